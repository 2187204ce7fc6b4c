//! Dense matrix products: `C = A·B` and `C += A·B`, for any strides of A and B, with bias and
//! activation applied while the result is still in the cache.
//!
//! Storage may be `f32`, `f64`, `bf16` or `f16`, and another for each of A, B and C, as long as they
//! share [`Float::Acc`]: products are summed in it and rounded once, when C is written. Only packing
//! reads how A and B are stored.
//!
//! Every element of C is summed over k in an order that depends on k alone. The number of threads
//! therefore never changes a bit, and neither does the number of other rows and columns.

mod ahead;
mod drive;
mod few;
mod pack;
mod plan;
mod right;
pub(crate) mod rounded;
mod strided;
mod task;
mod tile;

pub use crate::activation::Activation;
use crate::element::{Float, same};
pub use crate::simd::Isa;
use crate::simd::public;
use rayon::prelude::*;
use right::Right;
pub use strided::{CodesRef, MatRef, Strided};

/// Evaluates an expression with `$kernel` bound to the tiles of an instruction set, or to the
/// portable ones if the processor does not have it.
macro_rules! with_kernel {
    ($isa:expr, $operands:expr, $kernel:ident => $do:expr) => {
        match tile::choose($isa, $operands) {
            tile::Choice::Portable($kernel) => $do,
            #[cfg(target_arch = "aarch64")]
            tile::Choice::Neon($kernel) => $do,
            #[cfg(target_arch = "aarch64")]
            tile::Choice::NeonBf16($kernel) => $do,
            #[cfg(target_arch = "x86_64")]
            tile::Choice::Avx2($kernel) => $do,
            #[cfg(target_arch = "x86_64")]
            tile::Choice::Avx512($kernel) => $do,
            #[cfg(target_arch = "x86_64")]
            tile::Choice::Avx512Bf16($kernel) => $do,
        }
    };
}

/// What the elements of A and B are rounded to before they are multiplied.
///
/// Rounding happens while a block is packed, so no rounded copy of a matrix is ever made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operands {
    /// Nothing: they are multiplied as they are stored.
    AsStored,
    /// bf16, whatever they are stored in: `f32` weights beside `bf16` activations. For a computing
    /// type of `f32`.
    ///
    /// The product of two bf16 numbers is exact in `f32`, so instruction sets differ in the order
    /// and the rounding of sums alone, except that AVX512_BF16 and ARM's FEAT_BF16 take denormal numbers for zero.
    Bf16,
}

/// What happens to `x = a·b` (plus the old c, if accumulating) on its way into C:
/// `x += bias`; `x` rounded to storage; `pre_activation = x`; `c = activation(x)`. The default is
/// nothing.
#[derive(Debug)]
pub struct Epilogue<'a, T: Float> {
    /// `[n]`, added to every row.
    pub bias: Option<&'a [T::Acc]>,
    /// Applied last.
    pub activation: Option<Activation>,
    /// `[m, n]`: if given, receives what the activation is applied to.
    pub pre_activation: Option<&'a mut [T]>,
}

impl<T: Float> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Self {
            bias: None,
            activation: None,
            pre_activation: None,
        }
    }
}

/// Several products of the same sizes: matrix i of each operand begins i strides after matrix 0.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// Number of products.
    pub count: usize,
    /// Elements from one A to the next (0: all share one).
    pub a_stride: usize,
    /// Elements from one B to the next (0: all share one).
    pub b_stride: usize,
    /// Elements from one C to the next; at least m·n.
    pub c_stride: usize,
}

/// A batch is split over at most this many lanes, each with its own workspace.
const LANES: usize = 16;
/// Products of so many multiply-adds are split themselves rather than done side by side.
const LARGE: usize = 1 << 26;
/// Batches of fewer multiply-adds run on the calling thread.
const SMALL: usize = 1 << 17;

/// Workspace that [`gemm`] needs for `[m, k] · [k, n]` and a C of `T`, in elements of `T::Acc`:
/// packed blocks of A and B, a few MiB at most, and for a short T one block of wide sums.
pub fn gemm_workspace<T: Float>(operands: Operands, m: usize, n: usize, k: usize) -> usize {
    gemm_workspace_with::<T>(Isa::detect(), operands, m, n, k)
}

/// [`gemm_workspace`] of a given instruction set.
pub fn gemm_workspace_with<T: Float>(
    isa: Isa,
    operands: Operands,
    m: usize,
    n: usize,
    k: usize,
) -> usize {
    if m == 0 || n == 0 {
        return 0;
    }
    with_kernel!(isa, operands, kernel => workspace_of::<T, _>(kernel, m, n, k))
}

fn workspace_of<T: Float, K: tile::Kernel>(_: K, m: usize, n: usize, k: usize) -> usize {
    drive::workspace::<T, K>(m, n, k)
}

