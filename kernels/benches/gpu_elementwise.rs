//! Memory traffic of a GPU's elementwise and row-wise kernels, beside that of a copy by the driver
//! measured in the same run.
//!
//! `cargo bench -p graft-kernels --bench gpu_elementwise [-- name]`. GB/s count every byte of the
//! arguments that a perfect kernel would read or write once. Tensors are larger than any second-level
//! cache; times are by the device's clock, the best of five times ten calls.

use graft_kernels::activation::{Activation, Glu, Unary};
use graft_kernels::binary::Binary;
use graft_kernels::cuda::{
    self, Buffer, Gpu, Result, Scalar, Slice, SliceMut, activation as act, binary, dropout, norm,
    norm_held, pool, rope, softmax,
};
use graft_kernels::philox::Key;
use graft_kernels::pool::Pool;

const CALLS: usize = 10;

/// Seconds of a call.
fn best(gpu: &Gpu, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let seconds = gpu.seconds(|| (0..CALLS).try_for_each(|_| run()))?;
        best = best.min(seconds / CALLS as f64);
    }
    Ok(best)
}

struct Report<'a> {
    gpu: &'a Gpu,
    only: Option<String>,
    copy: f64,
}

impl Report<'_> {
    fn line(&self, name: &str, bytes: usize, run: impl FnMut() -> Result<()>) -> Result<()> {
        if self
            .only
            .as_ref()
            .is_some_and(|only| !name.contains(only.as_str()))
        {
            return Ok(());
        }
        let seconds = best(self.gpu, run)?;
        let rate = bytes as f64 / seconds * 1e-9;
        println!(
            "  {name:<40} {:8.1} us {rate:7.0} GB/s  {:4.0} % of copy",
            seconds * 1e6,
            100.0 * rate / self.copy
        );
        Ok(())
    }
}

/// Tensors of one shape side by side in a buffer.
struct Tensors {
    buffer: Buffer,
    count: usize,
    scalar: Scalar,
}

impl Tensors {
    /// `number` of them, with numbers between 0.5 and 2 in all their bytes.
    fn new(gpu: &Gpu, number: usize, count: usize, scalar: Scalar) -> Result<Tensors> {
        let buffer = gpu.allocate(number * count * scalar.size())?;
        let all = buffer.slice_mut(0, number * count, scalar);
        // The bytes of a small number, repeated.
        gpu.set_bytes(all, 0x3f)?;
        Ok(Tensors {
            buffer,
            count,
            scalar,
        })
    }

    fn at(&self, number: usize) -> Slice<'_> {
        let first = number * self.count * self.scalar.size();
        self.buffer.slice(first, self.count, self.scalar)
    }

    fn to(&self, number: usize) -> SliceMut<'_> {
        let first = number * self.count * self.scalar.size();
        self.buffer.slice_mut(first, self.count, self.scalar)
    }
}

fn elements(report: &Report<'_>, scalar: Scalar, name: &str) -> Result<()> {
    let gpu = report.gpu;
    let count = (256 << 20) / scalar.size();
    let t = Tensors::new(gpu, 5, count, scalar)?;
    let bytes = count * scalar.size();
    for kind in [
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Tanh,
        Activation::Silu,
    ] {
        report.line(&format!("{kind:?} {name}"), 2 * bytes, || {
            act::activation(gpu, kind, t.at(0), t.to(1))
        })?;
        report.line(&format!("{kind:?} backward {name}"), 3 * bytes, || {
            act::activation_backward(gpu, kind, t.at(0), t.to(1))
        })?;
    }
    for kind in [Glu::Swiglu, Glu::Geglu] {
        report.line(&format!("{kind:?} {name}"), 3 * bytes, || {
            act::glu(gpu, kind, t.at(0), t.at(1), t.to(2))
        })?;
        report.line(&format!("{kind:?} backward {name}"), 5 * bytes, || {
            let (dgate, dup) = (Some(t.to(3)), Some(t.to(4)));
            act::glu_backward(gpu, kind, t.at(0), t.at(1), t.at(2), dgate, dup)
        })?;
    }
    report.line(&format!("exp {name}"), 2 * bytes, || {
        act::unary(gpu, Unary::Exp, t.at(0), t.to(1))
    })?;
    report.line(&format!("affine {name}"), 2 * bytes, || {
        act::affine(gpu, t.at(0), 0.5, 1.0, t.to(1))
    })?;
    report.line(&format!("add {name}"), 3 * bytes, || {
        binary::binary(gpu, Binary::Add, t.at(0), t.at(1), t.to(2))
    })?;
    report.line(&format!("add in place {name}"), 3 * bytes, || {
        binary::add_assign(gpu, t.to(0), t.at(1))
    })?;
    let shape = [count / 1024, 1024];
    report.line(&format!("add a row {name}"), 2 * bytes, || {
        binary::binary_strided(
            gpu,
            Binary::Add,
            &shape,
            t.at(0),
            &[1024, 1],
            t.at(1),
            &[0, 1],
            t.to(2),
        )
    })?;
    report.line(&format!("dropout {name}"), 2 * bytes, || {
        dropout::dropout(gpu, t.at(0), t.to(1), 0.1, Key::new(1, 2, 3))
    })?;
    report.line(&format!("dropout in place {name}"), 2 * bytes, || {
        dropout::dropout_in_place(gpu, t.to(0), 0.1, Key::new(1, 2, 3))
    })
}

