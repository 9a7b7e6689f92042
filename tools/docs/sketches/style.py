"""What drawings are made of: colours, sizes, boxes, words, arrows."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Okabe and Ito's colours, told apart by colour-blind readers. Each means one thing in all drawings.
Q, K, V = "#0072B2", "#56B4E9", "#CC79A7"  # rows of the tensors
SOFTMAX, PRODUCT, WAIT, OUTPUT = "#E69F00", "#009E73", "#D55E00", "#F0E442"
SHADES = ("#009E73", "#8FD6C0")  # of products and tiles of two who share work
WHOLE, PARTIAL, SKIPPED = "#0072B2", "#E69F00", "#EDEDED"
INK, QUIET, EMPTY, IDLE = "#222222", "#777777", "#F6F6F6", "#D9D9D9"

WIDTH = 7.0  # inches: 672 pixels of a page
SMALL, TEXT, LARGE = 9.5, 11.0, 12.5

STYLE: Any = {
    "svg.hashsalt": "flashcute",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": TEXT,
    "text.color": INK,
}


def canvas(height: float, columns: float, rows: float) -> tuple[Figure, Axes]:
    """A figure with one picture of so many units, the first row on top."""
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    frame(axes, columns, rows)
    return figure, axes


def frame(axes: Axes, columns: float, rows: float) -> None:
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.axis("off")


def on(colour: str) -> str:
    """The colour of text that is read on another."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * r + 0.587 * g + 0.114 * b < 140 else INK


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    colour: str = EMPTY,
    *,
    size: float = TEXT,
    edge: str | None = None,
    bold: bool = False,
) -> None:
    """A rectangle with text in its middle."""
    edge = edge or ("#FFFFFF" if colour != EMPTY else "#BBBBBB")
    shape = Rectangle((x, y), width, height)
    shape.set(facecolor=colour, edgecolor=edge, linewidth=0.8)
    axes.add_patch(shape)
    if text:
        weight = "bold" if bold else "normal"
        say(axes, x + width / 2, y + height / 2, text, size=size, colour=on(colour), weight=weight)


def say(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = TEXT,
    colour: str = INK,
    ha: str = "center",
    va: str = "center_baseline",
    weight: str = "normal",
) -> None:
    axes.text(
        x, y, text, fontsize=size, color=colour, ha=ha, va=va, weight=weight, linespacing=1.25
    )


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    *,
    colour: str = INK,
    bend: float = 0.0,
    style: str = "-|>",
    dashed: bool = False,
) -> None:
    axes.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": style,
            "color": colour,
            "linewidth": 1.3,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 11,
            "linestyle": (0, (4, 2)) if dashed else "solid",
            "connectionstyle": f"arc3,rad={bend}",
        },
    )
