"""Tables of Hopper's deterministic gradients of head dimensions up to 128, beside the default ones and cuDNN."""

from __future__ import annotations

import statistics

from lines import link, rounded, speed_ups, table

from tables.sm90_backward import HEAD_DIMS, LENGTHS, MASKS, span

FILE = "gpu_sm90_backward_deterministic"
ONE_TILE = f"{FILE}_one_tile"  # before thread blocks were persistent
OURS, DEFAULT, CUDNN = "flashcute_deterministic", "flashcute", "sdpa_cudnn"

# What was predicted: the lowest and the highest. At 1k it was "more", which says nothing that can be checked.
PREDICTED = {"full": (0.95, 0.99), "causal": (0.93, 0.95)}
CHECKED = LENGTHS[1:]


def ratios(peer: str, file: str = FILE) -> dict[tuple[int, bool], list[float]]:
    """Their time over ours by head dimension and mask, from the shortest to the longest."""
    found = {cell[3:]: ratio for cell, ratio in speed_ups(file, peer, OURS).items()}
    return {
        (head_dim, causal): [found[length, head_dim, causal] for length in LENGTHS]
        for head_dim in HEAD_DIMS
        for causal in MASKS.values()
    }


def cost() -> str:
    """The time of the default over theirs."""
    found = ratios(DEFAULT)
    rows = [
        [f"{head_dim} {mask}", *map(rounded, found[head_dim, causal])]
        for head_dim in HEAD_DIMS
        for mask, causal in MASKS.items()
    ]
    return table(["head dim, mask", *map(thousands, LENGTHS)], rows, numbers=len(LENGTHS))


def thousands(length: int) -> str:
    return f"{length // 1024}k"


def summary() -> str:
    """Beside the default and cuDNN: means, and the lowest and the highest."""

    def told(peer: str) -> str:
        every = [x for of in ratios(peer).values() for x in of]
        return f"{rounded(statistics.geometric_mean(every))} ({span(every)})"

    return (
        f"Geometric means of the 20 cases, with the lowest and the highest: {told(DEFAULT)} of the default's rate,\n"
        f"{told(CUDNN)} of cuDNN's, which was not asked for the same bits\n"
        f"({link('lines', FILE)}, one H200, one process)."
    )


def predictions() -> str:
    """Of kernels with one tile for each thread block: what was predicted, what was found, and at which lengths it is
    out of the range, to two decimals."""
    rows = []
    for (head_dim, causal), found in ratios(DEFAULT, ONE_TILE).items():
        mask = "causal" if causal else "full"
        low, high = PREDICTED[mask]
        by_length = {n: round(x, 2) for n, x in zip(LENGTHS, found, strict=True) if n in CHECKED}
        outside = {
            "above": [thousands(n) for n, x in by_length.items() if x > high],
            "below": [thousands(n) for n, x in by_length.items() if x < low],
        }
        verdict = "; ".join(f"{side} at {', '.join(x)}" for side, x in outside.items() if x)
        of_checked = [x for n, x in zip(LENGTHS, found, strict=True) if n in CHECKED]
        rows.append(
            [f"{head_dim} {mask}", f"{low} to {high}", span(of_checked), verdict or "right"]
        )
    return table(["head dim, mask", "predicted", "2k to 16k", "prediction"], rows)
