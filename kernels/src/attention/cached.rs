//! Attention of the last tokens of texts whose earlier keys and values were kept: what decoding does.
//!
//! A query reads each visible key and value once, and there is next to nothing to share between
//! queries: the tiles of the other passes would only cost their packing.

use super::rows::Source;
use super::{Attention, Packed};
use crate::element::{Float, Real};
use crate::math::{exp, tanh};
use crate::prefetch::prefetch;
use crate::shared::Shared;
use crate::simd::{Arch, kernel, public};
use crate::sums::{each_lane, fold, total};
use rayon::prelude::*;
use std::ops::Range;

/// At most so many tasks at a time, each with its piece of workspace.
const LANES: usize = 32;
/// Fewer multiply-adds than this stay on the calling thread.
const PARALLEL: usize = 1 << 16;
/// Partial sums of a product of query and key.
const SUMS: usize = 16;
/// Columns of values that are summed together.
const STRIPE: usize = 64;
/// How many rows of keys or values are asked for ahead of those that are being read.
const ROWS_AHEAD: usize = 16;

/// Where each sequence's keys and values lie: rows `starts[s] .. starts[s] + lengths[s]`.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a> {
    /// First row of each, `[sequences]`
    pub starts: &'a [i64],
    /// Rows of each, those of its queries included, `[sequences]`
    pub lengths: &'a [i64],
}

impl Kept<'_> {
    fn longest(&self) -> usize {
        self.lengths.iter().max().map_or(0, |&n| n as usize)
    }

    /// One past the last row.
    fn end(&self) -> usize {
        let ends = self.starts.iter().zip(self.lengths);
        ends.map(|(start, length)| (start + length) as usize)
            .max()
            .unwrap_or(0)
    }
}

/// Elements of a lane: the scores and the sums of a group of heads.
fn lane(p: &Attention, kept: Kept) -> usize {
    p.heads / p.kv_heads * (kept.longest() + p.head_dim)
}

/// A query of all heads that share a key head is a task.
fn lanes(p: &Attention, queries: usize) -> usize {
    (queries * p.kv_heads).clamp(1, LANES)
}

/// Workspace of [`attention_cached`] for so many queries, in elements of `T::Acc`.
pub fn attention_cached_workspace(p: &Attention, queries: usize, kept: Kept) -> usize {
    lanes(p, queries) * lane(p, kept)
}

public! {
    /// Causal attention of the last tokens of every sequence: its queries are those of its last
    /// keys.
    ///
    /// offsets: `[sequences + 1]`, of the queries, rising from 0; q: `[queries, heads, head_dim]`;
    /// k and v: `[rows, kv_heads, head_dim]`, each with its own row stride; out:
    /// `[queries, heads * head_dim]`; workspace: at least [`attention_cached_workspace`]. There is
    /// no dropout and no backward pass.
    ///
    /// # Panics
    /// If the sizes do not fit each other.
    pub fn attention_cached, attention_cached_with[T: Float](
        isa: Isa,
        p: &Attention,
        offsets: &[i64],
        kept: Kept,
        q: Packed<T>,
        k: Packed<T>,
        v: Packed<T>,
        out: &mut [T],
        workspace: &mut [T::Acc],
    ) {
        check(p, offsets, kept, [&q, &k, &v], out);
        let queries = offsets.last().map_or(0, |&last| last as usize);
        let need = attention_cached_workspace(p, queries, kept);
        assert!(
            workspace.len() >= need,
            "attention_cached: workspace of {} elements, {need} needed",
            workspace.len()
        );
        let group = p.heads / p.kv_heads;
        let width = group * p.head_dim;
        let (lanes, each) = (lanes(p, queries), lane(p, kept));
        if queries == 0 {
            return;
        }
        let shared = Shared::new(out);
        let work = |first: usize, workspace: &mut [T::Acc]| {
            let mut sequence = 0;
            for task in (first..queries * p.kv_heads).step_by(lanes) {
                let (token, head) = (task / p.kv_heads, task % p.kv_heads);
                while offsets[sequence + 1] as usize <= token {
                    sequence += 1;
                }
                let (start, len) = (kept.starts[sequence] as usize, kept.lengths[sequence] as usize);
                let behind = offsets[sequence + 1] as usize - token;
                // SAFETY: this token and these heads belong to this task alone.
                let out = unsafe { shared.part((token * p.kv_heads + head) * width, width) };
                let q = q.head(token, 1, head * group, p.head_dim);
                let k = k.head(start, len, head, p.head_dim);
                let v = v.head(start, len, head, p.head_dim);
                one_query(isa, p, len - behind, &q.data[..width], k, v, out, workspace);
            }
        };
        let workspace = &mut workspace[..need];
        if queries * p.heads * kept.longest() * p.head_dim < PARALLEL {
            for (first, workspace) in workspace.chunks_exact_mut(each).enumerate() {
                work(first, workspace);
            }
        } else {
            let lanes = workspace.par_chunks_exact_mut(each).with_max_len(1);
            lanes.enumerate().for_each(|(first, workspace)| work(first, workspace));
        }
    }
}

