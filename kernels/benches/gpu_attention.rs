//! Attention on a GPU over the shapes of fine-tuning, forward and backward, in TFLOP/s.
//!
//! `cargo bench -p graft-kernels --bench gpu_attention [-- part-of-a-name ...]`
//!
//! Counted are the products alone, 2 (forward) or 5 (backward) of `2 * heads * head_dim` operations
//! for each visible pair of tokens, though the backward pass computes 7. Each number is the median
//! of several runs of calls one after the other, after some that do not count.

use graft_kernels::attention::Attention;
use graft_kernels::cuda::attention::{
    Offsets, Rows, attention, attention_backward, attention_backward_workspace,
};
use graft_kernels::cuda::{Buffer, Gpu, Result, Scalar};
use graft_kernels::philox::{self, Key};
use half::bf16;
use std::time::Instant;

/// Seconds of one call.
fn time(gpu: &Gpu, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..3 {
        call()?;
    }
    gpu.synchronize()?;
    let mut seconds = Vec::new();
    for _ in 0..7 {
        const CALLS: u32 = 10;
        let start = Instant::now();
        for _ in 0..CALLS {
            call()?;
        }
        gpu.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64() / f64::from(CALLS));
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Normal numbers on the device.
fn random(gpu: &Gpu, stream: u64, count: usize, scalar: Scalar) -> Result<Buffer> {
    // One million of them, over and over.
    let mut numbers = vec![0.0f32; count.min(1 << 20)];
    philox::fill_normal(Key::new(0, 0, stream), &mut numbers, 0.0, 1.0);
    let bytes: Vec<u8> = match scalar {
        Scalar::Bf16 => {
            let short: Vec<bf16> = numbers.iter().map(|&x| bf16::from_f32(x)).collect();
            bytemuck::cast_slice(&short).to_vec()
        }
        _ => bytemuck::cast_slice(&numbers).to_vec(),
    };
    let buffer = gpu.allocate(count * scalar.size())?;
    let mut first = 0;
    while first < count {
        let part = numbers.len().min(count - first);
        let to = buffer.slice_mut(first * scalar.size(), part, scalar);
        gpu.upload(&bytes[..part * scalar.size()], to)?;
        first += part;
    }
    Ok(buffer)
}

fn bench(gpu: &Gpu, name: &str, p: Attention, lengths: &[usize], scalar: Scalar) -> Result<()> {
    let only: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with("--"))
        .collect();
    if !only.is_empty() && !only.iter().any(|part| name.contains(part.as_str())) {
        return Ok(());
    }
    let mut ends = vec![0i64];
    for &length in lengths {
        ends.push(ends[ends.len() - 1] + length as i64);
    }
    let tokens = ends[lengths.len()] as usize;
    let (width, kv_width) = (p.heads * p.head_dim, p.kv_heads * p.head_dim);
    let row_stride = width + 2 * kv_width;
    let fused = random(gpu, 0, tokens * row_stride, scalar)?;
    let dout = random(gpu, 1, tokens * width, scalar)?;
    let device = gpu.allocate(8 * ends.len())?;
    let whole = device.slice_mut(0, ends.len(), Scalar::I64);
    gpu.upload(bytemuck::cast_slice(&ends), whole)?;
    let offsets = Offsets {
        host: &ends,
        device: device.slice(0, ends.len(), Scalar::I64),
    };
    let inputs = [0, width, width + kv_width].map(|at| Rows {
        data: fused.slice(at * scalar.size(), tokens * row_stride - at, scalar),
        row_stride,
    });
    let empty = |count: usize, scalar: Scalar| gpu.allocate(count * scalar.size());
    let out = empty(tokens * width, scalar)?;
    let lse = empty(tokens * p.heads, Scalar::F32)?;
    let forward = time(gpu, || {
        let out = out.slice_mut(0, tokens * width, scalar);
        let lse = lse.slice_mut(0, tokens * p.heads, Scalar::F32);
        attention(gpu, &p, offsets, inputs, out, lse)
    })?;
    let needed = attention_backward_workspace(&p, tokens, lengths.len());
    let workspace = empty(needed, Scalar::F32)?;
    let dq = empty(tokens * width, scalar)?;
    let dk = empty(tokens * kv_width, scalar)?;
    let dv = empty(tokens * kv_width, scalar)?;
    let backward = |needs: [bool; 3]| {
        time(gpu, || {
            let [q, k, v] = [
                dq.slice_mut(0, tokens * width, scalar),
                dk.slice_mut(0, tokens * kv_width, scalar),
                dv.slice_mut(0, tokens * kv_width, scalar),
            ];
            let grads = [
                needs[0].then_some(q),
                needs[1].then_some(k),
                needs[2].then_some(v),
            ];
            let outs = [
                out.slice(0, tokens * width, scalar),
                dout.slice(0, tokens * width, scalar),
            ];
            let lse = lse.slice(0, tokens * p.heads, Scalar::F32);
            let workspace = workspace.slice_mut(0, needed, Scalar::F32);
            attention_backward(gpu, &p, offsets, inputs, outs, lse, grads, workspace)
        })
    };
    let (all, queries, keys) = (
        backward([true; 3])?,
        backward([true, false, false])?,
        backward([false, true, true])?,
    );
    let pairs: usize = lengths
        .iter()
        .map(|n| if p.causal { n * (n + 1) / 2 } else { n * n })
        .sum();
    let flops = (pairs * 2 * width) as f64;
    println!(
        "{name:<30} forward {:8.3} ms {:6.1} TFLOP/s   backward {:8.3} ms {:6.1} TFLOP/s (dq {:.3} \
         ms, dk and dv {:.3} ms)",
        forward * 1e3,
        2.0 * flops / forward * 1e-12,
        all * 1e3,
        5.0 * flops / all * 1e-12,
        queries * 1e3,
        keys * 1e3
    );
    Ok(())
}

