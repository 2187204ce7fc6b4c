//! The forward pass: a task is up to [`QUERIES`](super::plan::QUERIES) queries of one head.

use super::plan::{Place, Plan, take};
use super::rows::{self, Ahead, Source, Target};
use super::tile::{At, COLS, Order, Panels, Products, ROWS};
use super::weights::{self, Scores};
use super::{Attention, Packed};
use crate::element::{Float, Real};
use crate::shared::Shared;
use crate::simd::Isa;

/// Elements of a lane's workspace.
pub(super) fn lane(plan: &Plan) -> usize {
    let Plan {
        padded,
        wide,
        keys,
        queries,
        strip,
        ..
    } = *plan;
    let operands = 2 * queries * padded + 2 * keys * wide;
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
    let products = Products::new::<T>(isa);
    let group = p.heads / p.kv_heads;
    let tasks = |len: usize| len.div_ceil(plan.queries) * p.heads;
    let at = |Place { start, len, task }| {
        // Chunks of one head follow each other: they share its keys and values.
        let chunks = len.div_ceil(plan.queries);
        let (head, chunk) = (task / chunks, task % chunks);
        let first = chunk * plan.queries;
        let count = plan.queries.min(len - first);
        Task {
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
        }
    };
    let each = lane(&plan);
    plan.run(workspace, each, offsets, tasks, |workspace, place, next| {
        let task: Task<T> = at(place);
        let next: Option<Task<T>> = next.map(at);
        task.run(next, workspace, &out, &lse, tokens);
    });
}

/// Queries `first .. first + count` of one head of one sequence.
struct Task<'a, T: Float> {
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
    /// What is read once the keys and values before the one of number `block` are done with: those of the block that begins
    /// there, or, from `end` on, which no query of this task sees, what the next task reads first.
    fn ahead(&self, next: &Option<Self>, block: usize, end: usize) -> Option<Ahead<'_, T, 3>> {
        let keys = self.plan.keys;
        if block < end {
            let count = keys.min(self.len - block);
            let none = self.q.rows(0, 0);
            let [k, v] = [self.k, self.v].map(|rows| rows.rows(block, count));
            return Some(Ahead::new([none, k, v]));
        }
        let next = next.as_ref()?;
        let [k, v] = [next.k, next.v].map(|rows| rows.rows(0, keys.min(next.len)));
        Some(Ahead::new([next.q, k, v]))
    }

    /// Computes it, and meanwhile asks for what the next one needs.
    fn run(
        &self,
        next: Option<Self>,
        mut workspace: &mut [T::Acc],
        out: &Shared<T>,
        lse: &Shared<T::Acc>,
        tokens: usize,
    ) {
        let Self {
            p, plan, products, ..
        } = *self;
        let Plan {
            dim,
            padded,
            wide,
            keys,
            queries,
            strip,
            ..
        } = plan;
        let (zero, step) = (T::Acc::ZERO, products.step);
        let rest = &mut workspace;
        let rows = self.count.next_multiple_of(ROWS);
        let q = &mut take(rest, queries * padded)[..rows * padded / step];
        let acc = &mut take(rest, queries * padded)[..rows * padded];
        let k = take(rest, keys * wide);
        let v = take(rest, keys * wide);
        let scores = take(rest, strip * keys);
        let max = take(rest, queries);
        let sum = take(rest, queries);
        acc.fill(zero);
        max.fill(T::Acc::NEG_INFINITY);
        sum.fill(zero);
        rows::pack_rows(&products, self.q, q, padded);
        let token = self.start + self.first;
        // SAFETY: these tokens and this head belong to this task alone.
        let (target, lse) = unsafe {
            let first = (token * p.heads + self.head) * dim;
            (
                Target::new(out, first, p.heads * dim, dim),
                lse.part(self.head * tokens + token, self.count),
            )
        };

        let seen = p.visible_to(self.first..self.first + self.count, self.len);
        for block in (seen.start / keys * keys..seen.end).step_by(keys) {
            let count = keys.min(self.len - block);
            let k = columns(&products, &plan, self.k.rows(block, count), k);
            let v = depth(&products, &plan, self.v.rows(block, count), v);
            let mut ahead = self.ahead(&next, block + keys, seen.end);
            for top in (0..self.count).step_by(strip) {
                let height = strip.min(self.count - top);
                if let Some(ahead) = &mut ahead {
                    ahead.ask(strip);
                }
                if block + keys >= seen.end {
                    target.ask(top, height);
                }
                let query = self.first + top;
                let Some((from, to)) = p.columns(query..query + height, self.len, block, count)
                else {
                    continue;
                };
                let tall = height.next_multiple_of(ROWS);
                let q = At {
                    data: &q[top * padded / step..],
                    stride: padded / step,
                    order: Order::Rows,
                };
                let size = (tall, from..to, dim.div_ceil(step));
                products.product(size, q, k, scores, keys, false);
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
                let (max, sum) = (&mut max[top..], &mut sum[top..]);
                weights::softmax(&products, area, scores, max, sum, acc, padded);
                let weights = At {
                    data: &scores[from..],
                    stride: keys,
                    order: Order::Rows,
                };
                let v = Panels {
                    first: from / step,
                    ..v
                };
                let size = (tall, 0..padded, (to.min(count) - from).div_ceil(step));
                products.product(size, weights, v, acc, padded, true);
            }
        }

        let grow = T::Acc::from_f64(weights::grow(p));
        let unit = weights::unit(&products);
        rows::finish(products.isa, acc, padded, max, sum, unit, grow, target, lse);
    }
}

/// Packs a block of rows as the columns of a product over their elements.
pub(super) fn columns<'a, T: Float>(
    products: &Products<T::Acc>,
    plan: &Plan,
    rows: Source<T>,
    room: &'a mut [T::Acc],
) -> Panels<'a, T::Acc> {
    rows::pack_columns(products, rows, room);
    Panels {
        data: room,
        width: products.panel,
        depth: plan.dim.div_ceil(products.step),
        first: 0,
    }
}

/// Packs a block of rows as the depth of a product, whose columns their elements are.
pub(super) fn depth<'a, T: Float>(
    products: &Products<T::Acc>,
    plan: &Plan,
    rows: Source<T>,
    room: &'a mut [T::Acc],
) -> Panels<'a, T::Acc> {
    let depth = rows.rows.div_ceil(products.step);
    let width = if products.pairs() {
        rows::pack_depth(products, rows, &mut room[..depth * plan.wide]);
        products.panel
    } else {
        rows::pack_rows(
            products,
            rows,
            &mut room[..depth * plan.padded],
            plan.padded,
        );
        plan.padded
    };
    Panels {
        data: room,
        width,
        depth,
        first: 0,
    }
}
