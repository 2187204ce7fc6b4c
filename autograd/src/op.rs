//! The operations that a tape can hold, as plain data.
//!
//! Tensors are never part of an operation: everything that it reads, integers included, is an input
//! on the tape. That is what lets a program be printed, compared and replayed with other inputs.

use graft_tensor::ops::attention::Attention;
use graft_tensor::ops::rope::Rope;
use graft_tensor::ops::{Binary, Glu, Linear, Lora, Needs, Pool, Reduce, Unary};
use graft_tensor::{DType, Shape};
use smallvec::SmallVec;

/// Something for each input of an operation: held inline, as none but [`Op::Concat`] has more than five.
pub(crate) type Inputs<T> = SmallVec<[T; 6]>;

/// One operation, without its inputs. The inputs of each, in order, stand in its comment; those in
/// parentheses are there if the field of that name says so.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Op {
    /// A value from outside the tape. Inputs: none.
    Leaf,
    /// The same value, through which no gradient flows. Inputs: x.
    Detach,
    /// `activation(x·w + bias)`. Inputs: x, weight, (bias).
    Linear {
        /// Weight layout and activation
        linear: Linear,
        /// There is a bias
        bias: bool,
    },
    /// `activation(x·w + bias + scale * dropout(x)·aᵀ·bᵀ)`: a linear layer with a low-rank adapter. Inputs: x, weight,
    /// (bias), a, b.
    Lora {
        /// The layer, and the adapter's scale and dropout
        lora: Lora,
        /// There is a bias
        bias: bool,
        /// Number of the random stream, if there is dropout
        stream: u64,
    },
    /// Batched matrix product. Inputs: a, b.
    MatMul,
    /// Two elements to one, with broadcasting. Inputs: a, b.
    Binary(Binary),
    /// `x * scale + shift`. Inputs: x.
    Affine {
        /// Factor
        scale: f64,
        /// Summand
        shift: f64,
    },
    /// A function of each element. Inputs: x.
    Unary(Unary),
    /// Gated unit. Inputs: gate, up.
    Glu(Glu),
    /// Sum, mean or maximum along one dimension. Inputs: x.
    Reduce {
        /// Which
        kind: Reduce,
        /// Dimension
        axis: usize,
        /// It stays, with length 1
        keep: bool,
    },
    /// Sum of all elements. Inputs: x.
    SumAll,
    /// Index of each row's maximum; has no backward. Inputs: x.
    ArgMax,
    /// Another shape over the same elements. Inputs: x.
    Reshape(Shape),
    /// Dimensions in another order. Inputs: x.
    Permute(Shape),
    /// A range of one dimension. Inputs: x.
    Narrow {
        /// Dimension
        axis: usize,
        /// First index
        start: usize,
        /// Number of indices
        length: usize,
    },
    /// Repetition along dimensions of length 1. Inputs: x.
    Expand(Shape),
    /// One after the other along a dimension. Inputs: any number.
    Concat {
        /// Dimension
        axis: usize,
    },
    /// Rows of a table by index. Inputs: table, index.
    GatherRows,
    /// Layer norm of dropout(x) + residual. Inputs: x, (residual), (weight), (bias).
    LayerNorm {
        /// Added to the variance
        eps: f64,
        /// Probability of a zero in place of an element of x
        dropout: f64,
        /// Number of the random stream, if there is dropout
        stream: u64,
        /// There is a residual
        residual: bool,
        /// There is a weight
        weight: bool,
        /// There is a bias
        bias: bool,
    },
    /// RMS norm of x + residual. Inputs: x, (residual), weight.
    RmsNorm {
        /// Added to the mean square
        eps: f64,
        /// Added to the weight
        offset: f64,
        /// There is a residual
        residual: bool,
    },
    /// Rows scaled to unit length. Inputs: x.
    L2Normalize {
        /// Least length that is divided by
        eps: f64,
    },
    /// Softmax of each row, or its logarithm. Inputs: x.
    Softmax {
        /// The logarithm
        log: bool,
    },
    /// Attention within packed sequences. Inputs: q, k, v, offsets.
    Attention {
        /// Heads, masks, scale and dropout; its key is drawn from the tape
        attention: Attention,
        /// Number of the random stream, if there is dropout
        stream: u64,
    },
    /// Rotary position embedding. Inputs: x, cos, sin, positions.
    Rope(Rope),
    /// Dropout. Inputs: x.
    Dropout {
        /// Probability of a zero
        p: f64,
        /// Number of the random stream
        stream: u64,
    },
    /// One row per packed sequence. Inputs: x, offsets.
    Pool(Pool),
    /// Summed cross-entropy. Inputs: logits, targets.
    CrossEntropy {
        /// Label smoothing
        smoothing: f64,
    },
    /// Summed cross-entropy of a linear layer, by chunks of classes. Inputs: x, weight, (bias),
    /// targets.
    LinearCrossEntropy {
        /// Label smoothing
        smoothing: f64,
        /// Soft cap of the logits
        cap: Option<f64>,
        /// There is a bias
        bias: bool,
    },
    /// Summed binary cross-entropy of logits. Inputs: x, targets.
    BceWithLogits,
    /// Another float type. Inputs: x.
    Cast(DType),
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident $pattern:tt),* $(,)?) => {
        /// The operations by name alone, for tables that must list every one.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        pub enum OpKind {
            $(#[doc = concat!("[`Op::", stringify!($name), "`]")] $name,)*
        }

        impl OpKind {
            /// Every kind of operation.
            pub const ALL: &[OpKind] = &[$(OpKind::$name,)*];
        }

        impl Op {
            /// The operation's name alone.
            pub fn kind(&self) -> OpKind {
                match self {
                    $(kinds!(@pattern $name $pattern) => OpKind::$name,)*
                }
            }
        }
    };
    (@pattern $name:ident ()) => { Op::$name };
    (@pattern $name:ident (_)) => { Op::$name(_) };
    (@pattern $name:ident {}) => { Op::$name { .. } };
}

