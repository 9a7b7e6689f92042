"""Times masks by element on the CPU: whether a call costs its share of the visited blocks, and documents in one row
beside torch's attention with the same mask as booleans.

One line for each problem: medians in milliseconds of float32 forwards, all calls taking turns in one process. `share_*`
are visited blocks over all blocks, `visible_*` visible pairs over all pairs; `of_share_*` is the time over that of the
unmasked call, over the share: 1 is a call that pays for what it visits and for nothing else.

usage: python benchmarks/python/block_masks_cpu.py --commit COMMIT --device TEXT --out LINES.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashcute
import torch
from block_masks import documents

ROUNDS = 21


def medians_ms(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name in random.sample(list(calls), len(calls)):
            begin = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def problem(tokens: int, head_dim: int) -> dict[str, Any]:
    heads = 4
    q, k, v = (torch.randn(1, tokens, heads, head_dim) for _ in "qkv")
    out = torch.empty_like(q)
    lengths = torch.tensor(documents(tokens))
    numbers = torch.arange(len(lengths)).repeat_interleave(lengths).int()[None]
    position = torch.arange(tokens)
    distance = position[:, None] - position
    dense = {
        "causal": distance >= 0,
        "documents": (distance >= 0) & (numbers[0][:, None] == numbers[0]),
        "window": (distance >= 0) & (distance <= 1024),
    }
    own = flashcute.BlockMask.from_documents(numbers)
    Variant = flashcute.Variant
    variants = {
        "full": Variant(),
        "mapped_full": Variant(
            block_mask=flashcute.BlockMask.from_dense(torch.ones_like(distance) > 0)
        ),
        "causal": Variant(causal=True),
        "mapped_causal": Variant(block_mask=flashcute.BlockMask.from_dense(dense["causal"])),
        "documents": Variant(causal=True, block_mask=own),
        "window": Variant(causal=True, window=(1024, 0)),
        "mapped_window": Variant(block_mask=flashcute.BlockMask.from_dense(dense["window"])),
    }
    config = flashcute.explain(q, k, v).config
    assert config is not None

    def forward(variant: Any) -> Callable[[], object]:
        return lambda: flashcute.forward(config, q, k, v, variant=variant, out=out)

    calls: dict[str, Callable[[], object]] = {x: forward(y) for x, y in variants.items()}
    calls["build_documents"] = lambda: flashcute.BlockMask.from_documents(numbers)
    calls["build_dense"] = lambda: flashcute.BlockMask.from_dense(dense["documents"])
    tq, tk, tv = (x.transpose(1, 2) for x in (q, k, v))
    calls["torch_documents"] = lambda: torch.nn.functional.scaled_dot_product_attention(
        tq, tk, tv, attn_mask=dense["documents"]
    )
    times = medians_ms(calls)
    found: dict[str, Any] = {"tokens": tokens, "head_dim": head_dim, "documents": len(lengths)}
    found["config"] = str(config)
    found |= {f"ms_{name}": round(x, 4) for name, x in times.items()}
    for name, variant in variants.items():
        blocks = flashcute.count_blocks(config, q, k, v, variant=variant)
        share = (blocks[..., :2].sum() / blocks.sum()).item()
        found[f"share_{name}"] = round(share, 4)
        found[f"of_share_{name}"] = round(times[name] / times["full"] / share, 3)
    return found | {
        f"visible_{name}": round(x.float().mean().item(), 4) for name, x in dense.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", required=True)
    parser.add_argument("--device", required=True, help="the processor, in words")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    head = {
        "kind": "block_masks_cpu",
        "commit": options.commit,
        "date": datetime.date.today().isoformat(),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
    }
    with options.out.open("w") as lines:
        for tokens in (2048, 4096):
            for head_dim in (64, 128):
                line = head | problem(tokens, head_dim)
                print(json.dumps(line), file=lines, flush=True)
                print(line, flush=True)


if __name__ == "__main__":
    main()
