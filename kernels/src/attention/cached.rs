//! Attention of the last tokens of texts whose earlier keys and values were kept: what decoding does.
//!
//! A query reads each visible key and value once, and there is next to nothing to share between
//! queries: the tiles of the other passes would only cost their packing.

use super::rows::Source;
use super::{Attention, Packed};
#[cfg(target_arch = "x86_64")]
use super::{floats, floats_mut};
use crate::element::{Float, Real, same};
use crate::math::{exp, tanh};
use crate::prefetch::prefetch;
use crate::shared::Shared;
use crate::simd::{Arch, Isa, kernel, public};
use crate::sums::{fold, total};
use rayon::prelude::*;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
mod avx512;

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
                one_query(isa, p, len - behind, &q.data[..width], [k, v], out, workspace);
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

/// The query at key `i`, of all heads that share keys `k` and values `v`.
fn one_query<T: Float>(
    isa: Isa,
    p: &Attention,
    i: usize,
    q: &[T],
    [k, v]: [Source<'_, T>; 2],
    out: &mut [T],
    workspace: &mut [T::Acc],
) {
    let seen = p.visible(i, k.rows);
    if seen.is_empty() {
        out.fill(T::default());
        return;
    }
    let [k, v] = [k, v].map(|rows| rows.rows(seen.start, seen.len()));
    let (query, scores) = workspace.split_at_mut(q.len());
    let scores = &mut scores[..q.len() / p.head_dim * k.rows];
    scale(isa, q, T::Acc::from_f64(p.factor()), query);
    products(isa, query, k, scores);
    ask(v, 0..ROWS_AHEAD);
    // The query's place takes sums.
    let sums = query.chunks_exact_mut(p.head_dim);
    let heads = sums.zip(out.chunks_exact_mut(p.head_dim));
    for (scores, (sums, out)) in scores.chunks_exact_mut(k.rows).zip(heads) {
        let total = exponentials(isa, scores, p.softcap);
        weighted_sum(isa, scores, v, sums);
        narrow(isa, sums, T::Acc::ONE / total, out);
    }
}

kernel! {
    /// `y = x * by`
    fn scale[A: Arch, T: Float](isa: Isa, x: &[T], by: T::Acc, y: &mut [T::Acc]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = x.widen() * by;
        }
    }
}

kernel! {
    /// `y = x * by`, rounded to storage.
    fn narrow[A: Arch, T: Float](isa: Isa, x: &[T::Acc], by: T::Acc, y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::narrow(*x * by);
        }
    }
}

/// Asks for rows of keys or values that will be read soon: a head's part of a row is too short, and
/// the next one too far, for the processor to see them coming.
#[inline(always)]
fn ask<T>(rows: Source<'_, T>, range: Range<usize>) {
    for r in range {
        let row = rows.data.as_ptr().wrapping_add(r * rows.stride);
        prefetch(row, rows.dim);
    }
}

/// `scores[h, n]` = the product of query h and key n.
///
/// query: `[heads, dim]`, scores: `[heads, keys]`
fn products<T: Float>(isa: Isa, query: &[T::Acc], k: Source<'_, T>, scores: &mut [T::Acc]) {
    #[cfg(target_arch = "x86_64")]
    if wide::<T>(isa) {
        // SAFETY: the processor has the instructions; sums are f32.
        unsafe { avx512::products(floats(query), k, floats_mut(scores)) };
        return;
    }
    any_products(isa, query, k, scores);
}

/// `out` = the sum of `weights[n] * v[n]`.
fn weighted_sum<T: Float>(isa: Isa, weights: &[T::Acc], v: Source<'_, T>, out: &mut [T::Acc]) {
    #[cfg(target_arch = "x86_64")]
    if wide::<T>(isa) {
        // SAFETY: as in `products`.
        unsafe { avx512::weighted_sum(floats(weights), v, floats_mut(out)) };
        return;
    }
    any_weighted_sum(isa, weights, v, out);
}

/// Whether AVX-512 is there, and meant for what is summed in f32.
#[cfg(target_arch = "x86_64")]
fn wide<T: Float>(isa: Isa) -> bool {
    matches!(isa.or_portable(), Isa::Avx512 | Isa::Avx512Bf16) && same::<T::Acc, f32>()
}

kernel! {
    /// [`products`] with any instructions.
    fn any_products[A: Arch, T: Float](
        isa: Isa, query: &[T::Acc], k: Source<'_, T>, scores: &mut [T::Acc],
    ) {
        let heads = query.len() / k.dim;
        ask(k, 0..ROWS_AHEAD);
        for first in (0..k.rows).step_by(4) {
            ask(k, first + ROWS_AHEAD..first + ROWS_AHEAD + 4);
            // Behind the last key it is taken again, for nothing.
            let key = |r: usize| k.row((first + r).min(k.rows - 1));
            let keys = [key(0), key(1), key(2), key(3)];
            for h in 0..heads {
                let sums = dots::<A, T>(&query[h * k.dim..][..k.dim], keys);
                let scores = &mut scores[h * k.rows + first..(h + 1) * k.rows];
                for (score, sum) in scores.iter_mut().zip(sums) {
                    *score = sum;
                }
            }
        }
    }
}

