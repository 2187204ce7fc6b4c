//! The angles of rotary positions (Su et al., arXiv:2104.09864), and the ways to stretch them over longer texts.
//!
//! The frequencies are computed in f32, step by step as transformers computes them: an angle is a frequency times a
//! position, so that another rounding of a frequency would show in the logits of long texts.

use std::f64::consts::PI;

use super::MAX_POSITIONS;
use super::read::Reader;
use crate::error::Result;
use crate::json::describe;

/// Base and scaling of rotary positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeParameters {
    /// Pair i of a head turns by `theta^(-2i / head_dim)` per position.
    pub theta: f64,
    /// How these frequencies are changed.
    pub scaling: RopeScaling,
}

/// How the frequencies are changed for longer texts; `rope_type` in config.json.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// `default`: not at all.
    None,
    /// `linear`: positions count as `1 / factor`.
    Linear {
        /// Above 0.
        factor: f64,
    },
    /// `dynamic`: not at all up to `max_position_embeddings`; longer texts are refused.
    Dynamic,
    /// `llama3`: wavelengths beyond `original_positions / low_freq_factor` are stretched by `factor`, those below
    /// `original_positions / high_freq_factor` are kept, those between are interpolated.
    Llama3 {
        /// Above 0.
        factor: f64,
        /// Below `high_freq_factor`.
        low_freq_factor: f64,
        /// Above `low_freq_factor`.
        high_freq_factor: f64,
        /// Positions that the model was first trained on.
        original_positions: usize,
    },
    /// `yarn` (Peng et al., arXiv:2309.00071): pairs that turn less than `beta_slow` times over the original
    /// positions are stretched by `factor`, those that turn more than `beta_fast` times are kept, with a ramp between.
    Yarn {
        /// Above 0.
        factor: f64,
        /// Factor of cosine and sine.
        attention_factor: f64,
        /// Above `beta_slow`.
        beta_fast: f64,
        /// Below `beta_fast`.
        beta_slow: f64,
        /// The ramp begins and ends at whole pairs.
        truncate: bool,
        /// Positions that the model was first trained on.
        original_positions: usize,
    },
}

/// Positions that a stretched model was first trained on.
pub(super) const ORIGINAL_POSITIONS: &str = "original_max_position_embeddings";

const ROPE_TYPES: &str = "one of default, linear, dynamic, llama3, yarn";

