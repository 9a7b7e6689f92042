"""Plots how much faster calls with masks are than the same calls of other libraries: one panel for each head dimension,
one row for each case, one mark for each library at its time over ours.

Reads the lines of packed sequences (``gpu_packed.jsonl``) and of ``block_masks.py``; others are passed over. Needs
matplotlib.

usage: python benchmarks/python/plot_masks.py FILE.jsonl ... --out FILE.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from plot import STYLES, format_length

Line = dict[str, Any]

# Peer -> its label, colour and marker.
PEERS = {
    "fa3": STYLES["fa3"],
    "varlen_attn": ("torch, varlen_attn", "#0072B2", "s"),
    "flex": ("torch, FlexAttention compiled", "#009E73", "^"),
    "flex_built": ("the same, both masks made", "#E69F00", "D"),
}


class Mark(NamedTuple):
    head_dim: int
    case: str
    peer: str
    speed_up: float


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    lines = [json.loads(text) for file in options.files for text in file.read_text().splitlines()]
    marks = [*packed(lines), *documents(lines)]
    if not marks:
        parser.error("no line of packed sequences or of documents")
    shown = [x for x in lines if x["kind"] in ("packed", "block_masks")]
    sources = [*dict.fromkeys(x["device"] for x in shown), "bfloat16", "forward"]
    sources += dict.fromkeys(x["commit"] for x in shown)
    draw(marks, ", ".join(sources), options.out)
    return 0


def packed(lines: list[Line]) -> Iterator[Mark]:
    """Peers are measured beside ours in the same case: one line for each implementation."""
    ours: dict[tuple[Any, ...], float] = {}
    found = [x for x in lines if x["kind"] == "packed" and "impl" in x and x["pass"] == "forward"]
    fields = ("case", "head_dim", "heads", "kv_heads", "causal")
    for x in found:
        if x["impl"] == "flashcute":
            ours[tuple(x[field] for field in fields)] = x["ms_p50"]
    for x in found:
        if x["impl"] in PEERS:
            name = x["case"].replace("_", " ").replace("lognormal", "log-normal")
            mask = "causal" if x["causal"] else "full"
            case = f"{name}, {mask}, {x['heads']}/{x['kv_heads']} heads"
            time = ours[tuple(x[field] for field in fields)]
            yield Mark(x["head_dim"], case, x["impl"], x["ms_p50"] / time)


def documents(lines: list[Line]) -> Iterator[Mark]:
    for x in lines:
        if x["kind"] == "block_masks" and "ms_flex_documents" in x:
            case = f"documents {format_length(x['tokens'])}, causal, 32/8 heads"
            theirs, own = x["ms_flex_documents"], x["ms_mapped_documents"]
            yield Mark(x["head_dim"], case, "flex", theirs / own)
            built = (theirs + x["ms_flex_build"]) / (own + x["ms_build_documents"])
            yield Mark(x["head_dim"], case, "flex_built", built)


def draw(marks: list[Mark], footer: str, out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: this needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "flashcute", "font.size": 9})
    import matplotlib.pyplot as plt

    head_dims = sorted({mark.head_dim for mark in marks})
    cases = {d: list(dict.fromkeys(m.case for m in marks if m.head_dim == d)) for d in head_dims}
    rows = [len(cases[d]) for d in head_dims]
    figure, axes = plt.subplots(
        len(head_dims),
        1,
        figsize=(8, 1.2 + 0.26 * sum(rows) + 0.5 * len(rows)),
        height_ratios=rows,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for d, axis in zip(head_dims, axes[:, 0], strict=True):
        for peer, (label, colour, marker) in PEERS.items():
            points = [
                (m.speed_up, cases[d].index(m.case))
                for m in marks
                if m.head_dim == d and m.peer == peer
            ]
            if points:
                x, y = zip(*points, strict=True)
                axis.scatter(x, y, label=label, color=colour, marker=marker, s=26, zorder=3)
        axis.axvline(1.0, color="#555555", linewidth=1)
        axis.set_yticks(range(len(cases[d])), cases[d])
        axis.invert_yaxis()
        axis.grid(axis="both", color="#DDDDDD", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"head dim {d}", fontsize=10, loc="left")
    axes[-1][0].set_xlabel("their time / flashcute's: above 1, flashcute is faster")
    axes[0][0].set_xlim(left=0)
    handles = {
        text: handle
        for axis in axes[:, 0]
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=2, frameon=False
    )
    figure.supxlabel(footer, fontsize=7, color="#555555")
    # No date in the file: the same lines give the same plot.
    metadata = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(out, dpi=160, metadata=metadata)


if __name__ == "__main__":
    sys.exit(main())
