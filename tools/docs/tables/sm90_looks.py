"""Tables of how tiles of Hopper's deterministic gradients look whether it is their turn to add, of what it takes to
turn sums into dQ in the main pass, and of what racecheck reports."""

from __future__ import annotations

from collections import Counter

from lines import Line, one, rounded, table, where

from tables.sm90_backward import MASKS

LOOKS, FINISH, RACES = (
    "gpu_sm90_deterministic_looks",
    "gpu_sm90_early_finish",
    "gpu_sm90_racecheck",
)


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
    return by_turns(LOOKS, "looks", kv_ratio=int(group))


def tried_looks(run: str) -> str:
    return by_turns(LOOKS, run)


def finish(run: str) -> str:
    return by_turns(FINISH, run)


def finish_passes() -> str:
    """Microseconds of each launch of a call."""
    found = where(FINISH, kind="gradient_pass_times")
    cells = list(dict.fromkeys((x["head_dim"], x["causal"], x["seqlen"]) for x in found))
    rows = []
    for head_dim, causal, seqlen in cells:
        for variant in dict.fromkeys(x["variant"] for x in found):
            of = {"head_dim": head_dim, "causal": causal, "seqlen": seqlen, "variant": variant}
            x = one(FINISH, kind="gradient_pass_times", **of)
            mask = "causal" if causal else "full"
            told = [f"{x[f'us_{launch}']:.0f}" for launch in ("prepare", "gradients", "finish")]
            rows.append([f"{head_dim} {mask}, {seqlen // 1024}k, {variant}", *told])
    return table(["us", "before", "main pass", "after"], rows, numbers=3)


SHARED = {
    "blocks": "gradients: what the loading lane says of a block of queries",
    "statistics": "gradients: LSE and delta of its rows, bulk copies",
    "inspections": "forward: which block of V has to be inspected",
    "map blocks": "forward, maps: what the loading lane says of a block of keys",
}


def races() -> str:
    """Reports of racecheck by what is shared and by the masks of the kernels."""
    found: list[Line] = where(RACES, kind="racecheck")
    masks = list(dict.fromkeys(mask for x in found for mask in x["reports"]))
    rows = []
    for what, told in SHARED.items():
        counts: Counter[str] = Counter()
        for x in where(RACES, kind="racecheck", what=what):
            counts.update(x["reports"])
        rows.append([told, *(counts[mask] for mask in masks)])
    return table(["what", *masks], rows, numbers=len(masks))


def all_races() -> str:
    total = sum(n for x in where(RACES, kind="racecheck") for n in x["reports"].values())
    return f"It reports {total} pairs of these kernels:"
