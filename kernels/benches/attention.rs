//! Attention over the shapes of fine-tuning, forward and backward, in GFLOP/s.
//!
//! `cargo bench -p graft-kernels --bench attention [-- part-of-a-name ...]`
//!
//! Counted are the products alone, 2 (forward) or 5 (backward) of `2 * heads * head_dim`
//! operations for each visible pair of tokens; softmax and packing are in the time. Each number is
//! the best of several repeats, since other programs may be running.

mod best;

use best::best;
use graft_kernels::Float;
use graft_kernels::attention::{
    Attention, Packed, attention, attention_backward, attention_backward_workspace,
    attention_workspace,
};
use graft_kernels::philox::{self, Key};
use half::bf16;
use std::hint::black_box;

fn bench<T: Float<Acc = f32>>(name: &str, p: Attention, lengths: &[usize]) {
    let only: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with("--"))
        .collect();
    if !only.is_empty() && !only.iter().any(|part| name.contains(part.as_str())) {
        return;
    }
    let mut offsets = vec![0i64];
    for &n in lengths {
        offsets.push(offsets[offsets.len() - 1] + n as i64);
    }
    let tokens = offsets[lengths.len()] as usize;
    let (width, kv_width) = (p.heads * p.head_dim, p.kv_heads * p.head_dim);
    let random = |stream: u64, len: usize| {
        let mut x = vec![0.0f32; len];
        philox::fill_normal(Key::new(0, 0, stream), &mut x, 0.0, 1.0);
        x.into_iter().map(T::narrow).collect::<Vec<T>>()
    };
    let row_stride = width + 2 * kv_width;
    let fused = random(0, tokens * row_stride);
    let dout = random(1, tokens * width);
    let [q, k, v] = [0, width, width + kv_width].map(|at| Packed {
        data: &fused[at..],
        row_stride,
    });
    let mut out = vec![T::default(); tokens * width];
    let mut lse = vec![0.0f32; p.heads * tokens];
    let mut workspace = vec![0.0f32; attention_workspace(&p, &offsets)];
    let forward = best(1.0, || {
        attention(&p, &offsets, q, k, v, &mut out, &mut lse, &mut workspace);
        black_box(&mut out);
    });
    let mut workspace = vec![0.0f32; attention_backward_workspace(&p, &offsets)];
    let mut dq = vec![T::default(); tokens * width];
    let [mut dk, mut dv] = [0; 2].map(|_| vec![T::default(); tokens * kv_width]);
    let backward = best(1.0, || {
        let (dq, dk, dv) = (Some(&mut dq[..]), Some(&mut dk[..]), Some(&mut dv[..]));
        attention_backward(
            &p,
            &offsets,
            q,
            k,
            v,
            &out,
            &lse,
            &dout,
            dq,
            dk,
            dv,
            &mut workspace,
        );
        black_box(&mut workspace);
    });
    let pairs: usize = lengths
        .iter()
        .map(|n| if p.causal { n * (n + 1) / 2 } else { n * n })
        .sum();
    let flops = (pairs * 2 * width) as f64;
    println!(
        "{name:<28} forward {:8.2} ms {:7.1} GFLOP/s   backward {:8.2} ms {:7.1} GFLOP/s",
        forward * 1e3,
        2.0 * flops / forward * 1e-9,
        backward * 1e3,
        5.0 * flops / backward * 1e-9
    );
}

fn main() {
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
    let ragged: Vec<usize> = (0..64).map(|i| 8 + i * 37 % 121).collect();
    println!("{} threads", rayon::current_num_threads());
    bench::<f32>("minilm 32x128", p(12, 12, 32), &[128; 32]);
    bench::<f32>("minilm ragged 8..128", p(12, 12, 32), &ragged);
    bench::<f32>(
        "minilm 32x128 dropout",
        Attention {
            dropout: 0.1,
            ..p(12, 12, 32)
        },
        &[128; 32],
    );
    bench::<bf16>("minilm 32x128 bf16", p(12, 12, 32), &[128; 32]);
    bench::<bf16>(
        "minilm 32x128 bf16 dropout",
        Attention {
            dropout: 0.1,
            ..p(12, 12, 32)
        },
        &[128; 32],
    );
    bench::<f32>("bert 16x256", p(12, 12, 64), &[256; 16]);
    bench::<bf16>("bert 16x256 bf16", p(12, 12, 64), &[256; 16]);
    bench::<f32>(
        "causal 1x4096",
        Attention {
            causal: true,
            ..p(12, 12, 64)
        },
        &[4096],
    );
    bench::<bf16>(
        "causal 1x4096 bf16",
        Attention {
            causal: true,
            ..p(12, 12, 64)
        },
        &[4096],
    );
    let grouped = Attention {
        causal: true,
        ..p(16, 4, 128)
    };
    bench::<f32>("grouped causal 1x1024", grouped, &[1024]);
    bench::<f32>(
        "softcap causal 1x1024",
        Attention {
            softcap: Some(50.0),
            ..grouped
        },
        &[1024],
    );
}
