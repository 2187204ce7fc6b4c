//! Codes of weights: those of bitsandbytes to the bit, and products with them.

mod codes;
mod products;
