"""The passes of the backward."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sketches.style import EMPTY, LARGE, QUIET, SMALL, SOFTMAX, TEXT, arrow, box, canvas, say


def scores_sketch(axes: Axes, x: float, y: float, side: float, stays: str) -> None:
    """Queries down, keys to the right, with the tile that stays and the direction in which blocks pass."""
    cell = side / 6
    for row in range(6):
        for column in range(6):
            inside = column == 2 if stays == "keys" else row == 2
            box(
                axes,
                x + column * cell,
                y + row * cell,
                cell,
                cell,
                "",
                SOFTMAX if inside else "#FFFFFF",
                edge="#CCCCCC",
            )
    if stays == "keys":
        arrow(axes, (x + 2.5 * cell, y + 0.4 * cell), (x + 2.5 * cell, y + 5.6 * cell))
    else:
        arrow(axes, (x + 0.4 * cell, y + 2.5 * cell), (x + 5.6 * cell, y + 2.5 * cell))
    say(axes, x + side / 2, y - 0.35, "keys", size=SMALL, colour=QUIET)
    axes.text(
        x - 0.35,
        y + side / 2,
        "queries",
        fontsize=SMALL,
        color=QUIET,
        rotation=90,
        va="center",
        ha="center",
    )


def tell(
    axes: Axes, x: float, y: float, lines: Sequence[tuple[str, str]], step: float = 0.95
) -> None:
    """Lines of a heading in bold and what it is."""
    for i, (heading, text) in enumerate(lines):
        say(axes, x, y + i * step, heading, size=SMALL, ha="left", weight="bold")
        say(axes, x + 3.0, y + i * step, text, size=SMALL, ha="left")


def draw() -> Figure:
    figure, axes = canvas(9.6, 20, 27.4)
    say(axes, 0.4, 0.7, "default: five products", size=LARGE, ha="left", weight="bold")
    box(
        axes,
        0.4,
        1.5,
        19.2,
        1.5,
        "prepare: delta = rowsum(dO * O), and the float32 sums of dQ are cleared",
        "#FFFFFF",
        size=TEXT,
        edge="#999999",
    )
    arrow(axes, (10, 3.0), (10, 3.9))
    box(axes, 0.4, 3.9, 19.2, 7.2, "", EMPTY)
    say(axes, 0.8, 4.5, "gradients", size=TEXT, ha="left", weight="bold")
    scores_sketch(axes, 1.5, 5.9, 4.6, "keys")
    tell(
        axes,
        7.0,
        4.9,
        (
            ("stay", "K, V of a tile (shared memory)"),
            ("", "dK, dV (registers)"),
            ("pass by", "Q, dO, LSE, delta of each block"),
            ("again", "S = Q Kᵀ, P = exp(scale S - LSE)"),
            ("", "dP = dO Vᵀ, dS = P (dP - delta)"),
            ("add", "dV += Pᵀ dO, dK += dSᵀ Q"),
            ("atomic", "dS K to the sums of dQ, in memory"),
        ),
    )
    arrow(axes, (10, 11.1), (10, 12.0))
    box(
        axes,
        0.4,
        12.0,
        19.2,
        1.5,
        "finish: dQ = scale * sums, rounded to the dtype",
        "#FFFFFF",
        size=TEXT,
        edge="#999999",
    )

    say(axes, 0.4, 15.0, "deterministic: seven products", size=LARGE, ha="left", weight="bold")
    for i, (name, stays) in enumerate((("queries", "queries"), ("keys", "keys"))):
        y = 15.8 + i * 5.8
        box(axes, 0.4, y, 19.2, 5.0, "", EMPTY)
        say(axes, 7.0, y + 0.7, f"pass {name}", size=TEXT, ha="left", weight="bold")
        scores_sketch(axes, 2.0, y + 1.1, 3.6, stays)
        if stays == "queries":
            lines = (
                ("stay", "Q, dO of a tile; dQ in registers"),
                ("pass by", "K, V of each block"),
                ("three", "S, dP, dQ += dS K; also delta"),
            )
        else:
            lines = (
                ("stay", "K, V of a tile; dK, dV in registers"),
                ("pass by", "Q, dO, LSE, delta of each block"),
                ("four", "S, dP, dV += Pᵀ dO, dK += dSᵀ Q"),
            )
        tell(axes, 7.0, y + 1.8, lines, step=1.05)
    return figure
