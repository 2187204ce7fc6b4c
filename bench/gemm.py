"""Ours against PyTorch, and in f32 against the crates `gemm` and `matrixmultiply`, on the same machine in the same run:
matrix products of the layers of BERT and GPT-2, and of GPT-2's head.

    python bench/gemm.py [--threads 2]

Prints GFLOP/s: ours for x·w (NN) and x·wᵀ (NT), and for the gradient of the weight (TN), which PyTorch is not asked for;
the best of several repeats on both sides. `bf16` is bf16 activations beside f32 weights, which ours rounds while it packs
them; PyTorch gets both in bf16. The first line is the processor's peak, measured in the same run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^\w+ +(\d+)x(\d+)x(\d+) +(?:(NN|NT|TN) )?(f32|mixed|gemm|matrixmult\.) +[\d.]+ +([\d.]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    # Operands in large pages on both sides: that is where the tensors of a training lie.
    pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    env = os.environ | pages | {"RAYON_NUM_THREADS": args.threads}
    command = ["cargo", "bench", "--package", "graft-kernels", "--bench", "gemm", "--"]
    run = lambda *words: subprocess.run(words, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    text = "".join(run(*command, group, "peers") for group in ("step", "vocabulary"))
    peer = run(sys.executable, "bench/pytorch_peer.py", "--mode", "gemm", "--threads", args.threads)
    found = json.loads([line for line in peer.splitlines() if line.startswith("{")][-1])["results"]
    torch = {(r["m"], r["n"], r["k"], r["dtype"]): r["best_gflops"] for r in found}

    # Ours by (tokens, outputs, inputs), whatever the form; a line of a peer belongs to the line of ours above it.
    ours: dict[tuple, dict] = {}
    form = "NN"
    for m in filter(None, map(LINE.match, text.splitlines())):
        form = m[4] or form
        a, b, c = map(int, m.group(1, 2, 3))
        shape = (c, b, a) if form == "TN" else (a, b, c)
        ours.setdefault(shape, {})[form, m[5]] = float(m[6])
    print(text.splitlines()[0])
    print("| tokens x out x in | f32 NN | NT | TN | `gemm` NN | `matrixmultiply` NN | PyTorch | bf16 NN | NT | TN | PyTorch |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for shape, speed in ours.items():
        cell = lambda *key: f"{speed[key]:.0f}" if key in speed else ""
        peers = [f"{torch[*shape, dtype]:.0f}" if (*shape, dtype) in torch else "" for dtype in ("f32", "bf16")]
        forms = ("NN", "NT", "TN")
        f32, bf16 = ([cell(form, kind) for form in forms] for kind in ("f32", "mixed"))
        crates = [cell("NN", "gemm"), cell("NN", "matrixmult.")]
        print("| " + " x ".join(map(str, shape)) + " | " + " | ".join([*f32, *crates, peers[0], *bf16, peers[1]]) + " |")


if __name__ == "__main__":
    main()
