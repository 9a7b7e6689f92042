"""Trains a Llama of 100 million parameters by Hugging Face transformers, once with each attention, and compares.

    python benchmarks/python/train_llama.py --out benchmarks/results/gpu_train_llama.jsonl
    python benchmarks/python/train_llama.py --steps 3 --device cpu --tiny      # whether it runs at all

All runs begin with the same random weights and see the same batches in the same order, so their losses differ by
rounding alone. The data is made here: each token has four possible successors, so the loss can fall to log(4) = 1.386.
Weights are float32, products bfloat16 (autocast), the optimizer AdamW with a warm-up and clipped gradients. Prints a
table, and writes a JSON line for each attention: the loss of every step, the median time of a step, tokens per second
and the peak of allocated memory.

The attentions: fcute, flashcute; sdpa, transformers' own by torch; flash2, FlashAttention-2 by the package flash_attn
where it is installed, else by the copy in torch. The exit code is 1 if the loss of fcute differs from that of sdpa by
more than noise at the end, or by more than rounding in the first steps.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import transformers
from flashcute import __version__
from flashcute._cli.kits import TorchCpuKit, TorchCudaKit
from flashcute._cli.provenance import provenance
from flashcute.integrations.transformers import register
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SUCCESSORS = 4
UNTIMED = 10  # steps in which kernels are loaded, and memory is asked for
WARMUP = 50  # steps in which the learning rate rises to its value
CLIPPED_NORM = 1.0  # of the gradients
FIRST = 20  # steps in which weights are still nearly the same
Line = dict[str, Any]


# ---- FlashAttention-2 ------------------------------------------------------------------------------


def register_flash2(name: str = "fa2_peer") -> str:
    """Under a name without "flash", by which transformers would look for the package itself. Returns what computes."""
    try:
        from flash_attn import __version__ as version
        from flash_attn import flash_attn_func
    except ImportError:
        attend, version = by_torch, f"torch {torch.__version__}"
    else:
        version = f"flash_attn {version}"

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            # Of float32 weights the rotation makes float32, which autocast does not cast here.
            q, k, v = (x.transpose(1, 2).bfloat16() for x in (query, key, value))
            return flash_attn_func(q, k, v, softmax_scale=scale, causal=True)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **kw: Any
    ) -> Any:
        assert mask is None
        assert kw["dropout"] == 0.0
        return attend(query, key, value, kw["scaling"]), None

    transformers.AttentionInterface.register(name, attention)
    transformers.AttentionMaskInterface.register(name, transformers.masking_utils.sdpa_mask)
    return version


def by_torch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    attend = nn.functional.scaled_dot_product_attention
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = attend(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


# ---- the model and its data ------------------------------------------------------------------------


def make_model(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    sizes = (64, 128, 2, 4, 2, 64) if options.tiny else (768, 2048, 12, 12, 4, 16384)
    width, inner, layers, heads, kv_heads, words = sizes
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=options.seqlen,
        use_cache=False,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def make_tokens(words: int, options: argparse.Namespace) -> Tensor:
    """(steps, batch, seqlen)"""
    random = np.random.default_rng(options.seed)
    successors = random.integers(words, size=(words, SUCCESSORS))
    rows = options.steps * options.batch
    choices = random.integers(SUCCESSORS, size=(options.seqlen, rows))
    tokens = np.empty((options.seqlen, rows), np.int64)
    tokens[0] = random.integers(words, size=rows)
    for at in range(1, options.seqlen):
        tokens[at] = successors[tokens[at - 1], choices[at]]
    shape = (options.steps, options.batch, options.seqlen)
    return torch.from_numpy(np.ascontiguousarray(tokens.T)).reshape(shape)


# ---- a run -----------------------------------------------------------------------------------------


class Clock:
    """Marks between steps, read at the end: on a GPU without waiting for it."""

    def __init__(self, device: str) -> None:
        self.on_gpu, self.marks = device == "cuda", []

    def mark(self) -> None:
        now = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            now.record()
        self.marks.append(now)

    def ms(self) -> Iterator[float]:
        if self.on_gpu:
            torch.cuda.synchronize()
        for start, end in pairwise(self.marks):
            yield start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)


def train(start: nn.Module, tokens: Tensor, attention: str, options: argparse.Namespace) -> Line:
    on_gpu = options.device == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model: Any = copy.deepcopy(start).to(options.device)
    model.set_attn_implementation(attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=on_gpu)
    # Without both, single large steps make of differences in rounding different curves.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP)
    )
    losses, clock = [], Clock(options.device)
    clock.mark()
    for batch in tokens:
        batch = batch.to(options.device, non_blocking=True)
        with torch.autocast(options.device, torch.bfloat16):
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPED_NORM, foreach=on_gpu)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        clock.mark()
    times = list(clock.ms())
    times = times[UNTIMED:] or times
    median = statistics.median(times)
    return {
        "losses": [round(x, 6) for x in torch.stack(losses).tolist()],
        "ms_p50": median,
        "ms_p10": float(np.percentile(times, 10)),
        "ms_p90": float(np.percentile(times, 90)),
        "samples": len(times),
        "tokens_per_s": 1e3 * options.batch * options.seqlen / median,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


# ---- the comparison --------------------------------------------------------------------------------


def first_difference(line: Line, other: Line) -> float:
    pairs = zip(line["losses"][:FIRST], other["losses"][:FIRST], strict=True)
    return max(abs(a - b) for a, b in pairs)


def end_of(line: Line) -> list[float]:
    return line["losses"][-max(2, len(line["losses"]) // 10) :]


def show(lines: dict[str, Line]) -> None:
    print(
        f"{'attention':<10}{'ms a step':>11}{'tokens/s':>12}{'peak GB':>9}{'loss: first':>13}{'last tenth':>12}"
        f"{'from sdpa':>11}"
    )
    for name, line in lines.items():
        memory = "-" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 1e9:.2f}"
        apart = f"{first_difference(line, lines['sdpa']):.1e}" if "sdpa" in lines else "-"
        print(
            f"{name:<10}{line['ms_p50']:>11.2f}{line['tokens_per_s']:>12.0f}{memory:>9}{line['losses'][0]:>13.4f}"
            f"{statistics.fmean(end_of(line)):>12.4f}{apart:>11}"
        )
    print(f"from sdpa: the largest difference of a loss in the first {FIRST} steps")


def same_curve(lines: dict[str, Line]) -> bool:
    """Whether fcute's losses are those of sdpa: in the first steps up to bfloat16's rounding, at the end up to how much
    the loss varies from batch to batch."""
    mine, theirs = lines["fcute"], lines["sdpa"]
    ends = end_of(mine), end_of(theirs)
    apart = abs(statistics.fmean(ends[0]) - statistics.fmean(ends[1]))
    return first_difference(mine, theirs) < 0.02 and apart <= max(0.01, statistics.stdev(ends[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, help="default: 8, with --tiny 2")
    parser.add_argument("--seqlen", type=int, help="default: 2048, with --tiny 64")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--impls", default="fcute,sdpa,flash2", metavar="NAME,...")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a model that any machine can train")
    parser.add_argument("--out", metavar="FILE", help="append the JSON lines to this file")
    parser.add_argument("--note", metavar="TEXT", help="put into every line")
    parser.add_argument("--commit", metavar="TEXT", help="default: that of the checkout")
    options = parser.parse_args()
    options.batch = options.batch or (2 if options.tiny else 8)
    options.seqlen = options.seqlen or (64 if options.tiny else 2048)

    register(on_unsupported="error")  # a step that torch computes would be measured as ours
    versions = {
        "fcute": __version__,
        "sdpa": f"torch {torch.__version__}",
        "flash2": register_flash2(),
    }
    attentions = {"fcute": "fcute", "sdpa": "sdpa", "flash2": "fa2_peer"}
    names = options.impls.split(",")
    if unknown := set(names) - set(attentions):
        parser.error(
            f"--impls: expected names among {', '.join(attentions)}, got {sorted(unknown)}"
        )
    kit = (TorchCudaKit if options.device == "cuda" else TorchCpuKit)(options.seed)
    start = make_model(options)
    parameters = sum(x.numel() for x in start.parameters())
    tokens = make_tokens(start.config.vocab_size, options)
    print(
        f"{parameters / 1e6:.1f} million parameters, {options.batch} x {options.seqlen} tokens a step"
    )
    common = {
        "kind": "train_llama",
        **provenance(kit, options.commit),
        "transformers": transformers.__version__,
        "seed": options.seed,
        "parameters": parameters,
        "layers": start.config.num_hidden_layers,
        "heads": start.config.num_attention_heads,
        "kv_heads": start.config.num_key_value_heads,
        "head_dim": start.config.hidden_size // start.config.num_attention_heads,
        "batch": options.batch,
        "seqlen": options.seqlen,
        "steps": options.steps,
        "dtype": "bfloat16",
        "learning_rate": options.learning_rate,
        "note": options.note,
    }
    lines: dict[str, Line] = {}
    for name in names:
        lines[name] = train(start, tokens, attentions[name], options)
        print(f"{name}: loss {lines[name]['losses'][-1]:.4f}", flush=True)
        if options.out:
            line = {**common, "impl": name, "impl_version": versions[name], **lines[name]}
            with open(options.out, "a") as out:
                out.write(json.dumps(line, allow_nan=False) + "\n")
    show(lines)
    return 0 if not {"fcute", "sdpa"} <= set(lines) or same_curve(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
