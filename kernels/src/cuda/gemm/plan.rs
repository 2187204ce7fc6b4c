//! How a product is computed: in what type, over how many ranges of k, and what of its operands has
//! to be copied first. All of it follows from sizes, so that workspace can be planned without a GPU.

use crate::cuda::environment::named;
use crate::cuda::{Error, Result, Scalar, Target};
use crate::gemm::{Batch, Operands};

/// A matrix on the device, without its elements: element (i, j) lies i row strides and j column
/// strides after the first.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Element type
    pub scalar: Scalar,
    /// Number of rows
    pub rows: usize,
    /// Number of columns
    pub cols: usize,
    /// Elements from a row to the next
    pub row_stride: usize,
    /// Elements from a column to the next
    pub col_stride: usize,
    /// Whether the first element lies on a 16-byte boundary
    pub aligned: bool,
}

/// Which kernels multiply, where they can.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub enum Kernels {
    /// The fastest for the device and the sizes
    #[default]
    Auto,
    /// Those of `gemm.cu`, which every device has: on tensor cores where there are any
    General,
    /// Of f32 numbers those without tensor cores; others as with `Auto`
    Simt,
    /// Warpgroups of Hopper
    Hopper,
    /// NVIDIA's cuBLASLt, which has to be there; products with an epilogue as with `Auto`
    CublasLt,
}

impl Kernels {
    /// What the variable GRAFT_GEMM asks for: `auto` (as if there were none), `general`, `simt`, `hopper`,
    /// `cublaslt`.
    ///
    /// # Errors
    /// Another value.
    pub fn asked_for() -> Result<Kernels> {
        let read = |name: &str| {
            Some(match name {
                "auto" => Kernels::Auto,
                "general" => Kernels::General,
                "simt" => Kernels::Simt,
                "hopper" => Kernels::Hopper,
                "cublaslt" => Kernels::CublasLt,
                _ => return None,
            })
        };
        let expected = "auto, general, simt, hopper or cublaslt";
        Ok(named("GRAFT_GEMM", expected, read)?.unwrap_or_default())
    }

    /// What multiplies on a device of this compute capability: of f32 numbers, three products on tensor cores take less time
    /// than one beside them on an A100 (by their rates, 156 / 3 against 19.5 TFLOP/s), an H100 and an H200 (495 / 3, of which
    /// `mma.sync` reaches some 60 %, against 67). Other cards of capability 8 multiply TF32 at most twice as fast as f32; of
    /// later ones nothing was measured.
    pub(super) fn on(self, capability: (i32, i32)) -> Kernels {
        match self {
            Kernels::Auto if !matches!(capability, (8 | 9, 0)) => Kernels::Simt,
            kernels => kernels,
        }
    }
}

/// `batch.count` products of one size, without the elements.
#[derive(Clone, Copy, Debug)]
pub struct Products {
    /// Which kernels multiply
    pub kernels: Kernels,
    /// What the elements of A and B are rounded to
    pub operands: Operands,
    /// How the matrices follow each other
    pub batch: Batch,
    /// The first A, `[m, k]`
    pub a: Layout,
    /// The first B, `[k, n]`
    pub b: Layout,
    /// Element type of C
    pub c: Scalar,
}

/// Multiprocessors that the division of work reckons with, on every device, so that all that run the
/// same kernels sum in the same order: those of an H100.
const PROCESSORS: usize = 132;
/// Rows and columns of C that a block of `gemm.cu` sums.
pub(super) const TILE: usize = 128;
/// Rows or columns that a block of its kernels for few of them sums.
pub(super) const FEW: usize = 16;
/// Rows and columns of a block of `gemm_hopper.cu`.
pub(super) const HOPPER_TILE: [usize; 2] = [128, 192];
/// Bytes that cuBLASLt may use.
pub(super) const LIBRARY_ROOM: usize = 32 << 20;
/// What ranges of k are multiples of: of the depth of every kernel's stages.
const DEPTH: usize = 64;
/// Alignment of what lies in the workspace, in bytes.
const ALIGN: usize = 256;

/// The copy of an operand that a kernel can read: `[batches, rows, step]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packed {
    pub batches: usize,
    pub rows: usize,
    pub cols: usize,
    pub batch_stride: usize,
    pub row_stride: usize,
    pub col_stride: usize,
    /// Where it begins in the workspace, in bytes
    pub at: usize,
}

/// An operand as a kernel reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operand {
    /// Contiguous along k
    pub along_depth: bool,
    /// Elements from one row, or column, to the next
    pub step: usize,
    /// Elements from one matrix to the next
    pub batch: usize,
    pub packed: Option<Packed>,
}

/// The kernels that were chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// Without tensor cores
    Simple,
    /// `mma.sync`
    TensorCores,
    /// The same, of at most so few rows
    FewRows,
    /// Of at most so few columns
    FewColumns,
    /// `wgmma`
    Hopper,
    /// cuBLASLt
    Library,
}

