//! Launchers of `quantised.cu`.

use super::launch::args;
use super::pointwise::{choose, spread};
use super::{Gpu, Result, Scalar, Slice, SliceMut};
use crate::quantised::{DYNAMIC, Format, NF4};

/// Elements that a thread writes at a time.
const EIGHT: usize = 8;

/// `y[i]` = the number that code i stands for: in f32 with the bits of
/// [`dequantise`](crate::quantised::dequantise), in bf16 that rounded to nearest. `codes`: the bytes of as many
/// elements as y has.
///
/// # Errors
/// Types other than f32 and bf16.
///
/// # Panics
/// If there is another number of bytes, or either does not begin on a 16-byte boundary.
pub fn dequantise(gpu: &Gpu, format: Format, codes: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    let count = y.count();
    assert_eq!(
        (codes.scalar(), codes.count()),
        (Scalar::U8, format.bytes(count)),
        "dequantise: {format:?} codes of {count} elements"
    );
    let aligned = |address: u64| count == 0 || address.is_multiple_of(16);
    assert!(
        aligned(codes.address()) && aligned(y.address()),
        "dequantise: codes and numbers begin on 16-byte boundaries"
    );
    let names = match format {
        Format::Nf4 => ["dequantise_nf4_f32", "dequantise_nf4_bf16"],
        Format::Int8 => ["dequantise_int8_f32", "dequantise_int8_bf16"],
    };
    let name = choose("dequantise", y.scalar(), names)?;
    let parts = format.parts(count);
    let coded = [codes.address(), parts.absmax as u64, parts.codes as u64];
    let coded: &[u8] = bytemuck::cast_slice(&coded);
    let mut tables = [0.0f32; 16 + 256];
    tables[..16].copy_from_slice(&NF4);
    tables[16..].copy_from_slice(&DYNAMIC);
    let tables: &[u8] = bytemuck::cast_slice(&tables);
    let args = args![coded, tables, y, count];
    gpu.launch("quantised", name, spread(gpu, count, EIGHT), args)
}
