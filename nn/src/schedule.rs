//! Learning-rate schedules: a factor of the base rate for each optimizer step.

use std::f64::consts::PI;

/// The shape of the schedule after the warm-up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decay {
    /// Stays at 1
    Constant,
    /// Falls in a line to 0 at the last step
    Linear,
    /// Falls as half a cosine to 0 at the last step
    Cosine,
}

/// A warm-up in a line from 0, then a decay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// After the warm-up
    pub decay: Decay,
    /// Steps of the warm-up
    pub warmup: u64,
    /// Steps of the whole run
    pub total: u64,
}

impl Schedule {
    /// The factor of step `step`, counted from 0. As in transformers, the first step of a warm-up
    /// has rate 0 and the step after the last would have rate 0.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let rest = self.total.saturating_sub(self.warmup).max(1);
        let done = ((step - self.warmup) as f64 / rest as f64).min(1.0);
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - done,
            Decay::Cosine => 0.5 * (1.0 + (PI * done).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(decay: Decay) -> Vec<f64> {
        let schedule = Schedule {
            decay,
            warmup: 2,
            total: 6,
        };
        (0..8).map(|step| schedule.factor(step)).collect()
    }

    #[test]
    fn factors_are_those_of_transformers() {
        let linear = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0];
        assert_eq!(factors(Decay::Linear), linear);
        assert_eq!(factors(Decay::Constant)[2..], [1.0; 6]);
        let cosine = factors(Decay::Cosine);
        assert!((cosine[4] - 0.5).abs() < 1e-15 && cosine[6] < 1e-15);
    }

    #[test]
    fn a_run_of_nothing_but_warm_up_has_no_division_by_zero() {
        let schedule = Schedule {
            decay: Decay::Linear,
            warmup: 3,
            total: 3,
        };
        assert_eq!(schedule.factor(3), 1.0);
        assert_eq!(schedule.factor(2), 2.0 / 3.0);
    }
}
