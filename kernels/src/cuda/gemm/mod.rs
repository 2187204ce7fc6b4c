//! Launchers of `gemm.cu` and `gemm_hopper.cu`: matrix products with everything that [`crate::gemm`] does on their way
//! into C.
//!
//! f32 operands that are to be multiplied in bf16, and those of tensor cores whose rows do not begin on 16-byte
//! boundaries, are first copied to the workspace. So are matrices that are contiguous along neither
//! dimension.

mod hopper;
mod library;
mod plan;

pub(super) use library::Library;
pub use plan::{Kernels, Layout, Products};

use self::plan::{FEW, Operand, Path, Plan, TILE};
use super::launch::args;
use super::{Gpu, Launch, Result, Scalar, Slice, SliceMut, Target};
use crate::activation::Activation;

/// What happens to a sum on its way into C: see [`crate::gemm::Epilogue`].
#[derive(Debug, Default)]
pub struct Epilogue<'a> {
    /// `[n]` in f32, added to every row
    pub bias: Option<Slice<'a>>,
    /// Applied last
    pub activation: Option<Activation>,
    /// `[m, n]` in C's type: if given, receives what the activation is applied to
    pub pre_activation: Option<SliceMut<'a>>,
    /// `[m, n]` in C's type: if given, the activation is not applied; C is multiplied, as it is
    /// stored, with the activation's slope there
    pub slope_of: Option<Slice<'a>>,
    /// `[m]` in f32: if given, the elements of C, which is bf16 otherwise, are f16, less this number
    /// of their row. For one product without an activation that is not accumulated.
    pub relative_to: Option<Slice<'a>>,
}

/// Dynamic shared memory of the kernels on tensor cores, in bytes: four stages of 64 bytes of each side.
const STAGES: usize = 4 * 2 * TILE * 64;
/// The same of those for few rows or columns.
const FEW_STAGES: usize = 4 * (TILE + FEW) * 32 * 2;

/// `C = A·B`, or `C += A·B` if `accumulate`, then the epilogue, for each product of the batch.
///
/// a, b: from the first element of the first matrix on. c: matrix i is the `[m, n]` at `i·c_stride`.
/// workspace: at least [`Products::workspace`] bytes, of any type. Results begin on 16-byte
/// boundaries.
///
/// # Errors
/// Element types other than f32 and bf16, a failed launch.
///
/// # Panics
/// If sizes or types do not fit each other, or an epilogue is asked for a batch.
pub fn gemm(
    gpu: &Gpu,
    products: &Products,
    a: Slice<'_>,
    b: Slice<'_>,
    c: SliceMut<'_>,
    accumulate: bool,
    epilogue: Epilogue<'_>,
    workspace: SliceMut<'_>,
) -> Result<()> {
    run(
        gpu,
        products,
        [a, b],
        None,
        c,
        accumulate,
        epilogue,
        workspace,
    )
}

