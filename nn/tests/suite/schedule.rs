use graft_nn::{Decay, Schedule};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// The formulas of transformers' get_*_schedule_with_warmup, in their own words.
    #[test]
    fn factors(warmup in 0..20u64, rest in 0..50u64, beyond in 0..10u64) {
        let total = warmup + rest;
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            let schedule = Schedule { decay, warmup, total };
            let mut last = f64::INFINITY;
            for step in 0..total + beyond {
                let factor = schedule.factor(step);
                prop_assert!((0.0..=1.0).contains(&factor), "{factor} at {step}");
                let (now, warm, all) = (step as f64, warmup as f64, total as f64);
                let progress = (now - warm) / (all - warm).max(1.0);
                let want = if step < warmup {
                    now / warm.max(1.0)
                } else {
                    match decay {
                        Decay::Constant => 1.0,
                        Decay::Linear => ((all - now) / (all - warm).max(1.0)).max(0.0),
                        Decay::Cosine => {
                            (0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())).max(0.0)
                        }
                    }
                };
                // A run of nothing but warm-up has no decay to speak of.
                if rest > 0 {
                    prop_assert!((factor - want).abs() < 1e-14, "{factor} at {step}, not {want}");
                }
                if step >= warmup {
                    prop_assert!(factor <= last, "rises at {step}");
                    last = factor;
                }
            }
        }
    }
}
