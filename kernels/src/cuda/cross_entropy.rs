//! Launchers of `cross_entropy.cu`.

use super::launch::args;
use super::{Error, Gpu, Launch, Result, Scalar, Slice, SliceMut};

/// Threads of a block, as in the source: of one that has a row, of others.
const WIDE: u32 = 1024;
const THREADS: u32 = 256;
/// Bytes of shared memory that a block of [`relative_cross_entropy`] has beside a row, at most.
const SUMS: usize = 2048;
/// Rows of more classes have a block each, others a warp.
const NARROW: usize = 1024;

/// What all rows of a loss share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// Classes of a row, at most 2^31 - 1
    pub classes: usize,
    /// Elements from one row of logits to the next: `classes`, or more, whose gradient is 0
    pub step: usize,
    /// The target of rows that cost nothing
    pub ignore: i64,
    /// Label smoothing, in `0..1`
    pub smoothing: f64,
    /// Logits are `cap * tanh(x / cap)`, of the x that is given; their gradient is that of x
    pub cap: Option<f64>,
}

impl Loss {
    /// The bytes of the source's `Loss`.
    fn bytes(&self) -> [u8; 32] {
        let step = i32::try_from(self.step).expect("cross_entropy: at most 2^31 - 1 classes");
        assert!(self.step >= self.classes, "cross_entropy: rows overlap");
        let words = [
            (1.0 - self.smoothing) as f32,
            (self.smoothing / self.classes as f64) as f32,
            self.cap.map_or(0.0, |cap| cap as f32),
            f32::from_bits(self.classes as u32),
            f32::from_bits(step as u32),
            0.0, // to the struct's end
        ];
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&self.ignore.to_ne_bytes());
        bytes[8..].copy_from_slice(bytemuck::cast_slice(&words));
        bytes
    }

    /// The launch for `rows` rows, and which of the kernels it is for: `[wide, narrow, capped]`, of
    /// which only the narrow one has a warp for a row.
    fn launch(&self, rows: usize, names: [&'static str; 3]) -> (Launch, &'static str) {
        let [wide, narrow, capped] = names;
        if self.cap.is_some() {
            (Launch::linear(rows, WIDE), capped)
        } else if self.classes > NARROW {
            (Launch::linear(rows, WIDE), wide)
        } else {
            let blocks = rows.div_ceil(THREADS as usize / 32);
            (Launch::linear(blocks, THREADS), narrow)
        }
    }

    fn check(&self, logits: usize, targets: Slice<'_>) {
        let count = targets.count() * self.step;
        assert_eq!(logits, count, "cross_entropy: logits are not [rows, step]");
        assert_eq!(targets.scalar(), Scalar::I64, "cross_entropy: targets");
    }
}

fn refused(found: Scalar) -> Error {
    Error::Scalar {
        kernel: "cross-entropy",
        found,
        expected: "f32 and bf16",
    }
}

/// Losses of rows of logits, and their log-sum-exps, in one pass. logits `[rows, step]`; targets
/// i64 `[rows]`, each `ignore` or a class; losses and lse: f32 `[rows]`, losses 0 where ignored.
///
/// # Errors
/// Logits that are neither f32 nor bf16.
///
/// # Panics
/// If lengths or types do not fit.
pub fn cross_entropy(
    gpu: &Gpu,
    p: &Loss,
    logits: Slice<'_>,
    targets: Slice<'_>,
    losses: SliceMut<'_>,
    lse: SliceMut<'_>,
) -> Result<()> {
    forward(gpu, p, logits, targets, losses, lse, None)
}

/// [`cross_entropy`], and the gradient of the losses' sum over the logits.
///
/// # Errors
/// As there.
///
/// # Panics
/// As there.
pub fn cross_entropy_with_gradient(
    gpu: &Gpu,
    p: &Loss,
    logits: SliceMut<'_>,
    targets: Slice<'_>,
    losses: SliceMut<'_>,
    lse: SliceMut<'_>,
) -> Result<()> {
    let to = Some(logits.address());
    forward(gpu, p, logits.as_slice(), targets, losses, lse, to)
}

