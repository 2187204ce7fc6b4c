//! Words that have labels, entities above all.

mod parity;
mod runs;
