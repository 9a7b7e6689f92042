"""What compute-sanitizer's racecheck reports of Hopper's kernels."""

from __future__ import annotations

from collections import Counter

from lines import Line, table, where

FILE = "gpu_sm90_racecheck"

SHARED = {
    "blocks": "gradients: what the loading lane says of a block of queries",
    "statistics": "gradients: LSE and delta of its rows, bulk copies",
    "inspections": "forward: which block of V has to be inspected",
    "map blocks": "forward, maps: what the loading lane says of a block of keys",
}


def by_place() -> str:
    """Reports of racecheck by what is shared and by the masks of the kernels."""
    found: list[Line] = where(FILE, kind="racecheck")
    masks = list(dict.fromkeys(mask for x in found for mask in x["reports"]))
    rows = []
    for what, told in SHARED.items():
        counts: Counter[str] = Counter()
        for x in where(FILE, kind="racecheck", what=what):
            counts.update(x["reports"])
        rows.append([told, *(counts[mask] for mask in masks)])
    return table(["what", *masks], rows, numbers=len(masks))


def total() -> str:
    reports = sum(n for x in where(FILE, kind="racecheck") for n in x["reports"].values())
    return f"It reports {reports} pairs of these kernels:"
