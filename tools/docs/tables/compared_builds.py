"""Tables of lines that benchmarks/python/compare_builds.py writes."""

from __future__ import annotations

from lines import one, rounded, table, where

from tables.sm90_backward import MASKS


def by_turns(file: str, run: str, **cells: int) -> str:
    """The time of a run's first build over that of each other; a row for each build, head dimension and mask."""
    found = where(file, kind="compared_builds", run=run, **cells)
    lengths = sorted({x["seqlen"] for x in found})
    builds = list(found[0]["over_first"])
    rows = []
    for build in builds:
        for head_dim in sorted({x["head_dim"] for x in found}):
            for mask in MASKS:
                of = {"head_dim": head_dim, "mask": mask, **cells}
                lines = [
                    one(file, kind="compared_builds", run=run, seqlen=n, **of) for n in lengths
                ]
                title = f"{head_dim} {mask}" + (f", {build}" if len(builds) > 1 else "")
                rows.append([title, *(rounded(x["over_first"][build]) for x in lines)])
    header = ["head dim, mask", *(f"{n // 1024}k" for n in lengths)]
    return table(header, rows, numbers=len(lengths))
