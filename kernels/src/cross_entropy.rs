//! Classification losses over rows of logits.
//!
//! With label smoothing `s` over `C` classes a row's loss is `lse - (1 - s) * x[target] - s / C *
//! sum(x)`, where `lse = ln(sum(exp(x)))` (C. Szegedy et al., CVPR 2016); its gradient is
//! `softmax(x) - (1 - s) * [class is target] - s / C`. Rows whose target is `ignore` cost 0 and
//! get a gradient of 0.
//!
//! Where the vocabulary is large, logits may be computed and forgotten in chunks of classes: see
//! [`cross_entropy_chunk`], which keeps a running maximum and sum per row (M. Milakov,
//! N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867).

use crate::element::{Float, Real};
use crate::gemm::Isa;
use crate::lanes::{self, Arch, Job, exp, widen};
use crate::split::{self, Shared};
use rayon::prelude::*;

/// Values that are summed side by side; the order of a sum depends on the row's length alone.
const LANES: usize = 32;

/// The largest element and the sums of `exp(x - largest)` and of `x` over a row.
#[inline(always)]
fn row_sums<A: Arch, T: Float>(x: &[T], with_total: bool) -> (T::Acc, T::Acc, T::Acc) {
    let zero = T::Acc::ZERO;
    let mut best = [T::Acc::NEG_INFINITY; LANES];
    let mut total = [zero; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for l in 0..LANES {
            let x = widen(x[l]);
            best[l] = if x > best[l] { x } else { best[l] };
        }
    }
    for (l, x) in rest.iter().enumerate() {
        let x = widen(*x);
        best[l] = if x > best[l] { x } else { best[l] };
    }
    if with_total {
        for x in whole {
            for l in 0..LANES {
                total[l] += widen(x[l]);
            }
        }
        for (l, x) in rest.iter().enumerate() {
            total[l] += widen(*x);
        }
    }
    let max = best
        .into_iter()
        .fold(T::Acc::NEG_INFINITY, |a, b| if b > a { b } else { a });
    // A row of nothing but -infinity: any finite shift avoids infinity minus infinity.
    let shift = if max == T::Acc::NEG_INFINITY {
        zero
    } else {
        max
    };
    let mut sum = [zero; LANES];
    for x in whole {
        for l in 0..LANES {
            sum[l] += exp::<A, _>(widen(x[l]) - shift);
        }
    }
    for (l, x) in rest.iter().enumerate() {
        sum[l] += exp::<A, _>(widen(*x) - shift);
    }
    (max, tree(sum), tree(total))
}

/// Sum of the lanes by halving.
#[inline(always)]
fn tree<R: Real>(mut lanes: [R; LANES]) -> R {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            let other = lanes[l + half];
            lanes[l] += other;
        }
        half /= 2;
    }
    lanes[0]
}

/// Runs `work(rows)` for fixed ranges of rows, each in a job of its own.
fn over_rows(rows: usize, cols: usize, work: impl Fn(std::ops::Range<usize>) + Sync) {
    let step = split::rows_per_task(cols);
    if rows <= step {
        return work(0..rows);
    }
    (0..rows.div_ceil(step))
        .into_par_iter()
        .for_each(|n| work(n * step..rows.min((n + 1) * step)));
}

/// The loss of a row from its sums.
#[inline(always)]
fn loss<R: Real>(lse: R, target_logit: R, logit_sum: R, smoothing: f64, classes: usize) -> R {
    let loss = lse - R::from_f64(1.0 - smoothing) * target_logit;
    if smoothing == 0.0 {
        loss
    } else {
        loss - R::from_f64(smoothing / classes as f64) * logit_sum
    }
}

/// Losses of rows of logits, and what the backward pass needs of the rows.
///
/// logits: `[rows, classes]`; targets: `[rows]`, each `ignore` or in `0..classes`; losses:
/// `[rows]` in nats, 0 where ignored; lse: `[rows]`, ln of the sum of exponentials of every row.
pub fn cross_entropy<T: Float>(
    logits: &[T],
    targets: &[i64],
    ignore: i64,
    smoothing: f64,
    losses: &mut [T::Acc],
    lse: &mut [T::Acc],
    classes: usize,
) {
    let isa = Isa::detect();
    cross_entropy_with(
        isa, logits, targets, ignore, smoothing, losses, lse, classes,
    );
}

