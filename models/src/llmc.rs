//! GPT-2 checkpoints of llm.c: a header of 256 numbers, then all parameters in one fixed order.
//!
//! The header (`int32`, little-endian) holds a magic number, the version, which tells the element type (3 is f32, 5
//! is bf16), and six sizes; the rest of it is zero. The parameters follow kind by kind, each kind for all layers:
//!
//! | kinds | shape | name here |
//! |---|---|---|
//! | wte, wpe | `[padded vocabulary, C]`, `[positions, C]` | `wte.weight`, `wpe.weight` |
//! | ln1w, ln1b | `[layers, C]` | `h.N.ln_1.weight`, `.bias` |
//! | qkvw, qkvb | `[layers, 3 C, C]`, `[layers, 3 C]` | `h.N.attn.c_attn` |
//! | attprojw, attprojb | `[layers, C, C]`, `[layers, C]` | `h.N.attn.c_proj` |
//! | ln2w, ln2b | `[layers, C]` | `h.N.ln_2` |
//! | fcw, fcb | `[layers, 4 C, C]`, `[layers, 4 C]` | `h.N.mlp.c_fc` |
//! | fcprojw, fcprojb | `[layers, C, 4 C]`, `[layers, C]` | `h.N.mlp.c_proj` |
//! | lnfw, lnfb | `[C]` | `ln_f` |
//!
//! Matrices are stored `[out, in]`; GPT-2's names stand for `[in, out]`, so they are read transposed. The rows that
//! pad the vocabulary are left out. Source: `gpt2_build_from_checkpoint` and `fill_in_parameter_sizes` of llm.c.

use std::io::{Read, Seek};
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::safetensors::reader::{Seekable, plain_file};
use crate::safetensors::{ByteSource, Checkpoint, FileDtype, TensorInfo};
use crate::strided::{StridedFile, StridedTensor, row_major};
use crate::torch::refusal::Refusal;

/// The first number of a checkpoint.
pub const MAGIC: i32 = 20240326;

/// Bytes of the header.
pub const HEADER_BYTES: u64 = 256 * 4;

/// Largest value of a size in the header: beyond every model, small enough that no product overflows.
const MAX_SIZE: u64 = 1 << 20;

/// Most layers: each costs twelve names.
const MAX_LAYERS: u64 = 4096;

/// The sizes in the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LlmcHeader {
    /// Element type of every parameter: f32 or bf16.
    pub dtype: FileDtype,
    /// Positions that the model has.
    pub max_seq_len: u64,
    /// Tokens in the vocabulary.
    pub vocab_size: u64,
    /// Layers.
    pub num_layers: u64,
    /// Attention heads of a layer.
    pub num_heads: u64,
    /// Width of the hidden states, C.
    pub channels: u64,
    /// Rows of the token embedding in the file, at least `vocab_size`.
    pub padded_vocab_size: u64,
}

/// Whether a file begins with llm.c's number.
pub(crate) fn is_llmc(start: &[u8]) -> bool {
    start.starts_with(&MAGIC.to_le_bytes())
}

/// Opens a checkpoint of llm.c: its header, and its parameters under GPT-2's names (`h.0.attn.c_attn.weight`, without
/// the `transformer.` of the class with a language-model head, whose matrix is tied to `wte.weight`).
///
/// # Errors
/// [`Error::Io`], [`Error::Weights`] if the header is none of these or the file is not as long as it says.
pub fn open(path: impl AsRef<Path>) -> Result<(LlmcHeader, Checkpoint)> {
    let path = path.as_ref();
    from_source(path.display().to_string(), plain_file(path)?)
}

/// [`open`] for any reader that can seek; `name` stands for it in messages.
///
/// # Errors
/// As there.
pub fn from_reader(
    name: impl Into<String>,
    reader: impl Read + Seek + Send + 'static,
) -> Result<(LlmcHeader, Checkpoint)> {
    let name = name.into();
    let source = Seekable::new(reader).map_err(|e| Error::io("read", &name, e))?;
    from_source(name, Box::new(source))
}

fn from_source(name: String, mut source: Box<dyn ByteSource>) -> Result<(LlmcHeader, Checkpoint)> {
    let file_len = source.byte_len();
    let mut bytes = Vec::new();
    let head: Range<u64> = 0..file_len.min(HEADER_BYTES);
    source
        .read_ranges(&[head], &mut |_, reader| {
            std::io::copy(reader, &mut bytes).map(drop)
        })
        .map_err(|e| Error::io("read the header of", &name, e))?;
    let header = LlmcHeader::parse(&bytes).map_err(|refusal| refusal.of(&name))?;
    let (tensors, expected) = header.lay_out();
    if file_len != expected {
        let reason =
            format!("the header's sizes need {expected} bytes in all, the file has {file_len}");
        return Err(Refusal::damaged(0, reason).of(&name));
    }
    Ok((
        header,
        Checkpoint::strided(StridedFile::new(name, tensors, source)),
    ))
}