fn rows(report: &Report<'_>, columns: usize, scalar: Scalar, name: &str) -> Result<()> {
    let gpu = report.gpu;
    let rows = (256 << 20) / scalar.size() / columns;
    let t = Tensors::new(gpu, 4, rows * columns, scalar)?;
    let bytes = rows * columns * scalar.size();
    let f32 = Scalar::F32;
    let [weight, bias] = [0, 1].map(|_| Tensors::new(gpu, 1, columns, f32));
    let (weight, bias) = (weight?, bias?);
    let statistics = Tensors::new(gpu, 2, rows, f32)?;
    let (w, b) = (weight.at(0), bias.at(0));
    let (mean, rstd) = (statistics.at(0), statistics.at(1));
    let name = format!("{columns} {name}");
    report.line(&format!("layer norm {name}"), 2 * bytes, || {
        let (mean, rstd) = (statistics.to(0), statistics.to(1));
        let (x, y) = (t.at(0), t.to(1));
        norm::layer_norm(
            gpu,
            x,
            None,
            Some(w),
            Some(b),
            1e-5,
            y,
            None,
            mean,
            rstd,
            columns,
        )
    })?;
    report.line(&format!("layer norm, residual {name}"), 4 * bytes, || {
        let (mean, rstd) = (statistics.to(0), statistics.to(1));
        let (x, r, y, s) = (t.at(0), Some(t.at(1)), t.to(2), Some(t.to(3)));
        norm::layer_norm(gpu, x, r, Some(w), Some(b), 1e-5, y, s, mean, rstd, columns)
    })?;
    report.line(&format!("layer norm backward {name}"), 3 * bytes, || {
        let (s, dy, dx) = (t.at(0), t.at(1), t.to(2));
        norm::layer_norm_backward_input(gpu, s, Some(w), mean, rstd, dy, dx, columns)
    })?;
    let need = norm::norm_backward_workspace(rows, columns, scalar);
    let scratch = Tensors::new(gpu, 1, need.max(1), f32)?;
    report.line(&format!("layer norm parameters {name}"), 2 * bytes, || {
        let (dw, db) = (Some(weight.to(0)), Some(bias.to(0)));
        let (s, dy, scratch) = (t.at(0), t.at(1), scratch.to(0));
        norm::layer_norm_backward_params(gpu, s, mean, rstd, dy, dw, db, columns, scratch)
    })?;
    if norm_held::holds(columns) {
        let what = format!("layer norm, all gradients, added {name}");
        report.line(&what, 4 * bytes, || {
            let read = norm_held::Read {
                s: Some(t.at(0)),
                weight: Some(w),
                mean: Some(mean),
                rstd: Some(rstd),
                dy: t.at(1),
            };
            let written = norm_held::Written {
                ds: Some(t.to(2)),
                adds: true,
                dweight: Some(weight.to(0)),
                dbias: Some(bias.to(0)),
            };
            norm_held::backward(gpu, read, written, [rows, columns], scratch.to(0))
        })?;
    }
    report.line(&format!("rms norm, residual {name}"), 4 * bytes, || {
        let (x, r, y, s) = (t.at(0), Some(t.at(1)), t.to(2), Some(t.to(3)));
        norm::rms_norm(gpu, x, r, w, 0.0, 1e-5, y, s, statistics.to(1), columns)
    })?;
    report.line(&format!("rms norm backward {name}"), 3 * bytes, || {
        let (s, dy, dx) = (t.at(0), t.at(1), t.to(2));
        norm::rms_norm_backward_input(gpu, s, w, 0.0, rstd, dy, dx, columns)
    })?;
    report.line(&format!("unit length {name}"), 2 * bytes, || {
        norm::l2_normalize(gpu, t.at(0), 1e-12, t.to(1), statistics.to(0), columns)
    })?;
    report.line(&format!("softmax {name}"), 2 * bytes, || {
        softmax::softmax(gpu, t.at(0), t.to(1), columns, false)
    })?;
    report.line(&format!("softmax backward {name}"), 3 * bytes, || {
        softmax::softmax_backward(gpu, t.at(0), t.at(1), t.to(2), columns, false)
    })
}

