//! Results that may differ by the rounding of their sums and, in bf16, by one unit in the last place.

use graft_tensor::{DType, Tensor};

/// Asserts that each element is within `absolute` of what was expected, or one rounding of bf16 away
/// from that. What is not a number must be so in both.
#[track_caller]
pub fn assert_within(what: &str, found: &Tensor, expected: &Tensor, absolute: f64) {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    assert_eq!(found.dtype(), expected.dtype(), "{what}");
    let relative = match found.dtype() {
        DType::Bf16 => 1.0 / 128.0,
        _ => 0.0,
    };
    let pairs = found.to_f64().unwrap().into_iter();
    for (i, (f, e)) in pairs.zip(expected.to_f64().unwrap()).enumerate() {
        let allowed = absolute + relative * e.abs();
        let near = f == e || (f.is_nan() && e.is_nan()) || (f - e).abs() <= allowed;
        assert!(
            near,
            "{what} {} at {i}: {f} for {e}, {:.2e} apart, {allowed:.2e} allowed",
            found.shape(),
            (f - e).abs()
        );
    }
}
