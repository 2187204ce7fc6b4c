//! Random cases, inputs as views of all kinds, and the comparison with the oracle.

use graft_tensor::{DType, Memory, Result, Tensor};
use half::{bf16, f16};
use ndarray::{ArrayD, Axis, IxDyn, Slice};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

pub const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::Bf16, DType::F16];

/// How an input lies in its storage.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Dimensions are stored in reverse order
    reversed: bool,
    /// Each dimension is a part of a longer one, surrounded by NaN
    padded: bool,
    /// The first dimension repeats one slice
    repeated: bool,
}

impl View {
    pub const PLAIN: View = View {
        reversed: false,
        padded: false,
        repeated: false,
    };
}

/// What a random case is made from; proptest shrinks it.
#[derive(Clone, Debug)]
pub struct Case {
    pub seed: u64,
    /// 0 to 7
    pub dims: [usize; 4],
    /// 0 to 70: enough for the vector loops and their remainders
    pub columns: usize,
    pub flags: [bool; 4],
    pub pick: usize,
    pub dtype: DType,
    pub views: [View; 4],
}

/// A tensor before it exists: its values, each exact in `dtype`, and how it is to lie in memory.
pub struct Input {
    pub values: ArrayD<f64>,
    pub dtype: DType,
    view: View,
}

/// An operation's result, copied out.
pub struct Out {
    pub values: ArrayD<f64>,
    pub dtype: DType,
}

