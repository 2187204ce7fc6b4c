//! The backward pass: a task is one key head of one sequence with all its query heads, so that
//! nobody else adds to the gradients of those keys and values, and the order of sums is fixed.

use super::forward::{columns, depth};
use super::plan::{Place, Plan, take};
use super::rows::{self, Ahead, Source, Target};
use super::tile::{At, COLS, Order, Panels, Products, ROWS};
use super::weights::{self, Scores};
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
        wide,
        keys,
        strip,
        longest,
        ..
    } = *plan;
    let group = p.heads / p.kv_heads.max(1);
    let per_key = keys * (3 * wide + 2 * padded);
    let per_strip = 2 * strip * (wide + keys);
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
    let products = Products::new::<T>(isa);
    let dim = p.head_dim;
    let [out, dout] = [out, dout].map(|data| Packed {
        data,
        row_stride: p.heads * dim,
    });
    let tasks = |len: usize| if len == 0 { 0 } else { p.kv_heads };
    let at = |place: Place| Task {
        p,
        plan,
        products,
        need,
        kv_head: place.task,
        start: place.start,
        len: place.len,
        k: k.head(place.start, place.len, place.task, dim),
        v: v.head(place.start, place.len, place.task, dim),
    };
    let inputs = Inputs {
        q,
        out,
        dout,
        lse,
        tokens,
    };
    let each = lane(&plan, p);
    plan.run(workspace, each, offsets, tasks, |workspace, place, next| {
        at(place).run(next.map(at), &inputs, &outputs, workspace);
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
    /// `[keys, padded]`: sums of dk, short of the scale, and of dv.
    dk: &'a mut [R],
    dv: &'a mut [R],
    /// A strip of queries.
    q: &'a mut [R],
    dout: &'a mut [R],
    weights: &'a mut [R],
    grads: &'a mut [R],
}

/// A block of keys, as the right operand of each product: their elements are its depth, or they
/// themselves.
struct Block<'a, R> {
    first: usize,
    count: usize,
    keys: Panels<'a, R>,
    values: Panels<'a, R>,
    deep_keys: Panels<'a, R>,
}

/// A strip of queries, or of the gradients of their outputs, as the left operand of one product
/// and the right one of another.
struct Strip<'a, R> {
    left: At<'a, R>,
    right: Panels<'a, R>,
}