/// [`cross_entropy`] on a given instruction set.
pub fn cross_entropy_with<T: Float>(
    isa: Isa,
    logits: &[T],
    targets: &[i64],
    ignore: i64,
    smoothing: f64,
    losses: &mut [T::Acc],
    lse: &mut [T::Acc],
    classes: usize,
) {
    let rows = targets.len();
    assert_eq!(
        logits.len(),
        rows * classes,
        "cross_entropy: logits are not [rows, classes]"
    );
    assert_eq!(losses.len(), rows, "cross_entropy: losses are not [rows]");
    assert_eq!(lse.len(), rows, "cross_entropy: lse is not [rows]");
    let (losses, lse) = (Shared::new(losses), Shared::new(lse));
    over_rows(rows, classes, |range| {
        // SAFETY: tasks have different rows.
        let (losses, lse) = unsafe {
            (
                losses.part(range.start, range.len()),
                lse.part(range.start, range.len()),
            )
        };
        let logits = &logits[range.start * classes..range.end * classes];
        let targets = &targets[range];
        lanes::call(
            isa,
            Forward {
                logits,
                targets,
                ignore,
                smoothing,
                losses,
                lse,
                classes,
            },
        );
    });
}

struct Forward<'a, T: Float> {
    logits: &'a [T],
    targets: &'a [i64],
    ignore: i64,
    smoothing: f64,
    losses: &'a mut [T::Acc],
    lse: &'a mut [T::Acc],
    classes: usize,
}

impl<T: Float> Job for Forward<'_, T> {
    #[inline(always)]
    fn run<A: Arch>(self) {
        for (row, &target) in self.targets.iter().enumerate() {
            let x = &self.logits[row * self.classes..(row + 1) * self.classes];
            let (max, sum, total) = row_sums::<A, T>(x, self.smoothing != 0.0);
            let lse = max + sum.ln();
            self.lse[row] = lse;
            self.losses[row] = if target == self.ignore {
                T::Acc::ZERO
            } else {
                loss(
                    lse,
                    x[target as usize].widen(),
                    total,
                    self.smoothing,
                    self.classes,
                )
            };
        }
    }
}

/// The gradient of [`cross_entropy`]'s losses, each times `scale` (the loss's gradient over the
/// number of targets that count).
///
/// logits, dlogits: `[rows, classes]`; lse: `[rows]` as the forward pass left it.
pub fn cross_entropy_backward<T: Float>(
    logits: &[T],
    targets: &[i64],
    ignore: i64,
    smoothing: f64,
    lse: &[T::Acc],
    scale: f64,
    dlogits: &mut [T],
    classes: usize,
) {
    assert_eq!(
        logits.len(),
        dlogits.len(),
        "cross_entropy_backward: logits and dlogits differ in length"
    );
    let sizes = Classes {
        first: 0,
        total: classes,
        chunk: classes,
    };
    backward(
        Isa::detect(),
        Some(logits),
        dlogits,
        targets,
        ignore,
        smoothing,
        lse,
        scale,
        sizes,
    );
}

/// Which classes a chunk holds.
#[derive(Clone, Copy)]
struct Classes {
    first: usize,
    total: usize,
    chunk: usize,
}

fn backward<T: Float>(
    isa: Isa,
    logits: Option<&[T]>,
    dlogits: &mut [T],
    targets: &[i64],
    ignore: i64,
    smoothing: f64,
    lse: &[T::Acc],
    scale: f64,
    classes: Classes,
) {
    let (rows, chunk) = (targets.len(), classes.chunk);
    assert_eq!(
        dlogits.len(),
        rows * chunk,
        "cross_entropy_backward: dlogits are not [rows, classes]"
    );
    assert_eq!(lse.len(), rows, "cross_entropy_backward: lse is not [rows]");
    let output = Shared::new(dlogits);
    over_rows(rows, chunk, |range| {
        // SAFETY: tasks have different rows.
        let dlogits = unsafe { output.part(range.start * chunk, range.len() * chunk) };
        let logits = logits.map(|x| &x[range.start * chunk..range.end * chunk]);
        let (targets, lse) = (&targets[range.clone()], &lse[range]);
        lanes::call(
            isa,
            Backward {
                logits,
                dlogits,
                targets,
                ignore,
                smoothing,
                lse,
                scale,
                classes,
            },
        );
    });
}

