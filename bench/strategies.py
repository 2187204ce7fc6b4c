"""What each strategy trains of MiniLM, and at what price, on examples/contracts.

    python bench/strategies.py WHEEL [STRATEGY...] [--epochs 6] [--table]

Runs each strategy (all of them without names) and keeps its run under target/strategies; with --table, prints a row for
each run that is there and trains nothing. The time of a step is the median over the steps of the last epoch, so that what
is kept of frozen layers counts; planned is what `trainer plan` says of the tensors and what is kept of frozen layers.
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
DATA = ["--train", ROOT / "examples/contracts/train.jsonl", "--eval", ROOT / "examples/contracts/test.jsonl"]

# Peak rates that do well: of 5e-4, 1e-3, 2e-3 and 5e-3 for what is small.
STRATEGIES = {
    "head": "1e-3",
    "bitfit": "2e-3",
    "norms": "2e-3",
    "norms+bitfit": "2e-3",
    "last:2": "5e-4",
    "last:2+llrd:0.8": "5e-4",
    "full": "2e-4",
    "full+llrd:0.8": "3e-4",
    "full+gradual": "3e-4",
}


def arguments(wheel: str, strategy: str, epochs: str) -> list:
    return ["--model", wheel, *DATA, "--strategy", strategy, "--epochs", epochs, "--lr", STRATEGIES[strategy], "--seed", "1"]


def trainer(*words: object) -> str:
    command = [TARGET / "release/trainer", *words]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


def place(strategy: str) -> Path:
    return TARGET / "strategies" / strategy.replace(":", "-")


def row(wheel: str, strategy: str, epochs: str) -> str:
    records = [json.loads(line) for line in (place(strategy) / "metrics.jsonl").read_text().splitlines()]
    of = lambda kind: [r for r in records if r["kind"] == kind]
    start, end = of("start")[0], of("end")[0]
    best = [r for r in of("eval") if r["best"]][-1]
    last = max(r["epoch"] for r in of("step"))
    seconds = [r["tokens"] / r["tokens_per_second"] for r in of("step") if r["epoch"] == last]
    said = trainer("plan", *arguments(wheel, strategy, epochs))
    planned = [line.split()[-2] for line in said.splitlines() if "at the worst moment" in line][0]
    share = 100 * start["trainable"] / start["parameters"]
    mib = lambda n: f"{n / 2**20:.1f}"
    return (
        f"| {strategy} | {STRATEGIES[strategy]} | {start['trainable']:,} | {share:.2f} % | {best['accuracy']:.4f} "
        f"| {best['macro_f1']:.4f} | {statistics.median(seconds):.4f} | {end['seconds']:.1f} "
        f"| {mib(end['peak_tensors'])} | {planned} | {mib(end['peak_rss'])} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel")
    parser.add_argument("strategy", nargs="*")
    parser.add_argument("--epochs", default="6")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    chosen = args.strategy or list(STRATEGIES)
    if not args.table:
        for strategy in chosen:
            place(strategy).parent.mkdir(parents=True, exist_ok=True)
            trainer("train", *arguments(args.wheel, strategy, args.epochs), "--out", place(strategy))
            trainer("verify", place(strategy))
    print("| strategy | rate | trained | share | accuracy | macro-F1 | s a step | s in all | tensors MiB | planned MiB | process MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for strategy in chosen:
        if (place(strategy) / "metrics.jsonl").exists():
            print(row(args.wheel, strategy, args.epochs))


if __name__ == "__main__":
    main()
