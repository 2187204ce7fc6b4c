use graft_tensor::ops::random::{Key, normal, shuffle, uniform};

use crate::common::*;

const COUNT: usize = 100_000;

fn moments(x: &[f64]) -> (f64, f64) {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
    (mean, variance)
}

fn drawn(
    f: impl Fn(&graft_tensor::Memory) -> graft_tensor::Result<graft_tensor::Tensor>,
) -> Vec<f64> {
    run1(f).values.into_raw_vec_and_offset().0
}

#[test]
fn uniform_numbers() {
    let x = drawn(|m| uniform(m, Key::new(1, 2, 3), &[COUNT], -1.0, 3.0));
    assert!(x.iter().all(|x| (-1.0..3.0).contains(x)));
    let (mean, variance) = moments(&x);
    // Five standard errors: 4 / sqrt(12 n) of the mean, 16 / sqrt(180 n) of the variance.
    let n = COUNT as f64;
    assert!((mean - 1.0).abs() < 5.0 * 4.0 / (12.0 * n).sqrt(), "{mean}");
    assert!(
        (variance - 16.0 / 12.0).abs() < 5.0 * 16.0 / (180.0 * n).sqrt(),
        "{variance}"
    );
    let low = x.iter().filter(|&&x| x < 0.0).count() as f64 / n;
    assert!((low - 0.25).abs() < 5.0 * (0.25 * 0.75 / n).sqrt(), "{low}");
}

#[test]
fn normal_numbers() {
    let x = drawn(|m| normal(m, Key::new(1, 2, 3), &[COUNT], 0.5, 2.0));
    let (mean, variance) = moments(&x);
    // Five standard errors: sd / sqrt(n) of the mean, var * sqrt(2 / n) of the variance.
    let n = COUNT as f64;
    assert!((mean - 0.5).abs() < 5.0 * 2.0 / n.sqrt(), "{mean}");
    assert!(
        (variance - 4.0).abs() < 5.0 * 4.0 * (2.0 / n).sqrt(),
        "{variance}"
    );
    let within = x.iter().filter(|&&x| (x - 0.5).abs() < 2.0).count() as f64 / n;
    assert!(
        (within - 0.682_689).abs() < 5.0 * (0.217 / n).sqrt(),
        "{within}"
    );
}

#[test]
fn numbers_are_functions_of_the_key_and_the_place() {
    let draw = |key, shape: &'static [usize]| drawn(move |m| normal(m, key, shape, 0.0, 1.0));
    let key = Key::new(7, 8, 9);
    let long = draw(key, &[50_001]);
    assert_eq!(long[..30], draw(key, &[5, 6])[..], "whatever the shape");
    for other in [Key::new(6, 8, 9), Key::new(7, 7, 9), Key::new(7, 8, 8)] {
        assert_ne!(long[..30], draw(other, &[30])[..]);
    }
    assert!(draw(key, &[3, 0]).is_empty());
}

#[test]
fn orders_are_permutations_of_the_key() {
    let order = |seed| {
        let mut items: Vec<usize> = (0..1000).collect();
        shuffle(Key::new(seed, 0, 0), &mut items);
        items
    };
    let mut sorted = order(1);
    assert_eq!(order(1), sorted);
    assert_ne!(order(2), sorted);
    sorted.sort_unstable();
    assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
}