/// `C = A·B + A₂·B₂`, or that added to C, then the epilogue: a product of one pair of factors with that of another beside
/// it, of any depth. `second` has the layouts of that; both are no batches. Where kernels can, the second pair is read as
/// more of the depth of the first; elsewhere its product is written before, and rounded to C's type.
///
/// workspace: at least [`pair_workspace`].
///
/// # Errors
/// As [`gemm`].
///
/// # Panics
/// As [`gemm`]; if C has other sizes or types for the two.
pub fn gemm_pair(
    gpu: &Gpu,
    [first, second]: [&Products; 2],
    a: [Slice<'_>; 2],
    b: [Slice<'_>; 2],
    mut c: SliceMut<'_>,
    accumulate: bool,
    epilogue: Epilogue<'_>,
    mut workspace: SliceMut<'_>,
) -> Result<()> {
    let sizes = |p: &Products| (p.a.rows, p.b.cols, p.c, p.batch.count);
    assert_eq!(sizes(first), sizes(second), "gemm: a pair of products");
    let target = gpu.limits().target;
    let (plan, other) = (first.plan(target)?, second.plan(target)?);
    let factors = [a[0], b[0]];
    if plan.takes_beside(&other) {
        check_factors(second, [a[1], b[1]]);
        let beside = Second {
            addresses: [a[1].address(), b[1].address()],
            plan: other,
        };
        let beside = Some(&beside);
        return run(
            gpu, first, factors, beside, c, accumulate, epilogue, workspace,
        );
    }
    let (to, room) = (c.reborrow(), workspace.reborrow());
    gemm(
        gpu,
        second,
        a[1],
        b[1],
        to,
        accumulate,
        Epilogue::default(),
        room,
    )?;
    run(gpu, first, factors, None, c, true, epilogue, workspace)
}

/// Bytes of workspace that [`gemm_pair`] needs on devices that run kernels for `target`.
///
/// # Errors
/// Element types other than f32 and bf16.
pub fn pair_workspace([first, second]: [&Products; 2], target: Target) -> Result<usize> {
    Ok(first.workspace(target)?.max(second.workspace(target)?))
}

/// The second pair of factors of a product.
struct Second {
    plan: Plan,
    addresses: [u64; 2],
}

fn run(
    gpu: &Gpu,
    products: &Products,
    [a, b]: [Slice<'_>; 2],
    beside: Option<&Second>,
    c: SliceMut<'_>,
    accumulate: bool,
    epilogue: Epilogue<'_>,
    workspace: SliceMut<'_>,
) -> Result<()> {
    let plain = epilogue.bias.is_none()
        && epilogue.pre_activation.is_none()
        && epilogue.activation.is_none()
        && epilogue.relative_to.is_none();
    let kernels = match products.kernels {
        Kernels::CublasLt if !plain => Kernels::Auto,
        kernels => kernels,
    };
    let products = &Products {
        kernels: kernels.on(gpu.limits().capability),
        ..*products
    };
    let plan = products.plan(gpu.limits().target)?;
    check(products, &plan, a, b, &c, &epilogue, &workspace);
    let special = epilogue.relative_to.is_some();
    assert!(!special || !accumulate, "gemm: a sum of relative numbers");
    let batches = products.batch.count;
    if plan.m == 0 || plan.n == 0 || batches == 0 {
        return Ok(());
    }
    let room = workspace.address();
    let a = readable(gpu, &plan, &plan.a, a, room)?;
    let b = readable(gpu, &plan, &plan.b, b, room)?;
    let whole = Sums {
        c: c.address(),
        wide: c.scalar() == Scalar::F32,
        c_batch: products.batch.c_stride,
        accumulate,
        bias: epilogue.bias.map_or(0, |bias| bias.address()),
        pre: epilogue.pre_activation.map_or(0, |pre| pre.address()),
        slope_of: epilogue.slope_of.map_or(0, |x| x.address()),
        relative: epilogue.relative_to.map_or(0, |x| x.address()),
        activation: epilogue.activation.map_or(0, number),
    };
    if plan.path == Path::Library {
        let room = room + plan.parts as u64;
        return gpu
            .library()?
            .multiply(gpu, &plan, batches, a, b, &whole, room);
    }
    if plan.splits == 1 {
        return multiply(gpu, &plan, batches, [a, b], beside, &whole);
    }
    let parts = room + plan.parts as u64;
    let partial = Sums {
        c: parts,
        wide: true,
        c_batch: plan.splits * plan.m * plan.n,
        accumulate: false,
        bias: 0,
        pre: 0,
        slope_of: 0,
        relative: 0,
        activation: 0,
    };
    multiply(gpu, &plan, batches, [a, b], beside, &partial)?;
    let product = whole.product(&plan, batches, a, b);
    let launch = Launch::cover(batches * plan.m * plan.n.div_ceil(4), 256, 1);
    let args = args![&product[..], parts, batches];
    gpu.launch("gemm", "gemm_sum_splits", launch, args)
}

/// Which of four kernels, by the order of both operands.
fn order(plan: &Plan) -> usize {
    match (plan.a.along_depth, plan.b.along_depth) {
        (true, false) => 0,
        (true, true) => 1,
        (false, false) => 2,
        (false, true) => 3,
    }
}

/// Launches the products of a plan, whose operands are at `a` and `b`.
fn multiply(
    gpu: &Gpu,
    plan: &Plan,
    batches: usize,
    [a, b]: [u64; 2],
    beside: Option<&Second>,
    sums: &Sums,
) -> Result<()> {
    if plan.path == Path::Hopper {
        return hopper::launch(gpu, plan, batches, [a, b], beside, sums);
    }
    let order = order(plan);
    let name = match plan.scalar {
        _ if plan.path == Path::FewRows => [
            "gemm_bf16_few_rows_nn",
            "gemm_bf16_few_rows_nt",
            "gemm_bf16_few_rows_tn",
            "gemm_bf16_few_rows_tt",
        ][order],
        _ if plan.path == Path::FewColumns => [
            "gemm_bf16_few_columns_nn",
            "gemm_bf16_few_columns_nt",
            "gemm_bf16_few_columns_tn",
            "gemm_bf16_few_columns_tt",
        ][order],
        Scalar::Bf16 => [
            "gemm_bf16_nn",
            "gemm_bf16_nt",
            "gemm_bf16_tn",
            "gemm_bf16_tt",
        ][order],
        _ if plan.path == Path::TensorCores => [
            "gemm_split_nn",
            "gemm_split_nt",
            "gemm_split_tn",
            "gemm_split_tt",
        ][order],
        _ => ["gemm_f32_nn", "gemm_f32_nt", "gemm_f32_tn", "gemm_f32_tt"][order],
    };
    let blocks = plan.path.tiles(plan.m, plan.n) * plan.splits * batches;
    let launch = match plan.path {
        Path::Simple => Launch::linear(blocks, 256),
        Path::FewRows | Path::FewColumns => Launch::linear(blocks, 128).with_shared(FEW_STAGES),
        _ => Launch::linear(blocks, 128).with_shared(STAGES),
    };
    let product = sums.product(plan, batches, a, b);
    gpu.launch("gemm", name, launch, args![&product[..]])
}

/// Where the sums of a launch go, and what happens to them.
struct Sums {
    c: u64,
    wide: bool,
    c_batch: usize,
    accumulate: bool,
    bias: u64,
    pre: u64,
    slope_of: u64,
    relative: u64,
    activation: usize,
}

impl Sums {
    /// Whether rows of C are no multiples of 16 bytes apart, which the copy engine writes, or what it
    /// reads beside does not begin at one.
    fn direct(&self, plan: &Plan, batches: usize) -> bool {
        let whole = |count: usize| (count * self.scalar().size()).is_multiple_of(16);
        let lies = self.slope_of.is_multiple_of(16);
        !whole(plan.n) || !lies || (batches > 1 && plan.splits == 1 && !whole(self.c_batch))
    }

    /// Element type of C.
    fn scalar(&self) -> Scalar {
        match self.wide {
            true => Scalar::F32,
            false => Scalar::Bf16,
        }
    }

    /// `Product` as `product.cuh` has it.
    fn product(&self, plan: &Plan, batches: usize, a: u64, b: u64) -> [u8; 168] {
        let words: [u64; 21] = [
            a,
            b,
            self.c,
            self.pre,
            self.bias,
            self.slope_of,
            self.relative,
            plan.m as u64,
            plan.n as u64,
            plan.k as u64,
            plan.a.step as u64,
            plan.b.step as u64,
            plan.a.batch as u64,
            plan.b.batch as u64,
            self.c_batch as u64,
            plan.splits as u64,
            plan.depth as u64,
            self.activation as u64,
            u64::from(self.accumulate),
            u64::from(self.wide),
            u64::from(self.direct(plan, batches)),
        ];
        bytemuck::cast(words)
    }
}

/// The number of an activation in `product.cuh`.
fn number(activation: Activation) -> usize {
    match activation {
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
        Activation::Tanh => 4,
        Activation::Silu => 5,
    }
}

/// Where a kernel finds an operand: where it is, or a copy of it in the workspace at address `room`.
fn readable(gpu: &Gpu, plan: &Plan, operand: &Operand, x: Slice<'_>, room: u64) -> Result<u64> {
    let Some(packed) = operand.packed else {
        return Ok(x.address());
    };
    let name = match (x.scalar(), plan.scalar) {
        (Scalar::F32, Scalar::F32) => "gemm_pack_f32_f32",
        (Scalar::F32, _) => "gemm_pack_f32_bf16",
        (_, Scalar::F32) => "gemm_pack_bf16_f32",
        _ => "gemm_pack_bf16_bf16",
    };
    let to = room + packed.at as u64;
    let args = args![
        x,
        to,
        packed.batches,
        packed.rows,
        packed.cols,
        packed.batch_stride,
        packed.row_stride,
        packed.col_stride,
        operand.step,
    ];
    let launch = Launch::cover(packed.batches * packed.rows * operand.step, 256, 8);
    gpu.launch("gemm", name, launch, args)?;
    Ok(to)
}

/// Elements from the first to the last of a layout, and of the last of `count` that are `stride`
/// apart.
fn extent(x: &Layout, count: usize, stride: usize) -> usize {
    if x.rows == 0 || x.cols == 0 || count == 0 {
        return 0;
    }
    (count - 1) * stride + (x.rows - 1) * x.row_stride + (x.cols - 1) * x.col_stride + 1
}

/// Checks that factors are what their layouts say.
fn check_factors(products: &Products, [a, b]: [Slice<'_>; 2]) {
    let batch = &products.batch;
    for (name, x, layout, stride) in [
        ("a", a, &products.a, batch.a_stride),
        ("b", b, &products.b, batch.b_stride),
    ] {
        assert_eq!(x.scalar(), layout.scalar, "gemm: type of {name}");
        let need = extent(layout, batch.count, stride);
        assert!(
            x.count() >= need,
            "gemm: {name} has {}, needs {need}",
            x.count()
        );
        assert!(
            !layout.aligned || x.address().is_multiple_of(16),
            "gemm: {name} does not lie where it was said to"
        );
    }
}

fn check(
    products: &Products,
    plan: &Plan,
    a: Slice<'_>,
    b: Slice<'_>,
    c: &SliceMut<'_>,
    epilogue: &Epilogue<'_>,
    workspace: &SliceMut<'_>,
) {
    check_factors(products, [a, b]);
    let batch = &products.batch;
    let size = plan.m * plan.n;
    assert_eq!(c.scalar(), products.c, "gemm: type of c");
    assert!(
        batch.count <= 1 || batch.c_stride >= size,
        "gemm: matrices of C overlap"
    );
    let need = batch.count.saturating_sub(1) * batch.c_stride + size;
    assert!(c.count() >= need, "gemm: c has {}, needs {need}", c.count());
    if let Some(bias) = &epilogue.bias {
        let found = (bias.scalar(), bias.count());
        assert_eq!(found, (Scalar::F32, plan.n), "gemm: the bias");
    }
    if let Some(pre) = &epilogue.pre_activation {
        let found = (pre.scalar(), pre.count());
        assert_eq!(found, (products.c, size), "gemm: the pre-activation");
    }
    if let Some(of) = &epilogue.slope_of {
        let found = (of.scalar(), of.count());
        assert_eq!(found, (products.c, size), "gemm: what the slope is of");
        let other = epilogue.activation.is_some() && epilogue.pre_activation.is_none();
        assert!(other, "gemm: a slope is that of an activation");
    }
    if let Some(less) = &epilogue.relative_to {
        let found = (less.scalar(), less.count(), products.c);
        let expected = (Scalar::F32, plan.m, Scalar::Bf16);
        assert_eq!(found, expected, "gemm: what C is relative to");
        let other = epilogue.activation.is_none() && epilogue.pre_activation.is_none();
        assert!(other, "gemm: relative numbers go through no activation");
    }
    let single = epilogue.pre_activation.is_none()
        && epilogue.slope_of.is_none()
        && epilogue.relative_to.is_none();
    assert!(
        batch.count <= 1 || single,
        "gemm: a batch has no such epilogue"
    );
    let outputs = [
        Some(c.address()),
        epilogue.pre_activation.as_ref().map(SliceMut::address),
    ];
    let free = outputs.iter().flatten().all(|to| to.is_multiple_of(16));
    assert!(free, "gemm: results begin on 16-byte boundaries");
    let have = workspace.as_slice().bytes();
    let need = plan.workspace;
    assert!(
        have >= need,
        "gemm: workspace of {have} bytes, {need} needed"
    );
    let free = workspace.address().is_multiple_of(16);
    assert!(free || need == 0, "gemm: the workspace is not aligned");
}
