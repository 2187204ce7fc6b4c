//! Descriptions of tensors in device memory for Hopper's copy engine.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::driver::check;
use super::{Gpu, Result, Scalar};

/// What a kernel takes as `TensorMap`.
pub(super) type TensorMap = [u64; 16];

/// A tensor of `dims` elements, the innermost dimension first and contiguous; the others are
/// `strides` elements apart, which are multiples of 16 bytes. It is copied in boxes, whose innermost
/// dimension is 128 bytes: the width of the swizzle that they have in shared memory.
///
/// # Errors
/// What the driver objects to.
pub(super) fn tensor_map(
    gpu: &Gpu,
    address: u64,
    scalar: Scalar,
    dims: [usize; 3],
    strides: [usize; 2],
    box_dims: [usize; 3],
) -> Result<TensorMap> {
    use sys::CUtensorMapDataType_enum as Type;
    let data_type = match scalar {
        Scalar::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Scalar::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        other => unreachable!("no tensor map of {other}"),
    };
    let dims = dims.map(|d| d as u64);
    let strides = strides.map(|s| (s * scalar.size()) as u64);
    if let Some(simulation) = gpu.simulation() {
        let box_dims = box_dims.map(|d| d as u64);
        return simulation.tensor_map(address, scalar.size() as u64, dims, strides, box_dims);
    }
    let box_dims = box_dims.map(|d| d as u32);
    let every = [1; 3];
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: a valid pointer to write to, and arrays of as many elements as there are dimensions,
    // one less of strides. The address is not followed.
    check("cuTensorMapEncodeTiled", unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            data_type,
            3,
            address as *mut c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            box_dims.as_ptr(),
            every.as_ptr(),
            sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    })?;
    Ok(map.opaque)
}
