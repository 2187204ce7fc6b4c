//! Files of models: read, written, and refused.

mod config;
mod decoder_config;
mod safetensors_hostile;
mod safetensors_oracle;
mod shards;
mod source;
mod tokenizer;
