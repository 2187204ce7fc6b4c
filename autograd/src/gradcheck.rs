//! Gradients against finite differences, for this crate's operations and for anybody's own.

use graft_tensor::{DType, Memory, Tensor};

use crate::error::{Error, Result};
use crate::gradients::Gradients;
use crate::tape::{Tape, Var};

/// How a gradient check is done.
#[derive(Clone, Copy, Debug)]
pub struct GradCheck {
    /// Distance of the finite differences, for inputs of the order of 1
    pub step: f64,
    /// Largest error allowed, relative to the larger of 1 and the gradient
    pub tolerance: f64,
    /// Seed of the tape's random numbers (dropout) and of the weights of the outputs
    pub seed: u64,
}

impl Default for GradCheck {
    /// Differences of fourth order at a distance of 1e-3 are exact to about 1e-11 for smooth
    /// functions of f64 inputs around 1, so that 1e-7 leaves room for curvature and none for a
    /// wrong formula.
    fn default() -> GradCheck {
        GradCheck {
            step: 1e-3,
            tolerance: 1e-7,
            seed: 0,
        }
    }
}

/// Compares the gradients of `f` with finite differences of fourth order. `inputs` that are f64 and
/// that `needs` marks are perturbed element by element; the others are constants. Outputs of any
/// shape are reduced to a number with random weights. Returns the largest relative error.
///
/// # Errors
/// [`Error::GradCheck`] for the worst element beyond the tolerance, [`Error::NeedMask`] if an input
/// has a gradient that it does not need or lacks one that it needs, and those of `f`.
///
/// # Examples
/// ```
/// use graft_autograd::{GradCheck, gradcheck};
/// use graft_tensor::{Memory, Tensor};
///
/// let memory = Memory::cpu();
/// let x = Tensor::from_vec(&memory, vec![0.5, -1.5], &[2])?;
/// let y = Tensor::from_vec(&memory, vec![2.0, 3.0], &[2])?;
/// let worst = gradcheck(&[x, y], &[true, true], GradCheck::default(), |tape, x| {
///     tape.mul(&x[0], &x[1])
/// })?;
/// assert!(worst < 1e-9);
/// # Ok::<(), graft_autograd::Error>(())
/// ```
pub fn gradcheck(
    inputs: &[Tensor],
    needs: &[bool],
    options: GradCheck,
    f: impl Fn(&mut Tape, &[Var]) -> Result<Var>,
) -> Result<f64> {
    assert_eq!(inputs.len(), needs.len(), "one need for each input");
    let memory = Memory::cpu();
    let run = |inputs: &[Tensor]| -> Result<(Tape, Var)> {
        let mut tape = Tape::new(&memory, options.seed, 0);
        let vars: Vec<Var> = inputs
            .iter()
            .enumerate()
            .map(|(i, x)| tape.parameter(i, &format!("input {i}"), x, needs[i]))
            .collect();
        let y = f(&mut tape, &vars)?;
        Ok((tape, y))
    };
    let (mut tape, y) = run(inputs)?;
    let weights = output_weights(options.seed, y.value().count());
    let mut gradients = Gradients::new();
    if needs.contains(&true) {
        let dy = Tensor::from_slice(&memory, &weights, y.shape())?;
        tape.backward_from(&y, dy, &mut gradients)?;
    }
    let value = |inputs: &[Tensor]| -> Result<f64> {
        let y = run(inputs)?.1.value().to_f64()?;
        Ok(y.iter().zip(&weights).map(|(y, w)| y * w).sum())
    };
    let mut worst = 0.0;
    let mut failure = None;
    for (i, x) in inputs.iter().enumerate() {
        let needed = needs[i] && x.dtype() == DType::F64;
        match (needed, gradients.get(i)) {
            (true, None) => {
                return Err(Error::NeedMask {
                    input: i,
                    found: "has not",
                    expected: "needs",
                });
            }
            (false, Some(_)) => {
                return Err(Error::NeedMask {
                    input: i,
                    found: "has",
                    expected: "does not need",
                });
            }
            (false, None) => continue,
            (true, Some(_)) => {}
        }
        let analytic = gradients.get(i).map_or(Ok(Vec::new()), Tensor::to_f64)?;
        let base = x.to_vec::<f64>()?;
        for element in 0..base.len() {
            let at = |distance: f64| -> Result<f64> {
                let mut moved = base.clone();
                moved[element] += distance;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(&memory, moved, x.shape())?;
                value(&inputs)
            };
            let h = options.step;
            // Fourth order: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h
            let numeric = (8.0 * (at(h)? - at(-h)?) - (at(2.0 * h)? - at(-2.0 * h)?)) / (12.0 * h);
            let size = numeric.abs().max(analytic[element].abs()).max(1.0);
            let error = (numeric - analytic[element]).abs() / size;
            // A NaN counts as the worst.
            let error = if error.is_nan() { f64::INFINITY } else { error };
            if error > worst {
                worst = error;
                if error > options.tolerance {
                    failure = Some(Error::GradCheck {
                        input: i,
                        element,
                        analytic: analytic[element],
                        numeric,
                        error,
                        tolerance: options.tolerance,
                    });
                }
            }
        }
    }
    match failure {
        Some(failure) => Err(failure),
        None => Ok(worst),
    }
}

/// Weights of either sign between 0.5 and 1.5, so that no output goes unseen and none cancels
/// another by accident.
fn output_weights(seed: u64, count: usize) -> Vec<f64> {
    // SplitMix64 (Steele et al., 2014): here any scrambling of the index does.
    (0..count as u64)
        .map(|i| {
            let mut z = seed ^ i.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            let unit = ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
            let sign = if z & 1 == 0 { 1.0 } else { -1.0 };
            sign * (0.5 + unit)
        })
        .collect()
}
