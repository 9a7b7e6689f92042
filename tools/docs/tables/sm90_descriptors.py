"""Tables of code that nvcc orders: the loading lane of Hopper's forward, and the descriptors of its gradients."""

from __future__ import annotations

from lines import Line, one, rounded, table, where

LANE, DESCRIPTORS = "gpu_sm90_loading_lane", "gpu_sm90_descriptors"


def loading_lane() -> str:
    """The time with unrolled loops over that without, and with all parts of a tile computed first."""
    rows = []
    for head_dim, mask, length in (
        *((d, m, n) for d in (64, 128, 256) for m in ("causal", "full") for n in (1024, 4096)),
        *((160, "causal", n) for n in (1024, 4096)),
        *((d, m, 1024) for d in (64, 128, 256) for m in ("packed", "packed-full")),
        *((d, m, 16384) for d in (64, 128) for m in ("window-1024", "documents")),
    ):
        x = one(LANE, run="loading lane", head_dim=head_dim, mask=mask, seqlen=length)
        ratios = (x["over_first"][build] for build in ("not unrolled", "not unrolled, parts first"))
        rows.append([named(x), *map(rounded, ratios)])
    header = ["head dim, mask, length", "not unrolled", "not unrolled, parts first"]
    return table(header, rows, numbers=2)


def beside_flash3() -> str:
    """The time of FlashAttention-3 over ours."""
    rows = []
    for head_dim in (192, 256):
        for mask, causal in (("causal", True), ("full", False)):
            told = []
            for length in (1024, 4096, 16384):
                cell = {"head_dim": head_dim, "causal": causal, "seqlen_q": length}
                ours, theirs = (
                    one(LANE, run="beside FlashAttention-3", impl=x, **cell)["ms_p50"]
                    for x in ("flashcute", "fa3")
                )
                told.append(rounded(theirs / ours))
            rows.append([f"{head_dim} {mask}", *told])
    return table(["head dim, mask", "1k", "4k", "16k"], rows, numbers=3)


def named(cell: Line) -> str:
    kind = ", deterministic" if cell["deterministic"] else ""
    mask = cell.get("mask", "causal" if cell["causal"] else "full")
    return f"{cell['head_dim']} {mask}, {cell['seqlen'] // 1024}k{kind}"


def builds(run: str, file: str = DESCRIPTORS) -> str:
    """The time of the first build over that of each other one, a column for each case."""
    found = where(file, kind="compared_builds", run=run)
    names = dict.fromkeys(name for x in found for name in x["over_first"])
    rows = [[name, *(rounded(x["over_first"].get(name)) for x in found)] for name in names]
    return table(["build", *map(named, found)], rows, numbers=len(found))


def orders() -> str:
    """Of builds that compute the same: how many, the slowest and the fastest over the first."""
    found: dict[str, list[float]] = {}
    for x in where(DESCRIPTORS, kind="order_of_instructions"):
        for cell in x["cases"]:
            found.setdefault(named(cell), []).append(cell["over_first"])
    rows = [
        [name, len(ratios), rounded(min(ratios)), rounded(max(ratios))]
        for name, ratios in sorted(found.items(), key=lambda x: (len(x[0]), x[0]))
    ]
    return table(["head dim, mask, length", "builds", "slowest", "fastest"], rows, numbers=3)


def landed() -> str:
    """The time before over that after, of what is the default now."""
    runs = ("landed", "landed, deterministic", "landed, bands and maps")
    found = [x for run in runs for x in where(DESCRIPTORS, run=run)]
    rows = [[named(x), rounded(x["over_first"]["after"])] for x in found]
    return table(["head dim, mask, length", "before over after"], rows, numbers=1)
