//! The gradient rule of each operation: one exhaustive match, without a default arm.

use graft_tensor::ops::random::Key;
use graft_tensor::ops::{self, Activation, Binary, Reduce, Unary, loss, norm, rope};
use graft_tensor::{Category, DType, Memory, Shape, Tensor};

use crate::error::Result;
use crate::forward::Randomness;
use crate::op::Op;

/// What a node kept of its forward; which tensors those are, [`Op::saves`] says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Saved {
    /// By position of the input
    pub inputs: Vec<Option<Tensor>>,
    /// Positions of the inputs that are rebuilt by the nodes that computed them
    pub rebuilt: Vec<usize>,
    pub output: Option<Tensor>,
    pub extras: Vec<Tensor>,
    /// What arrives is the gradient of what the activation was applied to
    pub sloped: bool,
}

impl Saved {
    /// True if the node, which reads `inputs`, was kept without the result of node `k`.
    pub fn rebuilds(&self, inputs: &[usize], k: usize) -> bool {
        self.rebuilt.iter().any(|&i| inputs[i] == k)
    }

    pub fn input(&self, i: usize) -> &Tensor {
        self.inputs[i]
            .as_ref()
            .expect("Op::saves names every input that the rule reads")
    }

    fn output(&self) -> &Tensor {
        self.output
            .as_ref()
            .expect("Op::saves names the output where the rule reads it")
    }
}

/// Shapes and types around a node, known without its values.
pub(crate) struct Around<'a> {
    pub shapes: &'a [Shape],
    pub dtypes: &'a [DType],
    pub needs: &'a [bool],
    /// Which inputs are parameters
    pub parameters: &'a [bool],
}

impl Around<'_> {
    /// Where the gradient of input `i` belongs: that of a parameter outlasts the pass, and lies from its first byte on where
    /// the allocator has gradients, out of the way of what comes and goes.
    fn memory(&self, m: &Memory, i: usize) -> Memory {
        match self.parameters[i] {
            true => m.with(Category::Gradients),
            false => m.clone(),
        }
    }
}

