"""Tables of Hopper's gradients of head dimensions above 128, beside cuDNN, and of what was predicted of them."""

from __future__ import annotations

import statistics

from lines import Line, link, one, rounded, speed_ups, table, where

from tables.sm90_backward import LENGTHS, MASKS, span

FILE, STUDY = "gpu_sm90_backward_wide", "gpu_sm90_backward_study"
HEAD_DIMS = (192, 256)
IMPLS = ("flashcute", "sdpa_cudnn")

# TFLOP/s at head dimension 256, from the first run and the changes after it.
PREDICTED = {("full", 16384): 505, ("causal", 4096): 450, ("causal", 1024): 310}


def rates() -> str:
    """TFLOP/s of every case, and cuDNN's time over ours."""
    ratio = {cell[3:]: x for cell, x in speed_ups(FILE, "sdpa_cudnn").items()}
    rows = []
    for head_dim in HEAD_DIMS:
        for mask, causal in MASKS.items():
            for length in LENGTHS:
                told = [f"{rate(impl, head_dim, causal, length):.0f}" for impl in IMPLS]
                speed_up = rounded(ratio[length, head_dim, causal])
                rows.append([f"{head_dim} {mask}", f"{length // 1024}k", *told, speed_up])
    return table(["head dim, mask", "length", "ours", "cuDNN", "speed-up"], rows, numbers=3)


def rate(impl: str, head_dim: int, causal: bool, length: int) -> float:
    x = one(FILE, impl=impl, head_dim=head_dim, causal=causal, seqlen_q=length)
    return float(x["tflops"])


def summary() -> str:
    """Means and spans over cuDNN by head dimension, and the largest errors."""
    found = speed_ups(FILE, "sdpa_cudnn")
    told = []
    for head_dim in HEAD_DIMS:
        of = [x for cell, x in found.items() if cell[4] == head_dim]
        mean = rounded(statistics.geometric_mean(of))
        told.append(f"{mean} at head dimension {head_dim} ({span(of)})")
    ours, cudnn = (f"{max(map(error, where(FILE, impl=impl))):.1e}" for impl in IMPLS)
    return (
        f"Geometric means over cuDNN: {' and '.join(told)}\n"
        f"({link('lines', FILE)}).\n"
        f"The largest relative error (L2) of dq, dk and dv is {ours}, cuDNN's {cudnn}."
    )


def error(line: Line) -> float:
    return max(float(line[f"{name}_rel_l2"]) for name in ("dq", "dk", "dv"))


def predictions() -> str:
    """Of the three cases: the first run, what was predicted after it, and what was found; and cuDNN in both runs."""
    rows = []
    for (mask, length), predicted in PREDICTED.items():
        causal = MASKS[mask]
        first = one(STUDY, kind="gradient_passes", causal=causal, seqlen=length)
        ours, cudnn = (rate(impl, 256, causal, length) for impl in IMPLS)
        told = [f"{x:.0f}" for x in (first["tflops"], predicted, ours)]
        apart = f"{100 * (ours / predicted - 1):+.0f} %"
        theirs = [f"{x:.0f}" for x in (first["tflops_cudnn"], cudnn)]
        rows.append([f"{length // 1024}k {mask}", *told, apart, *theirs])
    header = ["TFLOP/s", "first run", "predicted", "found", "found over predicted"]
    return table([*header, "cuDNN, first run", "cuDNN, with it"], rows, numbers=6)