impl Path {
    /// Rows and columns of C that a block sums, and how many an H100 runs at a time.
    fn tile(self) -> ([usize; 2], usize) {
        match self {
            Path::Simple | Path::TensorCores | Path::Library => ([TILE; 2], 2 * PROCESSORS),
            Path::FewRows => ([FEW, TILE], 4 * PROCESSORS),
            Path::FewColumns => ([TILE, FEW], 4 * PROCESSORS),
            Path::Hopper => (HOPPER_TILE, PROCESSORS),
        }
    }

    /// Number of tiles of C.
    pub fn tiles(self, m: usize, n: usize) -> usize {
        let [rows, columns] = self.tile().0;
        m.div_ceil(rows) * n.div_ceil(columns)
    }
}

/// Everything that is decided before a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub path: Path,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// What is multiplied
    pub scalar: Scalar,
    pub a: Operand,
    pub b: Operand,
    pub splits: usize,
    /// k of one split
    pub depth: usize,
    /// Where the sums of splits begin in the workspace, in bytes
    pub parts: usize,
    /// Bytes of the workspace
    pub workspace: usize,
}

impl Plan {
    /// Whether the kernels can read the factors of `other` as more of the depth of these.
    pub fn takes_beside(&self, other: &Plan) -> bool {
        let alike = |own: &Operand, other: &Operand| {
            other.packed.is_none() && own.along_depth == other.along_depth && other.batch == 0
        };
        self.path == Path::Hopper
            && (other.scalar, other.k > 0) == (Scalar::Bf16, true)
            && alike(&self.a, &other.a)
            && alike(&self.b, &other.b)
    }
}

/// Takes ranges from the workspace, one after the other.
struct Room(usize);

impl Room {
    fn take(&mut self, bytes: usize) -> usize {
        let at = self.0;
        self.0 += bytes.next_multiple_of(ALIGN);
        at
    }
}

impl Products {
    /// Bytes of workspace that the products need on devices that run kernels for `target`, those included on which
    /// [`Kernels::Simt`] is chosen, for which less is copied.
    ///
    /// # Errors
    /// Element types other than f32 and bf16.
    pub fn workspace(&self, target: Target) -> Result<usize> {
        let own = Products {
            kernels: match self.kernels {
                Kernels::CublasLt => Kernels::Auto,
                kernels => kernels,
            },
            ..*self
        };
        Ok(self
            .plan(target)?
            .workspace
            .max(own.plan(target)?.workspace))
    }

    pub(super) fn plan(&self, target: Target) -> Result<Plan> {
        let (m, n, k) = (self.a.rows, self.b.cols, self.a.cols);
        assert_eq!(k, self.b.rows, "gemm: the inner sizes differ");
        let most = i32::MAX as usize - 4 * TILE; // ends of tiles too
        assert!(m <= most && n <= most && k <= most, "gemm: {m} x {n} x {k}");
        let scalar = self.multiplied()?;
        let mut room = Room(0);
        let chunks = self.on_tensor_cores(scalar, target);
        let mut operand = |x: &Layout, side_stride, depth_stride, side, batch_stride| {
            operand(
                x,
                scalar,
                chunks,
                [side, k],
                [side_stride, depth_stride],
                self.batch.count,
                batch_stride,
                &mut room,
            )
        };
        let (a, b) = (&self.a, &self.b);
        let a = operand(a, a.row_stride, a.col_stride, m, self.batch.a_stride);
        let b = operand(b, b.col_stride, b.row_stride, n, self.batch.b_stride);
        let path = self.path(scalar, target, [&a, &b], [m, n, k]);
        let tiles = path.tiles(m, n) * self.batch.count;
        let (splits, depth) = match path {
            Path::Library => (1, k),
            _ => split(tiles, k, path.tile().1),
        };
        let parts = match splits {
            _ if path == Path::Library => room.take(LIBRARY_ROOM),
            0 | 1 => room.0,
            _ => room.take(4 * self.batch.count * splits * m * n),
        };
        Ok(Plan {
            path,
            m,
            n,
            k,
            scalar,
            a,
            b,
            splits,
            depth,
            parts,
            workspace: room.0,
        })
    }

    fn path(
        &self,
        scalar: Scalar,
        target: Target,
        operands: [&Operand; 2],
        [m, n, k]: [usize; 3],
    ) -> Path {
        if self.kernels == Kernels::CublasLt
            && k > 0
            && (scalar, self.c) != (Scalar::F32, Scalar::Bf16)
        {
            return Path::Library;
        }
        if !self.on_tensor_cores(scalar, target) {
            return Path::Simple;
        }
        if scalar == Scalar::F32 {
            // They have 32 times the step in 32 bits.
            let short = |x: &&Operand| x.step <= i32::MAX as usize / 32;
            return match operands.iter().all(short) {
                true => Path::TensorCores,
                false => Path::Simple,
            };
        }
        // The copy engine reads rows that do not overlap.
        let rows = [(operands[0], m), (operands[1], n)]
            .iter()
            .all(|(x, side)| {
                let (inner, outer) = if x.along_depth {
                    (k, *side)
                } else {
                    (*side, k)
                };
                outer == 1 || x.step >= inner
            });
        let possible = target == Target::Sm90a && k > 0 && rows;
        // Of few rows or columns, more blocks of smaller tiles read the other operand faster.
        let narrow = m.min(n) <= 64;
        match self.kernels {
            Kernels::General => Path::TensorCores,
            Kernels::Hopper if possible => Path::Hopper,
            Kernels::Hopper => Path::TensorCores,
            _ if n <= FEW => Path::FewColumns,
            _ if m <= FEW => Path::FewRows,
            _ if narrow || !possible => Path::TensorCores,
            _ => Path::Hopper,
        }
    }