impl LlmcHeader {
    fn parse(bytes: &[u8]) -> Result<LlmcHeader, Refusal> {
        if (bytes.len() as u64) < HEADER_BYTES {
            let reason = format!(
                "the header takes {HEADER_BYTES} bytes, the file has {}",
                bytes.len()
            );
            return Err(Refusal::truncated(0, reason));
        }
        let field = |i: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[4 * i..4 * i + 4]);
            i32::from_le_bytes(word)
        };
        let wrong = |i: usize, reason: String, help| Refusal {
            offset: 4 * i as u64,
            reason,
            help,
            truncated: false,
        };
        if field(0) != MAGIC {
            let reason = format!("the number {} where llm.c writes {MAGIC}", field(0));
            return Err(wrong(0, reason, "name a GPT-2 checkpoint of llm.c"));
        }
        let dtype = match field(1) {
            3 => FileDtype::F32,
            5 => FileDtype::Bf16,
            other => {
                let reason = format!("version {other}, expected 3 (f32) or 5 (bf16)");
                return Err(wrong(
                    1,
                    reason,
                    "write it again with the current train_gpt2.py of llm.c",
                ));
            }
        };
        let size = |i: usize, what: &str, limit: u64| match u64::try_from(field(i)) {
            Ok(size) if (1..=limit).contains(&size) => Ok(size),
            _ => {
                let reason = format!("{what} is {}, expected 1 to {limit}", field(i));
                Err(wrong(i, reason, "fetch the file again, it is damaged"))
            }
        };
        let header = LlmcHeader {
            dtype,
            max_seq_len: size(2, "max_seq_len", MAX_SIZE)?,
            vocab_size: size(3, "vocab_size", MAX_SIZE)?,
            num_layers: size(4, "num_layers", MAX_LAYERS)?,
            num_heads: size(5, "num_heads", MAX_SIZE)?,
            channels: size(6, "channels", MAX_SIZE)?,
            padded_vocab_size: size(7, "padded_vocab_size", MAX_SIZE)?,
        };
        if header.padded_vocab_size < header.vocab_size {
            let reason = format!(
                "padded_vocab_size is {}, less than the vocab_size {}",
                header.padded_vocab_size, header.vocab_size
            );
            return Err(wrong(7, reason, "fetch the file again, it is damaged"));
        }
        if !header.channels.is_multiple_of(header.num_heads) {
            let reason = format!(
                "{} channels are no multiple of {} heads",
                header.channels, header.num_heads
            );
            return Err(wrong(5, reason, "fetch the file again, it is damaged"));
        }
        Ok(header)
    }

    /// Every tensor, and the length of a file that holds them all.
    ///
    /// No product overflows: with [`MAX_SIZE`] and [`MAX_LAYERS`] the whole file stays below 2^60 bytes.
    fn lay_out(&self) -> (Vec<StridedTensor>, u64) {
        let c = self.channels;
        let mut layout = Layout {
            size: self.dtype.bits() / 8,
            dtype: self.dtype,
            position: HEADER_BYTES,
            tensors: Vec::new(),
        };
        layout.rows("wte.weight", self.vocab_size, self.padded_vocab_size, c);
        layout.rows("wpe.weight", self.max_seq_len, self.max_seq_len, c);
        // Name, outputs, inputs (0 for a vector).
        let kinds = [
            ("ln_1.weight", c, 0),
            ("ln_1.bias", c, 0),
            ("attn.c_attn.weight", 3 * c, c),
            ("attn.c_attn.bias", 3 * c, 0),
            ("attn.c_proj.weight", c, c),
            ("attn.c_proj.bias", c, 0),
            ("ln_2.weight", c, 0),
            ("ln_2.bias", c, 0),
            ("mlp.c_fc.weight", 4 * c, c),
            ("mlp.c_fc.bias", 4 * c, 0),
            ("mlp.c_proj.weight", c, 4 * c),
            ("mlp.c_proj.bias", c, 0),
        ];
        for (name, outputs, inputs) in kinds {
            for layer in 0..self.num_layers {
                layout.layer(format!("h.{layer}.{name}"), outputs, inputs);
            }
        }
        layout.layer("ln_f.weight".to_string(), c, 0);
        layout.layer("ln_f.bias".to_string(), c, 0);
        (layout.tensors, layout.position)
    }

    /// The `config.json` that the checkpoint implies: what llm.c's code fixes and its header states.
    pub fn config(&self) -> Map<String, Value> {
        let value = json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "n_ctx": self.max_seq_len,
            "n_embd": self.channels,
            "n_head": self.num_heads,
            "n_inner": null,
            "n_layer": self.num_layers,
            "n_positions": self.max_seq_len,
            "vocab_size": self.vocab_size,
            // llm.c trains with GPT-2's tokenizer, whose last token ends texts.
            "bos_token_id": self.vocab_size - 1,
            "eos_token_id": self.vocab_size - 1,
            "tie_word_embeddings": true,
            // llm.c has no dropout.
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "torch_dtype": match self.dtype {
                FileDtype::Bf16 => "bfloat16",
                _ => "float32",
            },
        });
        match value {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }
}

struct Layout {
    size: u64,
    dtype: FileDtype,
    position: u64,
    tensors: Vec<StridedTensor>,
}

impl Layout {
    /// A matrix of which only the first rows are wanted.
    fn rows(&mut self, name: &str, wanted: u64, stored: u64, columns: u64) {
        let shape = vec![wanted, columns];
        let strides = row_major(&shape);
        let range = self.position..self.position + wanted * columns * self.size;
        self.position += stored * columns * self.size;
        self.push(name.to_string(), shape, strides, range);
    }

    /// A vector, or a matrix stored `[outputs, inputs]` and read `[inputs, outputs]`.
    fn layer(&mut self, name: String, outputs: u64, inputs: u64) {
        let (shape, strides) = match inputs {
            0 => (vec![outputs], vec![1]),
            _ => (vec![inputs, outputs], vec![1, inputs]),
        };
        let range = self.position..self.position + outputs * inputs.max(1) * self.size;
        self.position = range.end;
        self.push(name, shape, strides, range);
    }

    fn push(&mut self, name: String, shape: Vec<u64>, strides: Vec<u64>, range: Range<u64>) {
        let info = TensorInfo {
            name,
            dtype: self.dtype,
            shape,
            range,
        };
        self.tensors.push(StridedTensor { info, strides });
    }
}