struct Backward<'a, T: Float> {
    /// None: they are in `dlogits`.
    logits: Option<&'a [T]>,
    dlogits: &'a mut [T],
    targets: &'a [i64],
    ignore: i64,
    smoothing: f64,
    lse: &'a [T::Acc],
    scale: f64,
    classes: Classes,
}

impl<T: Float> Job for Backward<'_, T> {
    #[inline(always)]
    fn run<A: Arch>(self) {
        let Classes {
            first,
            total,
            chunk,
        } = self.classes;
        let real = T::Acc::from_f64;
        let scale = real(self.scale);
        let smooth = real(self.smoothing / total as f64);
        let at_target = real(1.0 - self.smoothing);
        for (row, &target) in self.targets.iter().enumerate() {
            let dx = &mut self.dlogits[row * chunk..(row + 1) * chunk];
            if target == self.ignore {
                dx.fill(T::default());
                continue;
            }
            let lse = self.lse[row];
            let here = (target as usize).checked_sub(first).filter(|&t| t < chunk);
            let gradient = |x: T| (exp::<A, _>(widen(x) - lse) - smooth) * scale;
            // The target's element is rounded once, not after having been rounded to T.
            let target_gradient = |x: T| T::narrow(gradient(x) - at_target * scale);
            match self.logits {
                Some(logits) => {
                    let x = &logits[row * chunk..(row + 1) * chunk];
                    for (dx, &x) in dx.iter_mut().zip(x) {
                        *dx = T::narrow(gradient(x));
                    }
                    if let Some(t) = here {
                        dx[t] = target_gradient(x[t]);
                    }
                }
                None => {
                    let kept = here.map(|t| (t, target_gradient(dx[t])));
                    for dx in dx.iter_mut() {
                        *dx = T::narrow(gradient(*dx));
                    }
                    if let Some((t, value)) = kept {
                        dx[t] = value;
                    }
                }
            }
        }
    }
}

/// Takes the next chunk of classes into the running state of every row.
///
/// logits: `[rows, chunk]`, classes `first_class..first_class + chunk`; targets, max, sum,
/// target_logit, logit_sum: `[rows]`. The chunk with `first_class` 0 comes first and starts the
/// state, whatever it holds; after the last one, [`cross_entropy_chunk_finish`].
pub fn cross_entropy_chunk<T: Float>(
    logits: &[T],
    first_class: usize,
    targets: &[i64],
    max: &mut [T::Acc],
    sum: &mut [T::Acc],
    target_logit: &mut [T::Acc],
    logit_sum: &mut [T::Acc],
    chunk: usize,
) {
    let rows = targets.len();
    assert_eq!(
        logits.len(),
        rows * chunk,
        "cross_entropy_chunk: logits are not [rows, chunk]"
    );
    for (name, len) in [
        ("max", max.len()),
        ("sum", sum.len()),
        ("target_logit", target_logit.len()),
        ("logit_sum", logit_sum.len()),
    ] {
        assert_eq!(len, rows, "cross_entropy_chunk: {name} is not [rows]");
    }
    let isa = Isa::detect();
    let state = [
        Shared::new(max),
        Shared::new(sum),
        Shared::new(target_logit),
        Shared::new(logit_sum),
    ];
    over_rows(rows, chunk, |range| {
        // SAFETY: tasks have different rows.
        let state = state
            .each_ref()
            .map(|part| unsafe { part.part(range.start, range.len()) });
        let logits = &logits[range.start * chunk..range.end * chunk];
        let targets = &targets[range];
        lanes::call(
            isa,
            Chunk {
                logits,
                first: first_class,
                targets,
                state,
                chunk,
            },
        );
    });
}

struct Chunk<'a, T: Float> {
    logits: &'a [T],
    first: usize,
    targets: &'a [i64],
    state: [&'a mut [T::Acc]; 4],
    chunk: usize,
}

impl<T: Float> Job for Chunk<'_, T> {
    #[inline(always)]
    fn run<A: Arch>(self) {
        let [max, sum, target_logit, logit_sum] = self.state;
        if self.first == 0 {
            max.fill(T::Acc::NEG_INFINITY);
            for zeros in [&mut *sum, target_logit, logit_sum] {
                zeros.fill(T::Acc::ZERO);
            }
        }
        for (row, &target) in self.targets.iter().enumerate() {
            let x = &self.logits[row * self.chunk..(row + 1) * self.chunk];
            let (largest, exponentials, total) = row_sums::<A, T>(x, true);
            let old = max[row];
            let new = if largest > old { largest } else { old };
            // Both sums are 0 where their maximum is -infinity; the shift keeps NaN out.
            let shift = if new == T::Acc::NEG_INFINITY {
                T::Acc::ZERO
            } else {
                new
            };
            sum[row] =
                sum[row] * exp::<A, _>(old - shift) + exponentials * exp::<A, _>(largest - shift);
            max[row] = new;
            logit_sum[row] += total;
            if let Some(t) = (target as usize)
                .checked_sub(self.first)
                .filter(|&t| t < self.chunk)
            {
                target_logit[row] = x[t].widen();
            }
        }
    }
}

