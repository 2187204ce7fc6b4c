//! Codes, magnitudes and values against those that bitsandbytes computed, and what random numbers show.

use graft_kernels::Isa;
use graft_kernels::quantised::{
    BLOCK, Codes, DYNAMIC, Format, GROUP, NF4, dequantise_with, quantise, quantise_with,
    quantise_workspace, write_magnitudes,
};
use half::bf16;
use proptest::prelude::*;

/// Reads one part after the other.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (part, rest) = self.0.split_at(count);
        self.0 = rest;
        part
    }

    fn count(&mut self) -> usize {
        u32::from_le_bytes(self.bytes(4).try_into().unwrap()) as usize
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        let four = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
        self.bytes(4 * count).chunks(4).map(four).collect()
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn codes_of(isa: Isa, format: Format, x: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0xA5; format.bytes(x.len())];
    let mut workspace = vec![f32::NAN; quantise_workspace(format, x.len())];
    quantise_with(isa, format, x, &mut bytes, &mut workspace).unwrap();
    bytes
}

#[test]
fn bitsandbytes_has_the_same_codes() {
    let mut file = Reader(include_bytes!("../../../tests/fixtures/quantised.bin"));
    assert_eq!(bits(&file.floats(16)), bits(&NF4));
    assert_eq!(bits(&file.floats(256)), bits(&DYNAMIC));
    let cases = file.count();
    assert!(cases > 5);
    for _ in 0..cases {
        let n = file.count();
        let blocks = n.div_ceil(BLOCK);
        let x = file.floats(n);
        let codes = file.bytes(n.div_ceil(2));
        let absmax = file.floats(blocks);
        let offset = file.floats(1)[0];
        let nested = file.bytes(blocks);
        let groups = file.floats(blocks.div_ceil(GROUP));
        let values = file.floats(n);
        let (eight, scales) = (file.bytes(n), file.floats(blocks));

        let parts = Format::Nf4.parts(n);
        // Theirs: the order in which a mean is summed is no part of a format.
        let mut theirs = vec![0; parts.codes];
        write_magnitudes(&absmax, offset, &mut theirs);
        assert_eq!(&theirs[parts.absmax..][..blocks], nested, "{n}");
        for (i, group) in groups.iter().enumerate() {
            assert_eq!(theirs[4 + 4 * i..][..4], group.to_le_bytes(), "{n}");
        }
        theirs.extend(codes);
        for isa in Isa::available() {
            let ours = codes_of(isa, Format::Nf4, &x);
            // A byte's lower half behind the last element of an odd number: theirs is the code of 0, too.
            assert_eq!(&ours[parts.codes..], codes, "{isa:?} {n}");
            let mean = f32::from_le_bytes(ours[..4].try_into().unwrap());
            let off = mean.to_bits().abs_diff(offset.to_bits());
            assert!(off <= 2, "{isa:?} {n}: mean {mean:e}, theirs {offset:e}");
            let mut found = vec![f32::NAN; n];
            Codes::new(Format::Nf4, n, &theirs)
                .on(isa)
                .read(0, &mut found);
            assert_eq!(found, values, "{isa:?} {n}");

            let ours = codes_of(isa, Format::Int8, &x);
            assert_eq!(&ours[Format::Int8.parts(n).codes..], eight, "{isa:?} {n}");
            for (i, scale) in scales.iter().enumerate() {
                assert_eq!(ours[4 * i..][..4], scale.to_le_bytes(), "{isa:?} {n}");
            }
        }
    }
    assert!(file.0.is_empty());
}

/// Random values of many magnitudes.
fn values() -> impl Strategy<Value = Vec<f32>> {
    let one = (-1.0f32..1.0, -20i32..3).prop_map(|(x, e)| x * 2f32.powi(e));
    prop::collection::vec(one, 1..700)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    /// Any run, on any instruction set, gives the numbers that the definition gives one by one.
    #[test]
    fn runs_are_the_elements_one_by_one(x in values(), from in 0usize..700, take in 0usize..700) {
        let n = x.len();
        let from = from % n;
        let take = take % (n - from + 1);
        for format in [Format::Nf4, Format::Int8] {
            let bytes = codes_of(Isa::detect(), format, &x);
            let codes = Codes::new(format, n, &bytes);
            let mut single = vec![0.0; n];
            for (i, y) in single.iter_mut().enumerate() {
                codes.on(Isa::Portable).read(i, std::slice::from_mut(y));
            }
            for isa in Isa::available() {
                prop_assert_eq!(&codes_of(isa, format, &x), &bytes, "{:?}", isa);
                let mut run = vec![f32::NAN; take];
                codes.on(isa).read(from, &mut run);
                prop_assert_eq!(bits(&run), bits(&single[from..from + take]), "{:?}", isa);
                let mut short = vec![bf16::NAN; n];
                dequantise_with(isa, codes, &mut short);
                let rounded: Vec<bf16> = single.iter().map(|&x| bf16::from_f32(x)).collect();
                prop_assert_eq!(&short, &rounded, "{:?}", isa);
            }
        }
    }

    /// No element is further from its value than half the widest gap between codes, and what the magnitudes lost.
    #[test]
    fn values_are_near(x in values()) {
        for (format, gap) in [(Format::Nf4, 0.152), (Format::Int8, 0.5 / 127.0)] {
            let bytes = codes_of(Isa::detect(), format, &x);
            let mut y = vec![0.0; x.len()];
            Codes::new(format, x.len(), &bytes).read(0, &mut y);
            let blocks: Vec<f32> = x.chunks(BLOCK).map(|b| b.iter().fold(0.0f32, |m, x| m.max(x.abs()))).collect();
            let mean = blocks.iter().sum::<f32>() / blocks.len() as f32;
            let spread = blocks.iter().fold(0.0f32, |m, x| m.max((x - mean).abs()));
            // The widest gap of the dynamic map is 0.9 / 64 near 1; the lowest value is 0.007 short of -1.
            let magnitudes = if format == Format::Nf4 { 0.0071 * spread + 1e-6 * mean } else { 0.0 };
            for (i, (x, y)) in x.iter().zip(&y).enumerate() {
                let allowed = (gap + 1e-6) * blocks[i / BLOCK] + magnitudes;
                prop_assert!((x - y).abs() <= allowed, "{:?} element {}: {} became {}", format, i, x, y);
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for format in [Format::Nf4, Format::Int8] {
            let mut x = vec![0.5; 10_000];
            (x[9000], x[9999]) = (bad, bad);
            let mut bytes = vec![7; format.bytes(x.len())];
            let mut workspace = vec![0.0; quantise_workspace(format, x.len())];
            let refused = quantise(format, &x, &mut bytes, &mut workspace);
            assert_eq!(refused.unwrap_err().at, 9000);
            assert!(bytes.iter().all(|&b| b == 7));
        }
    }
}

#[test]
fn an_element_takes_as_many_bits_as_are_claimed() {
    let n = 1 << 24;
    let of = |format: Format| 8.0 * format.bytes(n) as f64 / n as f64;
    assert!(
        (of(Format::Nf4) - 4.127).abs() < 5e-4,
        "{}",
        of(Format::Nf4)
    );
    assert!(
        (of(Format::Int8) - 8.5).abs() < 5e-4,
        "{}",
        of(Format::Int8)
    );
    assert_eq!(Format::Nf4.bytes(0), 0);
}
