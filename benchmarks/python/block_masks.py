"""Times masks by element on a GPU: what reading a map costs beside masks that the kernels know, and documents in one
row beside packed sequences and compiled FlexAttention.

One line for each problem: medians in milliseconds, all calls taking turns in one process.

usage: python benchmarks/python/block_masks.py --commit COMMIT --out LINES.jsonl [--no-flex]
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashcute
import torch

Calls = dict[str, Callable[[], object]]
ROUNDS, CALLS = 15, 3
BUILDS = 8  # in a graph: from Python a small map takes the host longer than the GPU


def medians_ms(calls: Calls) -> dict[str, float]:
    """The median of the rounds, in each of which every call has a turn, in another order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(ROUNDS):
        for name in random.sample(list(calls), len(calls)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(CALLS):
                calls[name]()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / CALLS)
    return {f"ms_{name}": round(statistics.median(t), 4) for name, t in times.items()}


def of_builds(build: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(BUILDS):
            build()
    return graph


def documents(tokens: int) -> list[int]:
    """Lengths as of documents: log-normal, median 700, sigma 1.1."""
    draw = random.Random(1)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(1, round(draw.lognormvariate(6.55, 1.1)))))
    return lengths


def problem(tokens: int, head_dim: int, flex: bool) -> dict[str, Any]:
    heads, kv_heads, device = 32, 8, "cuda"
    q = torch.randn(1, tokens, heads, head_dim, device=device, dtype=torch.bfloat16)
    k, v = (
        torch.randn(1, tokens, kv_heads, head_dim, device=device, dtype=torch.bfloat16)
        for _ in "kv"
    )
    out, dout = torch.empty_like(q), torch.randn_like(q)
    lengths = torch.tensor(documents(tokens))
    numbers = torch.arange(len(lengths)).repeat_interleave(lengths).int().to(device)[None]
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(device)
    lower = torch.ones(tokens, tokens, device=device, dtype=torch.bool).tril()
    upper = lower.T.contiguous()
    everything = flashcute.BlockMask.from_dense(
        torch.ones(1, 1, device=device, dtype=torch.bool), seqlen_q=tokens, seqlen_k=tokens
    )
    triangle = flashcute.BlockMask.from_dense(lower)
    own = flashcute.BlockMask.from_documents(numbers)
    Variant, attend = flashcute.Variant, flashcute.flash_attention
    found: dict[str, Any] = {"tokens": tokens, "head_dim": head_dim, "documents": len(lengths)}
    configs = {
        "": flashcute.explain(q, k, v, True, block_mask=own).config,
        "sm80_": flashcute.default_config(head_dim, "bfloat16", "sm_80"),
    }
    calls: Calls = {
        "build_documents": lambda: flashcute.BlockMask.from_documents(numbers),
        "build_dense": lambda: flashcute.BlockMask.from_dense(lower),
        "build_transposed": lambda: flashcute.BlockMask.from_dense(upper.T),
        "packed": lambda: attend(q[0], k[0], v[0], True, cu_seqlens_q=starts, out=out[0]),
    }
    for prefix, config in configs.items():
        assert config is not None
        found[f"{prefix}config"] = str(config)

        def forward(variant: Any, config: Any = config) -> Callable[[], object]:
            return lambda: flashcute.forward(config, q, k, v, variant=variant, out=out)

        calls |= {
            f"{prefix}full": forward(Variant()),
            f"{prefix}causal": forward(Variant(causal=True)),
            f"{prefix}mapped_full": forward(Variant(block_mask=everything)),
            f"{prefix}mapped_causal": forward(Variant(causal=True, block_mask=everything)),
            f"{prefix}mapped_triangle": forward(Variant(block_mask=triangle)),
            f"{prefix}mapped_documents": forward(Variant(causal=True, block_mask=own)),
        }

    def backward(variant: Any) -> Callable[[], object]:
        result, lse = flashcute.forward(configs[""], q, k, v, variant=variant, return_lse=True)
        # Both sides by the same kernels: Hopper's of wide heads know no map.
        arch = "sm_100" if head_dim > 128 else None
        causal = variant.block_mask is None
        config = flashcute.default_backward_config(head_dim, "bfloat16", arch, causal=causal)
        return lambda: flashcute.backward(config, dout, q, k, v, result, lse, variant=variant)

    calls |= {
        "backward_causal": backward(Variant(causal=True)),
        "backward_mapped_causal": backward(Variant(causal=True, block_mask=everything)),
        "backward_mapped_documents": backward(Variant(causal=True, block_mask=own)),
    }
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        attention, create = torch.compile(flex_attention), torch.compile(create_block_mask)
        of_token = numbers[0]

        def same_document(_b: Any, _h: Any, i: Any, j: Any) -> Any:
            return (i >= j) & (of_token[i] == of_token[j])

        def build() -> Any:
            return create(same_document, None, None, tokens, tokens, device=device)

        mask, (tq, tk, tv) = build(), (x.transpose(1, 2) for x in (q, k, v))
        calls |= {
            "flex_build": build,
            "flex_documents": lambda: attention(tq, tk, tv, block_mask=mask, enable_gqa=True),
        }
    builds = {name: of_builds(call) for name, call in calls.items() if name.startswith("build_")}
    calls |= {f"graph_{name}": graph.replay for name, graph in builds.items()}
    times = medians_ms(calls)
    for name in builds:
        times[f"ms_gpu_{name}"] = round(times.pop(f"ms_graph_{name}") / BUILDS, 4)
    return found | times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--no-flex", action="store_true")
    options = parser.parse_args()
    head = {
        "kind": "block_masks",
        "commit": options.commit,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
    }
    with options.out.open("w") as lines:
        for tokens in (4096, 16384):
            for head_dim in (64, 128, 256):
                line = head | problem(tokens, head_dim, not options.no_flex and head_dim < 256)
                print(json.dumps(line), file=lines, flush=True)
                print(line, flush=True)


if __name__ == "__main__":
    main()
