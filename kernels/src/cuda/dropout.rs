//! Launchers of `dropout.cu`.

use super::launch::args;
use super::pointwise::{by_type, check, group, spread};
use super::{Gpu, Result, Slice, SliceMut};
use crate::dropout::kept_scale;
use crate::philox::{Key, keep_from};

fn launch(gpu: &Gpu, x: Slice<'_>, y: &SliceMut<'_>, p: f64, Key([key0, key1]): Key) -> Result<()> {
    let name = by_type!("dropout", x.scalar())?;
    let launch = spread(gpu, x.count(), group(x.scalar()));
    let scale = kept_scale(p) as f32;
    let args = args![x, y, x.count(), key0, key1, keep_from(p), scale];
    gpu.launch("dropout", name, launch, args)
}

/// `y[i] = x[i] / (1 - p)` where `philox::uniform(key, i) >= p`, else 0.
///
/// # Errors
/// Types other than f32 and bf16.
///
/// # Panics
/// If lengths or types differ.
pub fn dropout(gpu: &Gpu, x: Slice<'_>, y: SliceMut<'_>, p: f64, key: Key) -> Result<()> {
    check!("dropout", y, x.count(), x.scalar());
    launch(gpu, x, &y, p, key)
}

/// [`dropout`] over its input.
///
/// # Errors
/// As [`dropout`].
pub fn dropout_in_place(gpu: &Gpu, x: SliceMut<'_>, p: f64, key: Key) -> Result<()> {
    launch(gpu, x.as_slice(), &x, p, key)
}