/// The gradients of `op`'s inputs, one for each input that needs one. That of the first is added to
/// `sum`, what has arrived of it so far, if there is one: [`Op::adds`] says for which operations there may be. That
/// of a linear layer's first input, if that is the activation of something, may go `through` it.
pub(crate) fn backward(
    m: &Memory,
    random: Randomness,
    op: &Op,
    saved: &mut Saved,
    dy: Tensor,
    sum: Option<Tensor>,
    through: Option<(Activation, Tensor)>,
    around: &Around,
) -> Result<Vec<Option<Tensor>>> {
    let Around {
        shapes,
        dtypes,
        needs,
        ..
    } = *around;
    let need = |i: usize| needs.get(i).copied().unwrap_or(false);
    /// The gradient if it is needed, computed only then.
    fn when(need: bool, gradient: impl FnOnce() -> Result<Tensor>) -> Result<Option<Tensor>> {
        need.then(gradient).transpose()
    }
    let owned = dy;
    let dy = &owned;
    Ok(match op {
        Op::Leaf | Op::Detach | Op::ArgMax => vec![None; needs.len()],
        Op::Linear { linear, bias } => {
            linear_backward(m, linear, *bias, saved, owned, sum, through, around)?
        }
        Op::Lora { lora, bias, stream } => {
            let key = random.key(*stream);
            lora_backward(m, lora, *bias, key, saved, owned, sum, around)?
        }
        Op::MatMul => vec![
            when(need(0), || {
                let da = ops::matmul(m, dy, &saved.input(1).t()?)?;
                Ok(ops::reduce_to_shape(m, &da, &shapes[0])?)
            })?,
            when(need(1), || {
                let db = ops::matmul(m, &saved.input(0).t()?, dy)?;
                Ok(ops::reduce_to_shape(m, &db, &shapes[1])?)
            })?,
        ],
        Op::Binary(kind) => binary(m, *kind, saved, dy, shapes, needs)?,
        Op::Affine { scale, .. } => vec![Some(ops::affine(m, dy, *scale, 0.0)?)],
        Op::Unary(kind) => {
            let kept = saved.output.as_ref().or(saved.inputs[0].as_ref());
            vec![Some(ops::unary_backward(m, *kind, kept, dy)?)]
        }
        Op::Glu(kind) => {
            let (gate, up) = (saved.input(0), saved.input(1));
            ops::glu_backward(m, *kind, gate, up, dy, [need(0), need(1)])?.into()
        }
        Op::Reduce { kind, axis, .. } => {
            let kept = kept_shape(&shapes[0], *axis)?;
            let dy = dy.contiguous(m)?.reshape(&kept)?;
            vec![Some(match kind {
                Reduce::Sum => dy.expand(&shapes[0])?,
                Reduce::Mean => {
                    let share = 1.0 / shapes[0][*axis] as f64;
                    ops::affine(m, &dy, share, 0.0)?.expand(&shapes[0])?
                }
                Reduce::Max => {
                    let y = saved.output().reshape(&kept)?;
                    ops::max_backward(m, saved.input(0), &y, &dy, *axis)?
                }
            })]
        }
        Op::SumAll => vec![Some(ops::cast(m, dy, dtypes[0])?.expand(&shapes[0])?)],
        Op::Reshape(_) => vec![Some(dy.contiguous(m)?.reshape(&shapes[0])?)],
        Op::Permute(order) => {
            let mut inverse = vec![0; order.rank()];
            for (to, &from) in order.iter().enumerate() {
                inverse[from] = to;
            }
            vec![Some(dy.permute(&inverse)?)]
        }
        // The range itself: the tape puts it where it belongs, beside those of other ranges.
        Op::Narrow { .. } => vec![Some(dy.clone())],
        Op::Expand(_) => vec![Some(ops::reduce_to_shape(m, dy, &shapes[0])?)],
        Op::Concat { axis } => {
            let mut start = 0;
            let mut parts = Vec::with_capacity(shapes.len());
            for (i, shape) in shapes.iter().enumerate() {
                let length = shape[*axis];
                parts.push(when(need(i), || Ok(dy.narrow(*axis, start, length)?))?);
                start += length;
            }
            parts
        }
        Op::GatherRows => {
            let rows = shapes[0][0];
            let (memory, index) = (around.memory(m, 0), saved.input(1));
            let dtable = match sum {
                Some(sum) => ops::add_rows(&memory, sum, dy, index)?,
                None => ops::scatter_add_rows(&memory, dy, index, rows)?,
            };
            vec![Some(dtable), None]
        }
        Op::LayerNorm {
            dropout,
            stream,
            residual,
            weight,
            bias,
            ..
        } => {
            let dropout = random.dropout(*dropout, *stream);
            let at_weight = 1 + usize::from(*residual);
            let at_bias = at_weight + usize::from(*weight);
            let needs_input = need(0) || (*residual && need(1));
            let needs_weight = *weight && need(at_weight);
            let needs_bias = *bias && need(at_bias);
            let mut gradients = vec![None; needs.len()];
            if !needs_input && !needs_weight {
                // Nothing was kept for the bias alone.
                if needs_bias {
                    let dtype = dtypes[at_bias];
                    gradients[at_bias] = Some(norm::layer_norm_bias_gradient(m, dy, dtype)?);
                }
                return Ok(gradients);
            }
            let (mean, scale) = (&saved.extras[0], &saved.extras[1]);
            let s = saved.extras.get(2).unwrap_or_else(|| saved.input(0));
            let w = weight.then(|| saved.input(at_weight));
            let wanted = norm::Wanted {
                ds: (need(0) && dropout.is_none()) || (*residual && need(1)),
                dx: dropout.filter(|_| need(0)),
                dweight: needs_weight.then(|| dtypes[at_weight]),
                dbias: needs_bias.then(|| dtypes[at_bias]),
            };
            let found = norm::layer_norm_backward(m, s, w, mean, scale, dy, wanted, sum)?;
            gradients[0] = match dropout {
                Some(_) => found.dx,
                None => found.ds.clone().filter(|_| need(0)),
            };
            if *residual && need(1) {
                gradients[1] = found.ds;
            }
            if needs_weight {
                gradients[at_weight] = found.dweight;
            }
            if needs_bias {
                gradients[at_bias] = found.dbias;
            }
            gradients
        }
        Op::RmsNorm {
            offset, residual, ..
        } => {
            let at_weight = 1 + usize::from(*residual);
            let needs_input = need(0) || (*residual && need(1));
            let s = saved.extras.get(1).unwrap_or_else(|| saved.input(0));
            let (weight, scale) = (saved.input(at_weight), &saved.extras[0]);
            let wanted = [needs_input, need(at_weight)];
            let [dx, dweight] = norm::rms_norm_backward(m, s, weight, *offset, scale, dy, wanted)?;
            let mut gradients = vec![None; needs.len()];
            if *residual && need(1) {
                gradients[1] = dx.clone();
            }
            gradients[0] = dx.filter(|_| need(0));
            gradients[at_weight] = dweight;
            gradients
        }
        Op::L2Normalize { .. } => vec![Some(norm::l2_normalize_backward(
            m,
            saved.output(),
            &saved.extras[0],
            dy,
        )?)],
        Op::Softmax { log } => vec![Some(norm::softmax_backward(m, saved.output(), dy, *log)?)],
        Op::Attention { attention, stream } => {
            let p = random.attention(attention, *stream);
            let [dq, dk, dv] = ops::attention_backward(
                m,
                &p,
                [saved.input(0), saved.input(1), saved.input(2)],
                saved.input(3),
                saved.output(),
                &saved.extras[0],
                dy,
                [need(0), need(1), need(2)],
            )?;
            vec![dq, dk, dv, None]
        }
        Op::Rope(p) => {
            let (cos, sin, positions) = (saved.input(1), saved.input(2), saved.input(3));
            let dx = rope::rope(m, p, dy, cos, sin, positions, true)?;
            vec![Some(dx), None, None, None]
        }
        Op::Dropout { p, stream } => {
            let key = random.key(*stream);
            vec![Some(ops::dropout_backward(m, owned, *p, key)?)]
        }
        Op::Pool(kind) => {
            let x = saved.inputs[0].as_ref();
            let dx = ops::pool_backward(m, *kind, x, saved.input(1), dy)?;
            vec![Some(dx), None]
        }
        Op::CrossEntropy { smoothing } => {
            let (logits, targets) = (saved.input(0), saved.input(1));
            let lse = &saved.extras[0];
            let dlogits = loss::cross_entropy_backward(m, logits, targets, *smoothing, lse, dy)?;
            vec![Some(dlogits), None]
        }
        Op::LinearCrossEntropy {
            smoothing,
            cap,
            bias,
        } => {
            let kept = std::mem::take(&mut saved.extras);
            let (bias, at_targets) = if *bias {
                (Some(saved.input(2)), 3)
            } else {
                (None, 2)
            };
            let [dx, dweight, dbias] = loss::linear_cross_entropy_backward(
                m,
                saved.input(0),
                saved.input(1),
                bias,
                saved.input(at_targets),
                *smoothing,
                *cap,
                kept,
                dy,
                [need(0), need(1), bias.is_some() && need(2)],
            )?;
            let mut gradients = vec![dx, dweight];
            if bias.is_some() {
                gradients.push(dbias);
            }
            gradients.push(None);
            gradients
        }
        Op::BceWithLogits => {
            let (x, targets) = (saved.input(0), saved.input(1));
            vec![
                Some(loss::bce_with_logits_backward(m, x, targets, dy)?),
                None,
            ]
        }
        Op::Cast(_) => vec![Some(ops::cast(m, dy, dtypes[0])?)],
    })
}

