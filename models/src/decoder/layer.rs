//! One layer of a decoder: what it adds to the residual stream.

use graft_autograd::Var;
use graft_nn::adapters::attend;
use graft_nn::layers::{GatedMlp, LayerNorm, Linear, Mlp, RmsNorm};
use graft_nn::{Forward, Parameters};
use graft_tensor::ops::{Activation, Attention, Glu};

use super::cache::Past;
use super::names::{Names, Projections};
use super::rotary::Turns;
use crate::config::{DecoderConfig, DecoderFamily, HiddenAct, LayerKind};
use crate::encoder::trained_dropout;
use crate::error::Result;

/// Either norm.
#[derive(Clone, Debug)]
pub(super) enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
}

impl Norm {
    pub fn new(p: &mut Parameters, config: &DecoderConfig, name: &str) -> Result<Norm> {
        Self::of_width(p, config, name, config.hidden_size)
    }

    fn of_width(
        p: &mut Parameters,
        config: &DecoderConfig,
        name: &str,
        width: usize,
    ) -> Result<Norm> {
        let eps = config.norm_eps;
        Ok(match config.family {
            DecoderFamily::Gpt2 => Norm::Layer(LayerNorm::new(p, name, width, eps)?),
            // Gemma's weights are stored less one.
            DecoderFamily::Gemma2 | DecoderFamily::Gemma3 => {
                Norm::Rms(RmsNorm::with_unit_offset(p, name, width, eps)?)
            }
            DecoderFamily::Llama
            | DecoderFamily::Mistral
            | DecoderFamily::Qwen2
            | DecoderFamily::Qwen3 => Norm::Rms(RmsNorm::new(p, name, width, eps)?),
        })
    }

    /// `x [.., width]`, normalised.
    pub fn forward(&self, f: &mut Forward, x: &Var) -> Result<Var> {
        Ok(match self {
            Norm::Layer(norm) => norm.forward(f, x, None)?,
            Norm::Rms(norm) => norm.forward(f, x, None)?,
        })
    }
}

/// The projections to queries, keys and values.
#[derive(Clone, Debug)]
enum Inputs {
    /// GPT-2: one beside the other in one product
    Fused(Linear),
    Apart(Box<[Linear; 3]>),
}

/// Causal self-attention, rotary positions and norms of queries and keys included.
#[derive(Clone, Debug)]
struct DecoderAttention {
    inputs: Inputs,
    /// Of each head's query and key
    norms: Option<Box<[Norm; 2]>>,
    output: Linear,
    attention: Attention,
    kind: LayerKind,
    head_dim: usize,
    /// This layer's number
    layer: usize,
}

/// The feed-forward block.
#[derive(Clone, Debug)]
enum FeedForward {
    Plain(Mlp),
    Gated(GatedMlp),
}

/// Pre-norm transformer layer.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    attention_norm: Norm,
    attention: DecoderAttention,
    mlp_norm: Norm,
    mlp: FeedForward,
    /// Gemma: of what attention and feed-forward block give, before it is added
    output_norms: Option<Box<[Norm; 2]>>,
    dropout: f64,
}

impl Layer {
    pub fn new(
        p: &mut Parameters,
        config: &DecoderConfig,
        names: &Names,
        i: usize,
    ) -> Result<Layer> {
        let at = |name: &str| format!("{}{}.{i}.{name}", names.prefix, names.layer);
        let gemma = matches!(config.family, DecoderFamily::Gemma2 | DecoderFamily::Gemma3);
        let attention_norm = Norm::new(p, config, &at(names.attention_norm))?;
        let attention = DecoderAttention::new(p, config, names, i)?;
        let output_norm = |p: &mut Parameters, name| match gemma {
            true => Norm::new(p, config, &at(name)).map(Some),
            false => Ok(None),
        };
        let first = output_norm(p, names.attention_output_norm)?;
        let mlp_norm = Norm::new(p, config, &at(names.mlp_norm))?;
        let mlp = FeedForward::new(p, config, names, i)?;
        let second = output_norm(p, names.mlp_output_norm)?;
        Ok(Layer {
            attention_norm,
            attention,
            mlp_norm,
            mlp,
            output_norms: first.zip(second).map(|pair| Box::new(pair.into())),
            dropout: config.dropout.residual,
        })
    }

