//! The backward pass: a task is one key head of one sequence with all its query heads, so that
//! nobody else adds to the gradients of those keys and values, and the order of sums is fixed.

use super::forward::score;
use super::plan::{Cursor, Plan, take};
use super::rows::{self, Scores, Source, Target};
use super::tile::{At, COLS, Order, Products, ROWS};
use super::{Attention, Packed};
use crate::element::{Float, Real};
use crate::shared::Shared;
use crate::simd::Isa;

/// Which gradients are asked for.
#[derive(Clone, Copy)]
pub(super) struct Need {
    pub q: bool,
    pub k: bool,
    pub v: bool,
}

impl Need {
    /// Whether the gradient of the scores is computed.
    fn scores(self) -> bool {
        self.q || self.k
    }
}

/// Elements of a lane's workspace. Pieces for gradients that are not asked for are counted too,
/// since the caller learns the size before it knows.
pub(super) fn lane(plan: &Plan, p: &Attention) -> usize {
    let Plan {
        padded,
        keys,
        strip,
        longest,
        ..
    } = *plan;
    let group = p.heads / p.kv_heads.max(1);
    let per_key = 5 * keys * padded;
    let per_strip = 2 * strip * (padded + keys);
    let whole = group * (longest.next_multiple_of(ROWS) * padded + longest);
    (per_key + per_strip + whole).next_multiple_of(COLS)
}

pub(super) fn run<T: Float>(
    isa: Isa,
    p: &Attention,
    offsets: &[i64],
    [q, k, v]: [Packed<T>; 3],
    [out, dout]: [&[T]; 2],
    lse: &[T::Acc],
    [dq, dk, dv]: [Option<&mut [T]>; 3],
    workspace: &mut [T::Acc],
) {
    let plan = Plan::backward(p, offsets);
    let need = Need {
        q: dq.is_some(),
        k: dk.is_some(),
        v: dv.is_some(),
    };
    if plan.longest == 0 || p.heads == 0 || !(need.scores() || need.v) {
        return;
    }
    let tokens = lse.len() / p.heads;
    let [dq, dk, dv] = [dq, dk, dv].map(|grad| grad.map(Shared::new));
    let outputs = Outputs { dq, dk, dv };
    let products = Products::<T::Acc>::new(isa);
    let dim = p.head_dim;
    let [out, dout] = [out, dout].map(|data| Packed {
        data,
        row_stride: p.heads * dim,
    });
    plan.run(workspace, lane(&plan, p), |workspace, claim| {
        let mut cursor = Cursor::new(offsets);
        let tasks = |len: usize| if len == 0 { 0 } else { p.kv_heads };
        while let Some((start, len, kv_head)) = cursor.find(claim(), tasks) {
            let task = Task {
                isa,
                p,
                plan,
                products,
                need,
                kv_head,
                start,
                len,
                k: k.head(start, len, kv_head, dim),
                v: v.head(start, len, kv_head, dim),
            };
            let inputs = Inputs {
                q,
                out,
                dout,
                lse,
                tokens,
            };
            task.run(&inputs, &outputs, workspace);
        }
    });
}

/// What belongs to queries.
struct Inputs<'a, T: Float> {
    q: Packed<'a, T>,
    out: Packed<'a, T>,
    dout: Packed<'a, T>,
    lse: &'a [T::Acc],
    tokens: usize,
}

struct Outputs<T> {
    dq: Option<Shared<T>>,
    dk: Option<Shared<T>>,
    dv: Option<Shared<T>>,
}

/// One key head of one sequence.
struct Task<'a, T: Float> {
    isa: Isa,
    p: &'a Attention,
    plan: Plan,
    products: Products<T::Acc>,
    need: Need,
    kv_head: usize,
    start: usize,
    len: usize,
    k: Source<'a, T>,
    v: Source<'a, T>,
}

/// The pieces of a task's workspace.
struct Pieces<'a, R> {
    /// `[group, rows, padded]`: sums of dq, short of the scale, rows the sequence's length padded.
    dq: &'a mut [R],
    /// `[group, len]`: `out · dout`.
    dots: &'a mut [R],
    /// A block of keys: keys in panels, values in panels, keys in rows.
    k_panels: &'a mut [R],
    v_panels: &'a mut [R],
    k_rows: &'a mut [R],
    /// `[keys, padded]`: sums of dk, short of the scale, and of dv.
    dk: &'a mut [R],
    dv: &'a mut [R],
    /// A strip of queries.
    q: &'a mut [R],
    dout: &'a mut [R],
    weights: &'a mut [R],
    grads: &'a mut [R],
}