impl<T: Float> Task<'_, T> {
    fn group(&self) -> usize {
        self.p.heads / self.p.kv_heads
    }

    /// Computes it, and meanwhile asks for what the next one needs.
    fn run(
        &self,
        next: Option<Self>,
        inputs: &Inputs<T>,
        outputs: &Outputs<T>,
        mut workspace: &mut [T::Acc],
    ) {
        let Self {
            p,
            plan,
            products,
            need,
            len,
            ..
        } = *self;
        let Plan {
            dim,
            padded,
            wide,
            keys,
            strip,
            ..
        } = plan;
        let zero = T::Acc::ZERO;
        let rest = &mut workspace;
        let [k_room, v_room, deep_room] = [(); 3].map(|()| take(rest, keys * wide));
        let mut pieces = Pieces {
            dk: take(rest, keys * padded),
            dv: take(rest, keys * padded),
            q: take(rest, strip * wide),
            dout: take(rest, strip * wide),
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
                rows::dots(products.isa, out, dout, dots);
            }
        }
        let scale = T::Acc::from_f64(p.scale);
        let grow = T::Acc::from_f64(weights::grow(p));
        for first in (0..len).step_by(keys) {
            let count = keys.min(len - first);
            let (k, v) = (self.k.rows(first, count), self.v.rows(first, count));
            let none = Panels {
                data: &[],
                width: products.panel,
                depth: 0,
                first: 0,
            };
            let block = Block {
                first,
                count,
                keys: columns(&products, &plan, k, k_room),
                values: if need.scores() {
                    columns(&products, &plan, v, v_room)
                } else {
                    none
                },
                deep_keys: if need.q {
                    depth(&products, &plan, k, deep_room)
                } else {
                    none
                },
            };
            let rows = count.next_multiple_of(COLS) * padded;
            pieces.dk[..rows].fill(zero);
            pieces.dv[..rows].fill(zero);
            let mut ahead = self.ahead(&next, inputs, first + keys);
            let targets = [
                self.target(&outputs.dk, first),
                self.target(&outputs.dv, first),
            ];
            for g in 0..self.group() {
                for query in (0..len).step_by(strip) {
                    if let Some(ahead) = &mut ahead {
                        ahead.ask(strip);
                    }
                    if g == 0 && query < count {
                        let height = strip.min(count - query);
                        for target in targets.iter().flatten() {
                            target.ask(query, height);
                        }
                    }
                    self.strip(inputs, &mut pieces, &block, g, query);
                }
            }
            for (target, (sums, by)) in targets
                .into_iter()
                .zip([(&*pieces.dk, scale), (&*pieces.dv, grow)])
            {
                if let Some(target) = target {
                    let sums = &sums[..count * padded];
                    rows::write(products.isa, sums, padded, by, target);
                }
            }
        }
        if let Some(dq) = &outputs.dq {
            let rows = len.next_multiple_of(ROWS);
            for (g, sums) in pieces.dq.chunks_exact(rows * padded).enumerate() {
                let head = self.kv_head * self.group() + g;
                let first = (self.start * p.heads + head) * dim;
                // SAFETY: this task alone has this sequence's queries of this head.
                let target = unsafe { Target::new(dq, first, p.heads * dim, dim) };
                rows::write(products.isa, &sums[..len * padded], padded, scale, target);
            }
        }
    }

    /// Packs a strip of queries or gradients; as a right operand only if that is `needed`.
    fn pack<'a>(&self, rows: Source<T>, needed: bool, room: &'a mut [T::Acc]) -> Strip<'a, T::Acc> {
        let Self { products, plan, .. } = self;
        let tall = rows.rows.next_multiple_of(ROWS);
        let stride = plan.padded / products.step;
        let (left, room) = room.split_at_mut(tall * stride);
        rows::pack_rows(products, rows, left, plan.padded);
        let left = &*left;
        Strip {
            left: At {
                data: left,
                stride,
                order: Order::Rows,
            },
            right: if products.pairs() && needed {
                depth(products, plan, rows, room)
            } else {
                Panels {
                    data: left,
                    width: stride,
                    depth: tall,
                    first: 0,
                }
            },
        }
    }

    /// Adds what queries `query ..` of the group's head `g` contribute for a block of keys.
    fn strip(
        &self,
        inputs: &Inputs<T>,
        pieces: &mut Pieces<T::Acc>,
        block: &Block<T::Acc>,
        g: usize,
        query: usize,
    ) {
        let Self {
            p,
            plan,
            ref products,
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
        let queries = query..query + height;
        let Some((from, to)) = p.columns(queries, len, block.first, block.count) else {
            return;
        };
        let head = self.kv_head * self.group() + g;
        let step = products.step;
        let tall = height.next_multiple_of(ROWS);
        let first = self.start + query;
        let [q, dout] = [inputs.q, inputs.dout].map(|rows| rows.head(first, height, head, dim));
        let q = self.pack(q, need.k, pieces.q);
        let dout = self.pack(dout, need.v, pieces.dout);
        let size = (tall, from..to, dim.div_ceil(step));
        products.product(
            size.clone(),
            q.left,
            block.keys,
            pieces.weights,
            keys,
            false,
        );
        if need.scores() {
            products.product(size, dout.left, block.values, pieces.grads, keys, false);
        }
        let area = Scores {
            p,
            head,
            len,
            start: self.start,
            first_query: query,
            queries: height,
            first_key: block.first,
            from,
            to,
            stride: keys,
        };
        let lse = &inputs.lse[head * inputs.tokens + first..][..height];
        let grads = need.scores().then_some(&mut *pieces.grads);
        let dots = &pieces.dots[g * len + query..][..height];
        weights::gradient(products, area, pieces.weights, grads, lse, dots);

        // Where slots hold pairs, a step is two rows, of which the first has the weights and the
        // second the gradients of the scores.
        let by_key = |data| At {
            data,
            stride: step * keys,
            order: Order::Columns,
        };
        let grads = if products.pairs() {
            &pieces.weights[keys + from..]
        } else {
            &pieces.grads[from..]
        };
        let size = (to - from, 0..padded, height.div_ceil(step));
        if need.v {
            let dv = &mut pieces.dv[from * padded..];
            let weights = by_key(&pieces.weights[from..]);
            products.product(size.clone(), weights, dout.right, dv, padded, true);
        }
        if need.k {
            let dk = &mut pieces.dk[from * padded..];
            products.product(size, by_key(grads), q.right, dk, padded, true);
        }
        if need.q {
            let grads = At {
                data: &pieces.grads[from..],
                stride: keys,
                order: Order::Rows,
            };
            let k = Panels {
                first: from / step,
                ..block.deep_keys
            };
            let at = (g * len.next_multiple_of(ROWS) + query) * padded;
            let dq = &mut pieces.dq[at..];
            let size = (tall, 0..padded, (to.min(block.count) - from).div_ceil(step));
            products.product(size, grads, k, dq, padded, true);
        }
    }

    /// Where the gradients of the keys or values from `first` on go.
    fn target<'a>(&self, output: &'a Option<Shared<T>>, first: usize) -> Option<Target<'a, T>> {
        let (dim, heads) = (self.plan.dim, self.p.kv_heads);
        let first = ((self.start + first) * heads + self.kv_head) * dim;
        // SAFETY: this task alone has this sequence's keys and values of this head.
        let target = |output| unsafe { Target::new(output, first, heads * dim, dim) };
        output.as_ref().map(target)
    }

    /// What is read once the keys and values before the one of number `block` are done with: those of the block that begins
    /// there, or, behind the last one, what the next task reads first.
    fn ahead<'a>(
        &'a self,
        next: &'a Option<Self>,
        inputs: &'a Inputs<T>,
        block: usize,
    ) -> Option<Ahead<'a, T, 5>> {
        let keys = self.plan.keys;
        let none = self.k.rows(0, 0);
        if block < self.len {
            let count = keys.min(self.len - block);
            let [k, v] = [self.k, self.v].map(|rows| rows.rows(block, count));
            return Some(Ahead::new([none, none, none, k, v]));
        }
        let next = next.as_ref()?;
        let count = keys.min(next.len);
        let [k, v] = [next.k, next.v].map(|rows| rows.rows(0, count));
        let head = next.kv_head * next.group();
        let [q, out, dout] = [inputs.q, inputs.out, inputs.dout]
            .map(|rows| rows.head(next.start, count, head, next.plan.dim));
        Some(Ahead::new([q, out, dout, k, v]))
    }
}
