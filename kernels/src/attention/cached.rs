//! Attention of the last tokens of texts whose earlier keys and values were kept: what decoding does.
//!
//! A query reads each visible key and value once, and there is next to nothing to share between
//! queries: the tiles of the other passes would only cost their packing.

use super::rows::Source;
use super::{Attention, Packed};
#[cfg(target_arch = "x86_64")]
use super::{floats, floats_mut};
#[cfg(target_arch = "x86_64")]
use crate::element::same;
use crate::element::{Float, Real};
use crate::math::{exp, tanh};
use crate::prefetch::prefetch;
use crate::shared::Shared;
use crate::simd::{Arch, Isa, kernel, public};
use crate::sums::{fold, total};
use rayon::prelude::*;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
mod avx512;

/// Most pairs of a query and a key head that are worked on at a time, each in a piece of workspace of its own. A query with
/// more key heads than this has all of them worked on at once.
const LANES: usize = 32;
/// Fewer multiply-adds than this stay on the calling thread.
const PARALLEL: usize = 1 << 16;
/// Partial sums of a product of query and key.
const SUMS: usize = 16;
/// Columns of values that are summed together.
const STRIPE: usize = 64;
/// Rows of values whose products with a head's weights are summed before the next head's.
const ROWS: usize = 16;
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

/// Elements that a key head of a query needs: the scores, their total and the sums of each head that shares it.
fn piece(p: &Attention, kept: Kept) -> usize {
    p.heads / p.kv_heads * (kept.longest() + 1 + p.head_dim)
}

/// Pairs of a query and a key head that are worked on at a time, at most.
fn at_once(p: &Attention, queries: usize) -> usize {
    (queries * p.kv_heads).clamp(1, LANES.max(p.kv_heads))
}

/// Workspace of [`attention_cached`] for so many queries, in elements of `T::Acc`.
pub fn attention_cached_workspace(p: &Attention, queries: usize, kept: Kept) -> usize {
    at_once(p, queries) * piece(p, kept)
}

/// Key heads of a task, which lie side by side: as many as leave something to do for every thread. What is read
/// of a row of keys is then longer, and no result depends on it.
fn heads_of_a_task(p: &Attention, queries: usize) -> usize {
    let threads = rayon::current_num_threads();
    // Texts may be of different lengths.
    let tasks = if queries == 1 { threads } else { 4 * threads };
    p.kv_heads.div_ceil(tasks.div_ceil(queries))
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
        if queries == 0 {
            return;
        }
        let group = p.heads / p.kv_heads;
        let width = group * p.head_dim;
        let run = heads_of_a_task(p, queries);
        let runs = p.kv_heads.div_ceil(run);
        let lanes = (at_once(p, queries) / run).min(queries * runs);
        let shared = Shared::new(out);
        let work = |first: usize, workspace: &mut [T::Acc]| {
            let mut sequence = 0;
            for task in (first..queries * runs).step_by(lanes) {
                let (token, head) = (task / runs, task % runs * run);
                let heads = head..p.kv_heads.min(head + run);
                while offsets[sequence + 1] as usize <= token {
                    sequence += 1;
                }
                let (start, len) = (kept.starts[sequence] as usize, kept.lengths[sequence] as usize);
                let behind = offsets[sequence + 1] as usize - token;
                let width = heads.len() * width;
                // SAFETY: this token and these heads belong to this task alone.
                let out = unsafe {
                    shared.part((token * p.heads + head * group) * p.head_dim, width)
                };
                let q = q.head(token, 1, head * group, p.head_dim);
                let [k, v] = [k, v].map(|x| x.heads(start, len, heads.clone(), p.head_dim));
                one_query(isa, p, len - behind, &q.data[..width], [k, v], out, workspace);
            }
        };
        let each = run * piece(p, kept);
        let workspace = &mut workspace[..lanes * each];
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

/// The query at key `i`, of all heads that share the key heads side by side in the rows of `k` and `v`.
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
    let heads = q.len() / p.head_dim;
    let (query, workspace) = workspace.split_at_mut(q.len());
    let (totals, scores) = workspace.split_at_mut(heads);
    let scores = &mut scores[..heads * k.rows];
    scale(isa, q, T::Acc::from_f64(p.factor()), query);
    let each = Heads {
        dim: p.head_dim,
        group: p.heads / p.kv_heads,
    };
    products(isa, each, query, [k, v], scores);
    for (scores, total) in scores.chunks_exact_mut(k.rows).zip(&mut *totals) {
        *total = exponentials(isa, scores, p.softcap);
    }
    // The query's place takes sums.
    weighted_sums(isa, each, scores, v, query);
    let heads = query.chunks_exact(p.head_dim).zip(totals);
    for ((sums, total), out) in heads.zip(out.chunks_exact_mut(p.head_dim)) {
        narrow(isa, sums, T::Acc::ONE / *total, out);
    }
}