fn check<T>(p: &Attention, offsets: &[i64], kept: Kept, [q, k, v]: [&Packed<T>; 3], out: &[T]) {
    let who = "attention_cached";
    let queries = p.check(who, offsets, [("q", q, p.heads)]);
    assert!(
        p.causal && p.dropout == 0.0,
        "{who}: attention is causal and without dropout"
    );
    let counts = offsets.windows(2).map(|pair| pair[1] - pair[0]);
    let fits = kept.starts.len() == kept.lengths.len()
        && kept.lengths.len() + 1 == offsets.len().max(1)
        && kept.starts.iter().all(|&start| start >= 0)
        && counts.zip(kept.lengths).all(|(n, &len)| n <= len);
    assert!(fits, "{who}: keys and queries do not belong together");
    for (name, rows) in [("k", k), ("v", v)] {
        let need = match kept.end() {
            0 => 0,
            rows_needed => (rows_needed - 1) * rows.row_stride + p.kv_heads * p.head_dim,
        };
        assert!(
            rows.data.len() >= need,
            "{who}: {name} has {} elements, {need} needed",
            rows.data.len()
        );
    }
    assert_eq!(
        out.len(),
        queries * p.heads * p.head_dim,
        "{who}: out is not [queries, heads * head_dim]"
    );
}

kernel! {
    /// The query at key `i`, of all heads that share keys `k` and values `v`.
    fn one_query[A: Arch, T: Float](
        isa: Isa, p: &Attention, i: usize, q: &[T], k: Source<'_, T>, v: Source<'_, T>,
        out: &mut [T], workspace: &mut [T::Acc],
    ) {
        let dim = p.head_dim;
        let seen = p.visible(i, k.rows);
        if seen.is_empty() {
            out.fill(T::default());
            return;
        }
        let (k, v) = (k.rows(seen.start, seen.len()), v.rows(seen.start, seen.len()));
        let (query, rest) = workspace.split_at_mut(q.len());
        let scores = &mut rest[..q.len() / dim * k.rows];
        let factor = T::Acc::from_f64(p.factor());
        for (y, x) in query.iter_mut().zip(q) {
            *y = x.widen() * factor;
        }
        products::<A, T>(query, k, scores);
        ask(v, 0..ROWS_AHEAD);
        let heads = scores.chunks_exact_mut(k.rows).zip(out.chunks_exact_mut(dim));
        for (scores, out) in heads {
            if let Some(cap) = p.softcap {
                let cap = T::Acc::from_f64(cap);
                for x in &mut *scores {
                    *x = cap * tanh::<A, T::Acc>(*x);
                }
            }
            let by = T::Acc::ONE / exponentials::<A, T::Acc>(scores);
            weighted_sum::<A, T>(scores, by, v, out);
        }
    }
}

/// Asks for rows of keys or values that will be read soon: a head's part of a row is too short, and
/// the next one too far, for the processor to see them coming.
#[inline(always)]
fn ask<T>(rows: Source<'_, T>, range: Range<usize>) {
    for r in range.start..range.end.min(rows.rows) {
        prefetch(rows.row(r).as_ptr(), rows.dim);
    }
}

