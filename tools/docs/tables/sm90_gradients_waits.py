"""Tables of what warps of Hopper's gradients wait for, and of steps that shorten it: sampled waits beside
FlashAttention-4, clocks, rates."""

from __future__ import annotations

import statistics

from lines import Line, one, table, where

WAITS = "gpu_sm90_backward_waits"
MASKS = {"full": False, "causal": True}
NAMES = {"flashcute": "ours", "fa4": "FlashAttention-4"}

# What Nsight Compute calls the reasons for which a warp does not issue.
REASONS = {
    "its turn to issue, and other warps": ("selected", "not_selected", "dispatch"),
    "fixed latencies": ("wait", "branch_resolving", "no_inst", "math"),
    "shared memory, exponentials": ("short_sb",),
    "the queue of these": ("mio",),
    "mbarriers, fences": ("long_sb",),
    "named barriers, products": ("barrier", "unnamed"),
}


def waits() -> str:
    """Clocks of a computing warp in a block of 64 queries, by what it waits for."""
    rows = []
    for mask, causal in MASKS.items():
        for impl, name in NAMES.items():
            x = one(WAITS, kind="gradient_stalls", impl=impl, causal=causal)
            share = 64 / x["block_m"]
            told = [
                sum(x.get(f"clocks_{reason}", 0) for reason in reasons)
                for reasons in REASONS.values()
            ]
            numbers = [x["instructions_a_block"], x["clocks_a_block"], *told]
            rows.append([f"{name}, {mask}", *(f"{share * n:,.0f}" for n in numbers)])
    return table(["kernel", "instructions", "clocks", *REASONS], rows, numbers=2 + len(REASONS))


def change(rate: float, base: float) -> str:
    return f"{rate:.0f} ({100 * (rate / base - 1):+.0f} %)"


def rates() -> str:
    """TFLOP/s of steps: means of two rounds, and their change against the first."""
    cells = {
        f"{head_dim} {mask} {length // 1024}k": (head_dim, MASKS[mask], length)
        for head_dim, mask, length in (
            (128, "full", 4096),
            (128, "full", 16384),
            (128, "causal", 1024),
            (128, "causal", 4096),
            (128, "causal", 16384),
            (64, "full", 16384),
            (64, "causal", 16384),
        )
    }
    found: dict[str, dict[tuple[int, bool, int], list[float]]] = {}
    for x in where(WAITS, kind="gradient_order"):
        cell = x["head_dim"], x["causal"], x["seqlen"]
        found.setdefault(x["step"], {}).setdefault(cell, []).append(x["tflops"])
    steps = {
        step: {cell: statistics.mean(of) for cell, of in by_cell.items()}
        for step, by_cell in found.items()
        if all(len(of) == 2 for of in by_cell.values())
    }
    base = next(iter(steps.values()))
    rows = [
        [
            step,
            *(f"{of[c]:.0f}" if of is base else change(of[c], base[c]) for c in cells.values()),
        ]
        for step, of in steps.items()
    ]
    return table(["TFLOP/s", *cells], rows, numbers=len(cells))


def clocks() -> str:
    """Million clocks of one launch under the profiler, which holds the clock at its base: the mean of two."""
    found: dict[str, dict[bool, float]] = {}
    for x in where(WAITS, kind="gradient_cycles"):
        found.setdefault(x["step"], {})[x["causal"]] = statistics.mean(x["sm_cycles"])
    base = next(iter(found.values()))
    rows = []
    for step, of in found.items():
        told = [
            f"{of[causal] / 1e6:.2f}"
            + ("" if of is base else f" ({100 * (of[causal] / base[causal] - 1):+.0f} %)")
            for causal in MASKS.values()
        ]
        rows.append([step, *told])
    return table(["million clocks", *MASKS], rows, numbers=len(MASKS))


def cold() -> str:
    """Single calls with a pause before each: TFLOP/s of the median call and of the best."""
    turns: dict[int, list[Line]] = {}
    for x in where(WAITS, kind="gradient_cold"):
        turns.setdefault(x["turn"], []).append(x)
    rows = []
    for of in turns.values():
        told = [f"{x['tflops']:.0f}, {x['tflops_best']:.0f}" for x in of]
        rows.append([of[0]["step"].replace("late_dq=False", "`late_dq=False`"), *told])
    return table(["median, best TFLOP/s", "8k full", "8k causal", "1k causal"], rows, numbers=3)


def reductions() -> str:
    """TFLOP/s with dQ added by bulk reductions, and from registers."""
    cells = [(d, mask, s) for d in (64, 128) for mask in MASKS for s in (1024, 4096, 16384)]
    rows = []
    for head_dim, mask, length in cells:
        of = {"head_dim": head_dim, "causal": MASKS[mask], "seqlen": length}
        bulk, direct = (
            one(WAITS, kind="gradient_reductions", step=step, **of)["tflops"]
            for step in ("bulk reductions", "reductions from registers")
        )
        rows.append([f"{head_dim} {mask}", f"{length // 1024}k", bulk, change(direct, bulk)])
    header = ["head dim, mask", "length", "by bulk reductions", "from registers"]
    return table(header, rows, numbers=2)