fn forward(
    gpu: &Gpu,
    p: &Loss,
    logits: Slice<'_>,
    targets: Slice<'_>,
    losses: SliceMut<'_>,
    lse: SliceMut<'_>,
    dlogits: Option<u64>,
) -> Result<()> {
    p.check(logits.count(), targets);
    let rows = targets.count();
    for (what, x) in [("losses", &losses), ("lse", &lse)] {
        let found = (x.count(), x.scalar());
        assert_eq!(found, (rows, Scalar::F32), "cross_entropy: {what}");
    }
    let dlogits = dlogits.unwrap_or(0);
    let names = match logits.scalar() {
        Scalar::F32 => [
            "cross_entropy_f32_f32",
            "cross_entropy_f32_f32_narrow",
            "cross_entropy_f32_f32_capped",
        ],
        Scalar::Bf16 => [
            "cross_entropy_bf16_bf16",
            "cross_entropy_bf16_bf16_narrow",
            "cross_entropy_bf16_bf16_capped",
        ],
        found => return Err(refused(found)),
    };
    let (launch, name) = p.launch(rows, names);
    let numbers = p.bytes();
    let args = args![logits, targets, losses, lse, dlogits, rows, &numbers[..]];
    gpu.launch("cross_entropy", name, launch, args)
}

/// `dlogits` = the gradient of the losses' sum times `dy[0]`, from the `lse` that [`cross_entropy`]
/// gave; types and shapes as there, dlogits as logits, dy f32. There is none for logits with a cap:
/// [`cross_entropy_with_gradient`] gives theirs.
///
/// # Errors
/// Logits that are neither f32 nor bf16.
///
/// # Panics
/// If lengths or types do not fit.
pub fn cross_entropy_backward(
    gpu: &Gpu,
    p: &Loss,
    logits: Slice<'_>,
    targets: Slice<'_>,
    lse: Slice<'_>,
    dy: Slice<'_>,
    dlogits: SliceMut<'_>,
) -> Result<()> {
    p.check(logits.count(), targets);
    assert!(
        p.cap.is_none(),
        "cross_entropy_backward: of logits that are what they are"
    );
    let rows = targets.count();
    let found = (lse.count(), lse.scalar());
    assert_eq!(found, (rows, Scalar::F32), "cross_entropy_backward: lse");
    let found = (dy.count(), dy.scalar());
    assert_eq!(found, (1, Scalar::F32), "cross_entropy_backward: dy");
    let found = (dlogits.count(), dlogits.scalar());
    let expected = (logits.count(), logits.scalar());
    assert_eq!(found, expected, "cross_entropy_backward: dlogits");
    let names = match logits.scalar() {
        Scalar::F32 => [
            "cross_entropy_backward_f32",
            "cross_entropy_backward_f32_narrow",
            "cross_entropy_backward_f32",
        ],
        Scalar::Bf16 => [
            "cross_entropy_backward_bf16",
            "cross_entropy_backward_bf16_narrow",
            "cross_entropy_backward_bf16",
        ],
        found => return Err(refused(found)),
    };
    let (launch, name) = p.launch(rows, names);
    let numbers = p.bytes();
    let args = args![logits, targets, lse, dy, dlogits, rows, &numbers[..]];
    gpu.launch("cross_entropy", name, launch, args)
}

