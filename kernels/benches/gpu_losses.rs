//! Memory traffic of losses, optimizer steps, sums and rows by index on a GPU, beside that of a plain
//! copy measured in the same run.
//!
//! `cargo bench -p graft-kernels --bench gpu_losses [-- name]`, on the first GPU. GB/s count every byte
//! of the arguments that a perfect kernel would read or write once. Best of several series of
//! launches, each series timed as a whole.

use std::time::Instant;

use graft_kernels::cuda::cross_entropy::{
    Loss, cross_entropy, cross_entropy_backward, cross_entropy_with_gradient,
    relative_cross_entropy,
};
use graft_kernels::cuda::index::{Scatter, gather_rows, order_rows, scatter_add_rows};
use graft_kernels::cuda::optimizer::{
    GROUP, LINE, NORM, NORM_WORKSPACE, Norm, Rule, Table, adamw_group, global_norm, update,
};
use graft_kernels::cuda::reduce::{sum_rows, sum_rows_workspace};
use graft_kernels::cuda::{Buffer, Error, Gpu, Result, Scalar, copy};
use graft_kernels::optimizer::AdamW;

/// Launches of one series.
const SERIES: usize = 20;

struct Bench {
    gpu: Gpu,
    only: Option<String>,
    copy: f64,
}

