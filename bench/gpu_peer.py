"""PyTorch's side of `cargo bench -p graft-tests --bench gpu`: the same models, batches and optimizer on the first GPU.

    python bench/gpu_peer.py gpt2|bert [--compile] [--f32]
    python bench/gpu_peer.py llama8b-lora [--compile] [--checkpoint]

Needs torch and transformers, and peft for the latter. Prints a JSON object: the median time of the steps after the first
three, tokens in a second, the peak memory. bf16 is autocast over f32 weights; f32 is without TF32. Attention is PyTorch's
fused one. Llama's weights and its adapters are bf16, without autocast, which is as fast as it gets; --checkpoint computes
each layer again in backward, where memory does not suffice.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

WARM_UP = 3


def llama(checkpoint: bool) -> torch.nn.Module:
    """The shapes of Llama 3 8B, frozen, with LoRA of rank 16 beside every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        use_cache=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, adapter, autocast_adapter_dtype=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["gpt2", "bert", "llama8b-lora"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--f32", action="store_true")
    parser.add_argument("--checkpoint", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    started, steps = time.perf_counter(), 10
    if args.model == "gpt2":
        sequences, tokens, vocabulary = 64, 1024, 50257
        config = GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, use_cache=False)
        model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    elif args.model == "llama8b-lora":
        sequences, tokens, vocabulary, steps = 8, 2048, 128256, 5
        model = llama(args.checkpoint)
    else:
        sequences, tokens, vocabulary = 32, 128, 30522
        model = BertForSequenceClassification._from_config(BertConfig(), attn_implementation="sdpa")
    model = model.cuda().train()
    run = torch.compile(model) if args.compile else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
    ids = torch.tensor([i * 7919 % (vocabulary - 300) + 200 for i in range(sequences * tokens)])
    ids = ids.reshape(sequences, tokens).cuda()
    labels = (torch.arange(sequences) % 2).cuda() if args.model == "bert" else ids
    torch.cuda.synchronize()
    made = time.perf_counter() - started
    autocast = not args.f32 and args.model != "llama8b-lora"

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = run(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    times, losses = [], []
    for _ in range(WARM_UP + steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(step().item())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    median = statistics.median(times[WARM_UP:])
    # Each step is sent before anybody looks at the one before.
    started = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    ahead = (time.perf_counter() - started) / steps
    print(
        json.dumps(
            {
                "mode": args.model
                + ("-f32" if args.f32 else "")
                + (" compiled" if args.compile else " eager")
                + (" checkpointed" if args.checkpoint else ""),
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "median_step_s": median,
                "tokens_per_s": sequences * tokens / median,
                "ahead_step_s": ahead,
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "made_in_s": made,
                "peak_mib": torch.cuda.max_memory_allocated() >> 20,
            }
        )
    )


if __name__ == "__main__":
    main()
