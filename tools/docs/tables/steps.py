"""Runs of variants while Hopper's forward was made: each variant beside the faster of the others' kernels.

The lines are of kind "step", with TFLOP/s by variant, where `fa3` and `cudnn` are the others, or with thousands of
cycles by variant, where the first is what the rest is beside.
"""

from __future__ import annotations

from lines import Line, rounded, where
from lines import table as markdown

FILE = "gpu_hopper_steps"
PEERS = {"fa3": "FlashAttention-3", "cudnn": "cuDNN"}


def table(run: str, unit: str = "tflops") -> str:
    """Of a run, sorted by head dimension, mask, heads and length. unit: tflops or kcycles."""
    rows_of = {"tflops": speeds, "kcycles": cycles}[unit]
    chosen = [x for x in where(FILE, kind="step", run=int(run)) if x.get(unit)]
    chosen.sort(
        key=lambda x: (x["head_dim"], x["causal"], x["kv_heads"] != x["heads"], x["seqlen"])
    )
    columns = {
        "tflops": ["best of the others, TFLOP/s", "speed-up of each variant of ours"],
        "kcycles": ["before, thousands of cycles", "after"],
    }[unit]
    rows = [[*case_of(x), *told] for x in chosen if (told := rows_of(x))]
    if not rows:
        raise ValueError(f"{FILE}: no line of run {run} has {unit}")
    return markdown(["head dim, mask", "batch x heads x length", *columns], rows)


def case_of(line: Line) -> tuple[str, str]:
    """Head dimension and mask; sizes."""
    heads = f"{line['heads']}"
    if line["kv_heads"] != line["heads"]:
        heads += f"/{line['kv_heads']}"
    mask = "causal" if line["causal"] else "full"
    return f"{line['head_dim']} {mask}", f"{line['batch']} x {heads} x {line['seqlen']}"


def speeds(line: Line) -> tuple[str, str] | None:
    """The best of the others, and every variant's ratio to it: above 1, the variant is faster."""
    found = line["tflops"]
    best, peer = max((found[peer], peer) for peer in PEERS if peer in found)
    own = sorted((name for name in found if name not in PEERS), key=lambda name: -found[name])
    ratios = ", ".join(f"{name} {rounded(found[name] / best)}" for name in own)
    return (f"{best:.0f} ({PEERS[peer]})", ratios) if own else None


def cycles(line: Line) -> tuple[str, str]:
    """The first variant, and the others."""
    (first, before), *others = line["kcycles"].items()
    return f"{first} {before:.0f}", ", ".join(f"{name} {cycles:.0f}" for name, cycles in others)