impl Bench {
    /// Seconds of one run, the best of several series.
    fn seconds(&self, mut run: impl FnMut(&Gpu) -> Result<()>) -> Result<f64> {
        let mut best = f64::INFINITY;
        run(&self.gpu)?;
        for _ in 0..8 {
            self.gpu.synchronize()?;
            let start = Instant::now();
            for _ in 0..SERIES {
                run(&self.gpu)?;
            }
            self.gpu.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64() / SERIES as f64);
        }
        Ok(best)
    }

    fn line(&self, name: &str, bytes: usize, run: impl FnMut(&Gpu) -> Result<()>) -> Result<()> {
        if self
            .only
            .as_ref()
            .is_some_and(|only| !name.contains(only.as_str()))
        {
            return Ok(());
        }
        let seconds = self.seconds(run)?;
        let rate = bytes as f64 / seconds * 1e-9;
        println!(
            "  {name:<44} {:9.1} us {rate:8.1} GB/s {:4.0} % of copy",
            1e6 * seconds,
            100.0 * rate / self.copy
        );
        Ok(())
    }

    /// A buffer of f32 with numbers between -1 and 1.
    fn numbers(&self, count: usize) -> Result<Buffer> {
        let mut state = 1u32;
        let values: Vec<f32> = (0..count.min(1 << 20))
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        let buffer = self.gpu.allocate(4 * count.max(1))?;
        let mut done = 0;
        while done < count {
            let part = values.len().min(count - done);
            let to = buffer.slice_mut(4 * done, part, Scalar::F32);
            let bytes: Vec<u8> = values[..part]
                .iter()
                .flat_map(|x| x.to_ne_bytes())
                .collect();
            self.gpu.upload(&bytes, to)?;
            done += part;
        }
        Ok(buffer)
    }

    /// The same numbers in a type.
    fn typed(&self, count: usize, scalar: Scalar) -> Result<Buffer> {
        let wide = self.numbers(count)?;
        let buffer = self.gpu.allocate(count.max(1) * scalar.size())?;
        let to = buffer.slice_mut(0, count, scalar);
        copy::convert(&self.gpu, wide.slice(0, count, Scalar::F32), to)?;
        self.gpu.synchronize()?;
        Ok(buffer)
    }

    fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.gpu.allocate(bytes.len().max(8))?;
        self.gpu
            .upload(bytes, buffer.slice_mut(0, bytes.len(), Scalar::U8))?;
        Ok(buffer)
    }

    fn losses(&self, rows: usize, classes: usize) -> Result<()> {
        let p = Loss {
            classes,
            step: classes,
            ignore: -100,
            smoothing: 0.0,
            cap: None,
        };
        let count = rows * classes;
        let targets: Vec<u8> = (0..rows)
            .flat_map(|i| ((i * 7919 % classes) as i64).to_ne_bytes())
            .collect();
        let targets = self.upload(&targets)?;
        let targets = targets.slice(0, rows, Scalar::I64);
        let [losses, lse] = [self.numbers(rows)?, self.numbers(rows)?];
        let dy = self.numbers(1)?;
        for (scalar, name) in [(Scalar::F32, "f32"), (Scalar::Bf16, "bf16")] {
            let logits = self.typed(count, scalar)?;
            let dlogits = self.typed(count, scalar)?;
            let pass = count * scalar.size();
            let x = logits.slice(0, count, scalar);
            let name = format!("cross-entropy {name} [{rows}, {classes}]");
            self.line(&name, pass, |gpu| {
                let (losses, lse) = (
                    losses.slice_mut(0, rows, Scalar::F32),
                    lse.slice_mut(0, rows, Scalar::F32),
                );
                cross_entropy(gpu, &p, x, targets, losses, lse)
            })?;
            self.line(&format!("{name} backward"), 2 * pass, |gpu| {
                let (lse, dy) = (lse.slice(0, rows, Scalar::F32), dy.slice(0, 1, Scalar::F32));
                let dx = dlogits.slice_mut(0, count, scalar);
                cross_entropy_backward(gpu, &p, x, targets, lse, dy, dx)
            })?;
            self.line(&format!("{name} with gradient"), 2 * pass, |gpu| {
                cross_entropy_with_gradient(
                    gpu,
                    &p,
                    logits.slice_mut(0, count, scalar),
                    targets,
                    losses.slice_mut(0, rows, Scalar::F32),
                    lse.slice_mut(0, rows, Scalar::F32),
                )
            })?;
        }
        let p = Loss {
            step: classes.next_multiple_of(64),
            ..p
        };
        let count = rows * p.step;
        let logits = self.typed(count, Scalar::Bf16)?;
        let name = format!("relative cross-entropy [{rows}, {classes}]");
        for (gradient, name) in [
            (false, name.clone()),
            (true, format!("{name} with gradient")),
        ] {
            let pass = 2 * count * (1 + usize::from(gradient));
            self.line(&name, pass, |gpu| {
                let lse = lse.slice(0, rows, Scalar::F32);
                let losses = losses.slice_mut(0, rows, Scalar::F32);
                let logits = logits.slice_mut(0, count, Scalar::Bf16);
                relative_cross_entropy(gpu, &p, logits, lse, targets, losses, gradient)
            })?;
        }
        Ok(())
    }

    /// AdamW and the norm over tensors of these sizes, in f32.
    fn optimizer(&self, what: &str, sizes: &[usize]) -> Result<()> {
        let all: usize = sizes.iter().sum();
        let buffers = [0; 4].map(|_| self.numbers(all));
        let [weights, gradients, means, squares] = buffers;
        let (weights, gradients) = (weights?, gradients?);
        let (means, squares) = (means?, squares?);
        copy::fill(&self.gpu, squares.slice_mut(0, all, Scalar::F32), 0)?;
        let mut table = Table::new(Scalar::F32)?;
        let mut first = 0;
        for &size in sizes {
            table.push(
                &weights.slice_mut(4 * first, size, Scalar::F32),
                None,
                gradients.slice(4 * first, size, Scalar::F32),
                [
                    Some(&means.slice_mut(4 * first, size, Scalar::F32)),
                    Some(&squares.slice_mut(4 * first, size, Scalar::F32)),
                ],
                0,
            );
            first += size;
        }
        let lines = self.upload(table.bytes())?;
        let lines = lines.slice(0, sizes.len() * LINE, Scalar::U8);
        let p = AdamW {
            lr: 1e-5,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            step: 10,
            grad_scale: 1.0,
        };
        let groups = self.upload(&adamw_group(&p))?;
        let norm = Norm {
            squares: 0.0,
            clip: 1.0,
            broken: None,
        };
        let norm = self.upload(&norm.bytes())?;
        let sums = self.gpu.allocate(NORM_WORKSPACE)?;
        self.line(&format!("AdamW, {what}"), 28 * all, |gpu| {
            let groups = groups.slice(0, GROUP, Scalar::U8);
            update(
                gpu,
                Rule::AdamW,
                &table,
                lines,
                groups,
                norm.slice(0, NORM, Scalar::U8),
            )
        })?;
        self.line(&format!("norm of gradients, {what}"), 4 * all, |gpu| {
            let sums = sums.slice_mut(0, NORM_WORKSPACE, Scalar::U8);
            let norm = norm.slice_mut(0, NORM, Scalar::U8);
            global_norm(gpu, &table, lines, Some(1.0), sums, norm)
        })
    }

    fn rows(&self, scalar: Scalar, [tokens, columns]: [usize; 2]) -> Result<()> {
        let count = tokens * columns;
        let x = self.typed(count, scalar)?;
        let x = x.slice(0, count, scalar);
        let scratch = sum_rows_workspace(tokens, columns);
        let scratch = self.numbers(scratch.max(Scatter::workspace(tokens, columns)))?;
        let y = self.numbers(columns)?;
        let bytes = count * scalar.size();
        let name = format!("{scalar} [{tokens}, {columns}]");
        self.line(&format!("sum of rows {name}"), bytes, |gpu| {
            let scratch = scratch.slice_mut(0, scratch.bytes() / 4, Scalar::F32);
            let y = y.slice_mut(0, columns, Scalar::F32);
            sum_rows(gpu, x, [tokens, columns], y, scratch)
        })?;
        let vocabulary = 50_257;
        let table = self.typed(vocabulary * columns, scalar)?;
        // Few words are frequent, most are not.
        let words = (0..tokens).map(|i| {
            let i = (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
            let share = i as f64 / (1u64 << 24) as f64;
            (vocabulary as f64).powf(share) as i64
        });
        let words: Vec<i64> = words.collect();
        for (what, index) in [("words", words), ("one row", vec![0; tokens])] {
            let uploaded: Vec<u8> = index.iter().flat_map(|i| i.to_ne_bytes()).collect();
            let uploaded = self.upload(&uploaded)?;
            let y = self.typed(count, scalar)?;
            self.line(&format!("gather of {what} {name}"), 2 * bytes, |gpu| {
                let table = table.slice(0, vocabulary * columns, scalar);
                let index = uploaded.slice(0, tokens, Scalar::I64);
                gather_rows(gpu, table, index, y.slice_mut(0, count, scalar), columns)
            })?;
            let scatter = Scatter::new(tokens, vocabulary)?;
            let numbers = self.numbers(scatter.numbers())?;
            let room = self.numbers(scatter.order_workspace())?;
            self.line(&format!("order of {what} {name}"), 8 * tokens, |gpu| {
                let index = uploaded.slice(0, tokens, Scalar::I64);
                let numbers = numbers.slice_mut(0, scatter.numbers(), Scalar::I32);
                let room = room.slice_mut(0, scatter.order_workspace(), Scalar::I32);
                order_rows(gpu, &scatter, index, numbers, room)
            })?;
            let name = format!("scatter of {what} {name}");
            self.line(&name, bytes, |gpu| {
                let numbers = numbers.slice(0, scatter.numbers(), Scalar::I32);
                let table = table.slice_mut(0, vocabulary * columns, scalar);
                let scratch = scratch.slice_mut(0, scratch.bytes() / 4, Scalar::F32);
                scatter_add_rows(gpu, &scatter, numbers, x, table, columns, scratch)
            })?;
        }
        Ok(())
    }
}