    /// `x [tokens, hidden]` to `[tokens, hidden]`. Takes `x`, so that in a frozen layer it is freed as soon as it was
    /// used for the last time.
    pub fn forward(
        &self,
        f: &mut Forward,
        x: Var,
        offsets: &Var,
        turns: Option<&Turns>,
        past: Option<&mut Past>,
    ) -> Result<Var> {
        let h = self.attention_norm.forward(f, &x)?;
        let h = self.attention.forward(f, &h, offsets, turns, past)?;
        let x = self.add(f, x, h, 0)?;
        let h = self.mlp_norm.forward(f, &x)?;
        let h = self.mlp.forward(f, &h)?;
        self.add(f, x, h, 1)
    }

    /// `x + h`, with the norm of that output and dropout on `h`.
    fn add(&self, f: &mut Forward, x: Var, mut h: Var, which: usize) -> Result<Var> {
        if let Some(norms) = &self.output_norms {
            h = norms[which].forward(f, &h)?;
        }
        let h = trained_dropout(f, &h, self.dropout)?;
        Ok(f.tape.add(&x, &h)?)
    }
}

/// A linear layer `[outputs, inputs]`, with a bias or without.
fn linear(
    p: &mut Parameters,
    config: &DecoderConfig,
    name: &str,
    [inputs, outputs]: [usize; 2],
    bias: bool,
    std: f64,
) -> Result<Linear> {
    Ok(match (config.family, bias) {
        (DecoderFamily::Gpt2, _) => Linear::conv1d(p, name, inputs, outputs, std)?,
        (_, true) => Linear::new(p, name, inputs, outputs, std)?,
        (_, false) => Linear::without_bias(p, name, inputs, outputs, std)?,
    })
}

/// The standard deviation of new weights that write to the residual stream: in GPT-2 they are smaller by the root of
/// how many there are, so that the stream's variance does not grow with the depth.
fn residual_std(config: &DecoderConfig) -> f64 {
    match config.family {
        DecoderFamily::Gpt2 => config.initializer_range / (2.0 * config.layers as f64).sqrt(),
        _ => config.initializer_range,
    }
}

impl DecoderAttention {
    fn new(
        p: &mut Parameters,
        config: &DecoderConfig,
        names: &Names,
        i: usize,
    ) -> Result<DecoderAttention> {
        let at = |name: &str| format!("{}{}.{i}.{name}", names.prefix, names.layer);
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let (width, kv_width) = (config.heads * head_dim, config.kv_heads * head_dim);
        let [input_bias, output_bias, _] = config.biases;
        let std = config.initializer_range;
        let inputs = match names.projections {
            Projections::Fused(name) => {
                let sizes = [hidden, width + 2 * kv_width];
                Inputs::Fused(linear(p, config, &at(name), sizes, input_bias, std)?)
            }
            Projections::Apart([query, key, value]) => {
                let mut project = |name: &str, outputs: usize| {
                    linear(p, config, &at(name), [hidden, outputs], input_bias, std)
                };
                Inputs::Apart(Box::new([
                    project(query, width)?,
                    project(key, kv_width)?,
                    project(value, kv_width)?,
                ]))
            }
        };
        let output_name = at(names.attention_output);
        let output_std = residual_std(config);
        let output = linear(
            p,
            config,
            &output_name,
            [width, hidden],
            output_bias,
            output_std,
        )?;
        let norms = match config.family {
            DecoderFamily::Qwen3 | DecoderFamily::Gemma3 => Some(Box::new([
                Norm::of_width(p, config, &at(names.query_norm), head_dim)?,
                Norm::of_width(p, config, &at(names.key_norm), head_dim)?,
            ])),
            _ => None,
        };
        let kind = config.kinds[i];
        let divisor = match config.scale_by_layer {
            true => (i + 1) as f64,
            false => 1.0,
        };
        Ok(DecoderAttention {
            inputs,
            norms,
            output,
            attention: Attention {
                kv_heads: config.kv_heads,
                causal: true,
                window: config.window.filter(|_| kind == LayerKind::Sliding),
                softcap: config.attention_softcap,
                scale: config.score_scale / divisor,
                dropout: config.dropout.attention,
                ..Attention::bidirectional(config.heads, head_dim)
            },
            kind,
            head_dim,
            layer: i,
        })
    }

