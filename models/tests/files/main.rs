//! Files of models: read, written, and refused.

mod config;
mod decoder_config;
mod delta;
mod llmc;
mod safetensors_hostile;
mod safetensors_oracle;
mod shards;
mod source;
mod tokenizer;
mod torch;
mod torch_archives;
mod torch_files;
mod torch_hostile;