kinds! {
    Leaf (), Detach (), Linear {}, Lora {}, MatMul (), Binary (_), Affine {}, Unary (_), Glu (_),
    Reduce {}, SumAll (), ArgMax (), Reshape (_), Permute (_), Narrow {}, Expand (_), Concat {},
    GatherRows (), LayerNorm {}, RmsNorm {}, L2Normalize {}, Softmax {}, Attention {}, Rope (_),
    Dropout {}, Pool (_), CrossEntropy {}, LinearCrossEntropy {}, BceWithLogits (), Cast (_),
}

/// What an operation keeps for its backward pass.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Saves {
    /// Which inputs, by position
    pub inputs: Vec<usize>,
    /// Its result
    pub output: bool,
    /// What its forward computed beside the result (statistics, pre-activations)
    pub extras: bool,
}

impl Op {
    /// True if a gradient can flow through the operation. [`Op::Detach`] has one: none flows on.
    pub fn has_backward(&self) -> bool {
        self.kind() != OpKind::ArgMax
    }

    /// True if backward adds the gradient of the first input to what has arrived of it, where it is
    /// written, instead of leaving that sum to a pass of its own.
    pub fn adds(&self) -> bool {
        match self {
            Op::LayerNorm {
                dropout, residual, ..
            } => *dropout == 0.0 && !residual,
            _ => matches!(self, Op::Linear { .. } | Op::Lora { .. } | Op::GatherRows),
        }
    }

    /// True if the result can be had again, at the price of one pass over memory, from what is kept
    /// for the backward pass if that is anything. A later operation that saves such a result as
    /// its input does not keep it: it is computed again when backward gets there.
    pub fn can_rebuild(&self) -> bool {
        match self {
            Op::Linear { linear, .. } => linear.activation.is_some(),
            Op::Lora { lora, .. } => lora.linear.activation.is_some(),
            Op::LayerNorm { .. } | Op::RmsNorm { .. } | Op::Glu(_) => true,
            Op::Unary(kind) => kind.backward_needs() == Needs::Input,
            Op::Leaf
            | Op::Detach
            | Op::MatMul
            | Op::Binary(_)
            | Op::Affine { .. }
            | Op::Reduce { .. }
            | Op::SumAll
            | Op::ArgMax
            | Op::Reshape(_)
            | Op::Permute(_)
            | Op::Narrow { .. }
            | Op::Expand(_)
            | Op::Concat { .. }
            | Op::GatherRows
            | Op::L2Normalize { .. }
            | Op::Softmax { .. }
            | Op::Attention { .. }
            | Op::Rope(_)
            | Op::Dropout { .. }
            | Op::Pool(_)
            | Op::CrossEntropy { .. }
            | Op::LinearCrossEntropy { .. }
            | Op::BceWithLogits
            | Op::Cast(_) => false,
        }
    }

