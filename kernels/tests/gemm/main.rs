//! Matrix products.

mod bits;
mod oracle;
mod refused;
mod support;