    fn forward(
        &self,
        f: &mut Forward,
        x: &Var,
        offsets: &Var,
        turns: Option<&Turns>,
        past: Option<&mut Past>,
    ) -> Result<Var> {
        let Attention {
            heads, kv_heads, ..
        } = self.attention;
        let (mut q, mut k, v) = self.project(f, x)?;
        if let Some(norms) = &self.norms {
            q = self.normalise(f, &norms[0], &q)?;
            k = self.normalise(f, &norms[1], &k)?;
        }
        if let Some(turns) = turns {
            q = turns.turn(f, self.kind, heads, &q)?;
            k = turns.turn(f, self.kind, kv_heads, &k)?;
        }
        let prefix = match &self.inputs {
            Inputs::Fused(linear) => linear.prefix(f)?,
            Inputs::Apart(linears) => linears[1].prefix(f)?,
        };
        let trained = [&q, &k, &v]
            .into_iter()
            .chain(prefix.iter().flatten())
            .any(|x| f.tape.needs_gradient(x));
        let attention = Attention {
            dropout: match f.is_training() && trained {
                true => self.attention.dropout,
                false => 0.0,
            },
            ..self.attention
        };
        let heads = match past {
            Some(past) => {
                let qkv = [&q, &k, &v];
                past.attend(f, self.layer, &attention, qkv, offsets, prefix.as_ref())?
            }
            None => attend(f, &attention, [&q, &k, &v], offsets, prefix.as_ref())?,
        };
        drop((q, k, v, prefix));
        Ok(self.output.forward(f, &heads)?)
    }

    /// Queries `[tokens, heads * head_dim]`, keys and values `[tokens, kv_heads * head_dim]`.
    fn project(&self, f: &mut Forward, x: &Var) -> Result<(Var, Var, Var)> {
        match &self.inputs {
            Inputs::Fused(linear) => {
                let all = linear.forward(f, x)?;
                let width = self.attention.heads * self.head_dim;
                let kv_width = self.attention.kv_heads * self.head_dim;
                // Views: the attention reads rows at any distance.
                Ok((
                    f.tape.narrow(&all, 1, 0, width)?,
                    f.tape.narrow(&all, 1, width, kv_width)?,
                    f.tape.narrow(&all, 1, width + kv_width, kv_width)?,
                ))
            }
            Inputs::Apart(linears) => {
                let [query, key, value] = &**linears;
                Ok((
                    query.forward(f, x)?,
                    key.forward(f, x)?,
                    value.forward(f, x)?,
                ))
            }
        }
    }

    /// The norm of each head.
    fn normalise(&self, f: &mut Forward, norm: &Norm, x: &Var) -> Result<Var> {
        let [tokens, width] = [x.shape()[0], x.shape()[1]];
        let heads = [tokens * (width / self.head_dim), self.head_dim];
        let x = f.tape.reshape(x, &heads)?;
        let x = norm.forward(f, &x)?;
        Ok(f.tape.reshape(&x, &[tokens, width])?)
    }
}

impl FeedForward {
    fn new(
        p: &mut Parameters,
        config: &DecoderConfig,
        names: &Names,
        i: usize,
    ) -> Result<FeedForward> {
        let at = |name: &str| format!("{}{}.{i}.{name}", names.prefix, names.layer);
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let bias = config.biases[2];
        let std = config.initializer_range;
        let mut project = |name: &str, sizes: [usize; 2], std: f64| {
            linear(p, config, &at(name), sizes, bias, std)
        };
        if config.family == DecoderFamily::Gpt2 {
            return Ok(FeedForward::Plain(Mlp {
                up: project(names.up, [hidden, inner], std)?,
                down: project(names.down, [inner, hidden], residual_std(config))?,
                activation: match config.hidden_act {
                    HiddenAct::Gelu => Activation::Gelu,
                    HiddenAct::GeluTanh => Activation::GeluTanh,
                    HiddenAct::Relu => Activation::Relu,
                    HiddenAct::Silu => Activation::Silu,
                    HiddenAct::Tanh => Activation::Tanh,
                },
            }));
        }
        Ok(FeedForward::Gated(GatedMlp {
            gate: project(names.gate, [hidden, inner], std)?,
            up: project(names.up, [hidden, inner], std)?,
            down: project(names.down, [inner, hidden], residual_std(config))?,
            activation: match config.hidden_act {
                HiddenAct::Gelu => Glu::Geglu,
                HiddenAct::GeluTanh => Glu::GegluTanh,
                // The configuration refuses the others for gated layers.
                HiddenAct::Silu | HiddenAct::Relu | HiddenAct::Tanh => Glu::Swiglu,
            },
        }))
    }

    fn forward(&self, f: &mut Forward, x: &Var) -> Result<Var> {
        Ok(match self {
            FeedForward::Plain(mlp) => mlp.forward(f, x)?,
            FeedForward::Gated(mlp) => mlp.forward(f, x)?,
        })
    }
}
