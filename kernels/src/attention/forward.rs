//! The forward pass: a task is up to [`QUERIES`](super::plan::QUERIES) queries of one head.

use super::plan::{Cursor, Plan, take};
use super::rows::{self, Scores, Source};
use super::tile::{At, COLS, Order, Products, ROWS};
use super::{Attention, Packed};
use crate::element::{Float, Real};
use crate::shared::Shared;
use crate::simd::Isa;

/// Elements of a lane's workspace.
pub(super) fn lane(plan: &Plan) -> usize {
    let Plan {
        padded,
        keys,
        queries,
        strip,
        ..
    } = *plan;
    let operands = (2 * queries + 2 * keys) * padded;
    operands + strip * keys + 2 * queries.next_multiple_of(COLS)
}

pub(super) fn run<T: Float>(
    isa: Isa,
    p: &Attention,
    offsets: &[i64],
    [q, k, v]: [Packed<T>; 3],
    out: &mut [T],
    lse: &mut [T::Acc],
    workspace: &mut [T::Acc],
) {
    let plan = Plan::forward(p, offsets);
    if plan.longest == 0 || p.heads == 0 {
        return;
    }
    let tokens = lse.len() / p.heads;
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    let products = Products::<T::Acc>::new(isa);
    let group = p.heads / p.kv_heads;
    plan.run(workspace, lane(&plan), |workspace, claim| {
        let mut cursor = Cursor::new(offsets);
        let tasks = |len: usize| len.div_ceil(plan.queries) * p.heads;
        while let Some((start, len, task)) = cursor.find(claim(), tasks) {
            // Chunks of one head follow each other: they share its keys and values.
            let chunks = len.div_ceil(plan.queries);
            let (head, chunk) = (task / chunks, task % chunks);
            let first = chunk * plan.queries;
            let count = plan.queries.min(len - first);
            let task = Task {
                isa,
                p,
                plan,
                products,
                head,
                start,
                len,
                first,
                count,
                q: q.head(start + first, count, head, p.head_dim),
                k: k.head(start, len, head / group, p.head_dim),
                v: v.head(start, len, head / group, p.head_dim),
            };
            task.run(workspace, &out, &lse, tokens);
        }
    });
}

/// Queries `first .. first + count` of one head of one sequence.
struct Task<'a, T: Float> {
    isa: Isa,
    p: &'a Attention,
    plan: Plan,
    products: Products<T::Acc>,
    head: usize,
    start: usize,
    len: usize,
    first: usize,
    count: usize,
    q: Source<'a, T>,
    k: Source<'a, T>,
    v: Source<'a, T>,
}

impl<T: Float> Task<'_, T> {
    fn run(
        &self,
        mut workspace: &mut [T::Acc],
        out: &Shared<T>,
        lse: &Shared<T::Acc>,
        tokens: usize,
    ) {
        let Self { isa, p, plan, .. } = *self;
        let Plan {
            dim,
            padded,
            keys,
            queries,
            strip,
            ..
        } = plan;
        let zero = T::Acc::ZERO;
        let rest = &mut workspace;
        let rows = self.count.next_multiple_of(ROWS);
        let q = &mut take(rest, queries * padded)[..rows * padded];
        let acc = &mut take(rest, queries * padded)[..rows * padded];
        let k = take(rest, keys * padded);
        let v = take(rest, keys * padded);
        let scores = take(rest, strip * keys);
        let max = take(rest, queries);
        let sum = take(rest, queries);
        acc.fill(zero);
        max.fill(T::Acc::NEG_INFINITY);
        sum.fill(zero);
        // Scores leave the product scaled, and divided by the softcap where there is one.
        rows::pack_rows(isa, self.q, T::Acc::from_f64(p.factor()), q, padded);

        let seen = p.visible_to(self.first..self.first + self.count, self.len);
        for block in (seen.start / keys * keys..seen.end).step_by(keys) {
            let count = keys.min(self.len - block);
            let columns = count.next_multiple_of(self.products.panel);
            let panels = &mut k[..columns * dim];
            rows::pack_panels(isa, self.k.rows(block, count), panels);
            let v = &mut v[..count.next_multiple_of(COLS) * padded];
            rows::pack_rows(isa, self.v.rows(block, count), T::Acc::ONE, v, padded);
            for top in (0..self.count).step_by(strip) {
                let height = strip.min(self.count - top);
                let query = self.first + top;
                let Some((from, to)) = p.columns(query..query + height, self.len, block, count)
                else {
                    continue;
                };
                let tall = height.next_multiple_of(ROWS);
                let q = At {
                    data: &q[top * padded..],
                    stride: padded,
                };
                score(&self.products, (tall, dim), q, k, (from, to), scores, keys);
                let acc = &mut acc[top * padded..(top + tall) * padded];
                let area = Scores {
                    p,
                    head: self.head,
                    len: self.len,
                    start: self.start,
                    first_query: query,
                    queries: height,
                    first_key: block,
                    from,
                    to,
                    stride: keys,
                };
                rows::softmax(
                    isa,
                    area,
                    scores,
                    &mut max[top..],
                    &mut sum[top..],
                    acc,
                    padded,
                );
                let weights = At {
                    data: &scores[from..],
                    stride: keys,
                };
                let v = At {
                    data: &v[from * padded..],
                    stride: padded,
                };
                let size = (tall, padded, to - from);
                self.products
                    .product(size, (weights, Order::Rows), v, acc, padded, true);
            }
        }

        for r in 0..self.count {
            let token = self.start + self.first + r;
            // SAFETY: this token and head belong to this task alone.
            let (out, lse) = unsafe {
                let at = token * p.heads * dim + self.head * dim;
                (out.part(at, dim), lse.part(self.head * tokens + token, 1))
            };
            lse[0] = max[r] + sum[r].ln();
            let seen = sum[r] != zero;
            let by = if seen { T::Acc::ONE / sum[r] } else { zero };
            for (y, x) in out.iter_mut().zip(&acc[r * padded..]) {
                *y = T::narrow(*x * by);
            }
        }
    }
}

/// `scores[i, j] = q_i · panel_j` for columns `from..to` of rows `stride` apart.
pub(super) fn score<R: Real>(
    products: &Products<R>,
    (rows, dim): (usize, usize),
    q: At<R>,
    panels: &[R],
    (from, to): (usize, usize),
    scores: &mut [R],
    stride: usize,
) {
    let panel = products.panel;
    let mut col = from;
    while col < to {
        let inside = col % panel;
        let width = (panel - inside).min(to - col);
        let keys = At {
            data: &panels[col / panel * panel * dim + inside..],
            stride: panel,
        };
        let size = (rows, width, dim);
        products.product(
            size,
            (q, Order::Rows),
            keys,
            &mut scores[col..],
            stride,
            false,
        );
        col += width;
    }
}