/// The logits that [`relative_cross_entropy`] takes others relative to: `relative[r] = x[r]·w[target] +
/// bias[target]` for targets that count, else 0. x `[rows, width]` and w `[classes, width]` in bf16,
/// bias f32, targets i64 `[rows]`, relative f32 `[rows]`.
///
/// # Errors
/// A failed launch.
///
/// # Panics
/// If lengths or types do not fit.
pub fn target_logits(
    gpu: &Gpu,
    p: &Loss,
    x: Slice<'_>,
    w: Slice<'_>,
    bias: Option<Slice<'_>>,
    targets: Slice<'_>,
    relative: SliceMut<'_>,
) -> Result<()> {
    let rows = targets.count();
    let width = x.count() / rows.max(1);
    let fits = x.count() == rows * width && w.count() >= p.classes * width;
    assert!(fits, "target_logits: x is not [rows, width]");
    let types = [x.scalar(), w.scalar(), targets.scalar(), relative.scalar()];
    let expected = [Scalar::Bf16, Scalar::Bf16, Scalar::I64, Scalar::F32];
    assert_eq!(types, expected, "target_logits: types");
    assert_eq!(relative.count(), rows, "target_logits: relative");
    let enough = |b: Slice<'_>| b.scalar() == Scalar::F32 && b.count() >= p.classes;
    assert!(bias.is_none_or(enough), "target_logits: the bias");
    let width = i32::try_from(width).expect("target_logits: rows of less than 2^31 elements");
    let launch = Launch::linear(rows.div_ceil(THREADS as usize / 32), THREADS);
    let args = args![x, w, bias, targets, relative, rows, width, p.ignore];
    gpu.launch("cross_entropy", "target_logits", launch, args)
}

/// Losses of rows of logits that are f16, less `relative` of their row (see
/// [`gemm::Epilogue::relative_to`](super::gemm::Epilogue::relative_to)), and with `gradient` the
/// gradient of their sum, which is bf16, in the logits' place. logits `[rows, step]`, said to be bf16;
/// targets i64, losses and relative f32, each `[rows]`.
///
/// # Errors
/// A failed launch.
///
/// # Panics
/// If lengths or types do not fit, or rows do not begin on 16-byte boundaries.
pub fn relative_cross_entropy(
    gpu: &Gpu,
    p: &Loss,
    logits: SliceMut<'_>,
    relative: Slice<'_>,
    targets: Slice<'_>,
    losses: SliceMut<'_>,
    gradient: bool,
) -> Result<()> {
    p.check(logits.count(), targets);
    let rows = targets.count();
    let found = [logits.scalar(), relative.scalar(), losses.scalar()];
    let expected = [Scalar::Bf16, Scalar::F32, Scalar::F32];
    assert_eq!(found, expected, "relative_cross_entropy: types");
    let found = [relative.count(), losses.count()];
    assert_eq!(found, [rows; 2], "relative_cross_entropy: rows");
    let aligned = p.step.is_multiple_of(8) && logits.address().is_multiple_of(16);
    assert!(aligned, "relative_cross_entropy: rows are not aligned");
    let name = match p.cap {
        Some(_) => "relative_cross_entropy_capped",
        None => "relative_cross_entropy",
    };
    // Two blocks of a multiprocessor keep their rows.
    let bytes = p.step * 2;
    let kept = 2 * (bytes + SUMS) <= gpu.limits().shared;
    let launch = Launch::linear(rows, WIDE).with_shared(if kept { bytes } else { 0 });
    let numbers = p.bytes();
    let args = args![
        logits,
        relative,
        targets,
        losses,
        &numbers[..],
        !gradient,
        kept
    ];
    gpu.launch("cross_entropy", name, launch, args)
}

/// `y[i] = x[i] * factor[0]`; x and the factor f32, y f32 or bf16.
///
/// # Errors
/// Another type.
///
/// # Panics
/// If lengths do not fit.
pub fn times(gpu: &Gpu, x: Slice<'_>, factor: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    assert_eq!(x.count(), y.count(), "times: x and y differ in length");
    times_at(gpu, x.address(), x.scalar(), factor, y)
}

/// `y[i] *= factor[0]`, in f32.
///
/// # Errors
/// Another type.
pub fn times_in_place(gpu: &Gpu, factor: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    times_at(gpu, y.address(), y.scalar(), factor, y)
}

