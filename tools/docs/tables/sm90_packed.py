"""Tables of the order in which Hopper's thread blocks take the tiles of packed sequences."""

from __future__ import annotations

from lines import one, rounded, table

FILE = "gpu_sm90_packed_pairs"
GROUPS = (1, 4)  # query heads for each key head
BEFORE, AFTER = "022f435", "6c021d5"


def packs_over_batch() -> str:
    """The time of a batch over that of the same sequences packed."""
    rows = []
    for head_dim in (64, 128, 256):
        for ratio in GROUPS:
            for build, name in ((BEFORE, "before"), (AFTER, "now")):
                told = []
                for masks in (("causal", "packed"), ("full", "packed-full")):
                    for length in (1024, 4096):
                        batch, pack = (
                            one(FILE, run="both", kv_ratio=ratio, head_dim=head_dim, mask=x, seqlen=length)["ms"][build]
                            for x in masks
                        )  # fmt: skip
                        told.append(rounded(batch / pack))
                rows.append([f"{head_dim}, {ratio}, {name}", *told])
    header = [f"{mask}, {n}" for mask in ("causal", "full") for n in ("16 x 1,024", "4 x 4,096")]
    return table(["head dim, group", *header], rows, numbers=4)


def over_before() -> str:
    """The time before over the time now."""
    rows = []
    cells = (
        *((mask, n) for mask in ("packed", "packed-full") for n in (1024, 4096)),
        ("packed-uneven", 1024),
        ("documents", 4096),
    )
    for head_dim in (64, 128, 256):
        for ratio in GROUPS:
            found = (
                one(FILE, run="both", kv_ratio=ratio, head_dim=head_dim, mask=mask, seqlen=n)
                for mask, n in cells
            )
            rows.append([f"{head_dim}, {ratio}", *(rounded(x["over_first"][AFTER]) for x in found)])
    header = ["causal, 1k", "causal, 4k", "full, 1k", "full, 4k", "log-normal", "documents"]
    return table(["head dim, group", *header], rows, numbers=6)


def orders(run: str, *cells: str) -> str:
    """The time by cost alone over that of other orders. A cell: head dim:group:mask:length."""
    rows: dict[str, list[str]] = {}
    header = []
    for cell in cells:
        head_dim, ratio, mask, length = cell.split(":")
        found = one(
            FILE, run=run, head_dim=int(head_dim), kv_ratio=int(ratio), mask=mask, seqlen=int(length)
        )  # fmt: skip
        header.append(
            f"{head_dim}, {ratio}, {mask.removeprefix('packed-')}, {int(length) // 1024}k"
        )
        for name, ratio_of in found["over_first"].items():
            rows.setdefault(name, []).append(rounded(ratio_of))
    header = [x.replace("packed", "causal") for x in header]
    return table(
        ["order", *header], [[name, *told] for name, told in rows.items()], numbers=len(cells)
    )