impl<T: Float> Task<'_, T> {
    fn group(&self) -> usize {
        self.p.heads / self.p.kv_heads
    }

    fn run(&self, inputs: &Inputs<T>, outputs: &Outputs<T>, mut workspace: &mut [T::Acc]) {
        let Self {
            isa,
            p,
            plan,
            need,
            len,
            ..
        } = *self;
        let Plan {
            dim,
            padded,
            keys,
            strip,
            ..
        } = plan;
        let (zero, one) = (T::Acc::ZERO, T::Acc::ONE);
        let rest = &mut workspace;
        let mut pieces = Pieces {
            k_panels: take(rest, keys * padded),
            v_panels: take(rest, keys * padded),
            k_rows: take(rest, keys * padded),
            dk: take(rest, keys * padded),
            dv: take(rest, keys * padded),
            q: take(rest, strip * padded),
            dout: take(rest, strip * padded),
            weights: take(rest, strip * keys),
            grads: take(rest, strip * keys),
            dq: take(rest, self.group() * len.next_multiple_of(ROWS) * padded),
            dots: take(rest, self.group() * len),
        };
        if need.q {
            pieces.dq.fill(zero);
        }
        if need.scores() {
            for (g, dots) in pieces.dots.chunks_exact_mut(len).enumerate() {
                let head = self.kv_head * self.group() + g;
                let [out, dout] =
                    [inputs.out, inputs.dout].map(|rows| rows.head(self.start, len, head, dim));
                rows::dots(isa, out, dout, dots);
            }
        }
        let scale = T::Acc::from_f64(p.scale);
        for block in (0..len).step_by(keys) {
            let count = keys.min(len - block);
            let panels = count.next_multiple_of(self.products.panel) * dim;
            let rows = count.next_multiple_of(COLS) * padded;
            let (k, v) = (self.k.rows(block, count), self.v.rows(block, count));
            rows::pack_panels(isa, k, &mut pieces.k_panels[..panels]);
            if need.scores() {
                rows::pack_panels(isa, v, &mut pieces.v_panels[..panels]);
            }
            if need.q {
                rows::pack_rows(isa, k, one, &mut pieces.k_rows[..rows], padded);
            }
            pieces.dk[..rows].fill(zero);
            pieces.dv[..rows].fill(zero);
            for g in 0..self.group() {
                for query in (0..len).step_by(strip) {
                    self.strip(inputs, &mut pieces, g, query, block, count);
                }
            }
            self.write(&outputs.dk, block, count, pieces.dk, scale);
            self.write(&outputs.dv, block, count, pieces.dv, one);
        }
        if let Some(dq) = &outputs.dq {
            let rows = len.next_multiple_of(ROWS);
            for (g, sums) in pieces.dq.chunks_exact(rows * padded).enumerate() {
                let head = self.kv_head * self.group() + g;
                let first = (self.start * p.heads + head) * dim;
                // SAFETY: this task alone has this sequence's queries of this head.
                let target = unsafe { Target::new(dq, first, p.heads * dim, dim) };
                rows::write(isa, &sums[..len * padded], padded, scale, target);
            }
        }
    }

    /// Adds what queries `query ..` of the group's head `g` contribute for a block of keys.
    fn strip(
        &self,
        inputs: &Inputs<T>,
        pieces: &mut Pieces<T::Acc>,
        g: usize,
        query: usize,
        block: usize,
        count: usize,
    ) {
        let Self {
            isa,
            p,
            plan,
            need,
            len,
            ..
        } = *self;
        let Plan {
            dim,
            padded,
            keys,
            strip,
            ..
        } = plan;
        let height = strip.min(len - query);
        let Some((from, to)) = p.columns(query..query + height, len, block, count) else {
            return;
        };
        let head = self.kv_head * self.group() + g;
        let (tall, one) = (height.next_multiple_of(ROWS), T::Acc::ONE);
        let first = self.start + query;
        let q = inputs.q.head(first, height, head, dim);
        let dout = inputs.dout.head(first, height, head, dim);
        rows::pack_rows(isa, q, one, &mut pieces.q[..tall * padded], padded);
        rows::pack_rows(isa, dout, one, &mut pieces.dout[..tall * padded], padded);
        let q = At {
            data: &*pieces.q,
            stride: padded,
        };
        let dout = At {
            data: &*pieces.dout,
            stride: padded,
        };
        let (products, cols) = (&self.products, (from, to));
        score(
            products,
            (tall, dim),
            q,
            pieces.k_panels,
            cols,
            pieces.weights,
            keys,
        );
        if need.scores() {
            score(
                products,
                (tall, dim),
                dout,
                pieces.v_panels,
                cols,
                pieces.grads,
                keys,
            );
        }
        let area = Scores {
            p,
            head,
            len,
            start: self.start,
            first_query: query,
            queries: height,
            first_key: block,
            from,
            to,
            stride: keys,
        };
        let lse = &inputs.lse[head * inputs.tokens + first..][..height];
        let grads = need.scores().then_some(&mut *pieces.grads);
        let dots = &pieces.dots[g * len + query..][..height];
        rows::gradient(isa, area, pieces.weights, grads, lse, dots);

        let weights = At {
            data: &pieces.weights[from..],
            stride: keys,
        };
        let grads = At {
            data: &pieces.grads[from..],
            stride: keys,
        };
        let by_key = (to - from, padded, height);
        if need.v {
            let dv = &mut pieces.dv[from * padded..];
            products.product(by_key, (weights, Order::Columns), dout, dv, padded, true);
        }
        if need.k {
            let dk = &mut pieces.dk[from * padded..];
            products.product(by_key, (grads, Order::Columns), q, dk, padded, true);
        }
        if need.q {
            let k = At {
                data: &pieces.k_rows[from * padded..],
                stride: padded,
            };
            let at = (g * len.next_multiple_of(ROWS) + query) * padded;
            let by_query = (tall, padded, to - from);
            let dq = &mut pieces.dq[at..];
            products.product(by_query, (grads, Order::Rows), k, dq, padded, true);
        }
    }

    /// Rounds the sums of a block of keys, times `by`, to the output.
    fn write(
        &self,
        output: &Option<Shared<T>>,
        block: usize,
        count: usize,
        sums: &[T::Acc],
        by: T::Acc,
    ) {
        let Some(output) = output else {
            return;
        };
        let Plan { dim, padded, .. } = self.plan;
        let heads = self.p.kv_heads;
        let first = ((self.start + block) * heads + self.kv_head) * dim;
        // SAFETY: this task alone has this sequence's keys and values of this head.
        let target = unsafe { Target::new(output, first, heads * dim, dim) };
        rows::write(self.isa, &sums[..count * padded], padded, by, target);
    }
}
