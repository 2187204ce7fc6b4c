//! Text to tokens and back, against the reference; conversations, against transformers.

mod decode;
mod families;
mod lines;
