//! Rotary position embedding.
//!
//! J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
//! arXiv:2104.09864: pairs of dimensions are turned by an angle that grows with the position.

use crate::element::{Float, Real};
use crate::parallel::{self, rows};

/// Turns each head's first `rotary_dim` dimensions by its token's angles and copies the others.
///
/// x, y: `[tokens, heads * head_dim]`; cos, sin: `[positions, rotary_dim / 2]`; positions:
/// `[tokens]`, each a row of the tables. Pair `i` is dimensions `(2i, 2i + 1)` if `interleaved`
/// (GPT-J), else `(i, i + rotary_dim / 2)` (GPT-NeoX, Llama). `inverse` turns back, which is also
/// the backward pass, a rotation's transpose being its inverse.
pub fn rope<T: Float>(
    x: &[T],
    cos: &[f32],
    sin: &[f32],
    positions: &[i64],
    heads: usize,
    head_dim: usize,
    rotary_dim: usize,
    interleaved: bool,
    inverse: bool,
    y: &mut [T],
) {
    let width = heads * head_dim;
    let half = rotary_dim / 2;
    assert_eq!(
        x.len(),
        positions.len() * width,
        "rope: x is not [tokens, heads * head_dim]"
    );
    assert_eq!(y.len(), x.len(), "rope: x and y differ in length");
    assert_eq!(cos.len(), sin.len(), "rope: cos and sin differ in length");
    assert!(
        rotary_dim.is_multiple_of(2) && rotary_dim <= head_dim,
        "rope: rotary_dim {rotary_dim} is odd or larger than head_dim {head_dim}"
    );
    if width == 0 {
        return;
    }
    let sign = if inverse { -T::Acc::ONE } else { T::Acc::ONE };
    let wide = |x: f32| T::Acc::from_f64(f64::from(x));
    let slices = (rows(x, width), rows(y, width), positions);
    parallel::for_each_row_block(positions.len(), width, slices, |_, (x, y, positions)| {
        let tokens = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
        for ((x, y), &position) in tokens.zip(positions) {
            let start = position as usize * half;
            let (cos, sin) = (&cos[start..start + half], &sin[start..start + half]);
            for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
                y[rotary_dim..].copy_from_slice(&x[rotary_dim..]);
                if interleaved {
                    let pairs = x[..rotary_dim].chunks_exact(2);
                    let out = y[..rotary_dim].chunks_exact_mut(2);
                    for (((x, y), &c), &s) in pairs.zip(out).zip(cos).zip(sin) {
                        let (a, b, c, s) = (x[0].widen(), x[1].widen(), wide(c), wide(s) * sign);
                        y[0] = T::narrow(a * c - b * s);
                        y[1] = T::narrow(b * c + a * s);
                    }
                } else {
                    let (low, high) = x[..rotary_dim].split_at(half);
                    let (to_low, to_high) = y[..rotary_dim].split_at_mut(half);
                    for i in 0..half {
                        let (c, s) = (wide(cos[i]), wide(sin[i]) * sign);
                        let (a, b) = (low[i].widen(), high[i].widen());
                        to_low[i] = T::narrow(a * c - b * s);
                        to_high[i] = T::narrow(b * c + a * s);
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn turns_by_the_angle_and_back(
            tokens in 0usize..40, heads in 1usize..4, half in 0usize..20, plain in 0usize..5,
            interleaved in any::<bool>(), seed in any::<u32>(),
        ) {
            let (rotary, dim) = (2 * half, 2 * half + plain);
            prop_assume!(dim > 0);
            let key = crate::philox::Key([seed, 1]);
            let x: Vec<f64> = (0..tokens * heads * dim)
                .map(|i| f64::from(crate::philox::uniform(key, i as u64)) - 0.5).collect();
            let positions: Vec<i64> = (0..tokens).map(|t| ((t * 7 + 3) % 11) as i64).collect();
            let angle = |p: usize, i: usize| p as f64 / 10f64.powf(i as f64 / half as f64);
            let table = |f: fn(f64) -> f64| -> Vec<f32> {
                (0..11 * half).map(|n| f(angle(n / half, n % half)) as f32).collect()
            };
            let (cos, sin) = (table(f64::cos), table(f64::sin));
            let mut y = vec![f64::NAN; x.len()];
            rope(&x, &cos, &sin, &positions, heads, dim, rotary, interleaved, false, &mut y);
            for t in 0..tokens {
                for h in 0..heads {
                    let at = (t * heads + h) * dim;
                    for i in 0..half {
                        let (i0, i1) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                        // A complex product; the tables are f32, hence the tolerance.
                        let (s, c) = angle(positions[t] as usize, i).sin_cos();
                        let (a, b) = (x[at + i0], x[at + i1]);
                        prop_assert!((y[at + i0] - (a * c - b * s)).abs() < 1e-7);
                        prop_assert!((y[at + i1] - (a * s + b * c)).abs() < 1e-7);
                    }
                    prop_assert_eq!(&y[at + rotary..at + dim], &x[at + rotary..at + dim]);
                }
            }
            let mut back = vec![f64::NAN; x.len()];
            rope(&y, &cos, &sin, &positions, heads, dim, rotary, interleaved, true, &mut back);
            for (a, b) in x.iter().zip(&back) {
                // cos^2 + sin^2 of the rounded tables is 1 to 2 f32 roundings.
                prop_assert!((a - b).abs() < 3e-7);
            }
        }
    }

    #[test]
    #[should_panic(expected = "rope: rotary_dim 6 is odd or larger than head_dim 4")]
    fn sizes_are_checked() {
        rope(
            &[1.0f32; 4],
            &[1.0; 3],
            &[0.0; 3],
            &[0],
            1,
            4,
            6,
            false,
            false,
            &mut [0.0; 4],
        );
    }
}