/// How heads lie in a row.
#[derive(Clone, Copy)]
struct Heads {
    /// Columns of a head
    dim: usize,
    /// Heads of queries that share a head of keys and values
    group: usize,
}

impl Heads {
    /// The first column, of a row of keys or values, that head `h` of the queries reads.
    #[inline(always)]
    fn column(self, h: usize) -> usize {
        h / self.group * self.dim
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

/// `scores[h, n]` = the product of query h and key n, of all heads before the next keys: so are rows of keys read as
/// they lie.
///
/// query: `[heads, dim]`, k: `[keys, heads / group * dim]`, scores: `[heads, keys]`
fn products<T: Float>(
    isa: Isa,
    each: Heads,
    query: &[T::Acc],
    [k, then]: [Source<'_, T>; 2],
    scores: &mut [T::Acc],
) {
    #[cfg(target_arch = "x86_64")]
    if wide::<T>(isa) {
        // SAFETY: the processor has the instructions; sums are f32.
        unsafe { avx512::products(each, floats(query), [k, then], floats_mut(scores)) };
        return;
    }
    any_products(isa, each, query, k, scores);
    ask(then, 0..ROWS_AHEAD);
}

/// `out[h]` = the sum of `weights[h, n] * v[n]`, of all heads before the next rows of values.
///
/// weights: `[heads, keys]`, v: `[keys, heads / group * dim]`, out: `[heads, dim]`
fn weighted_sums<T: Float>(
    isa: Isa,
    each: Heads,
    weights: &[T::Acc],
    v: Source<'_, T>,
    out: &mut [T::Acc],
) {
    #[cfg(target_arch = "x86_64")]
    if wide::<T>(isa) {
        // SAFETY: as in `products`.
        unsafe { avx512::weighted_sums(each, floats(weights), v, floats_mut(out)) };
        return;
    }
    any_weighted_sums(isa, each, weights, v, out);
}

/// Whether AVX-512 is there, and meant for what is summed in f32.
#[cfg(target_arch = "x86_64")]
fn wide<T: Float>(isa: Isa) -> bool {
    matches!(isa.or_portable(), Isa::Avx512 | Isa::Avx512Bf16) && same::<T::Acc, f32>()
}

kernel! {
    /// [`products`] with any instructions.
    fn any_products[A: Arch, T: Float](
        isa: Isa, each: Heads, query: &[T::Acc], k: Source<'_, T>, scores: &mut [T::Acc],
    ) {
        ask(k, 0..ROWS_AHEAD);
        for first in (0..k.rows).step_by(4) {
            ask(k, first + ROWS_AHEAD..first + ROWS_AHEAD + 4);
            // Behind the last key it is taken again, for nothing.
            let key = |r: usize| k.row((first + r).min(k.rows - 1));
            let keys = [key(0), key(1), key(2), key(3)];
            for (h, query) in query.chunks_exact(each.dim).enumerate() {
                let sums = dots::<A, T>(query, keys.map(|key| &key[each.column(h)..][..each.dim]));
                let scores = &mut scores[h * k.rows + first..(h + 1) * k.rows];
                for (score, sum) in scores.iter_mut().zip(sums) {
                    *score = sum;
                }
            }
        }
    }
}

/// The products of a query and four keys. Sums have names, and what is left behind whole lanes is brought to their
/// length: what is indexed by a number that changes would not stay in registers. The additions stand twice: in a function,
/// even one that is always inlined, they take a tenth longer with AVX2.
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
    /// [`weighted_sums`] with any instructions, in stripes whose sums stay in registers over some rows.
    fn any_weighted_sums[A: Arch, T: Float](
        isa: Isa, each: Heads, weights: &[T::Acc], v: Source<'_, T>, out: &mut [T::Acc],
    ) {
        out.fill(T::Acc::ZERO);
        for first in (0..v.rows).step_by(ROWS) {
            ask(v, first + ROWS_AHEAD..first + ROWS_AHEAD + ROWS);
            let rows = first..v.rows.min(first + ROWS);
            for (h, out) in out.chunks_exact_mut(each.dim).enumerate() {
                let weights = &weights[h * v.rows..(h + 1) * v.rows];
                for (stripe, out) in out.chunks_mut(STRIPE).enumerate() {
                    let column = each.column(h) + stripe * STRIPE;
                    let mut sums = [T::Acc::ZERO; STRIPE];
                    sums[..out.len()].copy_from_slice(out);
                    for n in rows.clone() {
                        let row = &v.row(n)[column..][..out.len()];
                        let mut end = [T::default(); STRIPE];
                        let row = match row.first_chunk::<STRIPE>() {
                            Some(row) => row,
                            None => {
                                end[..row.len()].copy_from_slice(row);
                                &end
                            }
                        };
                        for c in 0..STRIPE {
                            sums[c] = A::fma(weights[n], row[c].widen(), sums[c]);
                        }
                    }
                    out.copy_from_slice(&sums[..out.len()]);
                }
            }
        }
    }
}
