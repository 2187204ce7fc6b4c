//! Soft caps of logits, as Gemma 2 has one (Gemma Team, arXiv:2408.00118): `y = cap * tanh(x / cap)`
//! leaves small values as they are and keeps all others between `-cap` and `cap`.

use crate::element::{Float, Real};
use crate::math::tanh;
use crate::parallel;
use crate::simd::{Isa, kernel};

/// `x[i] = cap * tanh(x[i] / cap)`, in place.
pub fn softcap<T: Float>(cap: f64, x: &mut [T]) {
    let isa = Isa::detect();
    parallel::for_each_chunk(x.len(), x, |_, x| squeeze(isa, cap, x));
}

/// `dy[i] *= 1 - (y[i] / cap)²`, in place: from the gradient of [`softcap`]'s result `y` to that of
/// its argument.
pub fn softcap_backward<T: Float>(cap: f64, y: &[T], dy: &mut [T]) {
    assert_eq!(
        y.len(),
        dy.len(),
        "softcap_backward: y and dy differ in length"
    );
    let isa = Isa::detect();
    parallel::for_each_chunk(dy.len(), (y, dy), |_, (y, dy)| slope(isa, cap, y, dy));
}

kernel! {
    fn squeeze[A: Arch, T: Float](isa: Isa, cap: f64, x: &mut [T]) {
        let (cap, inverse) = (T::Acc::from_f64(cap), T::Acc::from_f64(1.0 / cap));
        for x in x {
            *x = T::narrow(cap * tanh::<A, T::Acc>(x.widen() * inverse));
        }
    }
}

kernel! {
    fn slope[A: Arch, T: Float](isa: Isa, cap: f64, y: &[T], dy: &mut [T]) {
        let inverse = T::Acc::from_f64(1.0 / cap);
        for (y, dy) in y.iter().zip(dy) {
            let t = y.widen() * inverse;
            *dy = T::narrow(dy.widen() * A::fma(-t, t, T::Acc::ONE));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn caps_and_its_slope_is_that_of_the_cap(
            x in prop::collection::vec(-200.0f64..200.0, 0..200), cap in 0.5f64..60.0,
        ) {
            let mut y = x.clone();
            softcap(cap, &mut y);
            let mut single: Vec<f32> = x.iter().map(|&x| x as f32).collect();
            softcap(cap, &mut single);
            let mut dy = vec![2.0; x.len()];
            softcap_backward(cap, &y, &mut dy);
            for i in 0..x.len() {
                let want = cap * (x[i] / cap).tanh();
                prop_assert!((y[i] - want).abs() <= 1e-14 * cap);
                prop_assert!((f64::from(single[i]) - want).abs() <= 1e-6 * cap.max(want.abs()));
                // The derivative of tanh is 1 / cosh².
                let slope = (x[i] / cap).cosh().powi(-2);
                prop_assert!((dy[i] - 2.0 * slope).abs() <= 1e-13);
            }
        }
    }

    #[test]
    #[should_panic(expected = "softcap_backward: y and dy differ in length")]
    fn sizes_are_checked() {
        softcap_backward(1.0, &[1.0f32; 3], &mut [0.0; 4]);
    }
}
