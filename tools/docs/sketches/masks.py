"""Masks, and which blocks they visit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flashcute as fc
import numpy as np
from flashcute.block_mask import CELL
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline

from sketches.style import PARTIAL, QUIET, SKIPPED, SMALL, TEXT, WHOLE, WIDTH, box, frame, say

LENGTH = 1024  # queries and keys of every panel
SEQUENCES = (0, 320, 520, 1024)  # where packed sequences and documents begin


class Block(NamedTuple):
    """Of keys, of one tile of queries: in elements."""

    row: int
    column: int
    rows: int
    columns: int
    kind: int  # an index of COLOURS


COLOURS = (WHOLE, PARTIAL, SKIPPED)


@dataclass
class Panel:
    title: str
    options: dict[str, Any]  # what a Variant says
    shown: np.ndarray[Any, Any]  # bool, (queries, keys): the mask's definition, element by element
    grid: tuple[int, ...] = (
        0,
        LENGTH,
    )  # where sequences begin: each has tiles and blocks of its own
    blocks: list[Block] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = []
        for begin, end in zip(self.grid, self.grid[1:], strict=False):
            for row in range(begin, end, CELL):
                for column in range(begin, end, CELL):
                    rows, columns = min(CELL, end - row), min(CELL, end - column)
                    seen = self.shown[row : row + rows, column : column + columns]
                    # A block that reaches beyond the keys is tested element by element.
                    kind = 2 if not seen.any() else int(not (seen.all() and columns == CELL))
                    self.blocks.append(Block(row, column, rows, columns, kind))

    def counts(self) -> tuple[int, int, int]:
        """Blocks visited whole, visited in part, skipped."""
        kinds = [block.kind for block in self.blocks]
        return kinds.count(0), kinds.count(1), kinds.count(2)

    def counted(self) -> tuple[int, int, int]:
        """The same as `flashcute.count_blocks` has it: what the kernel did."""
        config = fc.default_config(16, "float32", "cpu").replace(block_m=CELL, block_n=CELL)
        packed = "cu_seqlens_q" in self.options
        x = np.zeros((LENGTH, 1, 16) if packed else (1, LENGTH, 1, 16), np.float32)
        counts = fc.count_blocks(config, x, x, x, variant=fc.Variant(**self.options))
        whole, partial, skipped = np.asarray(counts).reshape(-1, 3).sum(0).tolist()
        return whole, partial, skipped


def panels() -> list[Panel]:
    query, key = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None, :]
    causal = key <= query
    starts = np.array(SEQUENCES, np.int32)
    number = np.searchsorted(starts, np.arange(LENGTH), side="right").astype(np.int32)
    same = number[:, None] == number[None, :]
    keys = np.array([700], np.int32)
    stripes = causal & ((query - key < 128) | (key // CELL % 4 == 0))
    return [
        Panel("no mask", {}, np.ones((LENGTH, LENGTH), bool)),
        Panel("causal", {"causal": True}, causal),
        Panel(
            "causal, window of 256",
            {"causal": True, "window": (255, 0)},
            causal & (query - key < 256),
        ),
        Panel(
            "causal, prefix of 300", {"causal": True, "prefix": 300}, causal | (key < 300) & (query >= 0)
        ),
        Panel("700 of the keys exist", {"seqlens_k": keys}, (key < 700) & (query >= 0)),
        Panel(
            "packed, causal",
            {"causal": True, "cu_seqlens_q": starts},
            causal & same,
            SEQUENCES,
        ),
        Panel(
            "documents, causal", {"causal": True, "documents": number[None]}, causal & same
        ),
        Panel(
            "any mask by element",
            {"block_mask": fc.BlockMask.from_dense(stripes[None, None])},
            stripes,
        ),
    ]  # fmt: skip


def outline_of(block: Block) -> Outline:
    left, right = block.column, block.column + block.columns
    top, bottom = block.row, block.row + block.rows
    corners = ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))
    return Outline(corners, closed=True)


def draw() -> Figure:
    figure = Figure(figsize=(WIDTH, 8.9), facecolor="white")
    shown = panels()
    for i, panel in enumerate(shown):
        axes = figure.add_axes((0.035 + i % 3 * 0.327, 0.735 - i // 3 * 0.325, 0.275, 0.216))
        frame(axes, LENGTH, LENGTH)
        for kind, colour in enumerate(COLOURS):
            # One path for all blocks of a kind: the file is a fifth as large.
            outlines = [outline_of(block) for block in panel.blocks if block.kind == kind]
            if outlines:
                outline = Outline.make_compound_path(*outlines)
                axes.add_patch(
                    PathPatch(outline, facecolor=colour, edgecolor="white", linewidth=0.6)
                )
        axes.add_patch(
            Rectangle((0, 0), LENGTH, LENGTH, fill=False, edgecolor="#999999", linewidth=0.8)
        )
        whole, partial, skipped = panel.counts()
        say(axes, LENGTH / 2, -70, panel.title, size=TEXT, weight="bold")
        told = f"{whole} whole, {partial} partial,\n{skipped} of {len(panel.blocks)} skipped"
        say(axes, LENGTH / 2, LENGTH + 45, told, size=SMALL, va="top")
    axes = figure.add_axes((0.035 + 2 * 0.327, 0.735 - 2 * 0.325, 0.275, 0.216))
    frame(axes, 10, 10)
    for i, (colour, text) in enumerate(
        (
            (WHOLE, "visited, every\nelement is visible"),
            (PARTIAL, "visited, elements\nare tested"),
            (SKIPPED, "skipped: neither\nloaded nor multiplied"),
        )
    ):
        box(axes, 0, 0.4 + i * 2.6, 1.4, 1.4, "", colour, edge="#999999")
        say(axes, 2.0, 1.1 + i * 2.6, text, size=SMALL, ha="left")
    told = "white: another sequence\nqueries go down, keys right"
    say(axes, 0, 9.2, told, size=SMALL, ha="left", colour=QUIET)
    return figure
