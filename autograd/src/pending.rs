//! The gradient of a node while its parts arrive.

use graft_tensor::{Memory, Shape, Tensor, ops};

use crate::error::Result;
use crate::gradients::add;
use crate::op::Op;

/// What has arrived so far.
#[derive(Debug)]
pub(crate) enum Pending {
    /// A sum
    Whole(Tensor),
    /// Ranges of one dimension that do not overlap, as the gradients of [`Op::Narrow`] are of the
    /// parts that a value was cut into. What lies outside of them is not written yet.
    Blocks {
        gradient: Tensor,
        axis: usize,
        /// Start and length of each
        written: Vec<(usize, usize)>,
    },
}

impl Pending {
    /// Adds what `op`'s backward gave for an input of `shape`.
    pub fn add(
        m: &Memory,
        sum: Option<Pending>,
        op: &Op,
        part: Tensor,
        shape: &Shape,
    ) -> Result<Pending> {
        let Op::Narrow {
            axis,
            start,
            length,
        } = *op
        else {
            return match sum {
                None => Ok(Pending::Whole(part)),
                Some(sum) => Ok(Pending::Whole(add(sum.whole(m)?, part)?)),
            };
        };
        let (mut gradient, mut written) = match sum {
            None => (Tensor::empty(m, part.dtype(), shape)?, Vec::new()),
            Some(Pending::Blocks {
                gradient,
                axis: other,
                written,
            }) if other == axis
                && written
                    .iter()
                    .all(|&(s, n)| start >= s + n || s >= start + length) =>
            {
                (gradient, written)
            }
            Some(sum) => {
                let part = ops::place(m, &part, shape, axis, start)?;
                return Ok(Pending::Whole(add(sum.whole(m)?, part)?));
            }
        };
        ops::put(m, &mut gradient, &part, axis, start)?;
        written.push((start, length));
        Ok(Pending::Blocks {
            gradient,
            axis,
            written,
        })
    }

    /// The gradient, zero where nothing arrived.
    pub fn whole(self, m: &Memory) -> Result<Tensor> {
        let (mut gradient, axis, mut written) = match self {
            Pending::Whole(gradient) => return Ok(gradient),
            Pending::Blocks {
                gradient,
                axis,
                written,
            } => (gradient, axis, written),
        };
        written.sort_unstable();
        written.push((gradient.shape()[axis], 0));
        let mut next = 0;
        for (start, length) in written {
            if start > next {
                let mut shape = gradient.shape().to_vec();
                shape[axis] = start - next;
                let zeros = Tensor::zeros(m, gradient.dtype(), &shape)?;
                ops::put(m, &mut gradient, &zeros, axis, next)?;
            }
            next = start + length;
        }
        Ok(gradient)
    }
}
