"""What each strategy trains of a model, and at what price, on examples/contracts: MiniLM, which tells the classes apart, or
with --clm a GPT that scripts/pretrain-demo has made, which goes on with the text.

    python bench/strategies.py MODEL [STRATEGY...] [--epochs 6] [--clm] [--precision bf16] [--table | --steps]

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

# Peak rates; None is the one that the trainer takes where none is given.
STRATEGIES = {
    "head": None,
    "norms": None,
    "bitfit": None,
    "norms+bitfit": None,
    "ia3": None,
    "lora": None,
    "rslora": None,
    "dora": None,
    "adapter": None,
    "prefix": None,
    "prompt": None,
    "last:2": "5e-4",
    "last:2+llrd:0.8": "5e-4",
    "full": "2e-4",
    "full+llrd:0.8": "3e-4",
    "full+gradual": "3e-4",
}


def arguments(args: argparse.Namespace, strategy: str, epochs: str) -> list:
    lr = STRATEGIES[strategy]
    words = ["--model", args.model, *DATA, "--strategy", strategy, "--epochs", epochs, "--seed", "1"]
    words += ["--lr", lr] if lr else []
    words += ["--task", "clm", "--batch-size", "8"] if args.clm else []
    return words + ["--precision", args.precision]


def trainer(*words: object) -> str:
    command = [TARGET / "release/trainer", *words]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


def place(args: argparse.Namespace, strategy: str) -> Path:
    return TARGET / "strategies" / ("clm" if args.clm else "classify") / strategy.replace(":", "-")


def row(args: argparse.Namespace, strategy: str) -> str:
    folder = place(args, strategy)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    resolved = (folder / "config.resolved.toml").read_text()
    rate = [line.split(" = ")[1] for line in resolved.splitlines() if line.startswith("lr = ")][0]
    of = lambda kind: [r for r in records if r["kind"] == kind]
    start, end = of("start")[0], of("end")[0]
    best = [r for r in of("eval") if r["best"]][-1]
    said = trainer("plan", *arguments(args, strategy, args.epochs))
    planned = [line.split()[-2] for line in said.splitlines() if "at the worst moment" in line][0]
    share = 100 * start["trainable"] / start["parameters"]
    mib = lambda n: f"{n / 2**20:.1f}"
    return (
        f"| {strategy} | {rate} | {start['trainable']:,} | {share:.2f} % | {score(best)} "
        f"| {step_seconds(folder):.4f} | {end['seconds']:.1f} "
        f"| {mib(end['peak_tensors'])} | {planned} | {mib(end['peak_rss'])} |"
    )


def score(best: dict) -> str:
    if "perplexity" in best:
        return f"{best['perplexity']:.3f}"
    return f"{best['accuracy']:.4f} | {best['macro_f1']:.4f}"


def step_seconds(folder: Path) -> float:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    last = max(r["epoch"] for r in steps)
    return statistics.median(r["tokens"] / r["tokens_per_second"] for r in steps if r["epoch"] == last)


def steps(args: argparse.Namespace, chosen: list) -> None:
    print("| strategy | s a step |")
    print("|---|---|")
    for strategy in chosen:
        # What lies below the trained layers is run in the first epoch alone.
        epochs = "2" if strategy.startswith(("head", "last")) or "gradual" in strategy else "1"
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            trainer("train", *arguments(args, strategy, epochs), "--out", out)
            print(f"| {strategy} | {step_seconds(out):.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("strategy", nargs="*")
    parser.add_argument("--epochs", default="6")
    parser.add_argument("--clm", action="store_true")
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--steps", action="store_true")
    args = parser.parse_args()
    chosen = args.strategy or list(STRATEGIES)
    if args.steps:
        return steps(args, chosen)
    if not args.table:
        for strategy in chosen:
            place(args, strategy).parent.mkdir(parents=True, exist_ok=True)
            trainer("train", *arguments(args, strategy, args.epochs), "--out", place(args, strategy))
            trainer("verify", place(args, strategy))
    scores = "perplexity" if args.clm else "accuracy | macro-F1"
    columns = f"strategy | rate | trained | share | {scores} | s a step | s in all | tensors MiB | planned MiB | process MiB"
    print(f"| {columns} |")
    print("|---" * (columns.count("|") + 1) + "|")
    for strategy in chosen:
        if (place(args, strategy) / "metrics.jsonl").exists():
            print(row(args, strategy))


if __name__ == "__main__":
    main()
