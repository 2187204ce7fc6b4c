//! Sizes that do not fit are refused.

use graft_kernels::gemm::{Batch, Epilogue, MatRef, Operands, gemm, gemm_batched};

/// a times b, into so many elements, with so much workspace.
fn multiply(a: MatRef<f32>, b: MatRef<f32>, epilogue: Epilogue<f32>, c: usize, workspace: usize) {
    let (mut c, mut workspace) = (vec![0.0; c], vec![0.0; workspace]);
    let as_stored = Operands::AsStored;
    gemm(as_stored, a, b, &mut c, false, epilogue, &mut workspace);
}

#[test]
#[should_panic(expected = "a is [2, 3] and b is [2, 2]: the inner sizes differ")]
fn inner_sizes_must_agree() {
    let (a, b) = ([0f32; 6], [0f32; 4]);
    let (a, b) = (MatRef::row_major(&a, 2, 3), MatRef::row_major(&b, 2, 2));
    multiply(a, b, Epilogue::default(), 4, 0);
}

#[test]
#[should_panic(expected = "b is [3, 2] with strides (2, 1) and needs 6 elements, its slice has 5")]
fn matrices_must_lie_in_their_slices() {
    let (a, b) = ([0f32; 6], [0f32; 5]);
    let (a, b) = (MatRef::row_major(&a, 2, 3), MatRef::row_major(&b, 3, 2));
    multiply(a, b, Epilogue::default(), 4, 0);
}

#[test]
#[should_panic(expected = "workspace of 0 elements")]
fn the_workspace_must_suffice() {
    let a = [0f32; 4];
    let a = MatRef::row_major(&a, 2, 2);
    multiply(a, a, Epilogue::default(), 4, 0);
}

#[test]
#[should_panic(expected = "bias has the wrong number of elements for n = 2")]
fn the_bias_must_fit() {
    let a = [0f32; 4];
    let a = MatRef::row_major(&a, 2, 2);
    let epilogue = Epilogue {
        bias: Some(&[1.0]),
        ..Epilogue::default()
    };
    multiply(a, a, epilogue, 4, 4096);
}

#[test]
#[should_panic(expected = "c_stride of 3, matrices of 4 elements would overlap")]
fn batches_must_not_overlap() {
    let a = [0f32; 8];
    let batch = Batch {
        count: 2,
        a_stride: 4,
        b_stride: 4,
        c_stride: 3,
    };
    let first = MatRef::row_major(&a, 2, 2);
    gemm_batched(
        Operands::AsStored,
        batch,
        first,
        first,
        &mut [0f32; 8],
        false,
        &mut [0.0; 9000],
    );
}

#[test]
#[should_panic(expected = "f64 operands cannot be rounded to bf16")]
fn f64_is_not_rounded_to_bf16() {
    let a = [0f64; 4];
    let a = MatRef::row_major(&a, 2, 2);
    let mut c = [0f64; 4];
    gemm(
        Operands::Bf16,
        a,
        a,
        &mut c,
        false,
        Epilogue::default(),
        &mut [0.0; 4096],
    );
}
