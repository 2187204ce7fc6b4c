//! Launchers of `optimizer.cu`: one launch for all tensors of a step.

use super::launch::args;
use super::{Error, Gpu, Launch, Result, Scalar, Slice, SliceMut};
use crate::optimizer::{AdamW, Sgd};

/// Threads of a block, as in the source.
const THREADS: u32 = 256;
/// Elements of a block, as in the source.
const CHUNK: usize = 8192;
/// Blocks that sum squares, at most.
const SUM_BLOCKS: usize = 1024;

/// Bytes of [`Norm`] on the device.
pub const NORM: usize = 16;
/// Bytes of the numbers of one group, whatever the rule.
pub const GROUP: usize = 32;
/// Bytes of one tensor's line in a [`Table`].
pub const LINE: usize = 64;

/// What was found out about the gradients of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// The sum of their squares
    pub squares: f64,
    /// What they are multiplied with
    pub clip: f32,
    /// The first line of the table with an element that is infinite or NaN: nothing is updated then
    pub broken: Option<usize>,
}

impl Norm {
    /// As it lies on the device.
    pub fn bytes(&self) -> [u8; NORM] {
        let mut bytes = [0; NORM];
        bytes[..8].copy_from_slice(&self.squares.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.clip.to_ne_bytes());
        let broken = self.broken.map_or(-1, |line| line as i32);
        bytes[12..].copy_from_slice(&broken.to_ne_bytes());
        bytes
    }

    /// From the bytes of the device.
    pub fn from_bytes(bytes: [u8; NORM]) -> Norm {
        let [a, b, c, d] = bytemuck::cast::<_, [[u8; 4]; 4]>(bytes);
        Norm {
            squares: f64::from_ne_bytes(bytemuck::cast([a, b])),
            clip: f32::from_ne_bytes(c),
            broken: usize::try_from(i32::from_ne_bytes(d)).ok(),
        }
    }
}

/// The numbers of AdamW as the kernel reads them: those of optimizer.rs, rounded as there. The factor
/// of the gradients is not among them: it is in [`Norm`].
pub fn adamw_group(p: &AdamW) -> [u8; GROUP] {
    assert!(p.step >= 1, "adamw: steps are counted from 1");
    let t = p.step as f64;
    let numbers = [
        1.0 - p.lr * p.weight_decay,
        p.beta1,
        1.0 - p.beta1,
        p.beta2,
        1.0 - p.beta2,
        p.eps,
        p.lr / (1.0 - p.beta1.powf(t)),
        (1.0 - p.beta2.powf(t)).sqrt(),
    ];
    bytemuck::cast(numbers.map(|x| x as f32))
}

/// The numbers of stochastic gradient descent, as [`adamw_group`] gives those of AdamW.
pub fn sgd_group(p: &Sgd) -> [u8; GROUP] {
    let ahead = if p.nesterov { p.momentum } else { 1.0 };
    let numbers = [
        p.lr,
        p.momentum,
        1.0 - p.dampening,
        ahead,
        if p.nesterov { 1.0 } else { 0.0 },
        p.weight_decay,
    ]
    .map(|x| x as f32);
    let mut bytes = [0; GROUP];
    bytes[..24].copy_from_slice(bytemuck::cast_slice(&numbers));
    bytes[24..28].copy_from_slice(&i32::from(p.momentum != 0.0).to_ne_bytes());
    bytes[28..].copy_from_slice(&i32::from(p.first_step).to_ne_bytes());
    bytes
}

/// Where the tensors of a step lie. Its bytes go to the device; they change only if a tensor moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    bytes: Vec<u8>,
    lines: usize,
    chunks: usize,
    scalar: Scalar,
}

impl Table {
    /// No tensors yet; all will be of one type.
    ///
    /// # Errors
    /// Types other than f32 and bf16.
    pub fn new(scalar: Scalar) -> Result<Table> {
        if !matches!(scalar, Scalar::F32 | Scalar::Bf16) {
            return Err(Error::Scalar {
                kernel: "optimizer",
                found: scalar,
                expected: "f32 and bf16",
            });
        }
        Ok(Table {
            bytes: Vec::new(),
            lines: 0,
            chunks: 0,
            scalar,
        })
    }

    /// A gradient, whose squares are summed.
    ///
    /// # Panics
    /// If it is of another type.
    pub fn gradient(&mut self, gradient: Slice<'_>) {
        self.line(gradient, [0; 4], 0);
    }

