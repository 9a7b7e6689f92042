"""Tables of how tiles of Hopper's deterministic gradients look whether it is their turn to add."""

from __future__ import annotations

from lines import one, rounded, table, where

from tables.sm90_backward import MASKS

FILE = "gpu_sm90_deterministic_looks"


def by_turns(file: str, run: str, **cells: int) -> str:
    """The time as it was over that of each variant; a row for each head dimension and mask, or for each variant."""
    found = where(file, kind="compared_builds", run=run, **cells)
    lengths = sorted({x["seqlen"] for x in found})
    variants = list(found[0]["over_first"])
    rows: dict[str, list[str]] = {}
    for variant in variants:
        for head_dim in sorted({x["head_dim"] for x in found}):
            for mask in MASKS:
                of = {"head_dim": head_dim, "mask": mask, **cells}
                title = f"{head_dim} {mask}" + (f", {variant}" if len(variants) > 1 else "")
                rows[title] = [
                    rounded(one(file, kind="compared_builds", run=run, seqlen=n, **of)["over_first"][variant])
                    for n in lengths
                ]  # fmt: skip
    header = ["head dim, mask", *(f"{n // 1024}k" for n in lengths)]
    return table(header, [[title, *x] for title, x in rows.items()], numbers=len(lengths))


def looks(group: str) -> str:
    """The time with acquiring looks over the time without; `group`: query heads that share a key head."""
    return by_turns(FILE, "looks", kv_ratio=int(group))


def tried(run: str) -> str:
    return by_turns(FILE, run)
