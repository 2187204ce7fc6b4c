"""What each strategy trains of a model, and at what price, on examples/contracts: MiniLM, which tells the classes apart, or
with --clm a GPT that scripts/pretrain-demo has made, which goes on with the text.

    python bench/strategies.py MODEL [STRATEGY...] [--epochs 6] [--clm] [--precision bf16] [--base nf4]
                               [--table | --steps | --rates 1e-3,3e-3]

Runs each strategy (all of them without names) and keeps its run under target/strategies; with --table, prints a row for
each run that is there and trains nothing. The time of a step is the median over the steps of the last epoch, so that what
is kept of frozen layers counts; planned is what `trainer plan` says of the tensors. With --steps, short runs on half of the
texts that follow each other give the times of steps and the memory of tensors and process alone, on a machine that is
equally busy for all of them. With --rates, each strategy is trained at each rate on four fifths of the training file and
scored on the last fifth of each class, so that rates are chosen without the test set.
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
TRAIN, TEST = ROOT / "examples/contracts/train.jsonl", ROOT / "examples/contracts/test.jsonl"

# Peak rates for MiniLM and for the small GPT; None is the one that the trainer takes where none is given.
STRATEGIES = {
    "head": (None, "1e-2"),
    "norms": (None, "1e-2"),
    "bitfit": (None, "1e-2"),
    "norms+bitfit": (None, "1e-2"),
    "ia3": (None, "1e-1"),
    "lora": (None, "6e-3"),
    "rslora": (None, "6e-3"),
    "dora": (None, "6e-3"),
    "adapter": (None, "6e-3"),
    "prefix": (None, "1e-1"),
    "prompt": (None, "1e-1"),
    "lora+head+norms": (None, "6e-3"),
    "last:2": ("5e-4", "3e-3"),
    "last:2+llrd:0.8": ("5e-4", "3e-3"),
    "full": ("2e-4", "3e-3"),
    "full+llrd:0.8": ("3e-4", "3e-3"),
    "full+gradual": ("3e-4", "3e-3"),
}


def arguments(args: argparse.Namespace, strategy: str, epochs: str, lr: str | None) -> list:
    words = ["--model", args.model, "--strategy", strategy, "--epochs", epochs, "--seed", "1"]
    words += ["--lr", lr] if lr else []
    words += ["--task", "clm", "--batch-size", "8"] if args.clm else []
    words += ["--base", args.base] if args.base else []
    return words + ["--precision", args.precision]


def data(train: Path, test: Path) -> list:
    return ["--train", train, "--eval", test]


def trainer(*words: object) -> str:
    command = [TARGET / "release/trainer", *words]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def place(args: argparse.Namespace, strategy: str) -> Path:
    base = f"-{args.base}" if args.base else ""
    return TARGET / "strategies" / ("clm" if args.clm else "classify") / (strategy.replace(":", "-") + base)


def records(folder: Path, kind: str) -> list:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def row(args: argparse.Namespace, strategy: str) -> str:
    folder = place(args, strategy)
    resolved = (folder / "config.resolved.toml").read_text()
    rate = [line.split(" = ")[1] for line in resolved.splitlines() if line.startswith("lr = ")][0]
    start, end = records(folder, "start")[0], records(folder, "end")[0]
    words = arguments(args, strategy, args.epochs, rate)
    said = trainer("plan", *words, *data(TRAIN, TEST), "--out", folder.with_suffix(".plan"))
    planned = [line.split()[-2] for line in said.splitlines() if "at the worst moment" in line][0]
    share = 100 * start["trainable"] / start["parameters"]
    mib = lambda n: f"{n / 2**20:.1f}"
    return (
        f"| {strategy} | {float(rate):g} | {start['trainable']:,} | {share:.2f} % | {score(best(folder))} "
        f"| {step_seconds(folder):.4f} | {end['seconds']:.1f} "
        f"| {mib(end['peak_tensors'])} | {planned} | {mib(end['peak_rss'])} |"
    )


def best(folder: Path) -> dict:
    return [record for record in records(folder, "eval") if record["best"]][-1]


def score(best: dict) -> str:
    if "perplexity" in best:
        return f"{best['perplexity']:.2f}"
    return f"{best['accuracy']:.4f} | {best['macro_f1']:.4f}"


def step_seconds(folder: Path) -> float:
    steps = records(folder, "step")
    last = max(r["epoch"] for r in steps)
    return statistics.median(r["tokens"] / r["tokens_per_second"] for r in steps if r["epoch"] == last)


def steps(args: argparse.Namespace, chosen: list) -> None:
    with tempfile.TemporaryDirectory() as name:
        half = Path(name) / "train.jsonl"
        half.write_text("".join(text + "\n" for text in TRAIN.read_text().splitlines()[::2]))
        for i, strategy in enumerate(chosen):
            # What lies below the trained layers is run in the first epoch alone.
            epochs = "2" if strategy.startswith(("head", "last")) or "gradual" in strategy else "1"
            out = Path(name) / f"run-{i}"
            trainer("train", *arguments(args, strategy, epochs, None), "--train", half, "--out", out)
            end = records(out, "end")[0]
            memory = " | ".join(f"{end[key] / 2**20:.1f}" for key in ("peak_tensors", "peak_rss"))
            print(f"| {strategy} | {step_seconds(out):.4f} | {memory} |", flush=True)


def rates(args: argparse.Namespace, chosen: list) -> None:
    rows = TRAIN.read_text().splitlines()
    classes = collections.defaultdict(list)
    for text in rows:
        classes[json.loads(text)["label"]].append(text)
    held_out = {text for texts in classes.values() for text in texts[-len(texts) // 5 :]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = folder / "train.jsonl", folder / "held-out.jsonl"
        for part, wanted in zip(parts, (False, True)):
            part.write_text("".join(text + "\n" for text in rows if (text in held_out) == wanted))
        for strategy in chosen:
            for rate in args.rates.split(","):
                out = folder / f"run-{strategy.replace(':', '-')}-{rate}"
                trainer("train", *arguments(args, strategy, args.epochs, rate), *data(*parts), "--out", out)
                print(f"| {strategy} | {rate} | {score(best(out))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("strategy", nargs="*")
    parser.add_argument("--epochs", default="6")
    parser.add_argument("--clm", action="store_true")
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--base")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--rates")
    args = parser.parse_args()
    chosen = args.strategy or list(STRATEGIES)
    if args.steps:
        return steps(args, chosen)
    if args.rates:
        return rates(args, chosen)
    if not args.table:
        for strategy in chosen:
            out = place(args, strategy)
            out.parent.mkdir(parents=True, exist_ok=True)
            lr = STRATEGIES.get(strategy, (None, None))[args.clm]
            trainer("train", *arguments(args, strategy, args.epochs, lr), *data(TRAIN, TEST), "--out", out)
            trainer("verify", out)
    scores = "perplexity" if args.clm else "accuracy | macro-F1"
    columns = f"strategy | rate | trained | share | {scores} | s a step | s in all | tensors MiB | planned MiB | process MiB"
    print(f"| {columns} |")
    print("|---" * (columns.count("|") + 1) + "|")
    for strategy in chosen:
        if (place(args, strategy) / "metrics.jsonl").exists():
            print(row(args, strategy))


if __name__ == "__main__":
    main()