/// Runs `test` on 64 random cases.
pub fn cases(test: impl Fn(&Case)) {
    let dim = prop_oneof![1 => Just(0usize), 8 => 1..=7usize];
    let columns = prop_oneof![1 => Just(0usize), 6 => 1..=7usize, 3 => 8..=70usize];
    let view = any::<(bool, bool, bool)>().prop_map(|(reversed, padded, repeated)| View {
        reversed,
        padded,
        repeated,
    });
    let strategy = (
        any::<u64>(),
        proptest::array::uniform4(dim),
        columns,
        any::<[bool; 4]>(),
        0..1000usize,
        proptest::sample::select(&FLOATS[..]),
        proptest::array::uniform4(view),
    )
        .prop_map(|(seed, dims, columns, flags, pick, dtype, views)| Case {
            seed,
            dims,
            columns,
            flags,
            pick,
            dtype,
            views,
        });
    let config = Config {
        cases: 64,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&strategy, |case| {
            test(&case);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

/// Number `i` of stream `stream`, in `[0, 1)`: SplitMix64 (Steele et al., 2014).
fn unit_interval(seed: u64, stream: u64, i: usize) -> f64 {
    let mut z = seed
        .wrapping_add(stream.wrapping_mul(0xD134_2543_DE82_EF95))
        .wrapping_add((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

impl Case {
    /// Values between `low` and `high`, viewed in the way that the case has for input `which`.
    pub fn between(&self, which: usize, shape: &[usize], low: f64, high: f64) -> Input {
        let view = self.views[which % 4];
        let count: usize = shape.iter().product();
        let mut data: Vec<f64> = (0..count)
            .map(|i| {
                let x = low + (high - low) * unit_interval(self.seed, which as u64, i);
                round(self.dtype, x)
            })
            .collect();
        if view.repeated && !shape.is_empty() && count > 0 {
            let slice = count / shape[0];
            for i in slice..count {
                data[i] = data[i - slice];
            }
        }
        Input {
            values: ArrayD::from_shape_vec(shape, data).unwrap(),
            dtype: self.dtype,
            view,
        }
    }

    /// Values between -2 and 2.
    pub fn input(&self, which: usize, shape: &[usize]) -> Input {
        self.between(which, shape, -2.0, 2.0)
    }

    /// Integers from 0 up to, and without, `limit`.
    pub fn integers(&self, which: usize, count: usize, limit: usize) -> Vec<i64> {
        (0..count)
            .map(|i| (unit_interval(self.seed, which as u64, i) * limit as f64) as i64)
            .collect()
    }

    /// Offsets of sequences as long as the dimensions, and at least `least`.
    pub fn offsets(&self, least: usize) -> Vec<i64> {
        let mut ends = vec![0];
        for n in self.dims {
            ends.push(ends[ends.len() - 1] + n.max(least) as i64);
        }
        ends
    }

    pub fn of<T: Copy>(&self, from: &[T]) -> T {
        from[self.pick % from.len()]
    }
}

impl Input {
    /// All one.
    pub fn ones(dtype: DType, shape: &[usize]) -> Input {
        Input {
            values: ArrayD::ones(shape),
            dtype,
            view: View::PLAIN,
        }
    }

    /// The tensor, in `m`.
    pub fn on(&self, m: &Memory) -> Tensor {
        self.cast_on(self.dtype, m)
    }

    /// The same values as another type.
    pub fn cast_on(&self, dtype: DType, m: &Memory) -> Tensor {
        let rank = self.values.ndim();
        let mut stored = self.values.clone();
        if self.view.repeated && self.shape().iter().product::<usize>() > 0 && rank > 0 {
            stored = stored.slice_axis(Axis(0), Slice::from(0..1)).to_owned();
        }
        let unrepeated = stored.shape().to_vec();
        if self.view.padded {
            let longer: Vec<usize> = unrepeated.iter().map(|n| n + 2).collect();
            let mut padded = ArrayD::from_elem(IxDyn(&longer), f64::NAN);
            let mut inner = padded.view_mut();
            for axis in 0..rank {
                let to = 1 + unrepeated[axis];
                inner.slice_axis_inplace(Axis(axis), Slice::from(1..to));
            }
            inner.assign(&stored);
            stored = padded;
        }
        let backwards: Vec<usize> = (0..rank).rev().collect();
        if self.view.reversed {
            stored = stored.permuted_axes(IxDyn(&backwards));
        }
        let data = stored.iter().copied().collect();
        let mut tensor = upload(m, dtype, data, stored.shape());
        if self.view.reversed {
            tensor = tensor.permute(&backwards).unwrap();
        }
        if self.view.padded {
            for axis in 0..rank {
                tensor = tensor.narrow(axis, 1, unrepeated[axis]).unwrap();
            }
        }
        tensor.expand(self.shape()).unwrap()
    }

    pub fn shape(&self) -> &[usize] {
        self.values.shape()
    }

    pub fn plain(mut self) -> Input {
        self.view = View::PLAIN;
        self
    }
}

/// `data`, rounded to `dtype`, as a tensor.
pub fn upload(m: &Memory, dtype: DType, data: Vec<f64>, shape: &[usize]) -> Tensor {
    match dtype {
        DType::F64 => Tensor::from_vec(m, data, shape),
        DType::F32 => Tensor::from_vec(m, data.iter().map(|&x| x as f32).collect(), shape),
        DType::Bf16 => Tensor::from_vec(
            m,
            data.iter().map(|&x| bf16::from_f32(x as f32)).collect(),
            shape,
        ),
        DType::F16 => Tensor::from_vec(
            m,
            data.iter().map(|&x| f16::from_f32(x as f32)).collect(),
            shape,
        ),
        DType::I64 => Tensor::from_vec(m, data.iter().map(|&x| x as i64).collect(), shape),
        DType::I32 => Tensor::from_vec(m, data.iter().map(|&x| x as i32).collect(), shape),
        DType::U8 => Tensor::from_vec(m, data.iter().map(|&x| x as u8).collect(), shape),
        DType::Nf4 | DType::Int8 => panic!("codes have tests of their own"),
    }
    .unwrap()
}

pub fn ids(m: &Memory, data: &[i64]) -> Tensor {
    Tensor::from_slice(m, data, &[data.len()]).unwrap()
}

/// The nearest value that `dtype` has; for short types, to `x` as f32.
pub fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(x as f32),
        DType::Bf16 => bf16::from_f32(x as f32).to_f64(),
        DType::F16 => f16::from_f32(x as f32).to_f64(),
        _ => x,
    }
}

/// Half the distance from 1 to the next number: the relative error of one rounding.
pub fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2f64.powi(-24),
        DType::Bf16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-53),
    }
}

/// The type that sums over `dtype` are kept in.
pub fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Runs an operation over a real and a planned memory: both must give the same shapes and types
/// and count the same bytes, and both must get everything back. Returns the real results.
#[track_caller]
pub fn run(f: impl Fn(&Memory) -> Result<Vec<Tensor>>) -> Vec<Out> {
    let (real, plan) = (Memory::cpu(), Memory::planned());
    let (y, planned) = (f(&real).unwrap(), f(&plan).unwrap());
    let kinds =
        |list: &[Tensor]| -> Vec<_> { list.iter().map(|t| (t.dtype(), *t.shape())).collect() };
    assert_eq!(kinds(&y), kinds(&planned), "real, planned");
    for t in planned.iter().filter(|t| t.dtype().is_float()) {
        assert!(t.is_planned(), "a plan holds elements: {t:?}");
    }
    assert_eq!(real.usage(), plan.usage(), "real, planned");
    let copy = |t: &Tensor| Out {
        values: ArrayD::from_shape_vec(&t.shape()[..], t.to_f64().unwrap()).unwrap(),
        dtype: t.dtype(),
    };
    let out = y.iter().map(copy).collect();
    drop((y, planned));
    assert_eq!(real.usage().live, [0; 5], "bytes that did not come back");
    assert_eq!(plan.usage().live, [0; 5], "bytes that did not come back");
    out
}

/// Runs an operation with one result.
#[track_caller]
pub fn run1(f: impl Fn(&Memory) -> Result<Tensor>) -> Out {
    run(|m| Ok(vec![f(m)?])).pop().unwrap()
}

/// Compares with the oracle. Allowed are one rounding to the result's type and `roundings` of the
/// type that it was computed in, each relative to `scale`: the size of the largest number that
/// went into the element.
#[track_caller]
pub fn near(y: &Out, want: &ArrayD<f64>, roundings: f64, scale: &ArrayD<f64>) {
    assert_eq!(y.values.shape(), want.shape());
    let scale = scale.broadcast(want.raw_dim()).expect("scale broadcasts");
    // Below this, f16 has no more digits.
    let least = if y.dtype == DType::F16 {
        2f64.powi(-25)
    } else {
        0.0
    };
    for ((at, &y_i), (&want, &scale)) in y.values.indexed_iter().zip(want.iter().zip(&scale)) {
        let computed = roundings * unit(wide(y.dtype)) * scale.max(want.abs());
        let allowed = unit(y.dtype) * (want.abs() + computed) + computed + least;
        assert!(
            (y_i - want).abs() <= allowed,
            "element {at:?} is {y_i}, should be {want}, allowed error {allowed:e} ({})",
            y.dtype
        );
    }
}

/// [`near`] with one scale for all elements.
#[track_caller]
pub fn near_by(y: &Out, want: &ArrayD<f64>, roundings: f64, scale: f64) {
    near(y, want, roundings, &ndarray::arr0(scale).into_dyn());
}

/// Compares two results exactly.
#[track_caller]
pub fn equal(y: &Out, want: &ArrayD<f64>) {
    assert_eq!(y.values, want);
}

/// Runs `f` on the case's type and on f64, and compares: for gradients, whose f64 version is held
/// against finite differences in graft-autograd.
#[track_caller]
pub fn near_f64(
    case: &Case,
    f: impl Fn(&Memory, DType) -> Result<Vec<Tensor>>,
    roundings: f64,
    scale: f64,
) {
    let narrow = run(|m| f(m, case.dtype));
    let exact = run(|m| f(m, DType::F64));
    assert_eq!(narrow.len(), exact.len());
    for (y, want) in narrow.iter().zip(&exact) {
        near_by(y, &want.values, roundings, scale);
    }
}

/// The error function by a series of positive terms (Abramowitz and Stegun, 7.1.6).
pub fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        // 1 - erf(6) = 2e-17
        return x.signum();
    }
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= 2.0 * x * x / (2 * n + 1) as f64;
        sum += term;
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp()
}

/// The shape that two broadcast to.
pub fn broadcast(a: &[usize], b: &[usize]) -> Vec<usize> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], i: usize| {
        if i + s.len() < rank {
            1
        } else {
            s[i + s.len() - rank]
        }
    };
    (0..rank)
        .map(|i| if at(a, i) == 1 { at(b, i) } else { at(a, i) })
        .collect()
}