/// The weight's gradient comes first: what it alone reads is freed before the input's gradient,
/// often the step's largest tensor, is allocated.
fn linear_backward(
    m: &Memory,
    linear: &ops::Linear,
    bias: bool,
    saved: &mut Saved,
    mut dy: Tensor,
    sum: Option<Tensor>,
    through: Option<(Activation, Tensor)>,
    around: &Around,
) -> Result<Vec<Option<Tensor>>> {
    let need = |i: usize| around.needs[i];
    let mut gradients = vec![None; around.needs.len()];
    if let Some(kind) = linear.activation.filter(|_| !saved.sloped) {
        dy = ops::activation_backward(m, kind, &saved.extras[0], dy)?;
    }
    saved.extras.clear();
    if bias && need(2) {
        gradients[2] = Some(ops::sum_to_columns(m, &dy, around.dtypes[2])?);
    }
    if need(1) {
        let (layout, x, dtype) = (linear.layout, saved.input(0), around.dtypes[1]);
        let memory = around.memory(m, 1);
        gradients[1] = Some(ops::weight_gradient(&memory, layout, x, &dy, dtype)?);
        saved.inputs[0] = None;
    }
    if need(0) {
        let weight = saved.input(1);
        gradients[0] = Some(match through {
            Some((kind, pre)) => ops::input_gradient_through(m, linear, weight, &dy, &pre, kind)?,
            None => ops::input_gradient(m, linear, weight, &dy, &around.shapes[0], sum)?,
        });
    }
    Ok(gradients)
}

