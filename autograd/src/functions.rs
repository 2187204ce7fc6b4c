//! The operations as methods of the tape. Shapes and meanings are those of `graft_tensor::ops`.

use graft_tensor::ops::attention::Attention;
use graft_tensor::ops::random::Key;
use graft_tensor::ops::rope::Rope;
use graft_tensor::ops::{Activation, Binary, Glu, Linear, Lora, Pool, Reduce, Unary, WeightLayout};
use graft_tensor::{DType, Shape};

use crate::error::Result;
use crate::op::{Inputs, Op};
use crate::tape::{Tape, Var};

impl Tape {
    /// `activation(x·w + bias)` over the last dimension.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn linear(
        &mut self,
        x: &Var,
        weight: &Var,
        bias: Option<&Var>,
        layout: WeightLayout,
        activation: Option<Activation>,
    ) -> Result<Var> {
        let linear = Linear { layout, activation };
        let op = Op::Linear {
            linear,
            bias: bias.is_some(),
        };
        let inputs: Inputs<&Var> = [x, weight].into_iter().chain(bias).collect();
        self.record(op, &inputs)
    }

    /// `activation(x·w + bias + scale * dropout(x)·aᵀ·bᵀ)` over the last dimension, with `adapter` as `[a, b]`.
    ///
    /// # Errors
    /// Shapes that do not fit, a dropout outside `[0, 1)`.
    pub fn lora(
        &mut self,
        x: &Var,
        weight: &Var,
        bias: Option<&Var>,
        adapter: [&Var; 2],
        lora: Lora,
    ) -> Result<Var> {
        let op = Op::Lora {
            lora,
            bias: bias.is_some(),
            stream: match lora.dropout {
                0.0 => 0,
                _ => self.next_stream(),
            },
        };
        let inputs: Inputs<&Var> = [x, weight].into_iter().chain(bias).chain(adapter).collect();
        self.record(op, &inputs)
    }

    /// Batched matrix product.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn matmul(&mut self, a: &Var, b: &Var) -> Result<Var> {
        self.record(Op::MatMul, &[a, b])
    }

    /// Two elements to one, with broadcasting.
    ///
    /// # Errors
    /// Shapes that do not broadcast.
    pub fn binary(&mut self, kind: Binary, a: &Var, b: &Var) -> Result<Var> {
        self.record(Op::Binary(kind), &[a, b])
    }

    /// `a + b`.
    ///
    /// # Errors
    /// Shapes that do not broadcast.
    pub fn add(&mut self, a: &Var, b: &Var) -> Result<Var> {
        self.binary(Binary::Add, a, b)
    }

    /// `a - b`.
    ///
    /// # Errors
    /// Shapes that do not broadcast.
    pub fn sub(&mut self, a: &Var, b: &Var) -> Result<Var> {
        self.binary(Binary::Sub, a, b)
    }

    /// `a * b`.
    ///
    /// # Errors
    /// Shapes that do not broadcast.
    pub fn mul(&mut self, a: &Var, b: &Var) -> Result<Var> {
        self.binary(Binary::Mul, a, b)
    }

    /// `a / b`.
    ///
    /// # Errors
    /// Shapes that do not broadcast.
    pub fn div(&mut self, a: &Var, b: &Var) -> Result<Var> {
        self.binary(Binary::Div, a, b)
    }

    /// `x * scale + shift`.
    ///
    /// # Errors
    /// A type that is no float.
    pub fn affine(&mut self, x: &Var, scale: f64, shift: f64) -> Result<Var> {
        self.record(Op::Affine { scale, shift }, &[x])
    }

    /// `x * by`.
    ///
    /// # Errors
    /// A type that is no float.
    pub fn scale(&mut self, x: &Var, by: f64) -> Result<Var> {
        self.affine(x, by, 0.0)
    }

    /// A function of each element.
    ///
    /// # Errors
    /// A type that is no float.
    pub fn unary(&mut self, kind: Unary, x: &Var) -> Result<Var> {
        self.record(Op::Unary(kind), &[x])
    }

    /// `act(gate) * up`.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn glu(&mut self, kind: Glu, gate: &Var, up: &Var) -> Result<Var> {
        self.record(Op::Glu(kind), &[gate, up])
    }

    /// Sum, mean or maximum along a dimension, which stays with length 1 if `keep`.
    ///
    /// # Errors
    /// A dimension that does not exist.
    pub fn reduce(&mut self, kind: Reduce, x: &Var, axis: usize, keep: bool) -> Result<Var> {
        self.record(Op::Reduce { kind, axis, keep }, &[x])
    }

    /// The sum of all elements, a scalar.
    ///
    /// # Errors
    /// A type that is no float.
    pub fn sum_all(&mut self, x: &Var) -> Result<Var> {
        self.record(Op::SumAll, &[x])
    }

    /// The index of each row's maximum; no gradient may pass.
    ///
    /// # Errors
    /// Rows without elements; an input that a trainable parameter leads to.
    pub fn argmax(&mut self, x: &Var) -> Result<Var> {
        self.record(Op::ArgMax, &[x])
    }

    /// The same value, through which no gradient flows.
    ///
    /// # Errors
    /// None.
    pub fn detach(&mut self, x: &Var) -> Result<Var> {
        self.record(Op::Detach, &[x])
    }

    /// Another shape over the same elements.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn reshape(&mut self, x: &Var, shape: &[usize]) -> Result<Var> {
        self.record(Op::Reshape(Shape::new(shape)?), &[x])
    }

    /// Dimensions in another order.
    ///
    /// # Errors
    /// An order that does not name each dimension once.
    pub fn permute(&mut self, x: &Var, order: &[usize]) -> Result<Var> {
        self.record(Op::Permute(Shape::new(order)?), &[x])
    }

    /// `length` indices of a dimension from `start`.
    ///
    /// # Errors
    /// A range outside the dimension.
    pub fn narrow(&mut self, x: &Var, axis: usize, start: usize, length: usize) -> Result<Var> {
        let op = Op::Narrow {
            axis,
            start,
            length,
        };
        self.record(op, &[x])
    }

    /// Repetition along dimensions of length 1.
    ///
    /// # Errors
    /// A shape that this one does not broadcast to.
    pub fn expand(&mut self, x: &Var, shape: &[usize]) -> Result<Var> {
        self.record(Op::Expand(Shape::new(shape)?), &[x])
    }

    /// One after the other along a dimension.
    ///
    /// # Errors
    /// Other dimensions that differ.
    pub fn concat(&mut self, parts: &[&Var], axis: usize) -> Result<Var> {
        self.record(Op::Concat { axis }, parts)
    }

    /// Rows of `table` by `index`: an embedding, or a selection of tokens.
    ///
    /// # Errors
    /// An index outside the table.
    pub fn gather_rows(&mut self, table: &Var, index: &Var) -> Result<Var> {
        self.record(Op::GatherRows, &[table, index])
    }

    /// Layer norm of `x + residual`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn layer_norm(
        &mut self,
        x: &Var,
        residual: Option<&Var>,
        weight: Option<&Var>,
        bias: Option<&Var>,
        eps: f64,
    ) -> Result<Var> {
        self.layer_norm_dropped(x, 0.0, residual, weight, bias, eps)
    }

    /// Layer norm of `dropout(x) + residual`, with the mask that [`Tape::dropout`] would have drawn.
    ///
    /// # Errors
    /// Shapes that do not fit, a probability outside `[0, 1)`.
    pub fn layer_norm_dropped(
        &mut self,
        x: &Var,
        dropout: f64,
        residual: Option<&Var>,
        weight: Option<&Var>,
        bias: Option<&Var>,
        eps: f64,
    ) -> Result<Var> {
        let op = Op::LayerNorm {
            eps,
            dropout,
            stream: match dropout {
                0.0 => 0,
                _ => self.next_stream(),
            },
            residual: residual.is_some(),
            weight: weight.is_some(),
            bias: bias.is_some(),
        };
        let inputs: Inputs<&Var> = [x]
            .into_iter()
            .chain(residual)
            .chain(weight)
            .chain(bias)
            .collect();
        self.record(op, &inputs)
    }

    /// RMS norm of `x + residual`, with `weight + offset`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn rms_norm(
        &mut self,
        x: &Var,
        residual: Option<&Var>,
        weight: &Var,
        offset: f64,
        eps: f64,
    ) -> Result<Var> {
        let op = Op::RmsNorm {
            eps,
            offset,
            residual: residual.is_some(),
        };
        let inputs: Inputs<&Var> = [x].into_iter().chain(residual).chain([weight]).collect();
        self.record(op, &inputs)
    }

    /// Rows scaled to unit length.
    ///
    /// # Errors
    /// A tensor without dimensions.
    pub fn l2_normalize(&mut self, x: &Var, eps: f64) -> Result<Var> {
        self.record(Op::L2Normalize { eps }, &[x])
    }

    /// Softmax of each row.
    ///
    /// # Errors
    /// A tensor without dimensions.
    pub fn softmax(&mut self, x: &Var) -> Result<Var> {
        self.record(Op::Softmax { log: false }, &[x])
    }

    /// Logarithm of the softmax of each row.
    ///
    /// # Errors
    /// A tensor without dimensions.
    pub fn log_softmax(&mut self, x: &Var) -> Result<Var> {
        self.record(Op::Softmax { log: true }, &[x])
    }

    /// Attention within packed sequences. `attention.key` is ignored: the tape draws one.
    ///
    /// # Errors
    /// Shapes, offsets or options that do not fit.
    pub fn attention(
        &mut self,
        attention: &Attention,
        q: &Var,
        k: &Var,
        v: &Var,
        offsets: &Var,
    ) -> Result<Var> {
        let stream = if attention.dropout > 0.0 {
            self.next_stream()
        } else {
            0
        };
        let op = Op::Attention {
            // The stream's number stands for the key.
            attention: Attention {
                key: Key::new(0, 0, 0),
                ..*attention
            },
            stream,
        };
        self.record(op, &[q, k, v, offsets])
    }

    /// Rotary position embedding.
    ///
    /// # Errors
    /// Sizes that do not fit, a position outside the tables.
    pub fn rope(
        &mut self,
        rope: Rope,
        x: &Var,
        cos: &Var,
        sin: &Var,
        positions: &Var,
    ) -> Result<Var> {
        self.record(Op::Rope(rope), &[x, cos, sin, positions])
    }

    /// Dropout; with `p` of 0, `x` itself.
    ///
    /// # Errors
    /// A probability outside `[0, 1)`.
    pub fn dropout(&mut self, x: &Var, p: f64) -> Result<Var> {
        if p == 0.0 {
            return Ok(x.clone());
        }
        let stream = self.next_stream();
        self.record(Op::Dropout { p, stream }, &[x])
    }

    /// One row per packed sequence.
    ///
    /// # Errors
    /// Offsets that do not fit, a sequence without tokens.
    pub fn pool(&mut self, kind: Pool, x: &Var, offsets: &Var) -> Result<Var> {
        self.record(Op::Pool(kind), &[x, offsets])
    }

    /// Cross-entropy summed over the rows whose target is not
    /// [`IGNORE`](graft_tensor::ops::loss::IGNORE).
    ///
    /// # Errors
    /// A target outside the classes.
    pub fn cross_entropy(&mut self, logits: &Var, targets: &Var, smoothing: f64) -> Result<Var> {
        self.record(Op::CrossEntropy { smoothing }, &[logits, targets])
    }

    /// The same of a linear layer's logits, which are never held all at once; with a `cap`, of
    /// `cap * tanh(logits / cap)`.
    ///
    /// # Errors
    /// Shapes that do not fit, a target outside the classes.
    pub fn linear_cross_entropy(
        &mut self,
        x: &Var,
        weight: &Var,
        bias: Option<&Var>,
        targets: &Var,
        smoothing: f64,
        cap: Option<f64>,
    ) -> Result<Var> {
        let op = Op::LinearCrossEntropy {
            smoothing,
            cap,
            bias: bias.is_some(),
        };
        let inputs: Inputs<&Var> = [x, weight]
            .into_iter()
            .chain(bias)
            .chain([targets])
            .collect();
        self.record(op, &inputs)
    }

    /// Binary cross-entropy of logits, summed.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn bce_with_logits(&mut self, x: &Var, targets: &Var) -> Result<Var> {
        self.record(Op::BceWithLogits, &[x, targets])
    }

    /// Another float type.
    ///
    /// # Errors
    /// Types that are no floats.
    pub fn cast(&mut self, x: &Var, to: DType) -> Result<Var> {
        self.record(Op::Cast(to), &[x])
    }
}