    /// What must be kept, given which inputs need a gradient. This alone decides what a step costs
    /// in memory: what no needed gradient reads is not kept. Of the results that an operation can
    /// rebuild, not even that much: see [`Op::can_rebuild`].
    pub fn saves(&self, needs: &[bool]) -> Saves {
        let need = |i: usize| needs.get(i).copied().unwrap_or(false);
        let none = Saves::default();
        if !needs.contains(&true) {
            return none;
        }
        let inputs = |list: &[(bool, usize)]| Saves {
            inputs: list
                .iter()
                .filter(|(keep, _)| *keep)
                .map(|&(_, i)| i)
                .collect(),
            ..Saves::default()
        };
        match self {
            Op::Leaf | Op::Detach | Op::ArgMax => none,
            // dx reads the weight, dw reads x, and the activation's backward the pre-activation.
            Op::Linear { linear, .. } => Saves {
                extras: linear.activation.is_some(),
                ..inputs(&[(need(1), 0), (need(0), 1)])
            },
            // The adapter's inner values are kept too, for what b alone needs: they are a small part of x.
            Op::Lora { lora, bias, .. } => {
                let (a, b) = (2 + usize::from(*bias), 3 + usize::from(*bias));
                Saves {
                    extras: lora.linear.activation.is_some() || need(b),
                    ..inputs(&[
                        (need(1) || need(a), 0),
                        (need(0), 1),
                        (need(0), a),
                        (need(0) || need(a), b),
                    ])
                }
            }
            Op::MatMul => inputs(&[(need(1), 0), (need(0), 1)]),
            Op::Binary(kind) => match kind {
                Binary::Add | Binary::Sub => none,
                Binary::Mul => inputs(&[(need(1), 0), (need(0), 1)]),
                // da = dy / b; db = -dy * y / b
                Binary::Div => Saves {
                    output: need(1),
                    ..inputs(&[(true, 1)])
                },
                Binary::Max | Binary::Min => inputs(&[(true, 0), (true, 1)]),
            },
            Op::Affine { .. } | Op::SumAll | Op::Cast(_) => none,
            Op::Unary(kind) => match kind.backward_needs() {
                Needs::Input => inputs(&[(true, 0)]),
                Needs::Output => Saves {
                    output: true,
                    ..none
                },
                Needs::Neither => none,
            },
            Op::Glu(_) => inputs(&[(true, 0), (true, 1)]),
            Op::Reduce { kind, .. } => match kind {
                Reduce::Max => Saves {
                    output: true,
                    ..inputs(&[(true, 0)])
                },
                Reduce::Sum | Reduce::Mean => none,
            },
            Op::Reshape(_)
            | Op::Permute(_)
            | Op::Narrow { .. }
            | Op::Expand(_)
            | Op::Concat { .. }
            | Op::Dropout { .. } => none,
            Op::GatherRows => inputs(&[(true, 1)]),
            Op::LayerNorm {
                dropout,
                residual,
                weight,
                bias,
                ..
            } => {
                let first_weight = 1 + usize::from(*residual);
                let input = need(0) || (*residual && need(1));
                let statistics = input || (*weight && need(first_weight));
                // The backward pass has no use for the bias: `rebuild` has.
                Saves {
                    extras: statistics,
                    ..inputs(&[
                        (statistics && !residual && *dropout == 0.0, 0),
                        (statistics && *weight, first_weight),
                        (statistics && *bias, first_weight + usize::from(*weight)),
                    ])
                }
            }
            Op::RmsNorm { residual, .. } => Saves {
                extras: true,
                ..inputs(&[(!residual, 0), (true, 1 + usize::from(*residual))])
            },
            Op::L2Normalize { .. } => Saves {
                output: true,
                extras: true,
                ..none
            },
            Op::Softmax { .. } => Saves {
                output: true,
                ..none
            },
            Op::Attention { .. } => Saves {
                output: true,
                extras: true,
                ..inputs(&[(true, 0), (true, 1), (true, 2), (true, 3)])
            },
            Op::Rope(_) => inputs(&[(true, 1), (true, 2), (true, 3)]),
            Op::Pool(kind) => inputs(&[(*kind == Pool::Max, 0), (true, 1)]),
            Op::CrossEntropy { .. } => Saves {
                extras: true,
                ..inputs(&[(true, 0), (true, 1)])
            },
            Op::LinearCrossEntropy { bias, .. } => Saves {
                extras: true,
                ..inputs(&[(true, 0), (true, 1), (true, 2), (*bias, 3)])
            },
            Op::BceWithLogits => inputs(&[(true, 0), (true, 1)]),
        }
    }
}
