"""Bars in lanes, of which the drawings of pipelines are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from sketches.style import SMALL, box, say


class Bar(NamedTuple):
    lane: str
    begin: float
    end: float
    text: str
    colour: str


def timeline(
    axes: Axes, bars: Sequence[Bar], lanes: Sequence[str], *, top: float, left: float, scale: float,
    height: float = 1.0, step: float = 1.35, size: float = SMALL,
) -> None:  # fmt: skip
    """Bars in lanes; time goes to the right."""
    end = max(bar.end for bar in bars)
    for i, lane in enumerate(lanes):
        y = top + i * step
        say(axes, left - 0.2, y + height / 2, lane, size=SMALL, ha="right")
        axes.add_patch(
            Rectangle((left, y), end * scale, height, facecolor="#F6F6F6", edgecolor="none")
        )
    for bar in bars:
        y = top + list(lanes).index(bar.lane) * step
        x, width = left + bar.begin * scale, (bar.end - bar.begin) * scale
        box(axes, x, y, width, height, bar.text, bar.colour, size=size)
