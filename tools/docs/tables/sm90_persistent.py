"""Tables of persistent thread blocks of Hopper's gradients: clocks of a tile beside its blocks, and builds that took
turns."""

from __future__ import annotations

from collections.abc import Callable

from lines import Line, one, table, where

from tables.sm90_backward import HEAD_DIMS, MASKS

FILE, TWO_KEYS = "gpu_sm90_persistent", "gpu_sm90_two_keys"
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


STORES = {
    "requests, again": "registers",
    "stores from the place of dQ": "the place of dQ",
    "stores from the place of dS": "the place of dS (d 128: half of them)",
}


def clocks() -> str:
    return clocks_of(FILE, STEPS, waits)


def clocks_of_stores() -> str:
    return clocks_of(TWO_KEYS, STORES, lambda x: x["clocks"]["stores"])


def clocks_of(file: str, runs: dict[str, str], part: Callable[[Line], int]) -> str:
    """Means of the two computing warpgroups: all clocks beside the blocks, and a part of them."""
    rows = []
    for head_dim in HEAD_DIMS:
        for mask, causal in MASKS.items():
            for length in (1024, 4096):
                told = []
                for run in runs:
                    of = {"head_dim": head_dim, "causal": causal, "seqlen": length, "run": run}
                    found = where(file, kind="tile_clocks", **of)
                    means = (sum(map(f, found)) / len(found) for f in (beside_blocks, part))
                    told.append("{:.0f} ({:.0f})".format(*means))
                rows.append([f"{head_dim} {mask}, {length // 1024}k", *told])
    return table(["clocks of a tile", *runs.values()], rows, numbers=len(runs))


def gains(run: str, file: str = FILE) -> str:
    """The time of one tile for each thread block, or of the first build, over that of each other one."""
    found = where(file, kind="compared_builds", run=run)
    names = list(found[0]["over_first"])
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
                    if "one tile" in x["over_first"]:
                        over /= x["over_first"]["one tile"]
                    ratios.append(f"{over:.2f}")
                rows.append([name, f"{head_dim} {mask}", *ratios])
    header = ["build", "head dim, mask", *(f"{n // 1024}k" for n in lengths)]
    return table(header, rows, numbers=len(lengths))


def two_places() -> str:
    """The time of one place for K over that of the builds that became the defaults."""
    parts = ", dQ added in 4 parts"
    builds = {
        (64, False): "3 places for Q, at d 64 two for K",
        (64, True): "3 places for Q, at d 64 two for K",
        (128, False): f"the same{parts}",
        (128, True): f"2 and 2{parts}",
    }
    lengths = (1024, 4096, 16384)
    rows = []
    for head_dim in HEAD_DIMS:
        for mask, causal in MASKS.items():
            cells = (
                one(TWO_KEYS, run="two places", head_dim=head_dim, causal=causal, seqlen=length)
                for length in lengths
            )
            ratios = [f"{x['over_first'][builds[head_dim, causal]]:.2f}" for x in cells]
            places = "1" if (head_dim, causal) == (128, False) else "2"
            rows.append([f"{head_dim} {mask}", places, *ratios])
    header = ["head dim, mask", "places for K", *(f"{n // 1024}k" for n in lengths)]
    return table(header, rows, numbers=1 + len(lengths))
