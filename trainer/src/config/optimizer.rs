//! The settings of the optimizer, some of which only one kind has.

use graft_models::Strategy as Part;

use super::read::{choice, number};
use super::{
    AdapterKind, Init, OptimizerConfig, OptimizerKind, Schedule, Settings, Strategy, Warmup,
};
use crate::error::{Error, Result};

impl OptimizerConfig {
    /// The learning rate when none is given. A fresh head on a frozen trunk bears a large one; the deeper the
    /// pretrained layers that move, the smaller. SGD has no per-parameter scale and needs about a hundred times as
    /// much.
    pub fn default_lr(kind: &OptimizerKind, strategy: &Strategy) -> f64 {
        let of = |part: &Part| match (kind, part) {
            (OptimizerKind::AdamW { .. }, Part::Head) => 1e-3,
            // Biases and norms are few and cannot do much harm.
            (OptimizerKind::AdamW { .. }, Part::Bitfit | Part::Norms) => 2e-3,
            (OptimizerKind::AdamW { .. }, Part::Last(_)) => 1e-4,
            (OptimizerKind::AdamW { .. }, Part::Full) => 5e-5,
            (OptimizerKind::Sgd { .. }, Part::Head) => 1e-1,
            (OptimizerKind::Sgd { .. }, Part::Bitfit | Part::Norms) => 2e-1,
            (OptimizerKind::Sgd { .. }, Part::Last(_)) => 1e-2,
            (OptimizerKind::Sgd { .. }, Part::Full) => 5e-3,
        };
        let adapter = strategy.adapter.map(|adapter| match (kind, adapter) {
            // What nothing but the loss ties to the weights has far to go, and so have factors that begin at 1.
            (
                OptimizerKind::AdamW { .. },
                AdapterKind::Ia3 | AdapterKind::Prompt | AdapterKind::Prefix,
            ) => 3e-2,
            (OptimizerKind::AdamW { .. }, _) => 2e-3,
            (
                OptimizerKind::Sgd { .. },
                AdapterKind::Ia3 | AdapterKind::Prompt | AdapterKind::Prefix,
            ) => 3.0,
            (OptimizerKind::Sgd { .. }, _) => 2e-1,
        });
        let parts = strategy.parts.iter().map(of);
        parts.chain(adapter).fold(f64::INFINITY, f64::min)
    }
}

/// Checks `[optimizer]` and fills in the defaults, which depend on what is trained.
pub(super) fn optimizer(s: &Settings, strategy: &Strategy, init: Init) -> Result<OptimizerConfig> {
    #[derive(serde::Deserialize, Clone, Copy, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        AdamW,
        Sgd,
    }
    let kind = s.get("optimizer.kind", "\"adamw\" or \"sgd\"", |_: &Kind| true)?;
    let (name, kind_level) = match &kind {
        Some((name, origin)) => (*name, Some(origin.level())),
        None => (Kind::AdamW, None),
    };
    // A setting the chosen optimizer lacks is a mistake, unless the optimizer was chosen over the setting's head.
    let foreign = match name {
        Kind::AdamW => &["optimizer.momentum"][..],
        Kind::Sgd => &["optimizer.betas", "optimizer.eps"][..],
    };
    for key in foreign {
        if let Some(origin) = s.origin(key)
            && kind_level.is_none_or(|level| origin.level() >= level)
        {
            let (used, other) = match name {
                Kind::AdamW => ("adamw", "sgd"),
                Kind::Sgd => ("sgd", "adamw"),
            };
            return Err(Error::config(
                origin,
                format!("`{key}` has no effect: `optimizer.kind` is \"{used}\""),
                format!("remove it, or set optimizer.kind = \"{other}\""),
            ));
        }
    }
    let unit = |p: f64| (0.0..1.0).contains(&p);
    let not_negative = |x: f64| x >= 0.0 && x.is_finite();
    let kind = match name {
        Kind::AdamW => OptimizerKind::AdamW {
            betas: s
                .get(
                    "optimizer.betas",
                    "two numbers in [0, 1)",
                    |b: &[f64; 2]| b.iter().all(|&p| unit(p)),
                )?
                .map_or([0.9, 0.999], |(betas, _)| betas),
            eps: number(s, "optimizer.eps", "a number above 0", |x| {
                x > 0.0 && x.is_finite()
            })?
            .unwrap_or(1e-8),
        },
        Kind::Sgd => OptimizerKind::Sgd {
            momentum: number(s, "optimizer.momentum", "a number in [0, 1)", unit)?.unwrap_or(0.9),
        },
    };
    let warmup = "a fraction in [0, 1) such as 0.1, or a whole number of steps";
    Ok(OptimizerConfig {
        kind,
        lr: number(s, "optimizer.lr", "a number above 0", |x| {
            x > 0.0 && x.is_finite()
        })?
        .unwrap_or_else(|| match (kind, init) {
            // As GPT-3's smallest model.
            (OptimizerKind::AdamW { .. }, Init::Random) => 6e-4,
            _ => OptimizerConfig::default_lr(&kind, strategy),
        }),
        weight_decay: number(
            s,
            "optimizer.weight_decay",
            "a number, 0 or more",
            not_negative,
        )?
        .unwrap_or(0.01),
        no_decay: choice(s, "optimizer.no_decay", "true or false")?.unwrap_or(true),
        clip_norm: number(
            s,
            "optimizer.clip_norm",
            "a number, 0 or more",
            not_negative,
        )?
        .unwrap_or(1.0),
        schedule: choice(
            s,
            "optimizer.schedule",
            "\"linear\", \"cosine\" or \"constant\"",
        )?
        .unwrap_or(Schedule::Linear),
        warmup: choice(s, "optimizer.warmup", warmup)?.unwrap_or(Warmup::Ratio(0.1)),
    })
}
