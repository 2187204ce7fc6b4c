//! Shapes and strides: at most [`MAX_RANK`] dimensions, held inline.

use std::fmt;
use std::ops::Deref;

use crate::error::{Error, Result};

/// The most dimensions that a tensor can have.
pub const MAX_RANK: usize = 6;

/// The lengths of a tensor's dimensions.
///
/// Shapes are copied with every tensor: they are whole words, without gaps.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// 0 from `rank` on
    dims: [usize; MAX_RANK],
    rank: usize,
}

/// The distances, in elements, between neighbours along each dimension of a shape that is known.
pub(crate) type Strides = [usize; MAX_RANK];

impl Shape {
    /// From a slice of at most [`MAX_RANK`] lengths.
    ///
    /// # Errors
    /// A rank above [`MAX_RANK`], or more elements than memory can be addressed with.
    pub fn new(dims: &[usize]) -> Result<Shape> {
        let shape = Shape::checked(dims)?;
        let count = dims
            .iter()
            .try_fold(1usize, |product, &n| product.checked_mul(n.max(1)));
        match count {
            Some(count) if count <= isize::MAX as usize / 16 => Ok(shape),
            _ => Err(Error::argument(
                "shape",
                format!("{shape} has more elements than can be addressed"),
            )),
        }
    }

    fn checked(dims: &[usize]) -> Result<Shape> {
        if dims.len() > MAX_RANK {
            return Err(Error::argument(
                "shape",
                format!("{dims:?} has {} dimensions, at most {MAX_RANK}", dims.len()),
            ));
        }
        let mut inline = [0; MAX_RANK];
        inline[..dims.len()].copy_from_slice(dims);
        Ok(Shape {
            dims: inline,
            rank: dims.len(),
        })
    }

    /// Number of elements; 1 for a scalar.
    pub fn count(&self) -> usize {
        self.iter().product()
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Strides, in elements, of a contiguous row-major tensor of this shape.
    pub(crate) fn row_major_strides(&self) -> Strides {
        let mut strides = [0; MAX_RANK];
        let mut step = 1;
        for axis in (0..self.rank()).rev() {
            strides[axis] = step;
            step *= self.dims[axis];
        }
        strides
    }

    /// The shape without dimension `axis`, or with `with` in its place.
    pub(crate) fn replaced(&self, axis: usize, with: Option<usize>) -> Shape {
        let mut shape = *self;
        let dims = &mut shape.dims[..self.rank()];
        match with {
            Some(n) => dims[axis] = n,
            None => {
                dims[axis..].rotate_left(1);
                dims[self.rank() - 1] = 0;
                shape.rank -= 1;
            }
        }
        shape
    }

    /// Dimension `order[i]` of this as dimension `i`, with its stride.
    pub(crate) fn picked(&self, strides: &Strides, order: &[usize]) -> (Shape, Strides) {
        let (mut shape, mut picked) = (*self, *strides);
        for (i, &axis) in order.iter().enumerate() {
            (shape.dims[i], picked[i]) = (self[axis], strides[axis]);
        }
        (shape, picked)
    }

    /// The strides of a view of shape `to`, which a tensor of this shape and `strides` broadcasts to.
    pub(crate) fn expanded(&self, strides: &Strides, to: &Shape) -> Strides {
        let (mut expanded, lead) = ([0; MAX_RANK], to.rank() - self.rank());
        for axis in 0..to.rank() {
            expanded[axis] = match axis.checked_sub(lead) {
                Some(own) if self[own] == to[axis] => strides[own],
                _ => 0,
            };
        }
        expanded
    }

    pub(crate) fn from_dims(dims: &[usize]) -> Shape {
        Shape::checked(dims).expect("rank was checked by the caller")
    }

    /// The shape that two broadcast to: aligned at the last dimension, equal or 1.
    pub fn broadcast(&self, other: &Shape) -> Option<Shape> {
        let rank = self.rank().max(other.rank());
        let mut dims = [0; MAX_RANK];
        for i in 0..rank {
            let from_end = |s: &Shape| {
                let back = rank - i;
                if back <= s.rank() {
                    s[s.rank() - back]
                } else {
                    1
                }
            };
            dims[i] = match (from_end(self), from_end(other)) {
                (a, b) if a == b => a,
                (1, b) => b,
                (a, 1) => a,
                _ => return None,
            };
        }
        Shape::new(&dims[..rank]).ok()
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank]
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &self[..])
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &self[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasting_aligns_at_the_end() {
        let s = |d: &[usize]| Shape::new(d).unwrap();
        assert_eq!(s(&[3, 1]).broadcast(&s(&[4])), Some(s(&[3, 4])));
        assert_eq!(s(&[]).broadcast(&s(&[2, 0])), Some(s(&[2, 0])));
        assert_eq!(s(&[3]).broadcast(&s(&[4])), None);
    }

    #[test]
    fn absurd_shapes_are_refused() {
        assert!(Shape::new(&[1; 7]).is_err());
        assert!(Shape::new(&[usize::MAX, 2]).is_err());
        assert!(Shape::new(&[usize::MAX, 0]).is_err());
    }

    #[test]
    fn dimensions_are_replaced_and_picked() {
        let s = |d: &[usize]| Shape::new(d).unwrap();
        let shape = s(&[2, 3, 4]);
        assert_eq!(shape.replaced(1, Some(7)), s(&[2, 7, 4]));
        assert_eq!(shape.replaced(0, None), s(&[3, 4]));
        assert_eq!(s(&[5]).replaced(0, None), s(&[]));
        let strides = shape.row_major_strides();
        let (picked, strides) = shape.picked(&strides, &[2, 0, 1]);
        assert_eq!((picked, &strides[..3]), (s(&[4, 2, 3]), &[1, 12, 4][..]));
        let strides = s(&[3, 1]).expanded(&[1, 9, 0, 0, 0, 0], &s(&[2, 3, 4]));
        assert_eq!(strides, [0, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn strides_are_row_major() {
        let s = Shape::new(&[2, 3, 4]).unwrap();
        assert_eq!(s.row_major_strides(), [12, 4, 1, 0, 0, 0]);
    }
}
