"""Ours against PyTorch on the same machine in the same run: whole training steps of MiniLM, 32 x 128 tokens.

    python bench/steps.py WHEEL [--threads 1,2] [--rounds 3]

Needs torch and transformers beside the Rust toolchain. Each measurement is a process of its own; ours and PyTorch's
alternate, and the best median of all rounds counts, so that a neighbour's load hits both.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODES = ["full", "full_bf16", "last2", "head", "lora"]


def last_json(command: list[str], env: dict[str, str]) -> dict:
    out = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    wheel = str(Path(args.wheel).resolve())
    env = os.environ | {"GRAFT_MINILM": wheel}
    build = ["cargo", "bench", "--package", "graft-tests", "--bench", "steps"]
    subprocess.run([*build, "--no-run"], cwd=ROOT, env=env, check=True)

    print("| threads | strategy | ours s | PyTorch s | ratio | ours MiB | PyTorch MiB | ours start s | PyTorch start s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for threads in args.threads.split(","):
        for mode in MODES:
            best: dict[str, dict] = {}
            for _ in range(args.rounds):
                ours = last_json([*build, "--", mode], env | {"RAYON_NUM_THREADS": threads})
                peer = [sys.executable, "bench/pytorch_peer.py", wheel, "--mode", mode]
                theirs = last_json([*peer, "--threads", threads, "--steps", "6"], env)
                for name, found in (("ours", ours), ("theirs", theirs)):
                    if name not in best or found["median_step_s"] < best[name]["median_step_s"]:
                        best[name] = found
            a, b = best["ours"], best["theirs"]
            print(
                f"| {threads} | {mode} | {a['median_step_s']:.3f} | {b['median_step_s']:.3f} "
                f"| {b['median_step_s'] / a['median_step_s']:.2f} | {a['peak_rss_mib']:.0f} | {b['peak_rss_mib']:.0f} "
                f"| {a['startup_s']:.2f} | {b['startup_s']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
