//! Walking strided views in the order of a contiguous result.

/// The most dimensions a view may have.
pub(crate) const MAX_RANK: usize = 6;

/// The shape of a result and the strides of N operands, with dimensions of size 1 dropped and
/// neighbours merged where every operand allows it. Strides count elements; 0 repeats.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walk<const N: usize> {
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [[usize; N]; MAX_RANK],
}

impl<const N: usize> Walk<N> {
    /// `what` names the kernel in the message of an assertion.
    pub fn new(what: &str, shape: &[usize], strides: [&[usize]; N]) -> Self {
        assert!(
            shape.len() <= MAX_RANK,
            "{what}: rank {} above {MAX_RANK}",
            shape.len()
        );
        for s in strides {
            assert_eq!(
                s.len(),
                shape.len(),
                "{what}: strides and shape differ in rank"
            );
        }
        let mut walk = Walk {
            rank: 0,
            shape: [1; MAX_RANK],
            strides: [[0; N]; MAX_RANK],
        };
        for (d, &size) in shape.iter().enumerate() {
            if size == 1 {
                continue;
            }
            let here = strides.map(|s| s[d]);
            if walk.rank > 0 {
                let last = walk.rank - 1;
                // One step of the outer dimension is a whole turn of this one.
                if (0..N).all(|n| walk.strides[last][n] == here[n] * size) {
                    walk.shape[last] *= size;
                    walk.strides[last] = here;
                    continue;
                }
            }
            walk.shape[walk.rank] = size;
            walk.strides[walk.rank] = here;
            walk.rank += 1;
        }
        if walk.rank == 0 {
            // A single element: a row of one.
            walk.rank = 1;
        }
        walk
    }

    /// Number of elements of the result.
    pub fn len(&self) -> usize {
        self.shape[..self.rank].iter().product()
    }

    /// Lengths of the dimensions that are left.
    pub fn dims(&self) -> &[usize] {
        &self.shape[..self.rank]
    }

    /// Their strides in each operand.
    pub fn strides(&self) -> &[[usize; N]] {
        &self.strides[..self.rank]
    }

    /// Length of the innermost dimension, and the strides in it.
    pub fn inner(&self) -> (usize, [usize; N]) {
        (self.shape[self.rank - 1], self.strides[self.rank - 1])
    }

    /// Length of the dimension around it, and the strides in that; 1 if there is none.
    pub fn second(&self) -> (usize, [usize; N]) {
        if self.rank < 2 {
            (1, [0; N])
        } else {
            (self.shape[self.rank - 2], self.strides[self.rank - 2])
        }
    }

    /// Offset in each operand of the last element, so that sizes can be checked.
    pub fn last_offsets(&self) -> [usize; N] {
        let mut offsets = [0; N];
        for d in 0..self.rank {
            for n in 0..N {
                offsets[n] += (self.shape[d] - 1) * self.strides[d][n];
            }
        }
        offsets
    }

    /// Checks that operand n has all the elements that are addressed.
    pub fn check(&self, what: &str, n: usize, name: &str, len: usize) {
        if self.len() > 0 {
            let last = self.last_offsets()[n];
            assert!(
                last < len,
                "{what}: {name} has {len} elements, element {last} is addressed"
            );
        }
    }

    /// Offsets in the operands of the element at a position of the result.
    pub fn offsets(&self, position: usize) -> [usize; N] {
        let mut rest = position;
        let mut offsets = [0; N];
        for d in (0..self.rank).rev() {
            let i = rest % self.shape[d];
            rest /= self.shape[d];
            for n in 0..N {
                offsets[n] += i * self.strides[d][n];
            }
        }
        offsets
    }

    /// Calls `run(offsets, range)` for the runs along the innermost dimension that make up the
    /// positions `first .. first + len` of the result; `range` counts from `first`.
    #[inline(always)]
    pub fn runs(
        &self,
        first: usize,
        len: usize,
        mut run: impl FnMut([usize; N], std::ops::Range<usize>),
    ) {
        let (width, inner) = self.inner();
        if len == 0 || width == 0 {
            return;
        }
        // The position as digits, least significant last.
        let mut digits = [0; MAX_RANK];
        let mut rest = first;
        for d in (0..self.rank).rev() {
            digits[d] = rest % self.shape[d];
            rest /= self.shape[d];
        }
        let mut offsets = self.offsets(first);
        let mut done = 0;
        loop {
            let count = (width - digits[self.rank - 1]).min(len - done);
            run(offsets, done..done + count);
            done += count;
            if done == len {
                return;
            }
            // Back to the start of the row, then count up the digits before it.
            for n in 0..N {
                offsets[n] -= digits[self.rank - 1] * inner[n];
            }
            digits[self.rank - 1] = 0;
            for d in (0..self.rank - 1).rev() {
                digits[d] += 1;
                for n in 0..N {
                    offsets[n] += self.strides[d][n];
                }
                if digits[d] < self.shape[d] {
                    break;
                }
                for n in 0..N {
                    offsets[n] -= digits[d] * self.strides[d][n];
                }
                digits[d] = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn runs_visit_what_offsets_say(
            dims in prop::collection::vec((1usize..5, 0usize..9, 0usize..9), 0..=6),
            cut in 0usize..4000, take in 0usize..4000,
        ) {
            let shape: Vec<usize> = dims.iter().map(|d| d.0).collect();
            let a: Vec<usize> = dims.iter().map(|d| d.1).collect();
            let b: Vec<usize> = dims.iter().map(|d| d.2).collect();
            let walk = Walk::new("test", &shape, [&a, &b]);
            let total: usize = shape.iter().product();
            prop_assert_eq!(walk.len(), total);
            let first = cut % total;
            let len = take % (total - first + 1);
            let (_, inner) = walk.inner();
            let mut next = 0;
            walk.runs(first, len, |offsets, range| {
                assert_eq!(range.start, next);
                next = range.end;
                for (j, i) in range.enumerate() {
                    // The definition: digits of the position times strides.
                    let (mut rest, mut expected) = (first + i, [0, 0]);
                    for d in (0..shape.len()).rev() {
                        expected[0] += rest % shape[d] * a[d];
                        expected[1] += rest % shape[d] * b[d];
                        rest /= shape[d];
                    }
                    assert_eq!([offsets[0] + j * inner[0], offsets[1] + j * inner[1]], expected);
                }
            });
            prop_assert_eq!(next, len);
        }
    }

    #[test]
    fn neighbours_merge() {
        let walk = Walk::new("test", &[2, 1, 3, 4], [&[12, 99, 4, 1], &[0, 5, 0, 0]]);
        assert_eq!((walk.rank, walk.inner()), (1, (24, [1, 0])));
        let walk = Walk::new("test", &[2, 3, 4], [&[12, 4, 1], &[0, 4, 1]]);
        assert_eq!(
            (walk.rank, walk.inner(), walk.second()),
            (2, (12, [1, 1]), (2, [12, 0]))
        );
    }
}
