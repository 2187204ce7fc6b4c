"""Checks that transformers loads a model written by Graft, and that both give the same logits.

    python tests/peers/check_loads.py MODEL_DIR [--texts texts.jsonl --predictions out.jsonl]

1. AutoModelForSequenceClassification, or AutoModelForTokenClassification, AutoModelForCausalLM or AutoModelForMaskedLM where
   config.json names such a class, loads MODEL_DIR with no missing, unexpected or mismatched key. The names in the files are also
   compared with the model's own, because transformers passes over some unexpected keys without a word.
2. For classifiers, AutoTokenizer loads it too. With --texts (objects with "text", and "pair" or null for a pair) and --predictions (what
   `trainer predict --logits` printed: an object with "logits" a line, in the same order), the
   logits of transformers, one text at a time in f32, differ by at most --tolerance. Of a model that labels tokens, texts are
   objects with "tokens", and "logits" has a row for each word: that of its first token, by transformers' word_ids.

Exit status 0 when all holds, 1 with the reasons otherwise; the last line on stdout is JSON.
"""

import argparse
import json
import math
import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

transformers.utils.logging.disable_progress_bar()


def read_jsonl(path):
    with open(path, encoding="utf-8", newline="\n") as f:
        return [json.loads(line) for line in f if line.strip()]


def stored_names(folder):
    """(tensor names in model.safetensors or in the shards its index lists, problems with the index)."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        with safe_open(folder / "model.safetensors", framework="pt") as f:
            return set(f.keys()), []
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    found, problems = {}, []
    for shard in sorted(set(listed.values())):
        with safe_open(folder / shard, framework="pt") as f:
            for name in f.keys():
                if name in found:
                    problems.append(f"{name} is in {found[name]} and in {shard}")
                found[name] = shard
    if found != listed:
        wrong = sorted(n for n in found.keys() | listed.keys() if found.get(n) != listed.get(n))
        problems.append(f"the index and the shards disagree about {wrong}")
    return set(found), problems


def loading_problems(folder, model, info):
    problems = []
    for kind, keys in info.items():
        if keys:
            problems.append(f"{kind}: {sorted(map(str, keys)) if not isinstance(keys, str) else keys}")
    stored, index_problems = stored_names(folder)
    problems += index_problems
    # A tied head is the token embedding, and stored once.
    own = set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", None) or ())
    if stored - own:
        problems.append(f"stored, but the model has no such tensor: {sorted(stored - own)}")
    if own - stored:
        problems.append(f"in the model, but not stored: {sorted(own - stored)}")
    return problems


def max_tokens(config):
    """Longest sequence the position table holds; RoBERTa's starts behind the padding id."""
    limit = config.max_position_embeddings
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        limit -= config.pad_token_id + 1
    return limit


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--texts", type=pathlib.Path)
    parser.add_argument("--predictions", type=pathlib.Path)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--max-tokens", type=int, help="truncate to this, if it is less than the model's positions")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if (args.texts is None) != (args.predictions is None):
        parser.error("--texts and --predictions go together")
    torch.set_num_threads(args.threads)

    result = {"model": str(args.model), "problems": []}
    try:
        classes = AutoConfig.from_pretrained(args.model).architectures or []
        causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes)
        masked = any(name.endswith("ForMaskedLM") for name in classes)
        words = any(name.endswith("ForTokenClassification") for name in classes)
        if (causal or masked) and args.texts:
            parser.error("--texts is for classifiers")
        texts = AutoModelForTokenClassification if words else AutoModelForSequenceClassification
        auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM if masked else texts
        model, info = auto.from_pretrained(
            args.model,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed, and refused below
            attn_implementation="eager",
            dtype=torch.float32,
        )
        tokenizer = None if causal or masked else AutoTokenizer.from_pretrained(args.model)
    except Exception as e:  # whatever transformers raises is a file that it does not load
        result["problems"].append(f"{type(e).__name__}: {e}")
        return finish(result)
    model.eval()
    result["loading_info"] = {k: sorted(map(str, v)) if not isinstance(v, str) else v for k, v in info.items()}
    result["problems"] += loading_problems(args.model, model, info)

    if args.texts:
        texts, predictions = read_jsonl(args.texts), read_jsonl(args.predictions)
        if len(texts) != len(predictions):
            result["problems"].append(f"{len(texts)} texts, but {len(predictions)} predictions")
            return finish(result)
        limit = min(max_tokens(model.config), args.max_tokens or sys.maxsize)
        worst, where = 0.0, None
        for i, (row, prediction) in enumerate(zip(texts, predictions)):
            text = (row["tokens"], None) if words else (row["text"], row.get("pair"))
            encoded = tokenizer(
                *text, is_split_into_words=words, padding=False, truncation=True, max_length=limit, return_tensors="pt"
            )
            with torch.no_grad():
                want = model(**encoded).logits[0].double()
            if words:
                ids = encoded.word_ids()
                want = want[[ids.index(word) for word in range(len(row["tokens"])) if word in ids]]
            got = [row for row in prediction["logits"] if row is not None] if words else prediction["logits"]
            got = torch.tensor(got, dtype=torch.float64)
            if got.shape != want.shape:
                result["problems"].append(f"line {i + 1}: {list(got.shape)} logits, expected {list(want.shape)}")
                continue
            gap = (got - want).abs().max().item()
            if math.isnan(gap):
                gap = math.inf
            if gap > worst:
                worst, where = gap, i + 1
        result |= {"texts": len(texts), "max_abs_difference": worst if math.isfinite(worst) else "not finite", "worst_line": where, "tolerance": args.tolerance}
        if worst > args.tolerance:
            result["problems"].append(f"logits differ by {worst:.3e} on line {where}, more than {args.tolerance:.1e}")
    return finish(result)


def finish(result):
    for problem in result["problems"]:
        print(f"FAIL {problem}", file=sys.stderr)
    print(json.dumps({"ok": not result["problems"], **result}))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