fn run() -> Result<()> {
    let gpu = Gpu::open(0)?;
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let mut bench = Bench {
        gpu,
        only,
        copy: 1.0,
    };
    let bytes = 1usize << 30;
    let [a, b] = [bench.gpu.allocate(bytes)?, bench.gpu.allocate(bytes)?];
    let seconds = bench.seconds(|gpu| {
        gpu.copy(
            a.slice(0, bytes, Scalar::U8),
            b.slice_mut(0, bytes, Scalar::U8),
        )
    })?;
    bench.copy = 2.0 * bytes as f64 / seconds * 1e-9;
    println!("{:?}: copy {:.0} GB/s", bench.gpu, bench.copy);
    drop((a, b));
    bench.losses(2048, 50_257)?;
    bench.losses(1024, 128_256)?;
    bench.losses(65_536, 4)?;
    // GPT-2's small model, and one large tensor.
    let layer = [
        768 * 2304,
        2304,
        768 * 768,
        768,
        768 * 3072,
        3072,
        3072 * 768,
        768,
        768,
        768,
        768,
        768,
    ];
    let mut sizes = vec![50_257 * 768, 1024 * 768, 768, 768];
    sizes.extend(layer.repeat(12));
    bench.optimizer("124 M in 148 tensors", &sizes)?;
    bench.optimizer("500 M in one tensor", &[500_000_000])?;
    for scalar in [Scalar::F32, Scalar::Bf16] {
        bench.rows(scalar, [65_536, 768])?;
    }
    Ok(())
}

fn main() {
    match run() {
        Ok(()) => {}
        // A machine without a GPU has nothing to measure.
        Err(error @ (Error::NoDriver { .. } | Error::NoDevice { .. })) => {
            println!("not measured: {error}")
        }
        Err(error) => panic!("{error}"),
    }
}
