"""Tables of speed-ups: their time over ours."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from lines import Cell, Line, lines, link, rounded, speed_ups, table, where

HEAD_DIMS = (64, 128, 256)


class Row(NamedTuple):
    what: str  # the call
    peer: str  # in words
    impl: str  # its name in the lines
    file: str
    ours: str = "flashcute"


ROWS = {
    "forward_hopper": [
        Row("forward, Hopper's kernel", "FlashAttention-3", "fa3", "gpu_forward_hopper"),
        Row("forward, Hopper's kernel", "cuDNN", "sdpa_cudnn", "gpu_forward_hopper"),
    ],
    "forward_hopper_again": [
        Row("the same, a second run", "FlashAttention-3", "fa3", "gpu_forward_hopper_second_run"),
        Row("the same, a second run", "cuDNN", "sdpa_cudnn", "gpu_forward_hopper_second_run"),
    ],
    "forward_hopper_short": [
        Row(
            "few tokens, or up to 8 query heads for each key head",
            peer,
            impl,
            "gpu_forward_hopper_short",
        )
        for peer, impl in (("FlashAttention-3", "fa3"), ("cuDNN", "sdpa_cudnn"))
    ],
    "packed": [
        Row("packed sequences, Hopper's kernel", "FlashAttention-3", "fa3", "gpu_packed"),
        Row("packed sequences, Hopper's kernel", "torch's `varlen_attn`", "varlen_attn", "gpu_packed"),
    ],
    "forward_mma": [
        Row("forward, mma.sync kernel", "FlashAttention-2", "sdpa_flash", "gpu_forward"),
    ],
    "forward_float32": [
        Row("forward, float32", "torch, memory-efficient", "sdpa_efficient", "gpu_forward_float32"),
        Row("forward, float32", "torch, math", "sdpa_math", "gpu_forward_float32"),
    ],
    "gradients": [
        Row("gradients, mma.sync kernel", "FlashAttention-2", "sdpa_flash", "gpu_backward"),
    ],
    "gradients_more": [
        Row(
            "gradients, deterministic",
            "FlashAttention-2",
            "sdpa_flash",
            "gpu_backward",
            "flashcute_deterministic",
        ),
        Row(
            "gradients, eight query heads for each key head",
            "FlashAttention-2",
            "sdpa_flash",
            "gpu_backward_gqa",
        ),
        *(
            Row(
                f"gradients, float32{more}",
                "torch, memory-efficient",
                "sdpa_efficient",
                "gpu_backward_float32",
                ours,
            )
            for more, ours in (("", "flashcute"), (", deterministic", "flashcute_deterministic"))
        ),
    ],
    "cpu": [
        Row("forward, CPU, float32", "torch on the CPU", "sdpa", "cpu_forward_float32"),
        Row("gradients, CPU, float32", "torch on the CPU", "sdpa", "cpu_backward_float32"),
    ],
    "cpu_naive": [
        Row("forward, CPU, float32", "naive, in torch", "naive", "cpu_forward_float32"),
    ],
}  # fmt: skip

FLEX = {
    "documents": ("causal documents in one row, Hopper's kernel", False),
    "documents_made": ("documents in one row, and their mask made", True),
}


def speed_up_rows(*groups: str) -> str:
    """Geometric means by head dimension, and the lowest and highest single cell, of these groups of rows."""
    told = []
    for group in groups:
        if group in FLEX:
            what, made = FLEX[group]
            file = "gpu_block_masks"
            told.append(
                [link(what, file), "FlexAttention, compiled", *summary(over_flex(file, made))]
            )
        for row in ROWS.get(group, []):
            found = speed_ups(row.file, row.impl, row.ours)
            told.append([link(row.what, row.file), row.peer, *summary(found)])
        if group not in FLEX and group not in ROWS:
            raise ValueError(f"no group of rows {group!r}: {', '.join([*ROWS, *FLEX])}")
    header = ["call, and its measurements", "beside", *map(str, HEAD_DIMS), "lowest", "highest"]
    return table(header, told, numbers=5)


def summary(found: dict[Cell, float]) -> list[str]:
    by_dim: dict[int, list[float]] = {}
    for (*_, head_dim, _), ratio in found.items():
        by_dim.setdefault(head_dim, []).append(ratio)
    means = [statistics.geometric_mean(by_dim[d]) if d in by_dim else None for d in HEAD_DIMS]
    return [rounded(x) for x in (*means, min(found.values()), max(found.values()))]


def over_flex(file: str, made: bool) -> dict[Cell, float]:
    """Documents beside FlexAttention, each call alone or with the making of its mask."""
    found = {}
    for line in lines(file):
        if "ms_flex_documents" in line:
            theirs = line["ms_flex_documents"] + made * line["ms_flex_build"]
            ours = line["ms_mapped_documents"] + made * line["ms_build_documents"]
            found[(line["tokens"], line["head_dim"], True)] = theirs / ours
    return found


def windows() -> str:
    """Rates of visible pairs beside those of the causal kernel."""
    file = "gpu_windows"
    cases: dict[tuple[int, int, int], dict[str, float]] = {}
    for x in where(file, kind="window"):
        width = x["window"][0] + 1  # before the query, and its own key
        column = "gradients" if x["pass"] == "backward" else kernel_of(x)
        cases.setdefault((x["head_dim"], x["seqlen_q"], width), {})[column] = x["efficiency"]
    columns = ("sm90", "sm80", "gradients")
    rows = [
        [head_dim, f"{seqlen // 1024}k", f"{width:,}", *(rounded(row.get(c)) for c in columns)]
        for (head_dim, seqlen, width), row in cases.items()
    ]
    header = ["head dimension", "length", "window", "forward, Hopper's kernel"]
    return table([*header, "forward, mma.sync kernel", "gradients"], rows, numbers=3)


def kernel_of(line: Line) -> str:
    return "sm90" if "_sm90" in line["config"] else "sm80"