/// `scores[h, n]` = the product of query h and key n.
///
/// query: `[heads, dim]`, scores: `[heads, keys]`
#[inline(always)]
fn products<A: Arch, T: Float>(query: &[T::Acc], k: Source<'_, T>, scores: &mut [T::Acc]) {
    ask(k, 0..ROWS_AHEAD);
    for first in (0..k.rows).step_by(4) {
        ask(k, first + ROWS_AHEAD..first + ROWS_AHEAD + 4);
        // Behind the last key it is taken again, for nothing.
        let key = |r: usize| k.row((first + r).min(k.rows - 1));
        let keys = [key(0), key(1), key(2), key(3)];
        for (h, query) in query.chunks_exact(k.dim).enumerate() {
            let mut lanes = [[T::Acc::ZERO; SUMS]; 4];
            each_lane!(
                SUMS;
                [x = query, a = keys[0], b = keys[1], c = keys[2], d = keys[3]],
                |lane| {
                    lanes[0][lane] = A::fma(x, a.widen(), lanes[0][lane]);
                    lanes[1][lane] = A::fma(x, b.widen(), lanes[1][lane]);
                    lanes[2][lane] = A::fma(x, c.widen(), lanes[2][lane]);
                    lanes[3][lane] = A::fma(x, d.widen(), lanes[3][lane]);
                }
            );
            let scores = &mut scores[h * k.rows + first..(h + 1) * k.rows];
            for (score, lanes) in scores.iter_mut().zip(lanes) {
                *score = total(lanes);
            }
        }
    }
}

/// e to the power of what each score lies below the largest, and the sum of it.
#[inline(always)]
fn exponentials<A: Arch, R: Real>(scores: &mut [R]) -> R {
    let mut best = [R::NEG_INFINITY; SUMS];
    each_lane!(SUMS; [x = &*scores], |lane| {
        best[lane] = if x > best[lane] { x } else { best[lane] };
    });
    let largest = fold(best, |a, b| if a > b { a } else { b });
    let mut lanes = [R::ZERO; SUMS];
    let (whole, rest) = scores.as_chunks_mut::<SUMS>();
    for scores in whole {
        for lane in 0..SUMS {
            scores[lane] = exp::<A, R>(scores[lane] - largest);
            lanes[lane] += scores[lane];
        }
    }
    for (x, lane) in rest.iter_mut().zip(&mut lanes) {
        *x = exp::<A, R>(*x - largest);
        *lane += *x;
    }
    total(lanes)
}

/// `out = by * sum of weights[n] * v[n]`, in stripes whose sums stay in registers.
#[inline(always)]
fn weighted_sum<A: Arch, T: Float>(
    weights: &[T::Acc],
    by: T::Acc,
    v: Source<'_, T>,
    out: &mut [T],
) {
    let (whole, rest) = out.as_chunks_mut::<STRIPE>();
    for (stripe, out) in whole.iter_mut().enumerate() {
        let mut sums = [T::Acc::ZERO; STRIPE];
        for (n, &weight) in weights.iter().enumerate() {
            if stripe == 0 {
                ask(v, n + ROWS_AHEAD..n + ROWS_AHEAD + 1);
            }
            let value = v.row(n)[stripe * STRIPE..].first_chunk::<STRIPE>();
            let value = value.expect("a stripe lies inside the row");
            for c in 0..STRIPE {
                sums[c] = A::fma(weight, value[c].widen(), sums[c]);
            }
        }
        for c in 0..STRIPE {
            out[c] = T::narrow(sums[c] * by);
        }
    }
    let done = v.dim - rest.len();
    let mut sums = [T::Acc::ZERO; STRIPE];
    for (n, &weight) in weights.iter().enumerate() {
        for (sum, x) in sums.iter_mut().zip(&v.row(n)[done..]) {
            *sum = A::fma(weight, x.widen(), *sum);
        }
    }
    for (y, sum) in rest.iter_mut().zip(sums) {
        *y = T::narrow(sum * by);
    }
}