fn tokens(report: &Report<'_>, scalar: Scalar, name: &str) -> Result<()> {
    let gpu = report.gpu;
    let (heads, head) = (32, 128);
    let columns = heads * head;
    let length = 512;
    let tokens = (256 << 20) / scalar.size() / columns / length * length;
    let t = Tensors::new(gpu, 2, tokens * columns, scalar)?;
    let bytes = tokens * columns * scalar.size();
    let tables = Tensors::new(gpu, 2, length * head / 2, Scalar::F32)?;
    let positions: Vec<i64> = (0..tokens).map(|i| (i % length) as i64).collect();
    let offsets: Vec<i64> = (0..=tokens / length).map(|i| (i * length) as i64).collect();
    let integers = |values: &[i64]| {
        let buffer = gpu.allocate(8 * values.len())?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        gpu.upload(&bytes, buffer.slice_mut(0, values.len(), Scalar::I64))?;
        Ok::<_, cuda::Error>(buffer)
    };
    let (at, places) = (integers(&positions)?, integers(&offsets)?);
    let at = at.slice(0, tokens, Scalar::I64);
    let places = places.slice(0, offsets.len(), Scalar::I64);
    for interleaved in [false, true] {
        let name = format!("rope, interleaved: {interleaved}, {name}");
        report.line(&name, 2 * bytes, || {
            let (cos, sin, y) = (tables.at(0), tables.at(1), t.to(1));
            rope::rope(
                gpu,
                t.at(0),
                cos,
                sin,
                at,
                heads,
                head,
                head,
                interleaved,
                false,
                y,
            )
        })?;
    }
    let pooled = Tensors::new(gpu, 1, (offsets.len() - 1) * columns, scalar)?;
    for kind in [Pool::Mean, Pool::Max] {
        report.line(&format!("{kind:?} of tokens {name}"), bytes, || {
            pool::pool(gpu, kind, t.at(0), places, pooled.to(0), columns)
        })?;
    }
    report.line(&format!("mean of tokens backward {name}"), bytes, || {
        let (dy, dx) = (pooled.at(0), t.to(0));
        pool::pool_backward(gpu, Pool::Mean, None, places, dy, dx, columns)
    })
}

fn main() -> Result<()> {
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let gpu = &match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("nothing to measure: {error}");
            return Ok(());
        }
    };
    let t = Tensors::new(gpu, 2, 256 << 20, Scalar::U8)?;
    let seconds = best(gpu, || gpu.copy(t.at(0), t.to(1)))?;
    let copy = 2.0 * (256 << 20) as f64 / seconds * 1e-9;
    println!("{}: copy {copy:.0} GB/s", gpu.limits().name);
    drop(t);
    let report = Report { gpu, only, copy };
    for (scalar, name) in [(Scalar::Bf16, "bf16"), (Scalar::F32, "f32")] {
        elements(&report, scalar, name)?;
        for columns in [384, 768, 1024, 2048, 4096, 8192] {
            rows(&report, columns, scalar, name)?;
        }
        tokens(&report, scalar, name)?;
    }
    Ok(())
}
