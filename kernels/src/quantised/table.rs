//! The numbers that codes stand for, as published.

use super::GROUP;

/// NF4: the 16 values that codes stand for, times a block's largest magnitude.
///
/// T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E: quantiles of the normal
/// distribution with a zero among them, scaled to [-1, 1]. To the bit those of bitsandbytes.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The code of zero.
pub(super) const NF4_ZERO: u8 = 7;

/// Where one code of [`NF4`] ends and the next begins: what is larger than the middle belongs to the upper one.
pub(super) const NF4_MIDDLES: [f32; 15] = {
    let mut middles = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        middles[i] = (NF4[i] + NF4[i + 1]) / 2.0;
        i += 1;
    }
    middles
};

/// The 256 values of the signed dynamic map with which the blocks' largest magnitudes are stored, rising.
///
/// T. Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015: for each power of ten from 1e-6 to 1 twice
/// as many fractions, the middles of equal parts of [0.1, 1], of either sign; a zero and a one. To the bit those of
/// bitsandbytes.
pub const DYNAMIC: [f32; 256] = dynamic();

const fn dynamic() -> [f32; 256] {
    const POWERS: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut map = [0.0; 256];
    map[255] = 1.0;
    let mut i = 0;
    while i < 7 {
        // Those of greater magnitude lie further from the zero at 127.
        let parts = 1 << i;
        let mut j = 0;
        while j < parts {
            let middle = (boundary(j, parts) + boundary(j + 1, parts)) / 2.0;
            let value = POWERS[i] * middle;
            map[127 + parts + j] = value;
            map[127 - parts - j] = -value;
            j += 1;
        }
        i += 1;
    }
    map
}

/// Boundary `i` of so many equal parts of [0.1, 1], counted from the nearer end, with one rounding.
const fn boundary(i: usize, parts: usize) -> f32 {
    let step = (1.0 - 0.1f32) / parts as f32;
    // f64 holds the product exactly, and the sum to within less than a rounding of f32.
    if i < parts.div_ceil(2) {
        (0.1f32 as f64 + step as f64 * i as f64) as f32
    } else {
        (1.0 - step as f64 * (parts - i) as f64) as f32
    }
}

/// The code of [`DYNAMIC`] nearest to `x`, the lower one of two at the same distance.
pub(super) fn nearest(x: f32) -> u8 {
    let above = DYNAMIC.partition_point(|&value| value <= x);
    let below = above.saturating_sub(1);
    match DYNAMIC.get(above) {
        Some(upper) if (x - upper).abs() < (x - DYNAMIC[below]).abs() => above as u8,
        _ => below as u8,
    }
}

/// Stores the distances of some blocks' largest magnitudes from their mean: a code each, and the largest distance of each
/// group.
pub(super) fn compress(absmax: &[f32], offset: f32, codes: &mut [u8], mut group: impl FnMut(f32)) {
    for (absmax, codes) in absmax.chunks(GROUP).zip(codes.chunks_mut(GROUP)) {
        let largest = absmax
            .iter()
            .fold(0.0f32, |max, x| max.max((x - offset).abs()));
        let inverse = 1.0 / largest;
        for (code, x) in codes.iter_mut().zip(absmax) {
            // All at the mean: any code gives it back. bitsandbytes writes the first.
            *code = match largest > 0.0 {
                true => nearest(((x - offset) * inverse).clamp(-1.0, 1.0)),
                false => 0,
            };
        }
        group(largest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_rise() {
        assert!(NF4.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(DYNAMIC.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(
            (NF4[usize::from(NF4_ZERO)], DYNAMIC[127], DYNAMIC[255]),
            (0.0, 0.0, 1.0)
        );
    }

    #[test]
    fn the_nearest_code_is_found() {
        for (i, &value) in DYNAMIC.iter().enumerate() {
            assert_eq!(usize::from(nearest(value)), i);
        }
        for x in [
            -1.0, -0.99, -0.5, -1e-8, 1e-8, 0.3390584, 0.7, 0.994, 1.0f32,
        ] {
            let distance = |code: usize| (x - DYNAMIC[code]).abs();
            let first = (0..256).fold(0, |best, code| match distance(code) < distance(best) {
                true => code,
                false => best,
            });
            assert_eq!(usize::from(nearest(x)), first, "{x}");
        }
    }
}
