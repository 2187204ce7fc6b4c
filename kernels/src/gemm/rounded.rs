//! Numbers that lie in memory as `f32` and are multiplied as bf16.

use crate::element::{Element, Float};
use half::bf16;

/// An `f32` that is rounded to bf16 when it is read.
#[derive(Clone, Copy, Default, PartialEq, PartialOrd, Debug)]
#[repr(transparent)]
pub(crate) struct Rounded(f32);

impl Element for Rounded {}

impl Float for Rounded {
    type Acc = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        bf16::narrow(self.0).widen()
    }

    #[inline(always)]
    fn narrow(value: f32) -> Rounded {
        Rounded(bf16::narrow(value).widen())
    }
}
