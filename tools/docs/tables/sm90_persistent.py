"""Tables of persistent thread blocks of Hopper's gradients: clocks of a tile beside its blocks, and builds that took
turns."""

from __future__ import annotations

from lines import Line, table, where

from tables.sm90_backward import HEAD_DIMS, MASKS

FILE = "gpu_sm90_persistent"
STEPS = {
    "one tile": "one tile for each thread block",
    "persistent": "persistent",
    "prefetched": "and K prefetched",
    "requests": "K and V requested in time",
}


def waits(x: Line) -> int:
    """From a tile's beginning until its K is there."""
    clocks: dict[str, int] = x["clocks"]
    return clocks.get("entry to roles", 0) + clocks["K"]


def beside_blocks(x: Line) -> int:
    clocks: dict[str, int] = x["clocks"]
    return sum(n for name, n in clocks.items() if "block" not in name)


def clocks() -> str:
    """Means of the two computing warpgroups."""
    rows = []
    for head_dim in HEAD_DIMS:
        for mask, causal in MASKS.items():
            for length in (1024, 4096):
                told = []
                for run in STEPS:
                    of = {"head_dim": head_dim, "causal": causal, "seqlen": length, "run": run}
                    found = where(FILE, kind="tile_clocks", **of)
                    means = (sum(map(f, found)) / len(found) for f in (beside_blocks, waits))
                    told.append("{:.0f} ({:.0f})".format(*means))
                rows.append([f"{head_dim} {mask}, {length // 1024}k", *told])
    return table(["clocks of a tile", *STEPS.values()], rows, numbers=len(STEPS))


def gains(run: str) -> str:
    """The time of one tile for each thread block over that of each other build."""
    found = where(FILE, kind="compared_builds", run=run)
    names = list(found[0]["over_first"])
    first = next(iter(found[0]["ms"]))
    lengths = sorted({x["seqlen"] for x in found})
    rows = []
    for name in names:
        if name == "one tile":
            continue
        for head_dim in HEAD_DIMS:
            for mask, causal in MASKS.items():
                ratios = []
                for length in lengths:
                    (x,) = (
                        x
                        for x in found
                        if (x["head_dim"], x["causal"], x["seqlen"]) == (head_dim, causal, length)
                    )
                    over = x["over_first"][name]
                    if first != "one tile":
                        over /= x["over_first"]["one tile"]
                    ratios.append(f"{over:.2f}")
                rows.append([name, f"{head_dim} {mask}", *ratios])
    header = ["build", "head dim, mask", *(f"{n // 1024}k" for n in lengths)]
    return table(header, rows, numbers=len(lengths))
