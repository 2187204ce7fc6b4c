//! Launchers of `softcap.cu`.

use super::launch::args;
use super::pointwise::{by_type, check, group, spread};
use super::{Gpu, Result, Slice, SliceMut};

/// `x[i] = cap * tanh(x[i] / cap)`, in place.
///
/// # Errors
/// Types other than f32 and bf16.
pub fn softcap(gpu: &Gpu, cap: f64, x: SliceMut<'_>) -> Result<()> {
    let name = by_type!("softcap", x.scalar())?;
    let (count, each) = (x.count(), group(x.scalar()));
    let args = args![x, cap as f32, (1.0 / cap) as f32, count];
    gpu.launch("softcap", name, spread(gpu, count, each), args)
}

/// `dy[i] *= 1 - (y[i] / cap)²`, in place: from the gradient of [`softcap`]'s result `y` to that of
/// its argument.
///
/// # Errors
/// As [`softcap`].
///
/// # Panics
/// If lengths or types differ.
pub fn softcap_backward(gpu: &Gpu, cap: f64, y: Slice<'_>, dy: SliceMut<'_>) -> Result<()> {
    check!("softcap_backward", dy, y.count(), y.scalar());
    let name = by_type!("softcap_backward", y.scalar())?;
    let launch = spread(gpu, y.count(), group(y.scalar()));
    let args = args![y, dy, (1.0 / cap) as f32, y.count()];
    gpu.launch("softcap", name, launch, args)
}
