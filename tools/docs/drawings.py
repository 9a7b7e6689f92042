"""Draws docs/images/drawing_*.svg: how tiles, memory, pipelines and passes look. Each drawing is a file of sketches/.

usage: python tools/docs/drawings.py [TEXT]

What can be computed is computed: which blocks a mask visits, which banks an instruction reads, which lane holds which
element, when a copy can begin. Lengths of bars in the timelines are chosen to be readable; they are not measured.
The files are the same byte for byte in every run with the same matplotlib.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.text import Annotation, Text
from sketches import (
    backward,
    call,
    config,
    cpu,
    fragments,
    masks,
    sm80_pipeline,
    sm90_gradients,
    sm90_roles,
    sm90_timeline,
    swizzle,
    tile,
)
from sketches.style import STYLE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "images"

DRAWINGS: dict[str, Callable[[], Figure]] = {
    "call": call.draw,
    "config": config.draw,
    "tile": tile.draw,
    "masks": masks.draw,
    "swizzle": swizzle.draw,
    "sm80_pipeline": sm80_pipeline.draw,
    "sm90_timeline": sm90_timeline.draw,
    "fragments": fragments.draw,
    "sm90_roles": sm90_roles.draw,
    "sm90_gradients": sm90_gradients.draw,
    "backward": backward.draw,
    "cpu": cpu.draw,
}


def file_of(name: str) -> Path:
    return FOLDER / f"drawing_{name}.svg"


def digest_of(figure: Figure) -> str:
    """Of all that was drawn, by the numbers that it was drawn with: no version of matplotlib changes it."""
    parts: list[tuple[object, ...]] = []
    for artist in figure.findobj():
        if isinstance(artist, Annotation):
            parts.append(("arrow", *artist.xy, *artist.xyann))
        elif isinstance(artist, Text) and artist.get_text():
            parts.append((artist.get_text(), *artist.get_position(), artist.get_fontsize()))
        elif isinstance(artist, Rectangle):
            parts.append((*artist.get_bbox().bounds, *artist.get_facecolor()))
        elif isinstance(artist, PathPatch):
            parts.append((*np.asarray(artist.get_path().vertices).ravel(), *artist.get_facecolor()))
        elif isinstance(artist, Line2D):
            parts.append(tuple(np.asarray(artist.get_data()).ravel()))
    told = [" ".join(x if isinstance(x, str) else f"{x:.3f}" for x in part) for part in parts]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def drawn(name: str) -> Figure:
    with matplotlib.rc_context(STYLE):
        return DRAWINGS[name]()


def draw_all(only: str = "") -> None:
    """Those whose name contains `only`. Each file holds the digest of what it shows."""
    for name in DRAWINGS:
        if only in name:
            figure = drawn(name)
            creator = f"flashcute drawing {name}, {digest_of(figure)}"
            with matplotlib.rc_context(STYLE):
                figure.savefig(file_of(name), metadata={"Date": None, "Creator": creator})


if __name__ == "__main__":
    draw_all(*sys.argv[1:])
