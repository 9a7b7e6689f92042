"""Charts as pictures, by matplotlib: the same chart gives the same bytes with the same version of matplotlib."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .charts import OTHER_STYLES, STYLES, Chart, Curve, Panel, Rule, format_length, label
from .options import UsageError
from .table import format_bytes

FORMATS = (".svg", ".png", ".pdf")
GREY, LIGHT = "#555555", "#DDDDDD"
LETTERS_AN_INCH = 13  # of the legend's font


def matplotlib() -> Any:
    """Raises UsageError if it is not there."""
    try:
        return import_module("matplotlib")
    except ImportError:
        raise UsageError(
            '--out needs matplotlib: pip install "flashcute[bench]"; without --out the table is printed'
        ) from None


def checked_format(out: Path) -> str:
    """The suffix, which tells the format."""
    if out.suffix not in FORMATS:
        raise UsageError(
            f"--out: expected a name that ends in {', '.join(FORMATS)}, got {str(out)!r}"
        )
    return out.suffix


def draw(chart: Chart, out: Path) -> None:
    suffix = checked_format(out)
    library = matplotlib()
    with library.rc_context():
        library.rcdefaults()  # not what a file of the user's says
        library.rcParams.update(
            {"svg.hashsalt": "flashcute", "font.size": 9, "figure.facecolor": "white"}
        )
        figure = {"lengths": draw_lengths, "dots": draw_dots, "scatter": draw_scatter}[chart.form](
            chart
        )
        finish(figure, chart)
        try:
            figure.savefig(out, dpi=160, metadata=metadata(chart, suffix))
        except OSError as problem:
            raise UsageError(f"--out {out}: {problem.strerror}") from None


def metadata(chart: Chart, suffix: str) -> dict[str, str | None]:
    """What the picture shows, and no date: the same lines give the same file."""
    subject = f"flashcute plot {chart.kind}, data {chart.digest}"
    if suffix == ".svg":
        return {"Title": chart.title, "Description": subject, "Creator": "flashcute", "Date": None}
    if suffix == ".png":
        return {"Title": chart.title, "Description": subject, "Software": None}
    return {"Title": chart.title, "Subject": subject, "CreationDate": None}


# ---- figures -----------------------------------------------------------------------------------


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    """A figure of no window and no global state, and its axes."""
    figure = import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish(figure: Any, chart: Chart) -> None:
    handles = {
        text: handle
        for axis in figure.axes
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    order = [text for name in names_of(chart) for text in legend_texts(name)]
    shown = [text for text in order if text in handles]
    shown += [text for text in handles if text not in order]  # rules
    width = figure.get_figwidth()
    rows = 1
    while rows < len(shown) and legend_width(shown, rows) > LETTERS_AN_INCH * width:
        rows += 1
    figure.legend(
        [handles[text] for text in shown],
        shown,
        loc="outside upper center",
        ncols=math.ceil(len(shown) / rows),
        frameon=False,
    )
    footer = textwrap.fill(chart.footer, int(width * LETTERS_AN_INCH * 1.4), break_on_hyphens=False)
    figure.supxlabel(footer, fontsize=7, color=GREY)


def legend_texts(name: str) -> tuple[str, str]:
    """Without a mask and, where these differ, with the causal one."""
    return label(name), f"{label(name)}, causal"


def legend_width(texts: Sequence[str], rows: int) -> int:
    """In letters, with the room of handles. Columns are filled one after the other, the first ones first."""
    columns = math.ceil(len(texts) / rows)
    longer = len(texts) - columns * (rows - 1)  # columns that have all rows
    ends = [i * rows - max(0, i - longer) for i in range(columns + 1)]
    widths = [max(map(len, texts[i:j]), default=0) for i, j in itertools.pairwise(ends)]
    return sum(widths) + 7 * columns


def names_of(chart: Chart) -> list[str]:
    """Of all curves, in the order of the first panel that has them."""
    return list(
        dict.fromkeys(x.name for row in chart.panels for panel in row for x in panel.curves)
    )


def style(name: str, names: Sequence[str]) -> tuple[str, str]:
    """Colour and marker."""
    if name in STYLES:
        return STYLES[name][1:]
    unstyled = [x for x in names if x not in STYLES]
    return OTHER_STYLES[unstyled.index(name) % len(OTHER_STYLES)]


def light_frame(axis: Any, grid: str) -> None:
    """grid: along which axes there are lines."""
    axis.grid(axis=grid, color=LIGHT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def panels_and_axes(chart: Chart, axes: Any) -> Iterable[tuple[int, int, Panel, Any]]:
    for i, row in enumerate(chart.panels):
        for j, panel in enumerate(row):
            yield i, j, panel, axes[i][j]


def draw_lengths(chart: Chart) -> Any:
    rows, columns = len(chart.panels), len(chart.panels[0])
    size = (max(5.6, 0.8 + 4.2 * columns), 1.3 + 2.7 * rows)
    figure, axes = new_figure(rows, columns, size, sharex=True, sharey=True)
    names = names_of(chart)
    for i, j, panel, axis in panels_and_axes(chart, axes):
        for curve in panel.curves:
            colour, marker = style(curve.name, names)
            ours = curve.name.startswith("flashcute")
            axis.plot(
                *zip(*curve.points, strict=True),
                label=label(curve.name),
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=2.4 if ours else 1.3,
                zorder=3 if ours else 2,
            )
        for rule in chart.rules:
            axis.axhline(rule.value, color=GREY, linewidth=1)
        axis.set_title(panel.title, fontsize=10)
        light_frame(axis, "y")
        if i == rows - 1:
            axis.set_xlabel(chart.x)
        if j == 0:
            axis.set_ylabel(chart.y)
    one = axes[0][0]  # all share its axes
    one.set_xscale("log", base=2)
    ticks(one.xaxis, sorted({x for x, _ in all_points(chart)}), format_length)
    if chart.bytes_y:
        one.set_yscale("log", base=2)
        ys = [y for _, y in all_points(chart)]
        first, last = math.floor(math.log2(min(ys))), math.ceil(math.log2(max(ys)))
        step = max(1, round((last - first) / 6))
        ticks(one.yaxis, [2.0**x for x in range(first, last + 1, step)], whole_bytes)
    elif chart.rules:
        low = min(y for _, y in all_points(chart))
        one.set_ylim(bottom=min(0.9, 0.95 * low))
    else:
        one.set_ylim(bottom=0)
    return figure


def whole_bytes(count: float) -> str:
    """ "64 KiB"."""
    return format_bytes(count).replace(".0 ", " ")


def ticks(axis: Any, places: Sequence[float], text: Any) -> None:
    """At these places and no others."""
    ticker = import_module("matplotlib.ticker")
    axis.set_major_locator(ticker.FixedLocator(places))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: text(x)))


def all_points(chart: Chart) -> list[tuple[float, float]]:
    return [
        point for row in chart.panels for panel in row for x in panel.curves for point in x.points
    ]


def draw_dots(chart: Chart) -> Any:
    rows, columns = len(chart.panels), len(chart.panels[0])
    heights = [len(row[0].rows) for row in chart.panels]
    size = (max(8.0, 2.0 + 2.2 * columns), 1.3 + 0.26 * sum(heights) + 0.5 * rows)
    figure, axes = new_figure(rows, columns, size, height_ratios=heights, sharex=True, sharey="row")
    names = names_of(chart)
    for _, j, panel, axis in panels_and_axes(chart, axes):
        for curve in panel.curves:
            colour, marker = style(curve.name, names)
            x, y = zip(*curve.points, strict=True)
            axis.scatter(
                x,
                y,
                label=label(curve.name),
                color=colour,
                marker=marker,
                s=26,
                zorder=4 if curve.name.startswith("flashcute") else 3,
            )
        for rule in chart.rules:
            dashed = "dashed" if rule.label else "solid"
            text = rule.label or None
            axis.axvline(rule.value, color=GREY, linewidth=1, linestyle=dashed, label=text)
        axis.set_title(panel.title, fontsize=10, loc="left")
        light_frame(axis, "both")
        if j == 0:
            axis.set_yticks(range(len(panel.rows)), panel.rows)
            axis.set_ylim(len(panel.rows) - 0.5, -0.5)  # the first on top
    most = max([x for x, _ in all_points(chart)] + [rule.value for rule in chart.rules])
    axes[0][0].set_xlim(0, 1.06 * most)
    axes[-1][columns // 2].set_xlabel(chart.x)
    return figure


def draw_scatter(chart: Chart) -> Any:
    columns = len(chart.panels[0])
    size = (max(6.0, 0.9 + 2.6 * columns), 4.2)
    figure, axes = new_figure(1, columns, size, sharex=True, sharey=True)
    names = names_of(chart)
    points = all_points(chart)
    slopes = [rule.value for rule in chart.rules if rule.across == "slope"]
    tops = [rule.value for rule in chart.rules if rule.across == "y"]
    ridges = [top / slope for top in tops for slope in slopes]
    left, right = min([x for x, _ in points] + ridges) / 1.7, max(x for x, _ in points) * 1.7
    low, high = min(y for _, y in points) / 1.4, max([y for _, y in points] + tops) * 1.5
    for _, j, panel, axis in panels_and_axes(chart, axes):
        for rule in chart.rules:
            ceiling(axis, rule, ridges, (left, right), low)
        for curve in panel.curves:
            scattered(axis, curve, style(curve.name, names))
        axis.set_title(panel.title, fontsize=10)
        light_frame(axis, "both")
        axis.set_xlabel(chart.x)
        if j == 0:
            axis.set_ylabel(chart.y)
    one = axes[0][0]
    one.set_xscale("log", base=2)
    one.set_yscale("log", base=2)
    one.set_xlim(left, right)
    one.set_ylim(low, high)
    ticks(one.xaxis, powers(left, right, 5), lambda x: f"{x:,.0f}" if x >= 1 else f"{x:g}")
    ticks(one.yaxis, powers(low, high, 8), lambda y: f"{y:,.0f}" if y >= 1 else f"{y:g}")
    return figure


def powers(first: float, last: float, at_most: int) -> list[float]:
    """Of two, between these."""
    low, high = math.ceil(math.log2(first)), math.floor(math.log2(last))
    step = max(1, math.ceil((high - low + 1) / at_most))
    return [2.0**x for x in range(low, high + 1, step)]


def scattered(axis: Any, curve: Curve, look: tuple[str, str]) -> None:
    """Filled without a mask, hollow with the causal one."""
    colour, marker = look
    marker = {"+": "P", "x": "X"}.get(marker, marker)  # with a face
    x, y = zip(*curve.points, strict=True)
    axis.scatter(
        x,
        y,
        label=legend_texts(curve.name)[curve.hollow],
        facecolors="white" if curve.hollow else colour,
        edgecolors=colour,
        marker=marker,
        s=24,
        linewidths=1.1,
        zorder=4 if curve.name.startswith("flashcute") else 3,
    )


def ceiling(
    axis: Any, rule: Rule, ridges: Sequence[float], ends: tuple[float, float], low: float
) -> None:
    """The memory's up to the ridge, the tensor cores' from there on."""
    ridge = ridges[0] if ridges else None
    left, right = ends
    if rule.across == "slope":
        stop = ridge or right
        start = max(left, low / rule.value)
        axis.plot([start, stop], [start * rule.value, stop * rule.value], color=GREY, linewidth=1)
        place = math.sqrt(start * stop)
        axis.annotate(
            rule.label,
            (place, place * rule.value),
            xytext=(5, -5),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=7,
            color=GREY,
        )
    else:
        axis.plot([ridge or left, right], [rule.value] * 2, color=GREY, linewidth=1)
        axis.annotate(
            rule.label,
            (right, rule.value),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color=GREY,
        )
