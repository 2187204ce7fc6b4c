//! The choice of the next token.

/// How a token is chosen from its logits. What is not asked for has no effect; in this order: penalty, temperature, the
/// most likely `top_k`, the most likely that together reach `top_p`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 for always the most likely token
    pub temperature: f64,
    /// The most likely tokens alone, so many
    pub top_k: Option<usize>,
    /// The fewest most likely tokens alone that have this probability together, in (0, 1]
    pub top_p: Option<f64>,
    /// Above 1, tokens that were there before are less likely: their logits are divided by it where they are positive,
    /// and multiplied where they are negative (Keskar et al. 2019); 1 for none
    pub repetition_penalty: f64,
}

impl Sampling {
    /// The most likely token, always.
    pub const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_k: None,
        top_p: None,
        repetition_penalty: 1.0,
    };

    /// A token among those that are `allowed`, given the logits `[vocabulary]`, which are overwritten; the tokens so far;
    /// and a number in [0, 1). None if an allowed logit is no number or none is allowed.
    pub fn choose(
        &self,
        logits: &mut [f64],
        allowed: &[bool],
        so_far: &[u32],
        random: f64,
    ) -> Option<u32> {
        if self.repetition_penalty != 1.0 {
            let mut seen = so_far.to_vec();
            seen.sort_unstable();
            seen.dedup();
            for id in seen {
                let logit = &mut logits[id as usize];
                match *logit > 0.0 {
                    true => *logit /= self.repetition_penalty,
                    false => *logit *= self.repetition_penalty,
                }
            }
        }
        let likeliest = likeliest(logits, allowed)?;
        if self.temperature == 0.0 {
            return Some(likeliest as u32);
        }
        let mut order: Vec<usize> = (0..logits.len()).filter(|&i| allowed[i]).collect();
        let rank = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        if let Some(k) = self.top_k.filter(|&k| k < order.len()) {
            order.select_nth_unstable_by(k - 1, rank);
            order.truncate(k);
        }
        if self.top_p.is_some() {
            // The most likely first; of equals the lowest, so that the order is the same every time.
            order.sort_unstable_by(rank);
        }
        let top = logits[likeliest];
        let mut weights: Vec<f64> = order
            .iter()
            .map(|&i| ((logits[i] - top) / self.temperature).exp())
            .collect();
        if let Some(p) = self.top_p {
            let enough = p * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let reached = weights.iter().position(|w| {
                sum += w;
                sum >= enough
            });
            weights.truncate(reached.map_or(weights.len(), |last| last + 1));
        }
        let mut left = random * weights.iter().sum::<f64>();
        let chosen = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        // Rounding may leave nothing: then it is the last one.
        Some(order[chosen.unwrap_or(weights.len() - 1)] as u32)
    }
}

/// The first of the largest allowed logits; none if an allowed one is no number or none is allowed.
fn likeliest(all: &[f64], allowed: &[bool]) -> Option<usize> {
    /// Logits that are compared without asking where the largest one is.
    const SOME: usize = 64;
    let mut best = allowed.iter().position(|&allowed| allowed)?;
    let parts = all.chunks(SOME).zip(allowed.chunks(SOME));
    for (n, (logits, allowed)) in parts.enumerate() {
        let (mut top, mut numbers) = (f64::NEG_INFINITY, true);
        for (&x, &allowed) in logits.iter().zip(allowed) {
            let x = if allowed { x } else { f64::NEG_INFINITY };
            top = if x > top { x } else { top };
            numbers &= x < f64::INFINITY;
        }
        if !numbers {
            return None;
        }
        if top > all[best] {
            let at = logits
                .iter()
                .zip(allowed)
                .position(|(&x, &ok)| ok && x == top);
            best = n * SOME + at?;
        }
    }
    Some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [bool; 5] = [true; 5];

    /// How often each of five tokens is chosen, for numbers spread evenly.
    fn shares(sampling: &Sampling, logits: [f64; 5], so_far: &[u32]) -> [f64; 5] {
        let mut counts = [0.0; 5];
        for i in 0..10_000 {
            let mut logits = logits;
            let random = f64::from(i) / 1e4;
            let token = sampling.choose(&mut logits, &ALL, so_far, random).unwrap();
            counts[token as usize] += 1e-4;
        }
        counts
    }

    fn near(found: [f64; 5], expected: [f64; 5]) {
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-3, "{found:?} {expected:?}");
        }
    }

    const LOGS: [f64; 5] = [0.1, 0.4, 0.05, 0.25, 0.2];

    #[test]
    fn tokens_come_as_often_as_they_are_likely() {
        let logits = LOGS.map(f64::ln);
        let plain = Sampling {
            temperature: 1.0,
            ..Sampling::GREEDY
        };
        near(shares(&plain, logits, &[]), LOGS);
        let cold = Sampling {
            temperature: 0.5,
            ..plain
        };
        let squares: f64 = LOGS.iter().map(|p| p * p).sum();
        near(shares(&cold, logits, &[]), LOGS.map(|p| p * p / squares));
        let two = Sampling {
            top_k: Some(2),
            ..plain
        };
        near(
            shares(&two, logits, &[]),
            [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0],
        );
        // 0.4 + 0.25 do not reach 0.7; a third does.
        let nucleus = Sampling {
            top_p: Some(0.7),
            ..plain
        };
        near(
            shares(&nucleus, logits, &[]),
            [0.0, 0.4 / 0.85, 0.0, 0.25 / 0.85, 0.2 / 0.85],
        );
        let one = Sampling {
            top_p: Some(1e-9),
            ..plain
        };
        near(shares(&one, logits, &[]), [0.0, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn greedy_takes_the_most_likely_that_is_allowed_and_the_first_of_equals() {
        let mut logits = [1.0, 3.0, 3.0, -1.0, 9.0];
        let allowed = [true, true, true, true, false];
        assert_eq!(
            Sampling::GREEDY.choose(&mut logits, &allowed, &[], 0.9),
            Some(1)
        );
        logits[3] = f64::NAN;
        assert_eq!(
            Sampling::GREEDY.choose(&mut logits, &allowed, &[], 0.9),
            None
        );
        // One that is not allowed may be anything.
        let mut logits = [0.0, 1.0, f64::NEG_INFINITY, 0.0, f64::NAN];
        assert_eq!(
            Sampling::GREEDY.choose(&mut logits, &allowed, &[], 0.0),
            Some(1)
        );
        assert_eq!(
            Sampling::GREEDY.choose(&mut logits, &[false; 5], &[], 0.0),
            None
        );
    }

    #[test]
    fn the_penalty_counts_a_token_once_and_works_on_both_signs() {
        let penalty = Sampling {
            repetition_penalty: 2.0,
            ..Sampling::GREEDY
        };
        let mut logits = [3.0, 2.0, -1.0, -1.5, 1.4];
        assert_eq!(
            penalty.choose(&mut logits, &ALL, &[0, 0, 2, 0], 0.0),
            Some(1)
        );
        assert_eq!(logits, [1.5, 2.0, -2.0, -1.5, 1.4]);
    }
}
