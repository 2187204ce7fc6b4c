//! Text to tokens and back, against the reference; conversations, against transformers.

mod chat;
mod decode;
mod families;
mod lines;
mod made;