/// As [`linear_backward`]; what the adapter saw of the input is freed before the input's gradient is allocated.
fn lora_backward(
    m: &Memory,
    lora: &ops::Lora,
    bias: bool,
    key: Key,
    saved: &mut Saved,
    mut dy: Tensor,
    sum: Option<Tensor>,
    around: &Around,
) -> Result<Vec<Option<Tensor>>> {
    let need = |i: usize| around.needs[i];
    let (a, b) = (2 + usize::from(bias), 3 + usize::from(bias));
    let mut gradients = vec![None; around.needs.len()];
    if let Some(kind) = lora.linear.activation {
        dy = ops::activation_backward(m, kind, &saved.extras[0], dy)?;
        saved.extras.remove(0);
    }
    if bias && need(2) {
        gradients[2] = Some(ops::sum_to_columns(m, &dy, around.dtypes[2])?);
    }
    if need(1) {
        let (layout, x, dtype) = (lora.linear.layout, saved.input(0), around.dtypes[1]);
        let memory = around.memory(m, 1);
        gradients[1] = Some(ops::weight_gradient(&memory, layout, x, &dy, dtype)?);
    }
    let low = match need(0) || need(a) {
        true => Some(ops::lora_low_gradient(m, lora, saved.input(b), &dy)?),
        false => None,
    };
    let layout = ops::WeightLayout::OutIn;
    if need(b) {
        let (inner, dtype) = (&saved.extras[0], around.dtypes[b]);
        let memory = around.memory(m, b);
        gradients[b] = Some(ops::weight_gradient(&memory, layout, inner, &dy, dtype)?);
    }
    saved.extras.clear();
    if let Some(low) = low.as_ref().filter(|_| need(a)) {
        let seen = ops::lora_input(m, lora, saved.input(0), key)?;
        let (memory, dtype) = (around.memory(m, a), around.dtypes[a]);
        gradients[a] = Some(ops::weight_gradient(&memory, layout, &seen, low, dtype)?);
    }
    saved.inputs[0] = None;
    if let Some(low) = low.filter(|_| need(0)) {
        let weights = [saved.input(1), saved.input(a)];
        let shape = &around.shapes[0];
        gradients[0] = Some(ops::lora_input_gradient(
            m, lora, weights, &low, &dy, key, shape, sum,
        )?);
    }
    Ok(gradients)
}

fn binary(
    m: &Memory,
    kind: Binary,
    saved: &Saved,
    dy: &Tensor,
    shapes: &[Shape],
    needs: &[bool],
) -> Result<Vec<Option<Tensor>>> {
    let fit = |gradient: Tensor, i: usize| -> Result<Option<Tensor>> {
        Ok(Some(ops::reduce_to_shape(m, &gradient, &shapes[i])?))
    };
    let mut gradients = vec![None, None];
    match kind {
        Binary::Add | Binary::Sub => {
            if needs[0] {
                gradients[0] = fit(dy.clone(), 0)?;
            }
            if needs[1] {
                let reduced = ops::reduce_to_shape(m, dy, &shapes[1])?;
                gradients[1] = Some(match kind {
                    Binary::Sub => ops::affine(m, &reduced, -1.0, 0.0)?,
                    _ => reduced,
                });
            }
        }
        Binary::Mul => {
            // The smaller one first: a sum of products, which are gone before the other one takes as much room.
            let first = usize::from(shapes[1].count() < shapes[0].count());
            for i in [first, 1 - first] {
                if needs[i] {
                    let product = ops::binary(m, Binary::Mul, dy, saved.input(1 - i))?;
                    gradients[i] = fit(product, i)?;
                }
            }
        }
        Binary::Div => {
            // da = dy / b; db = -da * y
            let da = ops::binary(m, Binary::Div, dy, saved.input(1))?;
            if needs[1] {
                let product = ops::binary(m, Binary::Mul, &da, saved.output())?;
                gradients[1] = fit(ops::unary(m, Unary::Neg, &product)?, 1)?;
            }
            if needs[0] {
                gradients[0] = fit(da, 0)?;
            }
        }
        Binary::Max | Binary::Min => {
            // The first input takes the gradient where it is the one that was chosen, ties included.
            let (a, b) = (saved.input(0), saved.input(1));
            let chosen = ops::elementwise::selects_first(m, kind, a, b)?;
            if needs[0] {
                gradients[0] = fit(ops::binary(m, Binary::Mul, dy, &chosen)?, 0)?;
            }
            if needs[1] {
                let other = ops::affine(m, &chosen, -1.0, 1.0)?;
                gradients[1] = fit(ops::binary(m, Binary::Mul, dy, &other)?, 1)?;
            }
        }
    }
    Ok(gradients)
}

/// The shape with dimension `axis` of length 1.
fn kept_shape(shape: &Shape, axis: usize) -> Result<Shape> {
    let mut dims = shape.to_vec();
    dims[axis] = 1;
    Ok(Shape::new(&dims)?)
}