/// Losses and `lse`, as [`cross_entropy`] gives them, from the state that [`cross_entropy_chunk`]
/// left after the last chunk. All slices: `[rows]`.
pub fn cross_entropy_chunk_finish<R: Real>(
    max: &[R],
    sum: &[R],
    target_logit: &[R],
    logit_sum: &[R],
    targets: &[i64],
    ignore: i64,
    smoothing: f64,
    losses: &mut [R],
    lse: &mut [R],
    classes_total: usize,
) {
    let rows = targets.len();
    for (name, len) in [
        ("max", max.len()),
        ("sum", sum.len()),
        ("target_logit", target_logit.len()),
        ("logit_sum", logit_sum.len()),
        ("losses", losses.len()),
        ("lse", lse.len()),
    ] {
        assert_eq!(
            len, rows,
            "cross_entropy_chunk_finish: {name} is not [rows]"
        );
    }
    for row in 0..rows {
        lse[row] = max[row] + sum[row].ln();
        losses[row] = if targets[row] == ignore {
            R::ZERO
        } else {
            loss(
                lse[row],
                target_logit[row],
                logit_sum[row],
                smoothing,
                classes_total,
            )
        };
    }
}

/// The gradient for one chunk of classes; `logits` `[rows, chunk]` holds the chunk's logits
/// before and their gradients after. `lse`: `[rows]`, over all `classes_total` classes.
pub fn cross_entropy_chunk_backward<T: Float>(
    logits: &mut [T],
    first_class: usize,
    targets: &[i64],
    ignore: i64,
    smoothing: f64,
    lse: &[T::Acc],
    scale: f64,
    classes_total: usize,
    chunk: usize,
) {
    let classes = Classes {
        first: first_class,
        total: classes_total,
        chunk,
    };
    backward(
        Isa::detect(),
        None,
        logits,
        targets,
        ignore,
        smoothing,
        lse,
        scale,
        classes,
    );
}

/// Binary cross-entropy of logits: `max(x, 0) - x * t + ln(1 + e^-|x|)` for each element, which
/// does not overflow. Targets lie in `0..=1`. All slices have the same length.
pub fn bce_with_logits<T: Float>(x: &[T], targets: &[T], losses: &mut [T::Acc]) {
    assert_eq!(
        x.len(),
        targets.len(),
        "bce_with_logits: x and targets differ in length"
    );
    assert_eq!(
        x.len(),
        losses.len(),
        "bce_with_logits: x and losses differ in length"
    );
    split::chunks_mut(losses, split::GRAIN, |first, chunk| {
        for (i, loss) in chunk.iter_mut().enumerate() {
            let (x, t) = (
                x[first + i].widen().to_f64(),
                targets[first + i].widen().to_f64(),
            );
            *loss = T::Acc::from_f64(x.max(0.0) - x * t + (-x.abs()).exp().ln_1p());
        }
    });
}

/// The gradient of [`bce_with_logits`]: `(sigmoid(x) - t) * scale`.
pub fn bce_with_logits_backward<T: Float>(x: &[T], targets: &[T], scale: f64, dx: &mut [T]) {
    assert_eq!(
        x.len(),
        targets.len(),
        "bce_with_logits_backward: x and targets differ in length"
    );
    assert_eq!(
        x.len(),
        dx.len(),
        "bce_with_logits_backward: x and dx differ in length"
    );
    split::chunks_mut(dx, split::GRAIN, |first, chunk| {
        for (i, dx) in chunk.iter_mut().enumerate() {
            let (x, t) = (
                x[first + i].widen().to_f64(),
                targets[first + i].widen().to_f64(),
            );
            let small = (-x.abs()).exp();
            let sigmoid = if x < 0.0 { small } else { 1.0 } / (1.0 + small);
            *dx = T::narrow(T::Acc::from_f64((sigmoid - t) * scale));
        }
    });
}