fn times_at(gpu: &Gpu, x: u64, of: Scalar, factor: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    let types = (factor.count(), factor.scalar());
    assert_eq!(types, (1, Scalar::F32), "times: the factor is one f32");
    let name = match (of, y.scalar()) {
        (Scalar::F32, Scalar::F32) => "times_f32_f32",
        (Scalar::F32, Scalar::Bf16) => "times_f32_bf16",
        (Scalar::F32, found) | (found, _) => return Err(refused(found)),
    };
    let count = y.count();
    let launch = Launch::cover(count, THREADS, 4);
    gpu.launch("cross_entropy", name, launch, args![x, factor, y, count])
}

/// Binary cross-entropy of logits, for each element: logits and targets of one type, losses f32.
///
/// # Errors
/// Logits that are neither f32 nor bf16.
///
/// # Panics
/// If lengths or types do not fit.
pub fn bce_with_logits(
    gpu: &Gpu,
    logits: Slice<'_>,
    targets: Slice<'_>,
    losses: SliceMut<'_>,
) -> Result<()> {
    let count = logits.count();
    let found = (targets.count(), targets.scalar());
    assert_eq!(found, (count, logits.scalar()), "bce_with_logits: targets");
    let found = (losses.count(), losses.scalar());
    assert_eq!(found, (count, Scalar::F32), "bce_with_logits: losses");
    let name = match logits.scalar() {
        Scalar::F32 => "bce_f32",
        Scalar::Bf16 => "bce_bf16",
        found => return Err(refused(found)),
    };
    let launch = Launch::cover(count, THREADS, 1);
    gpu.launch(
        "cross_entropy",
        name,
        launch,
        args![logits, targets, losses, count],
    )
}

/// The gradient of [`bce_with_logits`]: `dlogits = (sigmoid(logits) - targets) * dy[0]`; dlogits as logits, dy f32.
///
/// # Errors
/// Logits that are neither f32 nor bf16.
///
/// # Panics
/// If lengths or types do not fit.
pub fn bce_with_logits_backward(
    gpu: &Gpu,
    logits: Slice<'_>,
    targets: Slice<'_>,
    dy: Slice<'_>,
    dlogits: SliceMut<'_>,
) -> Result<()> {
    let count = logits.count();
    let found = (targets.count(), targets.scalar());
    let expected = (count, logits.scalar());
    assert_eq!(found, expected, "bce_with_logits_backward: targets");
    let found = (dlogits.count(), dlogits.scalar());
    assert_eq!(found, expected, "bce_with_logits_backward: dlogits");
    let found = (dy.count(), dy.scalar());
    assert_eq!(found, (1, Scalar::F32), "bce_with_logits_backward: dy");
    let name = match logits.scalar() {
        Scalar::F32 => "bce_backward_f32",
        Scalar::Bf16 => "bce_backward_bf16",
        found => return Err(refused(found)),
    };
    let launch = Launch::cover(count, THREADS, 1);
    let args = args![logits, targets, dy, dlogits, count];
    gpu.launch("cross_entropy", name, launch, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_struct_is_that_of_the_source() {
        // i64 ignore; float keep, smooth, cap; int classes, step
        let p = Loss {
            classes: 10,
            step: 16,
            ignore: -100,
            smoothing: 0.25,
            cap: Some(30.0),
        };
        let bytes = p.bytes();
        assert_eq!(bytes[..8], (-100i64).to_ne_bytes());
        for (at, value) in [(8, 0.75f32), (12, 0.025), (16, 30.0)] {
            assert_eq!(bytes[at..at + 4], value.to_ne_bytes());
        }
        assert_eq!(bytes[20..24], 10i32.to_ne_bytes());
        assert_eq!(bytes[24..28], 16i32.to_ne_bytes());
    }
}
