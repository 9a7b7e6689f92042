"""Draws docs/images/*.svg: those of recorded lines, by the functions of `python -m flashcute plot`, and those of
drawings.py.

usage: python tools/docs/figures.py [TEXT]      only those whose name contains TEXT
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lines
from flashcute._cli import charts, drawing
from flashcute._cli.charts import Chart

FOLDER = Path(__file__).parents[2] / "docs" / "images"


class Source(NamedTuple):
    """Lines of a file (benchmarks/results/), by its name without folder and suffix."""

    file: str
    impls: tuple[str, ...] = ()  # only these, where given
    head_dims: tuple[int, ...] = ()

    def lines(self) -> list[lines.Line]:
        return [
            x
            for x in lines.lines(self.file)
            if (not self.impls or x.get("impl") in self.impls)
            and (not self.head_dims or x.get("head_dim") in self.head_dims)
        ]


class Figure(NamedTuple):
    name: str
    chart_of: Callable[[list[lines.Line]], Chart]
    sources: tuple[Source, ...]

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.svg"

    def chart(self) -> Chart:
        return self.chart_of([x for source in self.sources for x in source.lines()])


HOPPER = Source("gpu_forward_hopper")
BACKWARD_HOPPER = Source("gpu_sm90_backward_fa4", impls=("flashcute", "sdpa_cudnn", "fa4"))
NAIVE = Source("gpu_naive", impls=("naive",))

FIGURES = (
    Figure("gpu_forward_hopper", charts.tflops, (HOPPER,)),
    Figure("gpu_forward", charts.tflops, (Source("gpu_forward"),)),
    Figure("gpu_backward", charts.tflops, (Source("gpu_backward"),)),
    Figure("gpu_backward_hopper", charts.tflops, (BACKWARD_HOPPER,)),
    Figure("cpu_forward", charts.tflops, (Source("cpu_forward_float32"),)),
    Figure("gpu_masks", charts.masks, (Source("gpu_packed"), Source("gpu_block_masks"))),
    Figure("gpu_speedup_hopper", charts.speedup, (HOPPER,)),
    Figure("gpu_speedup_backward_hopper", charts.speedup, (BACKWARD_HOPPER,)),
    Figure("gpu_speedup_backward", charts.speedup, (Source("gpu_backward"),)),
    Figure(
        "gpu_speedup_short",
        partial(charts.speedup, by="case"),
        (Source("gpu_forward_hopper_short"),),
    ),
    Figure("gpu_memory", charts.memory, (Source("gpu_forward", head_dims=(64,)), NAIVE)),
    Figure("gpu_memory_backward", charts.memory, (Source("gpu_backward"),)),
    Figure(
        "gpu_error",
        charts.error,
        (HOPPER, Source("gpu_forward", impls=("sdpa_flash",)), NAIVE),
    ),
    Figure("gpu_error_backward", charts.error, (Source("gpu_backward"),)),
    Figure("gpu_error_float32", charts.error, (Source("gpu_forward_float32"),)),
    Figure("gpu_roofline", charts.roofline, (HOPPER, NAIVE)),
)


def draw_all(only: str = "") -> None:
    """Those whose name contains `only`."""
    for figure in FIGURES:
        if only in figure.name:
            drawing.draw(figure.chart(), figure.path)
    import drawings  # needs matplotlib, which what follows from the lines does not

    drawings.draw_all(only)


if __name__ == "__main__":
    draw_all(*sys.argv[1:])
