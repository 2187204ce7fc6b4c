//! Memory traffic of the elementwise and row-wise kernels at the sizes of MiniLM, beside that of a
//! plain copy measured in the same run.
//!
//! `cargo bench -p graft-kernels --bench elementwise [-- name]`; threads as in
//! `RAYON_NUM_THREADS`. GB/s count every byte of the arguments that a perfect kernel would read or
//! write once. Best of all repetitions in about a third of a second.

mod best;

use best::best;
use graft_kernels::activation::{Activation, Glu, activation, activation_backward, glu};
use graft_kernels::norm::{
    layer_norm, layer_norm_backward_input, layer_norm_backward_params,
    layer_norm_backward_workspace, rms_norm,
};
use graft_kernels::optimizer::{AdamW, adamw, sum_squares};
use graft_kernels::reduce::{sum_rows, sum_rows_workspace};
use graft_kernels::softmax::{softmax, softmax_backward};
use graft_kernels::{Isa, binary, copy};
use half::bf16;
use std::hint::black_box;

struct Report {
    only: Option<String>,
    copy: f64,
}

impl Report {
    fn line(&self, name: &str, bytes: usize, run: impl FnMut()) {
        if self
            .only
            .as_ref()
            .is_some_and(|only| !name.contains(only.as_str()))
        {
            return;
        }
        let rate = bytes as f64 / best(0.3, run) * 1e-9;
        println!(
            "  {name:<28} {rate:7.1} GB/s  {:4.0} % of copy",
            100.0 * rate / self.copy
        );
    }
}

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 * 4.0 - 4.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn main() {
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    println!(
        "{:?}, {} threads",
        Isa::detect(),
        rayon::current_num_threads()
    );
    for (rows, cols) in [(4096, 384), (4096, 1536)] {
        let n = rows * cols;
        let (x, dy, residual) = (numbers(n, 1), numbers(n, 2), numbers(n, 3));
        let (weight, bias) = (numbers(cols, 4), numbers(cols, 5));
        let (mut y, mut sum) = (vec![0f32; n], vec![0f32; n]);
        let (mut mean, mut rstd) = (vec![0f32; rows], vec![0f32; rows]);
        let pass = n * 4;

        // The larger of one thread's copy and that of all of them.
        let alone = best(0.3, || black_box(&mut y).copy_from_slice(black_box(&x)));
        let shared = best(0.3, || {
            copy::copy_strided(&[n], black_box(&x), &[1], black_box(&mut y))
        });
        let rate = |seconds: f64| 2.0 * pass as f64 / seconds * 1e-9;
        println!(
            "[{rows}, {cols}] f32: copy {:.1} GB/s on one thread, {:.1} on all",
            rate(alone),
            rate(shared)
        );
        let report = Report {
            only: only.clone(),
            copy: rate(alone.min(shared)),
        };

        for kind in [
            Activation::Gelu,
            Activation::GeluTanh,
            Activation::Silu,
            Activation::Tanh,
        ] {
            report.line(&format!("{kind:?}"), 2 * pass, || {
                activation(kind, &x, &mut y)
            });
            report.line(&format!("{kind:?} backward"), 3 * pass, || {
                activation_backward(kind, &x, &mut y);
            });
        }
        report.line("Swiglu", 3 * pass, || glu(Glu::Swiglu, &x, &dy, &mut y));
        report.line("add", 3 * pass, || {
            binary::binary(binary::Binary::Add, &x, &dy, &mut y)
        });
        report.line("add bias to rows", 2 * pass, || {
            let (shape, of_x, of_bias) = ([rows, cols], [cols, 1], [0, 1]);
            binary::binary_strided(
                binary::Binary::Add,
                &shape,
                &x,
                &of_x,
                &bias,
                &of_bias,
                &mut y,
            );
        });
        report.line("layer_norm", 2 * pass, || {
            let (weight, bias) = (Some(&weight[..]), Some(&bias[..]));
            layer_norm(
                &x, None, weight, bias, 1e-12, &mut y, None, &mut mean, &mut rstd, cols,
            );
        });
        report.line("layer_norm + residual", 4 * pass, || {
            let (weight, bias, residual) = (Some(&weight[..]), Some(&bias[..]), &residual);
            layer_norm(
                &x,
                Some(residual),
                weight,
                bias,
                1e-12,
                &mut y,
                Some(&mut sum),
                &mut mean,
                &mut rstd,
                cols,
            );
        });
        report.line("layer_norm backward input", 3 * pass, || {
            layer_norm_backward_input(&x, Some(&weight), &mean, &rstd, &dy, &mut y, cols);
        });
        let mut workspace = vec![0f32; layer_norm_backward_workspace(rows, cols)];
        let (mut dweight, mut dbias) = (vec![0f32; cols], vec![0f32; cols]);
        report.line("layer_norm backward params", 2 * pass, || {
            let (dweight, dbias) = (Some(&mut dweight[..]), Some(&mut dbias[..]));
            layer_norm_backward_params(&x, &mean, &rstd, &dy, dweight, dbias, cols, &mut workspace);
        });
        report.line("rms_norm", 2 * pass, || {
            rms_norm(&x, None, &weight, 0.0, 1e-6, &mut y, None, &mut rstd, cols);
        });
        report.line("softmax", 2 * pass, || softmax(&x, &mut y, cols));
        let probabilities = y.clone();
        report.line("softmax backward", 3 * pass, || {
            softmax_backward(&probabilities, &dy, &mut y, cols);
        });
        let mut workspace = vec![0f32; sum_rows_workspace(rows, cols)];
        report.line("sum of rows", pass, || {
            sum_rows(&x, rows, cols, &mut dbias, false, &mut workspace);
        });
        report.line("sum of squares", pass, || {
            black_box(sum_squares(&x));
        });
        let (mut m, mut v) = (vec![0f32; n], vec![0f32; n]);
        let step = AdamW {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            step: 3,
            grad_scale: 1.0,
        };
        report.line("adamw", 7 * pass, || {
            adamw(&step, &mut sum, &dy, &mut m, &mut v)
        });
        let (strides, shape) = ([1, cols], [cols, rows]);
        report.line("transpose", 2 * pass, || {
            copy::copy_strided(&shape, &x, &strides, &mut y)
        });

        let mut short = vec![bf16::ZERO; n];
        report.line("f32 to bf16", pass / 2 * 3, || {
            copy::convert(&x, &mut short)
        });
        let mut result = vec![bf16::ZERO; n];
        report.line("Gelu in bf16", pass, || {
            activation(Activation::Gelu, &short, &mut result)
        });
    }
}
