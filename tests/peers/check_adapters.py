"""Checks that PEFT loads adapters written by Graft, and that both give the same logits.

    GRAFT_ADAPTERS=DIR cargo test -p graft-tests --test adapters what_is_written
    python tests/peers/check_adapters.py DIR/*

    trainer predict --model RUN --data texts.jsonl --logits --out predictions.jsonl
    python tests/peers/check_adapters.py RUN --texts texts.jsonl --predictions predictions.jsonl [--base BASE]

1. PEFT loads each directory onto the base that it names (or --base) with no missing or unexpected key; the names in the
   file are also compared with those that PEFT itself would save.
2. Logits differ by at most --tolerance: of --texts (of an adapter that labels words, objects with "tokens"), one at a time
   in f32, against --predictions; or, without them, of
   the batch in the base's expected.safetensors against the directory's ours.safetensors.

Exit status 0 when all holds, 1 with the reasons otherwise; the last line on stdout is JSON.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import torch
import transformers
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

transformers.utils.logging.disable_progress_bar()


def load(folder, base):
    """(model with the adapter, problems)"""
    config = PeftConfig.from_pretrained(folder)
    words = config.task_type == "TOKEN_CLS"
    classifies = words or config.task_type == "SEQ_CLS"
    more = {}
    if classifies and (folder / "config.json").exists():
        # The base has no head yet, or one for other labels.
        more = {"num_labels": AutoConfig.from_pretrained(folder).num_labels, "ignore_mismatched_sizes": True}
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    auto = AutoModelForTokenClassification if words else auto
    base = auto.from_pretrained(
        base or config.base_model_name_or_path, attn_implementation="eager", dtype=torch.float32, **more
    )
    problems = []
    # Virtual tokens are the business of a task's own class.
    of_task = PeftModelForSequenceClassification if classifies else PeftModelForCausalLM
    of_task = PeftModelForTokenClassification if words else of_task
    model = (of_task if config.is_prompt_learning else PeftModel)(base, config)
    result = model.load_adapter(folder, "default")
    own = [k for k in result.missing_keys if "prompt_encoder" in k or "lora_" in k or "ia3_" in k or "modules_to_save.default" in k]
    if own:
        problems.append(f"missing: {sorted(own)}")
    # PEFT reads virtual tokens beside the state that it looks for, and lists them as unexpected in its own files too.
    unexpected = [k for k in result.unexpected_keys if not (config.is_prompt_learning and k == "prompt_embeddings")]
    if unexpected:
        problems.append(f"unexpected: {sorted(unexpected)}")
    stored = set(load_file(folder / "adapter_model.safetensors"))
    would = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # With bias="all", PEFT writes the biases of kept modules three times.
    would = {k for k in would if ".original_module." not in k and ".modules_to_save." not in k}
    if stored != would:
        problems.append(f"PEFT would save other names: {sorted(stored ^ would)}")
    return model.eval(), classifies, problems


def spans(packed, config):
    """Where each sequence begins and ends: the longest fills the positions, so virtual tokens take its last ones' place."""
    offsets = packed["offsets"].tolist()
    pairs = list(zip(offsets, offsets[1:]))
    room = max(end - start for start, end in pairs) - getattr(config, "num_virtual_tokens", 0)
    return [(start, min(end, start + room)) for start, end in pairs]


def answer(model, classifies, inputs):
    if classifies and model.active_peft_config.peft_type == "PREFIX_TUNING":
        # PEFT 0.21 looks for an argument `past_key_values`, which transformers 5.24 calls `cache`, and refuses to classify.
        return model.base_model(**inputs, cache=model.get_prompt(1))
    return model(**inputs)


def of_batch(model, classifies, folder):
    base = pathlib.Path(model.peft_config["default"].base_model_name_or_path)
    packed = load_file(base / "expected.safetensors")
    rows = []
    for start, end in spans(packed, model.active_peft_config):
        inputs = {"input_ids": packed["input_ids"][None, start:end]}
        if "token_type_ids" in packed and model.config.model_type != "distilbert":
            inputs["token_type_ids"] = packed["token_type_ids"][None, start:end]
        with torch.no_grad():
            logits = answer(model, classifies, inputs).logits
        # Those of a prompt's tokens come first.
        rows.append(logits if classifies else logits[0, start - end :])
    ours = load_file(folder / "ours.safetensors")["logits"].double()
    return (torch.cat(rows).double().flatten() - ours).abs().max().item()


def of_texts(model, classifies, folder, texts, predictions):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (texts, predictions)]
    assert len(rows[0]) == len(rows[1]), "another number of predictions than of texts"
    worst = 0.0
    for row, prediction in zip(*rows):
        limit = model.config.max_position_embeddings - getattr(model.active_peft_config, "num_virtual_tokens", 0)
        words = "tokens" in row
        text = (row["tokens"], None) if words else (row["text"], row.get("pair"))
        encoded = tokenizer(
            *text, is_split_into_words=words, truncation=True, max_length=limit, return_tensors="pt"
        )
        ids = encoded.word_ids()
        with torch.no_grad():
            want = answer(model, classifies, dict(encoded)).logits[0].double()
        got = prediction["logits"]
        if words:
            # The rows of a prompt come first; of each word, the first token's.
            want = want[-len(ids) :][[ids.index(word) for word in range(len(row["tokens"])) if word in ids]]
            got = [logits for logits in got if logits is not None]
        worst = max(worst, (torch.tensor(got, dtype=torch.float64) - want).abs().max().item())
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=pathlib.Path, nargs="+")
    parser.add_argument("--base", help="in place of the one that adapter_config.json names")
    parser.add_argument("--texts", type=pathlib.Path)
    parser.add_argument("--predictions", type=pathlib.Path)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results, failed = {}, False
    for folder in args.adapters:
        try:
            model, classifies, problems = load(folder, args.base)
            if args.texts:
                worst = of_texts(model, classifies, folder, args.texts, args.predictions)
            else:
                worst = of_batch(model, classifies, folder)
            if not worst <= args.tolerance:
                problems.append(f"logits differ by {worst:.3e}, more than {args.tolerance:.1e}")
        except Exception as e:  # whatever PEFT raises is an adapter that it does not load
            worst, problems = math.inf, [f"{type(e).__name__}: {e}"]
        for problem in problems:
            print(f"FAIL {folder}: {problem}", file=sys.stderr)
        failed |= bool(problems)
        results[folder.name] = worst if math.isfinite(worst) else "failed"
    print(json.dumps({"ok": not failed, "max_abs_difference": results}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
