"""Plots and tabulates the lines that ``python -m flashcute bench --out FILE.jsonl`` writes.

    python benchmarks/python/plot.py benchmarks/results/forward.jsonl --out forward.svg

One panel for each head dimension and mask, TFLOP/s over the sequence length, one line for each
implementation; and the same numbers as a Markdown table on stdout. Only self-attention without
shared K/V heads is shown. Where a case was measured several times, the last line counts. Needs
matplotlib, unless --out is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

Line = dict[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in print.
STYLES = {
    "flashcute": ("flashcute", "#D55E00", "o"),
    "sdpa_flash": ("torch, FlashAttention-2", "#0072B2", "s"),
    "sdpa_cudnn": ("torch, cuDNN", "#009E73", "^"),
    "sdpa_efficient": ("torch, memory-efficient", "#56B4E9", "D"),
    "sdpa_math": ("torch, math", "#999999", "x"),
    "sdpa": ("torch", "#0072B2", "s"),
    "fa3": ("FlashAttention-3", "#CC79A7", "v"),
    "naive": ("naive", "#000000", "+"),
    "flashcute_deterministic": ("flashcute, deterministic", "#E69F00", "P"),
}
OTHER_STYLES = (("#E69F00", "P"), ("#F0E442", "*"), ("#CC79A7", "h"), ("#56B4E9", "X"))


class Panel(NamedTuple):
    head_dim: int
    causal: bool

    @property
    def title(self) -> str:
        return f"head dim {self.head_dim}, {'causal' if self.causal else 'full'}"


# panel -> sequence length -> implementation -> TFLOP/s
Speeds = dict[Panel, dict[int, dict[str, float]]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Several devices or dtypes in the files: choose one with --device, --dtype.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE", help="plot to write: .svg, .png, .pdf")
    parser.add_argument("--impls", metavar="NAME,...", help="default: all that were measured")
    parser.add_argument("--device", metavar="TEXT", help="only devices whose name contains this")
    parser.add_argument("--dtype", metavar="NAME", help="only this one")
    options = parser.parse_args()
    try:
        lines = read(options.files)
    except (OSError, json.JSONDecodeError) as problem:
        parser.error(str(problem))
    lines = [
        x
        for x in lines
        if (options.device is None or options.device in x["device"])
        and (options.dtype is None or options.dtype == x["dtype"])
        and (options.impls is None or x["impl"] in options.impls.split(","))
    ]
    if not lines:
        parser.error("no measurement matches")
    for field in ("device", "dtype"):
        found = {x[field] for x in lines}
        if len(found) > 1:
            parser.error(f"several values of {field}: {', '.join(sorted(found))}; see --{field}")

    speeds = collect(lines)
    names = ordered_names(lines)
    print(markdown(speeds, names))
    print(f"\n{caption(lines)}")
    if options.out is not None:
        draw(speeds, names, caption(lines), options.out)
    return 0


def read(files: list[Path]) -> list[Line]:
    """The successful measurements of self-attention, of calls or of gradients, in the order of the files."""
    lines = [json.loads(text) for file in files for text in file.read_text().splitlines() if text]
    return [
        x
        for x in lines
        if x["kind"] in ("forward", "backward")
        and x["status"] == "ok"
        and x["seqlen_q"] == x["seqlen_k"]
        and x["heads"] == x["kv_heads"]
    ]


def collect(lines: list[Line]) -> Speeds:
    speeds: Speeds = {}
    for x in sorted(lines, key=lambda x: (x["head_dim"], x["causal"], x["seqlen_q"])):
        lengths = speeds.setdefault(Panel(x["head_dim"], x["causal"]), {})
        lengths.setdefault(x["seqlen_q"], {})[x["impl"]] = x["tflops"]
    return speeds


def ordered_names(lines: list[Line]) -> list[str]:
    """Those with a style in its order, then the others."""
    measured = list(dict.fromkeys(x["impl"] for x in lines))
    return [name for name in STYLES if name in measured] + sorted(
        name for name in measured if name not in STYLES
    )


def label(name: str) -> str:
    return STYLES[name][0] if name in STYLES else name


def caption(lines: list[Line]) -> str:
    """Where the numbers come from: every distinct value."""

    def values(field: str, prefix: str = "") -> list[str]:
        found = dict.fromkeys(x.get(field) for x in lines)
        return [f"{prefix}{value}" for value in found if value is not None]

    parts = [*values("device"), *values("dtype"), *values("library"), *values("cudnn", "cuDNN ")]
    parts += [*values("driver", "driver "), *values("commit")]
    return ", ".join(parts)


def markdown(speeds: Speeds, names: list[str]) -> str:
    """TFLOP/s, the fastest of a row in bold."""
    digits = 0 if max(max(x.values()) for p in speeds.values() for x in p.values()) > 20 else 2
    rows = [
        "| head dim, mask | seqlen | " + " | ".join(label(name) for name in names) + " |",
        "|---|---:|" + "---:|" * len(names),
    ]
    for panel, lengths in speeds.items():
        for seqlen, row in lengths.items():
            best = max(row.values())
            cells = []
            for name in names:
                speed = row.get(name)
                text = "-" if speed is None else f"{speed:.{digits}f}"
                cells.append(f"**{text}**" if speed == best else text)
            mask = "causal" if panel.causal else "full"
            rows.append(f"| {panel.head_dim} {mask} | {seqlen} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw(speeds: Speeds, names: list[str], footer: str, out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: --out needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "flashcute", "font.size": 9})
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    head_dims = sorted({panel.head_dim for panel in speeds})
    masks = sorted({panel.causal for panel in speeds})
    figure, axes = plt.subplots(
        len(head_dims),
        len(masks),
        figsize=(0.8 + 4.2 * len(masks), 1.2 + 2.7 * len(head_dims)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    unstyled = [name for name in names if name not in STYLES]
    for i, head_dim in enumerate(head_dims):
        for j, causal in enumerate(masks):
            axis, panel = axes[i][j], Panel(head_dim, causal)
            for name in names:
                points = [
                    (seqlen, row[name])
                    for seqlen, row in speeds.get(panel, {}).items()
                    if name in row
                ]
                if not points:
                    continue
                if name in STYLES:
                    _, colour, marker = STYLES[name]
                else:
                    colour, marker = OTHER_STYLES[unstyled.index(name) % len(OTHER_STYLES)]
                ours = name.startswith("flashcute")
                axis.plot(
                    *zip(*points, strict=True),
                    label=label(name),
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linewidth=2.4 if ours else 1.3,
                    zorder=3 if ours else 2,
                )
            axis.set_title(panel.title, fontsize=10)
            axis.set_xscale("log", base=2)
            axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            if i == len(head_dims) - 1:
                axis.set_xlabel("sequence length")
            if j == 0:
                axis.set_ylabel("TFLOP/s")
    axes[0][0].set_ylim(bottom=0)  # shared; after plotting, which widens it
    seqlens = sorted({seqlen for lengths in speeds.values() for seqlen in lengths})
    axes[0][0].xaxis.set_major_locator(FixedLocator(seqlens))
    axes[0][0].xaxis.set_minor_locator(NullLocator())
    axes[0][0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_length(x)))
    handles = {
        text: handle
        for row in axes
        for axis in row
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False
    )
    figure.supxlabel(footer, fontsize=7, color="#555555")
    # No date in the file: the same lines give the same plot.
    metadata = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(out, dpi=160, metadata=metadata)


def format_length(seqlen: float) -> str:
    """4096 as "4k"."""
    return f"{seqlen / 1024:.0f}k" if seqlen >= 1024 and seqlen % 1024 == 0 else f"{seqlen:.0f}"


if __name__ == "__main__":
    sys.exit(main())
