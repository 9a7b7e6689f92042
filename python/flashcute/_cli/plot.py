"""``plot``: recorded lines as a table and a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import charts, drawing, recorded
from .charts import Chart
from .options import Commands, UsageError, positive_float
from .recorded import Line

HELP = {
    "tflops": "TFLOP/s over the sequence length, a panel for each head dimension and mask",
    "speedup": "their time over flashcute's, by length or by case",
    "memory": "peak memory beside the inputs, for each head of each sequence, over the length",
    "error": "relative L2 error against float64 by implementation, or over that of another one",
    "roofline": "TFLOP/s over FLOP per byte of memory, under what the device can do, with the bytes in theory or as "
    "lines of io --ncu count them",
    "masks": "their time over flashcute's for packed sequences and documents (lines packed, block_masks)",
}


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "plot",
        help="recorded lines as a table and a picture",
        description="Prints a Markdown table of the lines that bench --out wrote, and draws them with "
        "--out. A case that was measured several times has its median. Lines of other kinds are passed over.",
    )
    parser.add_argument(
        "kind",
        choices=tuple(HELP),
        metavar="KIND",
        help="; ".join(f"{kind}: {text}" for kind, text in HELP.items()),
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="JSON lines, as bench --out writes"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"picture to write: {', '.join(drawing.FORMATS)}; needs matplotlib",
    )
    chosen = parser.add_argument_group("which lines")
    recorded.add_filters(chosen)
    of_kinds = parser.add_argument_group("of some kinds")
    of_kinds.add_argument(
        "--ours",
        metavar="NAME",
        help="speedup: whose time divides (default: flashcute)",
    )
    of_kinds.add_argument(
        "--by",
        choices=("length", "case"),
        help="speedup: curves over the sequence length, or a row for each case (default: length, where no two "
        "cases share one)",
    )
    of_kinds.add_argument(
        "--relative-to",
        metavar="NAME",
        help="error: divide by the error of this implementation, for example naive",
    )
    of_kinds.add_argument(
        "--peak-tflops",
        type=positive_float,
        metavar="N",
        help="roofline: what the device computes at most (default: published, for H100 SXM, H200 and A100 SXM)",
    )
    of_kinds.add_argument(
        "--bandwidth-gb",
        type=positive_float,
        metavar="N",
        help="roofline: what its memory moves at most, in 1e9 bytes a second",
    )
    parser.set_defaults(run=run)


# Option -> the kinds that read it.
OF_KINDS = {
    "ours": ("speedup",),
    "by": ("speedup",),
    "relative_to": ("error",),
    "peak_tflops": ("roofline",),
    "bandwidth_gb": ("roofline",),
}


def run(options: argparse.Namespace) -> int:
    for name, kinds in OF_KINDS.items():
        if getattr(options, name) is not None and options.kind not in kinds:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option}: expected with {' or '.join(kinds)}, not {options.kind}")
    if options.out is not None:
        drawing.checked_format(options.out)
        drawing.matplotlib()  # before anything is read or printed
    lines = recorded.read(options.files)
    chart = chart_of(lines, options)
    print(f"{chart.table}\n\n{chart.footer}")
    if chart.shown < len(lines):
        print(f"{chart.shown} of {len(lines)} lines are shown")
    if options.out is not None:
        drawing.draw(chart, options.out)
    return 0


def chart_of(lines: list[Line], options: argparse.Namespace) -> Chart:
    kind, impls = options.kind, options.impls
    if kind in ("speedup", "masks"):  # --impls names the others; ours is needed too
        lines = recorded.wanted(lines, options, impls=None)
        if kind == "masks":
            return charts.masks(lines, impls)
        return charts.speedup(lines, options.ours or charts.OURS, impls, options.by)
    if kind == "error":
        if impls is not None and options.relative_to is not None:
            impls = [*impls, options.relative_to]
        return charts.error(recorded.wanted(lines, options, impls), options.relative_to)
    if kind == "roofline":
        lines = recorded.wanted(lines, options, impls=None)
        lines = [x for x in lines if x["kind"] == "io" or impls is None or x.get("impl") in impls]
        return charts.roofline(lines, options.peak_tflops, options.bandwidth_gb)
    lines = recorded.wanted(lines, options, impls)
    return {"tflops": charts.tflops, "memory": charts.memory}[kind](lines)
