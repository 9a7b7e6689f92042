"""Tables of what it takes to turn sums into dQ in the main pass of Hopper's gradients, and of omitted parts."""

from __future__ import annotations

from lines import one, table, where

from tables.compared_builds import by_turns

FILE = "gpu_sm90_early_finish"


def turns(run: str) -> str:
    return by_turns(FILE, run)


def passes() -> str:
    """Microseconds of each launch of a call."""
    found = where(FILE, kind="gradient_pass_times")
    cells = list(dict.fromkeys((x["head_dim"], x["causal"], x["seqlen"]) for x in found))
    rows = []
    for head_dim, causal, seqlen in cells:
        for variant in dict.fromkeys(x["variant"] for x in found):
            of = {"head_dim": head_dim, "causal": causal, "seqlen": seqlen, "variant": variant}
            x = one(FILE, kind="gradient_pass_times", **of)
            mask = "causal" if causal else "full"
            told = [f"{x[f'us_{launch}']:.0f}" for launch in ("prepare", "gradients", "finish")]
            rows.append([f"{head_dim} {mask}, {seqlen // 1024}k, {variant}", *told])
    return table(["us", "before", "main pass", "after"], rows, numbers=3)