public! {
    /// `C = A·B`, or `C += A·B` if `accumulate`, then the epilogue.
    ///
    /// a: `[m, k]`, b: `[k, n]`, c: `[m, n]` contiguous, workspace: at least [`gemm_workspace`].
    /// If k is 0 the product is all zeros, and bias and activation still apply.
    ///
    /// # Panics
    /// If the sizes do not fit each other.
    pub fn gemm, gemm_with[
        A: Float, B: Float<Acc = <A as Float>::Acc>, C: Float<Acc = <A as Float>::Acc>
    ](
        isa: Isa,
        operands: Operands,
        a: MatRef<A>,
        b: MatRef<B>,
        c: &mut [C],
        accumulate: bool,
        epilogue: Epilogue<C>,
        workspace: &mut [C::Acc],
    ) {
        inside("b", &b);
        one(isa, operands, a, b, c, accumulate, epilogue, workspace);
    }
}

public! {
    /// [`gemm`] with codes for B, which become numbers where they are packed: the bits are those of a product with the
    /// numbers, and no other workspace is needed.
    ///
    /// # Panics
    /// If the sizes do not fit each other.
    pub fn gemm_codes, gemm_codes_with[A: Float<Acc = f32>, C: Float<Acc = f32>](
        isa: Isa,
        operands: Operands,
        a: MatRef<A>,
        b: CodesRef,
        c: &mut [C],
        accumulate: bool,
        epilogue: Epilogue<C>,
        workspace: &mut [f32],
    ) {
        assert!(
            b.span() <= b.data.count(),
            "gemm: b needs {} elements, there are codes of {}",
            b.span(),
            b.data.count()
        );
        let b = CodesRef { data: b.data.on(isa), ..b };
        one(isa, operands, a, b, c, accumulate, epilogue, workspace);
    }
}

/// One product, of a B that lies inside its slice.
fn one<A: Float, B: Right<Acc = A::Acc>, C: Float<Acc = A::Acc>>(
    isa: Isa,
    operands: Operands,
    a: MatRef<A>,
    b: B,
    c: &mut [C],
    accumulate: bool,
    epilogue: Epilogue<C>,
    workspace: &mut [C::Acc],
) {
    let (m, n, k) = check(operands, &a, &b);
    assert_eq!(
        c.len(),
        m * n,
        "gemm: c has the wrong number of elements for [{m}, {n}]"
    );
    if let Some(bias) = epilogue.bias {
        assert_eq!(
            bias.len(),
            n,
            "gemm: bias has the wrong number of elements for n = {n}"
        );
    }
    if let Some(pre) = &epilogue.pre_activation {
        assert_eq!(
            pre.len(),
            m * n,
            "gemm: pre_activation has the wrong number of elements for [{m}, {n}]"
        );
    }
    let need = gemm_workspace_with::<C>(isa, operands, m, n, k);
    assert!(
        workspace.len() >= need,
        "gemm: workspace of {} elements, {need} needed for m = {m}, n = {n}, k = {k}",
        workspace.len()
    );
    if m > 0 && n > 0 {
        with_kernel!(isa, operands, kernel =>
            drive::product(kernel, operands, a, b, c, accumulate, epilogue, workspace, true));
    }
}

/// Workspace that [`gemm_batched`] needs, in elements of `T::Acc`.
pub fn gemm_batched_workspace<T: Float>(
    operands: Operands,
    count: usize,
    m: usize,
    n: usize,
    k: usize,
) -> usize {
    gemm_workspace::<T>(operands, m, n, k) * count.min(LANES)
}