impl RopeParameters {
    /// From the object that holds `rope_type` and its settings, if there is one. Positions are those of the model, and
    /// the original ones if the config states them beside the object.
    pub(super) fn read(
        read: Option<&Reader>,
        default_theta: f64,
        (max_positions, original): (usize, Option<usize>),
    ) -> Result<RopeParameters> {
        let Some(read) = read else {
            return Ok(RopeParameters {
                theta: default_theta,
                scaling: RopeScaling::None,
            });
        };
        read.only("mrope_section", &[], "no multimodal positions")?;
        refuse_partial(read)?;
        let theta = base(read, "rope_theta")?.unwrap_or(default_theta);
        let need = |key: &str| {
            read.factor(key)?.ok_or_else(|| {
                let help = "take the config.json that belongs to the checkpoint";
                read.wrong(key, read.found(key), "a number above 0", help)
            })
        };
        let original_positions = || -> Result<usize> {
            let stated = read.optional_size(&[ORIGINAL_POSITIONS], MAX_POSITIONS)?;
            Ok(original.or(stated).unwrap_or(max_positions))
        };
        let ascending = |low: (&str, f64), high: (&str, f64)| {
            if low.1 < high.1 {
                return Ok(());
            }
            let expected = format!("less than `{}`, {}", low.0, high.1);
            let help = "take the config.json that belongs to the checkpoint";
            Err(read.wrong(low.0, low.1.to_string(), expected, help))
        };
        let type_key = ["rope_type", "type"]
            .into_iter()
            .find(|key| read.get(key).is_some_and(|v| !v.is_null()));
        let named = type_key.and_then(|key| read.get(key));
        let scaling = match named.map(|value| value.as_str().ok_or(value)) {
            None | Some(Ok("default")) => RopeScaling::None,
            Some(Ok("linear")) => RopeScaling::Linear {
                factor: need("factor")?,
            },
            Some(Ok("dynamic")) => RopeScaling::Dynamic,
            Some(Ok("llama3")) => {
                let low = need("low_freq_factor")?;
                let high = need("high_freq_factor")?;
                ascending(("low_freq_factor", low), ("high_freq_factor", high))?;
                RopeScaling::Llama3 {
                    factor: need("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_positions: original_positions()?,
                }
            }
            Some(Ok("yarn")) => {
                let original_positions = original_positions()?;
                let factor = match read.factor("factor")? {
                    Some(factor) => factor,
                    None => max_positions as f64 / original_positions as f64,
                };
                let fast = read.factor("beta_fast")?.unwrap_or(32.0);
                let slow = read.factor("beta_slow")?.unwrap_or(1.0);
                ascending(("beta_slow", slow), ("beta_fast", fast))?;
                let by = |scale: f64| match factor <= 1.0 {
                    true => 1.0,
                    false => 0.1 * scale * factor.ln() + 1.0,
                };
                let scales = (read.factor("mscale")?, read.factor("mscale_all_dim")?);
                RopeScaling::Yarn {
                    factor,
                    attention_factor: match (read.factor("attention_factor")?, scales) {
                        (Some(stated), _) => stated,
                        (None, (Some(scale), Some(all))) => by(scale) / by(all),
                        (None, _) => by(1.0),
                    },
                    beta_fast: fast,
                    beta_slow: slow,
                    truncate: read.flag("truncate", true)?,
                    original_positions,
                }
            }
            Some(Ok(_)) | Some(Err(_)) => {
                let found = named.map_or_else(String::new, describe);
                let key = type_key.unwrap_or("rope_type");
                return Err(read.wrong(
                    key,
                    found,
                    ROPE_TYPES,
                    "use a checkpoint with one of these",
                ));
            }
        };
        Ok(RopeParameters { theta, scaling })
    }

    /// The angle per position of each pair of a head's dimensions, `[head_dim / 2]`.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let pairs = 0..head_dim / 2;
        let power = |pair: usize| {
            let exponent = (2 * pair) as f32 / head_dim as f32;
            self.theta.powf(f64::from(exponent)) as f32
        };
        let plain = pairs.clone().map(|pair| 1.0 / power(pair));
        match self.scaling {
            RopeScaling::None | RopeScaling::Dynamic => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor as f32).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => {
                let positions = original_positions as f64;
                let longest_kept = (positions / high_freq_factor) as f32;
                let shortest_stretched = (positions / low_freq_factor) as f32;
                let stretch = |f: f32| {
                    let wavelength = (2.0 * PI) as f32 / f;
                    if wavelength < longest_kept {
                        f
                    } else if wavelength > shortest_stretched {
                        f / factor as f32
                    } else {
                        let share = (positions as f32 / wavelength - low_freq_factor as f32)
                            / (high_freq_factor - low_freq_factor) as f32;
                        (1.0 - share) * f / factor as f32 + share * f
                    }
                };
                plain.map(stretch).collect()
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                original_positions,
                ..
            } => {
                // The pair that turns so often over the original positions.
                let pair_of = |turns: f64| {
                    let wavelengths = original_positions as f64 / (turns * 2.0 * PI);
                    head_dim as f64 * wavelengths.ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let blend = |pair: usize| {
                    let ramp = (pair as f32 - low as f32) / (high - low) as f32;
                    let kept = 1.0 - ramp.clamp(0.0, 1.0);
                    let stretched = 1.0 / (factor as f32 * power(pair));
                    stretched * (1.0 - kept) + 1.0 / power(pair) * kept
                };
                pairs.map(blend).collect()
            }
        }
    }

    /// Factor of cosine and sine: 1 but for YaRN.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }

    /// Positions that the angles are meant for, if the scaling says more than `max_positions`.
    pub(super) fn reach(&self, max_positions: usize) -> usize {
        match self.scaling {
            RopeScaling::Yarn {
                factor,
                original_positions,
                ..
            } => max_positions.max((original_positions as f64 * factor) as usize),
            _ => max_positions,
        }
    }
}

/// The base of the angles under `key`, above 1.
pub(super) fn base(read: &Reader, key: &str) -> Result<Option<f64>> {
    let theta = read.factor(key)?;
    match theta.filter(|theta| *theta <= 1.0) {
        None => Ok(theta),
        Some(_) => {
            let help = "take the config.json that belongs to the checkpoint";
            Err(read.wrong(key, read.found(key), "a number above 1", help))
        }
    }
}

/// Refuses rotations of a part of each head.
pub(super) fn refuse_partial(read: &Reader) -> Result<()> {
    let key = "partial_rotary_factor";
    match read.factor(key)?.filter(|share| *share != 1.0) {
        None => Ok(()),
        Some(share) => Err(read.wrong(
            key,
            share.to_string(),
            "1: heads are rotated as a whole",
            "use a checkpoint without it",
        )),
    }
}
