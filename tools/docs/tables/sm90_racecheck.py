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
    """Reports by what is shared and by the masks of the kernels."""
    found: list[Line] = where(FILE, kind="racecheck")
    masks = list(dict.fromkeys(mask for x in found for mask in x["reports"]))
    counts: dict[str, Counter[str]] = {what: Counter() for what in SHARED}
    for x in found:
        counts[x["what"]].update(x["reports"])
    rows = [[told, *(counts[what][mask] for mask in masks)] for what, told in SHARED.items()]
    return table(["what", *masks], rows, numbers=len(masks))


def total() -> str:
    found = where(FILE, kind="racecheck")
    reports = sum(n for x in found for n in x["reports"].values())
    return f"In 18 calls, at commit {found[0]['commit']}, it reported {reports} hazards:"