    /// Whether numbers of this type are multiplied by tensor cores.
    fn on_tensor_cores(&self, scalar: Scalar, target: Target) -> bool {
        target != Target::Sm70 && (scalar == Scalar::Bf16 || self.kernels != Kernels::Simt)
    }

    /// The type that is multiplied. Products of bf16 numbers are exact in f32, in which all sums
    /// are, so that it makes no difference to two bf16 operands what they are rounded to.
    fn multiplied(&self) -> Result<Scalar> {
        for found in [self.a.scalar, self.b.scalar, self.c] {
            if !matches!(found, Scalar::F32 | Scalar::Bf16) {
                return Err(Error::Scalar {
                    kernel: "gemm",
                    found,
                    expected: "f32 and bf16",
                });
            }
        }
        let short = (self.a.scalar, self.b.scalar) == (Scalar::Bf16, Scalar::Bf16);
        Ok(match self.operands {
            Operands::AsStored if !short => Scalar::F32,
            _ => Scalar::Bf16,
        })
    }
}

/// How an operand is read, and what has to be copied for that. `[side, depth]`: its sizes, with
/// `strides` in that order. `chunks`: 16 bytes at a time, which begin at multiples of that.
fn operand(
    x: &Layout,
    scalar: Scalar,
    chunks: bool,
    [side, depth]: [usize; 2],
    [side_stride, depth_stride]: [usize; 2],
    batches: usize,
    batch_stride: usize,
    room: &mut Room,
) -> Operand {
    // A stride over one element is none.
    let side_stride = if side > 1 { side_stride } else { 0 };
    let depth_stride = if depth > 1 { depth_stride } else { 0 };
    let batch_stride = if batches > 1 { batch_stride } else { 0 };
    let chunk = 16 / scalar.size();
    let aligned = |step: usize| {
        !chunks || (x.aligned && step.is_multiple_of(chunk) && batch_stride.is_multiple_of(chunk))
    };
    let contiguous = |stride: usize, length: usize| stride == 1 || length <= 1;
    let along = contiguous(depth_stride, depth) && aligned(side_stride);
    let across = contiguous(side_stride, side) && aligned(depth_stride);
    if x.scalar == scalar && (along || across) {
        return Operand {
            along_depth: along,
            step: if along { side_stride } else { depth_stride },
            batch: batch_stride,
            packed: None,
        };
    }
    let along_depth = depth_stride <= side_stride;
    let (rows, cols, row_stride, col_stride) = match along_depth {
        true => (side, depth, side_stride, depth_stride),
        false => (depth, side, depth_stride, side_stride),
    };
    let step = cols.next_multiple_of(8);
    let copies = if batch_stride == 0 { 1 } else { batches };
    let at = room.take(copies * rows * step * scalar.size());
    Operand {
        along_depth,
        step,
        batch: if batch_stride == 0 { 0 } else { rows * step },
        packed: Some(Packed {
            batches: copies,
            rows,
            cols,
            batch_stride,
            row_stride,
            col_stride,
            at,
        }),
    }
}

/// Into how many ranges k is cut, and their length, where `tiles` blocks are too few for a device
/// that runs `capacity` at a time.
///
/// Costs are in units of one k of a tile. Beginning and ending a tile costs about as much as 128 k,
/// and writing its sums and reading them again as much as 256.
fn split(tiles: usize, k: usize, capacity: usize) -> (usize, usize) {
    let cost = |splits: usize| {
        let depth = k.div_ceil(splits).next_multiple_of(DEPTH);
        let extra = if splits > 1 { 128 + 256 } else { 128 };
        (tiles * splits).div_ceil(capacity) * (depth + extra)
    };
    // More blocks than five rounds of them would only make the workspace larger.
    let most = (k / 256).min(5 * capacity / tiles.max(1)).clamp(1, 64);
    let wanted = (1..=most).min_by_key(|&splits| cost(splits)).unwrap_or(1);
    let depth = k.div_ceil(wanted).next_multiple_of(DEPTH).max(DEPTH);
    // Rounded up, fewer ranges may do.
    (k.div_ceil(depth).max(1), depth)
}

#[cfg(test)]
mod tests;