/// `C_i = A_i·B_i`, or `C_i += A_i·B_i`, for `batch.count` products of the same sizes.
///
/// a and b describe matrix 0, their `data` holds all of them. c: matrix i is the `[m, n]` at
/// `i·c_stride`; what lies between the matrices is left alone.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn gemm_batched<A: Float, B: Float<Acc = A::Acc>, C: Float<Acc = A::Acc>>(
    operands: Operands,
    batch: Batch,
    a: MatRef<A>,
    b: MatRef<B>,
    c: &mut [C],
    accumulate: bool,
    workspace: &mut [C::Acc],
) {
    let Batch {
        count,
        a_stride,
        b_stride,
        c_stride,
    } = batch;
    if count == 0 {
        return;
    }
    let (m, n, k) = check(operands, &a, &b);
    inside("b", &b);
    for (name, have, need) in [
        ("a", a.data.len(), (count - 1) * a_stride + a.span()),
        ("b", b.data.len(), (count - 1) * b_stride + b.span()),
        ("c", c.len(), (count - 1) * c_stride + m * n),
    ] {
        assert!(
            have >= need,
            "gemm_batched: {name} has {have} elements, a batch of {count} needs {need}"
        );
    }
    assert!(
        count == 1 || c_stride >= m * n,
        "gemm_batched: c_stride of {c_stride}, matrices of {} elements would overlap",
        m * n
    );
    let need = gemm_batched_workspace::<C>(operands, count, m, n, k);
    assert!(
        workspace.len() >= need,
        "gemm_batched: workspace of {} elements, {need} needed",
        workspace.len()
    );
    if m == 0 || n == 0 {
        return;
    }
    let isa = Isa::detect();
    let one = |i: usize, c: &mut [C], workspace: &mut [C::Acc], parallel: bool| {
        let a = MatRef {
            data: &a.data[i * a_stride..],
            ..a
        };
        let b = MatRef {
            data: &b.data[i * b_stride..],
            ..b
        };
        let (c, none) = (&mut c[..m * n], Epilogue::default());
        with_kernel!(isa, operands, kernel =>
            drive::product(kernel, operands, a, b, c, accumulate, none, workspace, parallel));
    };
    let lanes = count.min(LANES);
    let per_product = m * n * k.max(1);
    if lanes == 1 || per_product > LARGE || per_product * count < SMALL {
        for i in 0..count {
            one(
                i,
                &mut c[i * c_stride..],
                workspace,
                per_product > LARGE || lanes == 1,
            );
        }
        return;
    }
    let per_lane = count.div_ceil(lanes);
    c.par_chunks_mut(per_lane * c_stride)
        .zip(workspace.par_chunks_mut(need / lanes))
        .with_max_len(1)
        .enumerate()
        .for_each(|(lane, (c, workspace))| {
            for (i, c) in c.chunks_mut(c_stride).enumerate() {
                // A last chunk shorter than a matrix is what the caller has after the batch.
                if lane * per_lane + i < count {
                    one(lane * per_lane + i, c, workspace, false);
                }
            }
        });
}

/// Rows of a panel of [`pack_panels`].
pub(crate) fn panel_width<R: Float>(isa: Isa) -> usize {
    fn of<K: tile::Kernel>(_: K, size: usize) -> usize {
        K::shape(size).nr
    }
    with_kernel!(isa, Operands::AsStored, kernel => of(kernel, size_of::<R>()))
}

/// Rows of x in panels of `width` = [`panel_width`] rows, transposed: `dst[r / width, c, r % width] =
/// x[r, c]`, `[panels, x.cols, width]`, zeros after the last row. For kernels that have products of
/// their own.
///
/// Elements are widened; but for operands in bf16, on an instruction set that multiplies pairs of
/// them, a slot holds a pair, the lower half being the first: `[panels, x.cols / 2, width]`, rounded up.
pub(crate) fn pack_panels<T: Float>(
    isa: Isa,
    operands: Operands,
    x: MatRef<T>,
    dst: &mut [T::Acc],
) {
    fn on<T: Float, K: tile::Kernel>(kernel: K, x: MatRef<T>, dst: &mut [T::Acc]) {
        let width = K::shape(size_of::<T::Acc>()).nr;
        let slots = x.rows.div_ceil(width) * width * x.cols.div_ceil(K::STEP);
        assert!(
            x.data.len() >= x.span() && dst.len() >= slots,
            "pack_panels: a slice is too short"
        );
        kernel.call(pack::Pack {
            kernel,
            src: x.data.as_ptr(),
            stride: x.row_stride,
            k_stride: x.col_stride,
            len: x.rows,
            depth: x.cols,
            width,
            rounds: false,
            dst: dst.as_mut_ptr(),
        });
    }
    with_kernel!(isa, operands, kernel => on(kernel, x, dst));
}

/// (m, n, k), after checking that A and B fit each other and A lies inside its slice.
fn check<A: Float, B: Right<Acc = A::Acc>>(
    operands: Operands,
    a: &MatRef<A>,
    b: &B,
) -> (usize, usize, usize) {
    assert!(
        operands == Operands::AsStored || same::<A::Acc, f32>(),
        "gemm: f64 operands cannot be rounded to bf16"
    );
    let (k, n) = b.size();
    assert_eq!(
        a.cols, k,
        "gemm: a is [{}, {}] and b is [{k}, {n}]: the inner sizes differ",
        a.rows, a.cols
    );
    inside("a", a);
    (a.rows, n, k)
}

fn inside<T>(name: &str, x: &MatRef<T>) {
    assert!(
        x.data.len() >= x.span(),
        "gemm: {name} is [{}, {}] with strides ({}, {}) and needs {} elements, its slice has {}",
        x.rows,
        x.cols,
        x.row_stride,
        x.col_stride,
        x.span(),
        x.data.len()
    );
}
