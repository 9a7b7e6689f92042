"""Tables of the order in which blocks of queries pass the tiles of Hopper's gradients under windows, and of other
orders of tiles and blocks that were tried with it."""

from __future__ import annotations

from lines import one, rounded, table, where

WINDOWS, OTHERS = "gpu_sm90_window_turns", "gpu_sm90_gradient_turns"
GROUPS = (1, 4, 8)  # query heads for each key head


def orders(*cells: str) -> str:
    """The time from the last block to the first over that of other orders. A cell: head dim:group:mask:length."""
    rows: dict[str, list[str]] = {}
    header = []
    for cell in cells:
        head_dim, group, mask, length = cell.split(":")
        found = one(
            WINDOWS, run="orders", head_dim=int(head_dim), kv_ratio=int(group), mask=mask, seqlen=int(length)
        )  # fmt: skip
        header.append(
            f"{head_dim}, {group}, {int(mask.removeprefix('window-')) // 1024}k, {int(length) // 1024}k"
        )
        for name, ratio in found["over_first"].items():
            rows.setdefault(name, []).append(rounded(ratio))
    return table(["order", *header], [[name, *x] for name, x in rows.items()], numbers=len(cells))


def over_before() -> str:
    """The time before over the time now."""
    cells = {
        "window 128, 1k": ("window-128", 1024),
        "16k": ("window-128", 16384),
        "1,024, 8k": ("window-1024", 8192),
        "1,024, 32k": ("window-1024", 32768),
        "4,096, 8k": ("window-4096", 8192),
        "4,096, 32k": ("window-4096", 32768),
        "packs, 1k": ("packed", 1024),
        "packs, 4k": ("packed", 4096),
    }
    rows = []
    for head_dim in (64, 128):
        for group in GROUPS:
            told = [f"{head_dim}, {group}"]
            for mask, length in cells.values():
                found = one(
                    WINDOWS, run="before and after", head_dim=head_dim, kv_ratio=group, mask=mask, seqlen=length
                )  # fmt: skip
                (ratio,) = found["over_first"].values()
                told.append(rounded(ratio))
            rows.append(told)
    return table(["head dim, group", *cells], rows, numbers=len(cells))


def heads_in_turn(head_dim: str, *cells: str) -> str:
    """Causal: the time as it is over that with more or fewer heads in turn. A cell: group:length."""
    rows: dict[str, list[str]] = {}
    for number, cell in enumerate(cells):
        group, length = (int(x) for x in cell.split(":"))
        for x in where(
            OTHERS, run="heads in turn", head_dim=int(head_dim), kv_ratio=group, mask="causal", seqlen=length
        ):  # fmt: skip
            for name, ratio in x["over_first"].items():
                rows.setdefault(name, ["-"] * len(cells))[number] = rounded(ratio)
    header = [f"{cell.split(':')[0]}, {int(cell.split(':')[1]) // 1024}k" for cell in cells]
    return table([f"d {head_dim}", *header], [[n, *x] for n, x in rows.items()], numbers=len(cells))


def reversed_maps() -> str:
    """Documents: the time head by head over that in step, where pages of the map are reversed when they are read."""
    cells = {
        f"{length // 1024}k of {tokens // 1024}k": (length, tokens)
        for tokens, lengths in ((16384, (1024, 2048, 4096, 16384)), (32768, (2048, 8192, 32768)))
        for length in lengths
    }
    rows = []
    for head_dim in (64, 128):
        for group in GROUPS:
            told = [f"{head_dim}, {group}"]
            for length, tokens in cells.values():
                of = {"head_dim": head_dim, "kv_ratio": group, "seqlen": length, "tokens": tokens}
                (ratio,) = one(OTHERS, run="reversed maps", **of)["over_first"].values()
                told.append(rounded(ratio))
            rows.append(told)
    return table(["head dim, group", *cells], rows, numbers=len(cells))


def maps() -> str:
    """Documents: the time head by head over that in step, two ways."""
    rows: dict[str, list[str]] = {}
    header = []
    for group in GROUPS:
        for head_dim in (64, 128):
            for length in (1024, 4096, 16384):
                header.append(f"{head_dim}, {group}, {length // 1024}k")
                found = one(OTHERS, run="maps", head_dim=head_dim, kv_ratio=group, seqlen=length)
                for name, ratio in found["over_first"].items():
                    rows.setdefault(name, []).append(rounded(ratio))
    turned = [[title, *x] for title, *x in zip(header, *rows.values(), strict=True)]
    return table(["head dim, group, rows", *rows], turned, numbers=len(rows))
