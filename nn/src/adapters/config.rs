//! What an adapter is made of. Names and defaults are PEFT's where it has them.

/// Which adapters there are, beside which layers, and what else is trained with them.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// What stands beside a layer
    pub method: Method,
    /// The layers that have one
    pub targets: Targets,
    /// Layers that have none although they are targets, by the ends of their names
    pub exclude: Vec<String>,
    /// If given, only layers of these numbers
    pub layers: Option<Vec<usize>>,
    /// What stands in front of a layer's number; empty for any word
    pub layers_pattern: Vec<String>,
    /// Modules that are trained and kept as a whole, by the ends of their names
    pub modules_to_save: Vec<String>,
    /// Which biases of the base are trained too
    pub bias: Bias,
}

/// What stands beside a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// LoRA and its kin
    LowRank(LowRankConfig),
    /// IA³
    Ia3 {
        /// Of the targets, those whose inputs are scaled instead of their outputs
        feedforward: Vec<String>,
    },
    /// Two small layers behind a layer, around which its output passes (N. Houlsby et al., "Parameter-Efficient Transfer
    /// Learning for NLP", 2019)
    Bottleneck {
        /// Outputs of the first
        size: usize,
    },
    /// Trained rows in front of each text's words (B. Lester et al., "The Power of Scale for Parameter-Efficient Prompt
    /// Tuning", 2021)
    Prompt {
        /// How many
        tokens: usize,
    },
    /// Trained keys and values in front of each text's own, in every layer (X. Li and P. Liang, "Prefix-Tuning:
    /// Optimizing Continuous Prompts for Generation", 2021)
    Prefix {
        /// How many
        tokens: usize,
        /// Of a layer's keys, and of its values
        width: usize,
        /// Inner width of the layers of which keys and values are the product while they are trained
        projection: Option<usize>,
    },
}

impl Method {
    /// Why such an adapter cannot be folded into the weights of its base, if it cannot.
    pub fn unmergeable(&self) -> Option<&'static str> {
        match self {
            Method::LowRank(_) | Method::Ia3 { .. } => None,
            Method::Bottleneck { .. } => Some(
                "a bottleneck adapter is two layers with a nonlinearity between them, and no change of its layer's weight \
                 computes what they do",
            ),
            Method::Prompt { .. } => Some(
                "a prompt is rows in front of each text, and no change of a weight puts them there",
            ),
            Method::Prefix { .. } => Some(
                "a prefix is keys and values in front of each text's own, and no change of a weight makes them",
            ),
        }
    }
}

/// LoRA (E. Hu et al., 2022), rsLoRA (D. Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
/// 2023) and DoRA (S. Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024).
#[derive(Clone, Debug, PartialEq)]
pub struct LowRankConfig {
    /// Rank
    pub rank: usize,
    /// The scale is alpha / rank
    pub alpha: f64,
    /// rsLoRA: it is alpha / √rank
    pub rank_stabilised: bool,
    /// DoRA: lengths and directions of the weights are trained apart
    pub magnitude: bool,
    /// Probability that an adapter does not see an element of its input, in training
    pub dropout: f64,
    /// Other ranks, by regular expressions of the ends of names; the first that matches decides
    pub rank_pattern: Vec<(String, usize)>,
    /// Other alphas, in the same way
    pub alpha_pattern: Vec<(String, f64)>,
    /// How the two matrices begin
    pub init: LowRankInit,
}

impl LowRankConfig {
    /// LoRA of a rank, with an alpha of twice that.
    pub fn lora(rank: usize) -> LowRankConfig {
        LowRankConfig {
            rank,
            alpha: 2.0 * rank as f64,
            rank_stabilised: false,
            magnitude: false,
            dropout: 0.0,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            init: LowRankInit::Kaiming,
        }
    }

    /// The factor of `b·a`.
    pub fn scale(&self, rank: usize, alpha: f64) -> f64 {
        match self.rank_stabilised {
            true => alpha / (rank as f64).sqrt(),
            false => alpha / rank as f64,
        }
    }
}

/// How the matrices of a low-rank adapter begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LowRankInit {
    /// `a` uniform as the weights of a linear layer, `b` zero: PEFT's default
    Kaiming,
    /// `a` normal with deviation 1 / rank, `b` zero
    Gaussian,
    /// Both random, in halves of the rank's space that are orthogonal, so that `b·a` is zero; an even rank
    Orthogonal,
    /// The weight's principal singular vectors, which are taken out of the weight (F. Meng et al., "PiSSA: Principal
    /// Singular Values and Singular Vectors Adaptation of Large Language Models", 2024)
    Pissa,
}

/// The layers that have an adapter.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Every linear layer but those of [`AdapterConfig::modules_to_save`] and the matrix of a language model's logits
    AllLinear,
    /// Those whose names are these or end in them
    Names(Vec<String>),
    /// Those whose whole names a regular expression matches
    Regex(String),
}

/// Which biases of the base are trained with an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// None
    None,
    /// Those of layers that have an adapter
    Adapted,
    /// All
    All,
}