    /// A weight that is updated with the numbers of `group`, its gradient, and its states: two for
    /// AdamW (mean gradient, mean square), one or none for descent. `rounded` is a copy of an f32
    /// weight in bf16, which is written with it.
    ///
    /// # Panics
    /// If they differ in length or type.
    pub fn push(
        &mut self,
        weight: &SliceMut<'_>,
        rounded: Option<&SliceMut<'_>>,
        gradient: Slice<'_>,
        states: [Option<&SliceMut<'_>>; 2],
        group: usize,
    ) {
        for x in states.into_iter().flatten().chain([weight]) {
            assert_eq!(x.count(), gradient.count(), "optimizer: lengths");
            assert_eq!(x.scalar(), self.scalar, "optimizer: types");
        }
        if let Some(rounded) = rounded {
            let kinds = (self.scalar, rounded.scalar());
            assert_eq!(kinds, (Scalar::F32, Scalar::Bf16), "optimizer: rounded");
            assert_eq!(rounded.count(), gradient.count(), "optimizer: rounded");
        }
        let [first, second] = states.map(|state| state.map_or(0, SliceMut::address));
        let rounded = rounded.map_or(0, SliceMut::address);
        self.line(gradient, [weight.address(), first, second, rounded], group);
    }

    fn line(&mut self, gradient: Slice<'_>, written: [u64; 4], group: usize) {
        assert_eq!(gradient.scalar(), self.scalar, "optimizer: types");
        let count = gradient.count();
        if count == 0 {
            return;
        }
        let [weight, first, second, rounded] = written;
        let words = [
            weight,
            gradient.address(),
            first,
            second,
            rounded,
            count as u64,
            self.chunks as u64,
            group as u64,
        ];
        self.bytes.extend_from_slice(bytemuck::bytes_of(&words));
        self.lines += 1;
        self.chunks += count.div_ceil(CHUNK);
    }

    /// What goes to the device.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn check(&self, on_device: Slice<'_>) {
        let aligned = on_device.address().is_multiple_of(8);
        assert!(
            on_device.bytes() >= self.bytes.len() && aligned,
            "optimizer: the table's place"
        );
    }

    fn name(&self, names: [&'static str; 2]) -> &'static str {
        names[usize::from(self.scalar == Scalar::Bf16)]
    }
}

/// Bytes of workspace for [`global_norm`].
pub const NORM_WORKSPACE: usize = (8 + 4) * SUM_BLOCKS;

/// The norm of all gradients of a table, and the factor that brings it down to `most`.
///
/// `on_device`: the table's bytes; workspace of [`NORM_WORKSPACE`] bytes; norm of [`NORM`] bytes; both
/// at multiples of 8.
///
/// # Errors
/// A failed launch.
///
/// # Panics
/// If something is too short.
pub fn global_norm(
    gpu: &Gpu,
    table: &Table,
    on_device: Slice<'_>,
    most: Option<f64>,
    workspace: SliceMut<'_>,
    norm: SliceMut<'_>,
) -> Result<()> {
    table.check(on_device);
    for (what, x, bytes) in [
        ("workspace", &workspace, NORM_WORKSPACE),
        ("norm", &norm, NORM),
    ] {
        let fits = x.as_slice().bytes() >= bytes && x.address().is_multiple_of(8);
        assert!(fits, "global_norm: {what}");
    }
    let blocks = table.chunks.min(SUM_BLOCKS);
    let name = table.name(["sum_squares_f32", "sum_squares_bf16"]);
    let launch = Launch::linear(blocks, THREADS);
    let lines = table.lines as i32;
    let args = args![on_device, lines, table.chunks, &workspace];
    gpu.launch("optimizer", name, launch, args)?;
    let launch = Launch::linear(1, THREADS);
    let args = args![workspace, blocks as i32, most.unwrap_or(-1.0), norm];
    gpu.launch("optimizer", "join_squares", launch, args)
}

/// Which update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// With groups of [`adamw_group`]
    AdamW,
    /// With groups of [`sgd_group`]
    Sgd,
}

/// Updates every tensor of a table with the numbers of its group, unless the norm says that a
/// gradient is not finite.
///
/// `on_device`: the table's bytes; groups: [`GROUP`] bytes each, as many as the table names; norm:
/// [`NORM`] bytes, that [`global_norm`] found or that were uploaded.
///
/// # Errors
/// A failed launch.
///
/// # Panics
/// If something is too short.
pub fn update(
    gpu: &Gpu,
    rule: Rule,
    table: &Table,
    on_device: Slice<'_>,
    groups: Slice<'_>,
    norm: Slice<'_>,
) -> Result<()> {
    table.check(on_device);
    assert!(norm.bytes() >= NORM, "update: norm");
    let last = table.bytes.as_chunks::<LINE>().0.iter().map(|line| {
        let words: [u64; LINE / 8] = bytemuck::pod_read_unaligned(line);
        words[7] as usize + 1
    });
    let need = last.max().unwrap_or(0) * GROUP;
    assert!(groups.bytes() >= need, "update: groups");
    let name = match rule {
        Rule::AdamW => table.name(["adamw_f32", "adamw_bf16"]),
        Rule::Sgd => table.name(["sgd_f32", "sgd_bf16"]),
    };
    let launch = Launch::linear(table.chunks, THREADS);
    let args = args![on_device, table.lines as i32, groups, norm];
    gpu.launch("optimizer", name, launch, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_norm_comes_back() {
        for broken in [None, Some(0), Some(7)] {
            let norm = Norm {
                squares: 1e77,
                clip: 0.25,
                broken,
            };
            assert_eq!(Norm::from_bytes(norm.bytes()), norm);
        }
    }

    #[test]
    fn lines_count_chunks_and_leave_out_what_is_empty() {
        let mut table = Table::new(Scalar::F32).unwrap();
        for count in [1, 0, CHUNK, CHUNK + 1, 5] {
            table.gradient(Slice::new(4096, count, Scalar::F32));
        }
        let words: Vec<u64> = table
            .bytes()
            .as_chunks::<8>()
            .0
            .iter()
            .map(|&b| u64::from_ne_bytes(b))
            .collect();
        let first: Vec<u64> = words.chunks(LINE / 8).map(|line| line[6]).collect();
        assert_eq!((first, table.chunks), (vec![0, 1, 2, 4], 5));
        assert!(Table::new(Scalar::F64).is_err());
    }
}
