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
use crate::math::exp;
use crate::parallel::{self, rows};
use crate::simd::{Arch, Isa, kernel, public};
use crate::sums::{row_exp_sum, row_max, row_sum};

/// The largest element and the sums of `exp(x - largest)` and, if asked for, of `x` over a row.
#[inline(always)]
fn row_sums<A: Arch, T: Float>(x: &[T], with_total: bool) -> (T::Acc, T::Acc, T::Acc) {
    let max = row_max(x);
    // A row of nothing but -infinity: any finite shift avoids infinity minus infinity.
    let shift = if max == T::Acc::NEG_INFINITY {
        T::Acc::ZERO
    } else {
        max
    };
    let all = if with_total { row_sum(x) } else { T::Acc::ZERO };
    (max, row_exp_sum::<A, T>(x, shift), all)
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

public! {
    /// Losses of rows of logits, and what the backward pass needs of the rows.
    ///
    /// logits: `[rows, classes]`; targets: `[rows]`, each `ignore` or in `0..classes`; losses:
    /// `[rows]` in nats, 0 where ignored; lse: `[rows]`, ln of the sum of exponentials of every row.
    pub fn cross_entropy, cross_entropy_with[T: Float](
        isa: Isa,
        logits: &[T],
        targets: &[i64],
        ignore: i64,
        smoothing: f64,
        losses: &mut [T::Acc],
        lse: &mut [T::Acc],
        classes: usize,
    ) {
        let count = targets.len();
        assert_eq!(
            logits.len(),
            count * classes,
            "cross_entropy: logits are not [rows, classes]"
        );
        assert_eq!(losses.len(), count, "cross_entropy: losses are not [rows]");
        assert_eq!(lse.len(), count, "cross_entropy: lse is not [rows]");
        let slices = (rows(logits, classes), targets, losses, lse);
        parallel::for_each_row_block(
            count,
            classes,
            slices,
            |_, (logits, targets, losses, lse)| {
                forward(
                    isa, logits, targets, ignore, smoothing, losses, lse, classes,
                );
            },
        );
    }
}

kernel! {
    fn forward[A: Arch, T: Float](
        isa: Isa, logits: &[T], targets: &[i64], ignore: i64, smoothing: f64,
        losses: &mut [T::Acc], lses: &mut [T::Acc], classes: usize,
    ) {
        for (row, &target) in targets.iter().enumerate() {
            let x = &logits[row * classes..(row + 1) * classes];
            let (max, sum, total) = row_sums::<A, T>(x, smoothing != 0.0);
            let lse = max + sum.ln();
            lses[row] = lse;
            losses[row] = if target == ignore {
                T::Acc::ZERO
            } else {
                loss(lse, x[target as usize].widen(), total, smoothing, classes)
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

/// Which classes a chunk holds, and of how many in all.
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
    let (count, chunk) = (targets.len(), classes.chunk);
    assert_eq!(
        dlogits.len(),
        count * chunk,
        "cross_entropy_backward: dlogits are not [rows, classes]"
    );
    assert_eq!(
        lse.len(),
        count,
        "cross_entropy_backward: lse is not [rows]"
    );
    let slices = (
        logits.map(|x| rows(x, chunk)),
        rows(dlogits, chunk),
        targets,
        lse,
    );
    parallel::for_each_row_block(
        count,
        chunk,
        slices,
        |_, (logits, dlogits, targets, lse)| {
            gradient(
                isa, logits, dlogits, targets, ignore, smoothing, lse, scale, classes,
            );
        },
    );
}

kernel! {
    /// Where no logits are given, they are in `dlogits`.
    fn gradient[A: Arch, T: Float](
        isa: Isa, logits: Option<&[T]>, dlogits: &mut [T], targets: &[i64], ignore: i64,
        smoothing: f64, lse: &[T::Acc], scale: f64, classes: Classes,
    ) {
        let Classes { first, total, chunk } = classes;
        let real = T::Acc::from_f64;
        let smooth = real(smoothing / total as f64);
        let at_target = real((1.0 - smoothing) * scale);
        let scale = real(scale);
        for (row, &target) in targets.iter().enumerate() {
            let dx = &mut dlogits[row * chunk..(row + 1) * chunk];
            if target == ignore {
                dx.fill(T::default());
                continue;
            }
            let lse = lse[row];
            let here = (target as usize).checked_sub(first).filter(|&t| t < chunk);
            let x = logits.map(|logits| &logits[row * chunk..(row + 1) * chunk]);
            // The target's element is rounded once, not after having been rounded to T.
            let special = here.map(|t| {
                let x = x.map_or(dx[t], |x| x[t]).widen();
                (t, T::narrow((exp::<A, T::Acc>(x - lse) - smooth) * scale - at_target))
            });
            match x {
                Some(x) => {
                    for (dx, x) in dx.iter_mut().zip(x) {
                        let p = exp::<A, T::Acc>(x.widen() - lse);
                        *dx = T::narrow((p - smooth) * scale);
                    }
                }
                None => {
                    for dx in dx.iter_mut() {
                        let p = exp::<A, T::Acc>(dx.widen() - lse);
                        *dx = T::narrow((p - smooth) * scale);
                    }
                }
            }
            if let Some((t, value)) = special {
                dx[t] = value;
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
    let count = targets.len();
    assert_eq!(
        logits.len(),
        count * chunk,
        "cross_entropy_chunk: logits are not [rows, chunk]"
    );
    for (name, len) in [
        ("max", max.len()),
        ("sum", sum.len()),
        ("target_logit", target_logit.len()),
        ("logit_sum", logit_sum.len()),
    ] {
        assert_eq!(len, count, "cross_entropy_chunk: {name} is not [rows]");
    }
    let isa = Isa::detect();
    let slices = (
        rows(logits, chunk),
        targets,
        max,
        sum,
        target_logit,
        logit_sum,
    );
    parallel::for_each_row_block(
        count,
        chunk,
        slices,
        |_, (logits, targets, max, sum, target_logit, logit_sum)| {
            let state = [max, sum, target_logit, logit_sum];
            update(isa, logits, first_class, targets, state, chunk);
        },
    );
}

kernel! {
    fn update[A: Arch, T: Float](
        isa: Isa, logits: &[T], first: usize, targets: &[i64], state: [&mut [T::Acc]; 4],
        chunk: usize,
    ) {
        let [max, sum, target_logit, logit_sum] = state;
        if first == 0 {
            max.fill(T::Acc::NEG_INFINITY);
            sum.fill(T::Acc::ZERO);
            target_logit.fill(T::Acc::ZERO);
            logit_sum.fill(T::Acc::ZERO);
        }
        for (row, &target) in targets.iter().enumerate() {
            let x = &logits[row * chunk..(row + 1) * chunk];
            let (largest, exponentials, total) = row_sums::<A, T>(x, true);
            let old = max[row];
            let new = if largest > old { largest } else { old };
            // Both sums are 0 where their maximum is -infinity; the shift keeps NaN out.
            let shift = if new == T::Acc::NEG_INFINITY { T::Acc::ZERO } else { new };
            sum[row] = sum[row] * exp::<A, T::Acc>(old - shift)
                + exponentials * exp::<A, T::Acc>(largest - shift);
            max[row] = new;
            logit_sum[row] += total;
            if let Some(t) = (target as usize).checked_sub(first).filter(|&t| t < chunk) {
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
    parallel::for_each_chunk(x.len(), (x, targets, losses), |_, (x, targets, losses)| {
        for ((x, t), loss) in x.iter().zip(targets).zip(losses) {
            let (x, t) = (x.widen().to_f64(), t.widen().to_f64());
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
    parallel::for_each_chunk(x.len(), (x, targets, dx), |_, (x, targets, dx)| {
        for ((x, t), dx) in x.iter().zip(targets).zip(dx) {
            let (x, t) = (x.widen().to_f64(), t.widen().to_f64());
            let small = (-x.abs()).exp();
            let sigmoid = if x < 0.0 { small } else { 1.0 } / (1.0 + small);
            *dx = T::narrow(T::Acc::from_f64((sigmoid - t) * scale));
        }
    });
}
