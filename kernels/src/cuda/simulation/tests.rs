//! What orders accesses is left out of kernels (`planted.cu`), which the watched simulation must find.

use crate::cuda::launch::args;
use crate::cuda::tensor_map::tensor_map;
use crate::cuda::{Gpu, Launch, Result, Scalar, Target};

/// Numbers that kernels read, and numbers that they write.
const FROM: usize = 3 * 64 * 64;
const OUT: usize = 128 * 32;

/// Runs a kernel without what number `without` orders.
fn run(gpu: &Gpu, name: &'static str, without: usize) -> Result<()> {
    let from = gpu.allocate(4 * FROM)?;
    let out = gpu.allocate(4 * OUT)?;
    gpu.fill(from.slice_mut(0, FROM, Scalar::F32), 1f32.to_bits())?;
    gpu.fill(out.slice_mut(0, OUT, Scalar::F32), 0)?;
    let (from, out) = (
        from.slice(0, FROM, Scalar::F32),
        out.slice(0, OUT, Scalar::F32),
    );
    let (blocks, threads) = match name {
        "planted_global" => (2, 128),
        "planted_warp" => (1, 64),
        "planted_engine" => (1, 96),
        "planted_products" => (1, 160),
        "planted_named" => (1, 256),
        _ => (1, 128),
    };
    let launch = Launch::linear(blocks, threads).with_shared(16 << 10);
    let without = without as u32;
    match name {
        "planted_copies" | "planted_engine" | "planted_products" => {
            gpu.launch("planted", name, launch, args![without, from, out])?;
        }
        "planted_stores" => {
            let (dims, boxes) = ([32, 128, 1], [32, 64, 1]);
            let map = tensor_map(gpu, out.address(), Scalar::F32, dims, [32, 4096], boxes)?;
            let map = bytemuck::cast_slice(&map);
            gpu.launch("planted", name, launch, args![without, map])?;
        }
        _ => gpu.launch("planted", name, launch, args![without, out])?,
    }
    gpu.synchronize()
}

/// What a report may say: that two accesses are not ordered, or, where one ran before the other, that nobody wrote what was
/// read, or that something was asked for too early.
const APART: &[&str] = &[
    "are not ordered",
    "what nobody wrote is read",
    "more threads arrive at a barrier",
];
const FENCE: &[&str] = &["have no fence of proxies between them"];
const ENDED: &[&str] = &["a block ends while the copy engine reads its shared memory"];

/// Each kernel with what it needs, and what is found without the first of its orders, the second, ...
const PLANTED: [(&str, Target, &[&[&str]]); 10] = [
    ("planted_block", Target::Sm70, &[APART; 2]),
    ("planted_warp", Target::Sm70, &[APART; 3]),
    ("planted_bytes", Target::Sm70, &[APART; 2]),
    ("planted_global", Target::Sm70, &[APART; 3]),
    ("planted_copies", Target::Sm80, &[APART; 4]),
    ("planted_named", Target::Sm90a, &[APART; 2]),
    (
        "planted_engine",
        Target::Sm90a,
        &[APART, APART, APART, APART, APART, APART, FENCE],
    ),
    ("planted_products", Target::Sm90a, &[APART; 3]),
    (
        "planted_fence",
        Target::Sm90a,
        &[FENCE, APART, FENCE, APART],
    ),
    (
        "planted_stores",
        Target::Sm90a,
        &[APART, APART, FENCE, APART, APART, ENDED],
    ),
];

#[test]
#[ignore = "needs the watched simulation"]
fn what_is_left_out_is_found() {
    let gpu = Gpu::open(0).unwrap();
    let mut wrong = Vec::new();
    for (name, needs, left_out) in PLANTED {
        if needs > gpu.limits().target {
            continue; // of later devices
        }
        if let Err(error) = run(&gpu, name, 0) {
            wrong.push(format!("{name}, as it is: {error}"));
        }
        for (i, words) in left_out.iter().enumerate() {
            let found = run(&gpu, name, i + 1)
                .map_or_else(|error| error.to_string(), |()| "nothing".into());
            if !words.iter().any(|words| found.contains(words)) {
                wrong.push(format!("{name} without {}: {found}", i + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
