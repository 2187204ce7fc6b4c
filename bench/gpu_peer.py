"""PyTorch's side of `cargo bench -p graft-tests --bench gpu`: the same models, batches and optimizer on the first GPU.

    python bench/gpu_peer.py gpt2|bert [--compile] [--f32]

Needs torch and transformers. Prints a JSON object: the median time of the steps after the first three, tokens in a
second, the peak memory. bf16 is autocast over f32 weights; f32 is without TF32. Attention is PyTorch's fused one.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

STEPS, WARM_UP = 13, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["gpt2", "bert"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--f32", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.model == "gpt2":
        sequences, tokens, vocabulary = 64, 1024, 50257
        config = GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, use_cache=False)
        model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    else:
        sequences, tokens, vocabulary = 32, 128, 30522
        model = BertForSequenceClassification._from_config(BertConfig(), attn_implementation="sdpa")
    model = model.cuda().train()
    run = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    ids = torch.tensor([i * 7919 % (vocabulary - 300) + 200 for i in range(sequences * tokens)])
    ids = ids.reshape(sequences, tokens).cuda()
    labels = ids if args.model == "gpt2" else (torch.arange(sequences) % 2).cuda()
    times, losses = [], []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=not args.f32):
            loss = run(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    median = statistics.median(times[WARM_UP:])
    print(
        json.dumps(
            {
                "mode": args.model + ("-f32" if args.f32 else "") + (" compiled" if args.compile else " eager"),
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "median_step_s": median,
                "tokens_per_s": sequences * tokens / median,
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "peak_mib": torch.cuda.max_memory_allocated() >> 20,
            }
        )
    )


if __name__ == "__main__":
    main()
