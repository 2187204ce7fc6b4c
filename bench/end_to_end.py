"""Ours against the Hugging Face Trainer on the same machine in the same run: a whole job on real text of mixed lengths.

    python bench/end_to_end.py WHEEL [--epochs 3] [--lr 2e-4] [--seeds 1,2,3] [--precision f32,bf16]

Fine-tunes every weight of MiniLM on examples/contracts, from the start of the process to the last prediction, with the
same epochs, batches, rate, schedule and clipping; transformers pads each batch to its longest text. Ours evaluates after
every epoch and writes the trained model and its certificate too; transformers does neither. Needs torch and transformers
beside the Rust toolchain. The two alternate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = [ROOT / "examples/contracts/train.jsonl", ROOT / "examples/contracts/test.jsonl"]


def ours(wheel: str, precision: str, seed: str, args: argparse.Namespace) -> dict:
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [target / "release/trainer", "train", "--model", wheel, "--train", DATA[0], "--eval", DATA[1]]
        command += ["--strategy", "full", "--epochs", args.epochs, "--lr", args.lr, "--batch-size", "16"]
        command += ["--seed", seed, "--precision", precision, "--max-length", "256", "--out", out]
        command += ["--set", "optimizer.warmup=0"]
        started = time.perf_counter()
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True, capture_output=True)
        wall = time.perf_counter() - started
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # The last epoch's score, as transformers predicts with the last weights.
    score = [r for r in records if "accuracy" in r][-1]
    peak = [r["peak_rss"] for r in records if r.get("peak_rss")][-1]
    return {
        "wall_s": wall,
        "accuracy": score["accuracy"],
        "macro_f1": score["macro_f1"],
        "peak_rss_mib": peak / 2**20,
    }


def theirs(wheel: str, seed: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, "bench/huggingface_job.py", wheel, *map(str, DATA), "--epochs", args.epochs]
    command += ["--lr", args.lr, "--batch-size", "16", "--seed", seed]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel")
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--lr", default="2e-4")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--precision", default="f32,bf16")
    args = parser.parse_args()
    wheel = str(Path(args.wheel).resolve())
    subprocess.run(["cargo", "build", "--release", "--package", "graft-trainer"], cwd=ROOT, check=True)
    found: dict[str, list[dict]] = {}
    for seed in args.seeds.split(","):
        for precision in args.precision.split(","):
            found.setdefault(f"ours, {precision}", []).append(ours(wheel, precision, seed, args))
        found.setdefault("transformers", []).append(theirs(wheel, seed, args))
    base = statistics.median(run["wall_s"] for run in found["transformers"])
    print("| who | wall s | ratio | accuracy by seed | macro-F1 by seed | peak MiB |")
    print("|---|---|---|---|---|---|")
    for who, runs in found.items():
        wall = statistics.median(run["wall_s"] for run in runs)
        scores = [", ".join(f"{run[key]:.3f}" for run in runs) for key in ("accuracy", "macro_f1")]
        peak = max(run["peak_rss_mib"] for run in runs)
        print(f"| {who} | {wall:.1f} | {base / wall:.2f} | {scores[0]} | {scores[1]} | {peak:.0f} |")


if __name__ == "__main__":
    main()
