"""What each strategy trains of MiniLM, and at what price, on examples/contracts.

    python bench/strategies.py WHEEL [STRATEGY...] [--epochs 6] [--table | --steps]

Runs each strategy (all of them without names) and keeps its run under target/strategies; with --table, prints a row for
each run that is there and trains nothing. The time of a step is the median over the steps of the last epoch, so that what
is kept of frozen layers counts; planned is what `trainer plan` says of the tensors. With --steps, short runs that follow
each other give the times of steps alone, on a machine that is equally busy for all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
DATA = ["--train", ROOT / "examples/contracts/train.jsonl", "--eval", ROOT / "examples/contracts/test.jsonl"]

# Peak rates; not searched for.
STRATEGIES = {
    "head": "1e-3",
    "bitfit": "2e-3",
    "norms": "2e-3",
    "norms+bitfit": "2e-3",
    "last:2": "5e-4",
    "last:2+llrd:0.8": "5e-4",
    "lora": "2e-3",
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
    said = trainer("plan", *arguments(wheel, strategy, epochs))
    planned = [line.split()[-2] for line in said.splitlines() if "at the worst moment" in line][0]
    share = 100 * start["trainable"] / start["parameters"]
    mib = lambda n: f"{n / 2**20:.1f}"
    return (
        f"| {strategy} | {STRATEGIES[strategy]} | {start['trainable']:,} | {share:.2f} % | {best['accuracy']:.4f} "
        f"| {best['macro_f1']:.4f} | {step_seconds(place(strategy)):.4f} | {end['seconds']:.1f} "
        f"| {mib(end['peak_tensors'])} | {planned} | {mib(end['peak_rss'])} |"
    )


def step_seconds(folder: Path) -> float:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    last = max(r["epoch"] for r in steps)
    return statistics.median(r["tokens"] / r["tokens_per_second"] for r in steps if r["epoch"] == last)


def steps(wheel: str, chosen: list) -> None:
    print("| strategy | s a step |")
    print("|---|---|")
    for strategy in chosen:
        # What lies below the trained layers is run in the first epoch alone.
        epochs = "2" if strategy.startswith(("head", "last")) or "gradual" in strategy else "1"
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            trainer("train", *arguments(wheel, strategy, epochs), "--out", out)
            print(f"| {strategy} | {step_seconds(out):.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel")
    parser.add_argument("strategy", nargs="*")
    parser.add_argument("--epochs", default="6")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--steps", action="store_true")
    args = parser.parse_args()
    chosen = args.strategy or list(STRATEGIES)
    if args.steps:
        return steps(args.wheel, chosen)
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