/// The products of a query and four keys. Sums have names, and what is left behind whole lanes is brought to their
/// length: what is indexed by a number that changes would not stay in registers.
#[inline(always)]
fn dots<A: Arch, T: Float>(query: &[T::Acc], [a, b, c, d]: [&[T]; 4]) -> [T::Acc; 4] {
    let zeros = [T::Acc::ZERO; SUMS];
    let (mut sa, mut sb, mut sc, mut sd) = (zeros, zeros, zeros, zeros);
    let (queries, rest) = query.as_chunks::<SUMS>();
    let [ka, kb, kc, kd] = [a, b, c, d].map(|key| key.as_chunks::<SUMS>().0);
    let keys = ka.iter().zip(kb).zip(kc.iter().zip(kd));
    for (x, ((a, b), (c, d))) in queries.iter().zip(keys) {
        for lane in 0..SUMS {
            sa[lane] = A::fma(x[lane], a[lane].widen(), sa[lane]);
            sb[lane] = A::fma(x[lane], b[lane].widen(), sb[lane]);
            sc[lane] = A::fma(x[lane], c[lane].widen(), sc[lane]);
            sd[lane] = A::fma(x[lane], d[lane].widen(), sd[lane]);
        }
    }
    if !rest.is_empty() {
        let mut x = zeros;
        x[..rest.len()].copy_from_slice(rest);
        let [a, b, c, d] = [a, b, c, d].map(|key| {
            let mut end = [T::default(); SUMS];
            end[..rest.len()].copy_from_slice(&key[query.len() - rest.len()..query.len()]);
            end
        });
        for lane in 0..SUMS {
            sa[lane] = A::fma(x[lane], a[lane].widen(), sa[lane]);
            sb[lane] = A::fma(x[lane], b[lane].widen(), sb[lane]);
            sc[lane] = A::fma(x[lane], c[lane].widen(), sc[lane]);
            sd[lane] = A::fma(x[lane], d[lane].widen(), sd[lane]);
        }
    }
    [total(sa), total(sb), total(sc), total(sd)]
}

kernel! {
    /// e to the power of what each score lies below the largest, and the sum of it; a softcap comes first.
    fn exponentials[A: Arch, R: Real](isa: Isa, scores: &mut [R], softcap: Option<f64>) -> R {
        if let Some(cap) = softcap {
            let cap = R::from_f64(cap);
            for x in &mut *scores {
                *x = cap * tanh::<A, R>(*x);
            }
        }
        let (whole, rest) = scores.as_chunks_mut::<SUMS>();
        let mut end = [R::NEG_INFINITY; SUMS];
        end[..rest.len()].copy_from_slice(rest);
        let mut best = end;
        for scores in &*whole {
            for lane in 0..SUMS {
                best[lane] = if scores[lane] > best[lane] { scores[lane] } else { best[lane] };
            }
        }
        let largest = fold(best, |a, b| if a > b { a } else { b });
        let mut lanes = [R::ZERO; SUMS];
        for scores in whole.iter_mut().chain([&mut end]) {
            for lane in 0..SUMS {
                scores[lane] = exp::<A, R>(scores[lane] - largest);
                lanes[lane] += scores[lane];
            }
        }
        rest.copy_from_slice(&end[..rest.len()]);
        total(lanes)
    }
}

kernel! {
    /// [`weighted_sum`] with any instructions, in stripes whose sums stay in registers.
    fn any_weighted_sum[A: Arch, T: Float](
        isa: Isa, weights: &[T::Acc], v: Source<'_, T>, out: &mut [T::Acc],
    ) {
        for (stripe, out) in out.chunks_mut(STRIPE).enumerate() {
            let first = stripe * STRIPE;
            let mut sums = [T::Acc::ZERO; STRIPE];
            let rows = v.data.chunks(v.stride).map(|row| &row[first..v.dim]);
            for (n, (&weight, row)) in weights.iter().zip(rows).enumerate() {
                if stripe == 0 {
                    ask(v, n + ROWS_AHEAD..n + ROWS_AHEAD + 1);
                }
                if let Some(row) = row.first_chunk::<STRIPE>() {
                    for c in 0..STRIPE {
                        sums[c] = A::fma(weight, row[c].widen(), sums[c]);
                    }
                } else {
                    let mut end = [T::default(); STRIPE];
                    end[..row.len()].copy_from_slice(row);
                    for c in 0..STRIPE {
                        sums[c] = A::fma(weight, end[c].widen(), sums[c]);
                    }
                }
            }
            out.copy_from_slice(&sums[..out.len()]);
        }
    }
}
