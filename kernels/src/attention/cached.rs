//! Attention of the last tokens of texts whose earlier keys and values were kept: what decoding does.
//!
//! A query reads each visible key and value once, and there is next to nothing to share between
//! queries: the tiles of the other passes would only cost their packing.

use super::rows::Source;
use super::{Attention, Packed};
use crate::element::{Float, Real};
use crate::math::{exp, tanh};
use crate::shared::Shared;
use crate::simd::{kernel, public};
use crate::sums::{each_lane, total};
use rayon::prelude::*;

/// At most so many tasks at a time, each with its piece of workspace.
const LANES: usize = 32;
/// Fewer multiply-adds than this stay on the calling thread.
const PARALLEL: usize = 1 << 16;
/// Partial sums of a product of query and key.
const SUMS: usize = 16;

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
        let count = seen.len();
        let (sums, rest) = workspace.split_at_mut(q.len());
        let scores = &mut rest[..q.len() / dim * count];
        let factor = T::Acc::from_f64(p.factor());
        for (n, j) in seen.clone().enumerate() {
            let key = k.row(j);
            for (h, q) in q.chunks_exact(dim).enumerate() {
                let mut lanes = [T::Acc::ZERO; SUMS];
                each_lane!(SUMS; [x = q, y = key], |lane| {
                    lanes[lane] = A::fma(x.widen(), y.widen(), lanes[lane]);
                });
                scores[h * count + n] = total(lanes) * factor;
            }
        }
        sums.fill(T::Acc::ZERO);
        if count == 0 {
            out.fill(T::default());
            return;
        }
        for scores in scores.chunks_exact_mut(count) {
            if let Some(cap) = p.softcap {
                let cap = T::Acc::from_f64(cap);
                for x in &mut *scores {
                    *x = cap * tanh::<A, T::Acc>(*x);
                }
            }
            let mut largest = T::Acc::NEG_INFINITY;
            for &x in &*scores {
                largest = if x > largest { x } else { largest };
            }
            let mut lanes = [T::Acc::ZERO; SUMS];
            for scores in scores.chunks_mut(SUMS) {
                for (x, lane) in scores.iter_mut().zip(&mut lanes) {
                    *x = exp::<A, T::Acc>(*x - largest);
                    *lane += *x;
                }
            }
            let by = T::Acc::ONE / total(lanes);
            for x in scores {
                *x = *x * by;
            }
        }
        for (n, j) in seen.enumerate() {
            let value = v.row(j);
            for (h, sums) in sums.chunks_exact_mut(dim).enumerate() {
                let weight = scores[h * count + n];
                for (sum, x) in sums.iter_mut().zip(value) {
                    *sum = A::fma(weight, x.widen(), *sum);
                }
            }
        }
        for (y, sum) in out.iter_mut().zip(&*sums) {
            *y = T::narrow(*sum);
        }
    }
}