fn main() {
    if let Err(error) = run() {
        println!("{error}");
    }
}

fn run() -> Result<()> {
    let gpu = Gpu::open(0)?;
    println!("{gpu:?}");
    let p = |heads: usize, kv_heads: usize, head_dim: usize| Attention {
        heads,
        kv_heads,
        head_dim,
        causal: false,
        window: None,
        softcap: None,
        scale: 1.0 / (head_dim as f64).sqrt(),
        dropout: 0.0,
        key: Key::new(1, 2, 3),
    };
    let causal = |p: Attention| Attention { causal: true, ..p };
    let short = Scalar::Bf16;
    let gpt2 = causal(p(12, 12, 64));
    let llama = causal(p(32, 8, 128));
    let ragged: Vec<usize> = (0..64).map(|i| 8 + i * 37 % 121).collect();
    bench(&gpu, "gpt2 64x1024 12x64 causal", gpt2, &[1024; 64], short)?;
    bench(&gpu, "bert 32x128 12x64", p(12, 12, 64), &[128; 32], short)?;
    bench(
        &gpu,
        "llama 8x2048 32/8x128 causal",
        llama,
        &[2048; 8],
        short,
    )?;
    bench(&gpu, "16x2048 16x64", p(16, 16, 64), &[2048; 16], short)?;
    bench(&gpu, "8x2048 16x128", p(16, 16, 128), &[2048; 8], short)?;
    bench(
        &gpu,
        "4x2048 8x256 causal",
        causal(p(8, 8, 256)),
        &[2048; 4],
        short,
    )?;
    bench(&gpu, "minilm ragged 12x32", p(12, 12, 32), &ragged, short)?;
    let dropout = Attention {
        dropout: 0.1,
        ..gpt2
    };
    bench(&gpu, "gpt2 dropout 16x1024", dropout, &[1024; 16], short)?;
    let capped = Attention {
        softcap: Some(50.0),
        ..llama
    };
    bench(&gpu, "softcap 2x2048 32/8x128", capped, &[2048; 2], short)?;
    bench(
        &gpu,
        "f32 4x1024 12x64 causal",
        gpt2,
        &[1024; 4],
        Scalar::F32,
    )?;
    bench(
        &gpu,
        "f32 2x1024 16x128",
        p(16, 16, 128),
        &[1024; 2],
        Scalar::F32,
    )
}
