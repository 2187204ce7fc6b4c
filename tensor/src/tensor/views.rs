//! Views: the same storage, seen otherwise.

use super::Tensor;
use crate::error::{Error, Result};
use crate::shape::{MAX_RANK, Shape};

impl Tensor {
    /// The same elements under another shape.
    ///
    /// # Errors
    /// Another element count, or a strided view (make it [`Tensor::contiguous`] first).
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        let shape = Shape::new(shape)?;
        if shape.count() != self.count() {
            return Err(Error::shape(
                "reshape",
                "the tensor",
                self.shape,
                format!("{} elements for {shape}", shape.count()),
            ));
        }
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { shape: self.shape });
        }
        Ok(Tensor {
            shape,
            strides: shape.row_major_strides(),
            ..self.clone()
        })
    }

    /// Dimensions in another order: dimension `i` of the result is dimension `order[i]` of this.
    ///
    /// # Errors
    /// An order that does not name every dimension once.
    pub fn permute(&self, order: &[usize]) -> Result<Tensor> {
        let mut seen = [false; MAX_RANK];
        let valid = order.len() == self.shape.rank()
            && order
                .iter()
                .all(|&axis| axis < order.len() && !std::mem::replace(&mut seen[axis], true));
        if !valid {
            return Err(Error::argument(
                "permute",
                format!(
                    "{order:?} does not name each dimension of {} once",
                    self.shape
                ),
            ));
        }
        let (shape, strides) = self.shape.picked(&self.strides, order);
        Ok(Tensor {
            shape,
            strides,
            ..self.clone()
        })
    }

    /// The last two dimensions swapped.
    ///
    /// # Errors
    /// Fewer than two dimensions.
    pub fn t(&self) -> Result<Tensor> {
        let rank = self.shape.rank();
        if rank < 2 {
            return Err(Error::shape(
                "transpose",
                "the tensor",
                self.shape,
                "at least [_, _]",
            ));
        }
        let mut order: [usize; MAX_RANK] = std::array::from_fn(|axis| axis);
        order.swap(rank - 2, rank - 1);
        self.permute(&order[..rank])
    }

    /// `length` indices of dimension `axis` from `start`.
    ///
    /// # Errors
    /// A dimension or range that the tensor does not have.
    pub fn narrow(&self, axis: usize, start: usize, length: usize) -> Result<Tensor> {
        let fits = axis < self.shape.rank()
            && start
                .checked_add(length)
                .is_some_and(|end| end <= self.shape[axis]);
        if !fits {
            return Err(Error::argument(
                "narrow",
                format!(
                    "dimension {axis}, {length} from {start}, is not within {}",
                    self.shape
                ),
            ));
        }
        Ok(Tensor {
            shape: self.shape.replaced(axis, Some(length)),
            offset: self.offset + start * self.strides[axis],
            ..self.clone()
        })
    }

    /// Repeats dimensions of length 1, and leading ones that are not there, without copying.
    ///
    /// # Errors
    /// A shape that this one does not broadcast to.
    pub fn expand(&self, shape: &[usize]) -> Result<Tensor> {
        let to = Shape::new(shape)?;
        if self.shape.broadcast(&to) != Some(to) {
            return Err(Error::shape(
                "expand",
                "the tensor",
                self.shape,
                format!("one that broadcasts to {to}"),
            ));
        }
        Ok(Tensor {
            shape: to,
            strides: self.shape.expanded(&self.strides, &to),
            ..self.clone()
        })
    }
}
