"""Tables of what warps of Hopper's gradients wait for, and of steps that shorten it: sampled waits beside
FlashAttention-4, clocks, rates."""

from __future__ import annotations

import statistics

from lines import Line, one, table, where

from tables.sm90_backward import HEAD_DIMS, MASKS

WAITS = "gpu_sm90_backward_waits"
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


def samples() -> str:
    """What single instructions of our loop wait for, under the causal mask."""
    delta, looks, (fence,) = (
        sorted(one(WAITS, kind="gradient_sampled_waits", what=what)["clocks"])
        for what in ("loads of delta", "looks at mbarriers", "fence of dQ")
    )
    return (
        f"In the samples of ours, causal, the first loads of delta took {delta[0]} to {delta[-1]} clocks each, one\n"
        f"after another; a WGMMA of 64 columns takes 32. A look at an mbarrier took {looks[0]} to {looks[-1]}, and\n"
        f"the fence behind the stores of dQ {fence}."
    )


def machine_code() -> str:
    """What 64-bit sums of descriptors change, at head dimension 128."""
    told = []
    for kind in ("gradient_machine_code", "forward_machine_code"):
        was, now = (one(WAITS, kind=kind, step=step) for step in ("as it was", "64-bit sums"))
        told += [now["umov"], was["umov"], now["instructions"], was["instructions"]]
    return (
        "At head dimension 128, causal, our loop has from its first product to its last {} `UMOV` for {}, and {} "
        "instructions\nfor {}; the forward's kernel without a mask {} `UMOV` for {}, and {} instructions for {}."
    ).format(*told)


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
    cells = [(d, mask, s) for d in HEAD_DIMS for mask in MASKS for s in (1024, 4096, 16384)]
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
