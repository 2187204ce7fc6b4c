//! Functions of two elements, with broadcasting.

use crate::element::{Float, Real};
use crate::parallel::for_each_chunk;
use crate::simd::{kernel, public};
use crate::strided::Walk;

/// A function of two elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Binary {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a · b`
    Mul,
    /// `a / b`
    Div,
    /// The larger; NaN if one is NaN.
    Max,
    /// The smaller; NaN if one is NaN.
    Min,
}

impl Binary {
    /// Every one.
    pub const ALL: [Binary; 6] = [
        Binary::Add,
        Binary::Sub,
        Binary::Mul,
        Binary::Div,
        Binary::Max,
        Binary::Min,
    ];
}

/// A function as a type, so that loops are compiled for each.
trait Op: 'static {
    fn value<R: Real>(a: R, b: R) -> R;
}

macro_rules! op {
    ($name:ident, |$a:ident, $b:ident| $value:expr) => {
        struct $name;
        impl Op for $name {
            #[inline(always)]
            #[allow(clippy::eq_op)] // a number that is not itself is NaN
            fn value<R: Real>($a: R, $b: R) -> R {
                $value
            }
        }
    };
}
op!(Add, |a, b| a + b);
op!(Sub, |a, b| a - b);
op!(Mul, |a, b| a * b);
op!(Div, |a, b| a / b);
op!(Max, |a, b| if a > b || a != a { a } else { b });
op!(Min, |a, b| if a < b || a != a { a } else { b });

kernel! {
    fn both[A: Arch, O: Op, T: Float](isa: Isa, a: &[T], b: &[T], y: &mut [T]) {
        for ((a, b), y) in a.iter().zip(b).zip(y) {
            *y = T::narrow(O::value(a.widen(), b.widen()));
        }
    }
}

kernel! {
    /// A run along the innermost dimension, with the steps of a and b in it.
    fn run[A: Arch, O: Op, T: Float](isa: Isa, steps: [usize; 2], a: &[T], b: &[T], y: &mut [T]) {
        let n = y.len();
        match steps {
            [1, 1] => {
                for ((a, b), y) in a[..n].iter().zip(&b[..n]).zip(y) {
                    *y = T::narrow(O::value(a.widen(), b.widen()));
                }
            }
            [1, 0] => {
                let b = b[0].widen();
                for (a, y) in a[..n].iter().zip(y) {
                    *y = T::narrow(O::value(a.widen(), b));
                }
            }
            [0, 1] => {
                let a = a[0].widen();
                for (b, y) in b[..n].iter().zip(y) {
                    *y = T::narrow(O::value(a, b.widen()));
                }
            }
            [s, t] => {
                for (k, y) in y.iter_mut().enumerate() {
                    *y = T::narrow(O::value(a[k * s].widen(), b[k * t].widen()));
                }
            }
        }
    }
}

macro_rules! with_op {
    ($kind:expr, $run:expr) => {
        with_op!($kind, $run, Add Sub Mul Div Max Min)
    };
    ($kind:expr, $run:expr, $($name:ident)*) => {
        match $kind {
            $(Binary::$name => {
                type O = $name;
                $run
            })*
        }
    };
}

public! {
    /// `y[i] = kind(a[i], b[i])`.
    pub fn binary, binary_with[T: Float](isa: Isa, kind: Binary, a: &[T], b: &[T], y: &mut [T]) {
        assert_eq!(a.len(), y.len(), "binary: a and y differ in length");
        assert_eq!(b.len(), y.len(), "binary: b and y differ in length");
        with_op!(
            kind,
            for_each_chunk(y.len(), (a, b, y), |_, (a, b, y)| both::<O, T>(isa, a, b, y))
        );
    }
}

public! {
    /// `y[i] = kind(a[at i], b[at i])` for every index i of `shape`, `y` contiguous. Strides count
    /// elements, 0 broadcasts; rank 0 to 6.
    pub fn binary_strided, binary_strided_with[T: Float](
        isa: Isa, kind: Binary, shape: &[usize],
        a: &[T], a_strides: &[usize], b: &[T], b_strides: &[usize], y: &mut [T]
    ) {
        let walk = Walk::new("binary_strided", shape, [a_strides, b_strides]);
        assert_eq!(walk.len(), y.len(), "binary_strided: y does not have the shape's size");
        walk.check("binary_strided", 0, "a", a.len());
        walk.check("binary_strided", 1, "b", b.len());
        let (_, steps) = walk.inner();
        with_op!(
            kind,
            for_each_chunk(y.len(), y, |first, y| {
                walk.runs(first, y.len(), |[i, j], range| {
                    run::<O, T>(isa, steps, &a[i..], &b[j..], &mut y[range]);
                });
            })
        );
    }
}

kernel! {
    fn add_to[A: Arch, T: Float](isa: Isa, y: &mut [T], x: &[T]) {
        for (x, y) in x.iter().zip(y) {
            *y = T::narrow(y.widen() + x.widen());
        }
    }
}

kernel! {
    fn add_scaled_to[A: Arch, T: Float](isa: Isa, y: &mut [T], x: &[T], by: T::Acc) {
        for (x, y) in x.iter().zip(y) {
            *y = T::narrow(A::fma(x.widen(), by, y.widen()));
        }
    }
}

kernel! {
    fn scale_here[A: Arch, T: Float](isa: Isa, y: &mut [T], by: T::Acc) {
        for y in y {
            *y = T::narrow(y.widen() * by);
        }
    }
}

public! {
    /// `y[i] += x[i]`.
    pub fn add_assign, add_assign_with[T: Float](isa: Isa, y: &mut [T], x: &[T]) {
        assert_eq!(x.len(), y.len(), "add_assign: x and y differ in length");
        for_each_chunk(y.len(), (y, x), |_, (y, x)| add_to(isa, y, x));
    }
}

public! {
    /// `y[i] *= by`.
    pub fn scale_in_place, scale_in_place_with[T: Float](isa: Isa, y: &mut [T], by: f64) {
        let by = T::Acc::from_f64(by);
        for_each_chunk(y.len(), y, |_, y| scale_here(isa, y, by));
    }
}

public! {
    /// `y[i] += x[i]·by`.
    pub fn add_scaled, add_scaled_with[T: Float](isa: Isa, y: &mut [T], x: &[T], by: f64) {
        assert_eq!(x.len(), y.len(), "add_scaled: x and y differ in length");
        let by = T::Acc::from_f64(by);
        for_each_chunk(y.len(), (y, x), |_, (y, x)| add_scaled_to(isa, y, x, by));
    }
}
