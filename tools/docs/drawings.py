"""Draws docs/images/drawing_*.svg: how tiles, memory, pipelines and passes look.

usage: python tools/docs/drawings.py [TEXT]

What can be computed is computed: which blocks a mask visits, which banks an instruction reads, which lane holds which
element, when a copy can begin. Lengths of bars in the timelines are chosen to be readable; they are not measured.
The files are the same byte for byte in every run with the same matplotlib.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import flashcute as fc
import matplotlib
import numpy as np
from flashcute.block_mask import CELL
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.text import Annotation, Text

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "images"

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


# ---- what drawings are made of ---------------------------------------------------------------------


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


# ---- a call, a configuration, a tile -------------------------------------------------------------------


def call() -> Figure:
    figure, axes = canvas(7.0, 20, 20.4)
    box(axes, 5.0, 0.3, 10, 1.6, "a call: arrays, mask, cfg or none", "#FFFFFF", edge="#999999")
    arrow(axes, (10, 1.9), (10, 3.1))
    box(
        axes,
        3.0,
        3.1,
        14,
        2.4,
        "plan: checks, then chooses\na kernel (configuration, features) and its parameters",
        EMPTY,
    )
    arrow(axes, (6.0, 5.5), (6.0, 7.2))
    arrow(axes, (16.2, 5.5), (16.2, 7.2))
    say(axes, 5.7, 6.35, "arrays of a GPU", size=SMALL, ha="right", colour=QUIET)
    say(axes, 15.9, 6.35, "arrays of the CPU", size=SMALL, ha="right", colour=QUIET)
    box(axes, 0.4, 7.2, 11.6, 8.2, "", EMPTY)
    say(axes, 6.2, 7.9, "image store: the kernel's machine code", size=TEXT, weight="bold")
    steps = (
        ("ahead of time", "compiled with the library"),
        ("disk cache", "compiled in an earlier process"),
        ("NVRTC", "compiled now, in seconds"),
    )
    for i, (name, text) in enumerate(steps):
        y = 8.7 + i * 2.2
        box(axes, 1.0, y, 3.9, 1.7, name, K, size=TEXT)
        say(axes, 5.3, y + 0.85, text, size=SMALL, ha="left")
        if i:
            arrow(axes, (2.95, y - 0.5), (2.95, y))
            say(axes, 3.25, y - 0.25, "else", size=SMALL, ha="left", colour=QUIET)
    box(
        axes,
        12.9,
        7.2,
        6.7,
        8.2,
        "CPU backend\n\nthe same masks,\nblocks and order,\nin vector\ninstructions",
        EMPTY,
    )
    arrow(axes, (6.0, 15.4), (6.0, 16.6))
    box(axes, 1.0, 16.6, 10.4, 1.6, "launch on the caller's stream", PRODUCT)
    arrow(axes, (6.0, 18.2), (9.0, 19.0))
    arrow(axes, (16.2, 15.4), (12.0, 19.0))
    say(axes, 10.5, 19.6, "out, log-sum-exp", size=TEXT, weight="bold")
    return figure


def config() -> Figure:
    chosen = fc.default_config(128, "bfloat16", "sm_80").replace(stages=2)
    figure, axes = canvas(4.9, 20, 14)
    members = ("dtype", "head_dim", "block_m", "block_n", "num_warps", "stages", "swizzled")
    box(axes, 0.3, 1.4, 7.4, 11.6, "", EMPTY)
    say(axes, 4.0, 0.7, "one value", size=LARGE, weight="bold")
    for i, member in enumerate(members):
        y = 2.4 + i * 1.4
        say(axes, 0.9, y, member, size=TEXT, ha="left")
        say(axes, 7.2, y, f"{getattr(chosen, member)}", size=TEXT, ha="right", weight="bold")
    say(axes, 4.0, 2.4 + len(members) * 1.4, "...", size=TEXT)
    uses = (
        ("template argument", "ForwardPass<Id>: each option is a constant"),
        ("key", "of the image store and of the disk cache"),
        ("name", f"{chosen.name}"),
        ("cfg", "of flashcute.forward(cfg, q, k, v)"),
        (
            "resources",
            f"{chosen.smem_bytes // 1024} KB of shared memory, {32 * chosen.num_warps} threads",
        ),
    )
    for i, (name, text) in enumerate(uses):
        y = 1.5 + i * 2.4
        arrow(axes, (7.7, 7.2), (9.1, y + 0.9), colour=QUIET)
        box(axes, 9.1, y, 10.6, 1.85, "", "#FFFFFF", edge="#BBBBBB")
        say(axes, 9.5, y + 0.55, name, size=TEXT, ha="left", weight="bold")
        say(axes, 9.5, y + 1.32, text, size=SMALL, ha="left")
    return figure


def tile() -> Figure:
    config = fc.default_config(128, "bfloat16", "sm_80")
    m, n, d = config.block_m, config.block_n, config.head_dim
    figure, axes = canvas(6.9, 20, 20)
    blocks = 5
    wide, left = 2.5, 6.2
    say(
        axes,
        left + blocks * wide / 2,
        0.7,
        f"K and V: blocks of {n} keys pass by, the last one first",
        size=TEXT,
        weight="bold",
    )
    for i in range(blocks):
        x = left + i * wide
        here = i == 2
        box(axes, x, 1.5, wide - 0.15, 1.9, f"K({i})", K if here else "#DCEFFA", size=TEXT)
        box(axes, x, 3.6, wide - 0.15, 1.9, f"V({i})", V if here else "#F3E0EA", size=TEXT)
    arrow(axes, (left + blocks * wide, 6.1), (left, 6.1), colour=QUIET)
    say(axes, left + blocks * wide, 6.7, "order of visits", size=SMALL, colour=QUIET, ha="right")
    box(axes, 0.6, 7.6, 3.6, 5.2, f"Q\n{m} x {d}\nstays", Q, size=TEXT)
    x = left + 2 * wide
    arrow(axes, (x + wide / 2, 5.5), (x + wide / 2, 7.6))
    box(
        axes,
        x - 0.7,
        7.6,
        wide + 1.25,
        5.2,
        f"S = Q K(2)ᵀ\n{m} x {n}\n\nthen P",
        SOFTMAX,
        size=TEXT,
    )
    arrow(axes, (4.2, 10.2), (x - 0.7, 10.2))
    box(axes, 15.2, 7.6, 4.4, 5.2, f"O += P V(2)\n{m} x {d}\nstays", OUTPUT, size=TEXT)
    arrow(axes, (x + wide + 0.55, 10.2), (15.2, 10.2))
    say(axes, 10.1, 14.2, "of each row: maximum m and sum l, which stay too", size=TEXT)
    lines = (
        ("m' = max(m, rowmax S)", "the row's maximum so far"),
        ("P = exp(S - m')", "never leaves registers"),
        ("l' = l exp(m - m') + rowsum P", "the row's sum so far"),
        ("O' = O exp(m - m') + P V", "divided by l at the end"),
    )
    for i, (formula, text) in enumerate(lines):
        say(axes, 1.6, 15.5 + i * 1.15, formula, size=TEXT, ha="left", weight="bold")
        say(axes, 11.6, 15.5 + i * 1.15, text, size=SMALL, ha="left", colour=QUIET)
    return figure


def cpu() -> Figure:
    config = fc.default_config(64, "float32", "cpu")
    m, n = config.block_m, config.block_n
    figure, axes = canvas(5.9, 20, 17)
    say(axes, 4.4, 0.7, "tasks: tiles of all heads", size=TEXT, weight="bold")
    for head in range(4):
        say(axes, 1.6, 2.1 + head * 1.5, f"head {head}", size=SMALL, ha="right", colour=QUIET)
        for i in range(5):
            index = head * 5 + i
            colour = (PRODUCT, SHADES[1])[index % 2] if index < 8 else EMPTY
            box(
                axes,
                1.9 + i * 1.25,
                1.5 + head * 1.5,
                1.15,
                1.3,
                f"{index}",
                colour,
                size=SMALL,
                edge="#BBBBBB",
            )
    say(
        axes,
        4.6,
        8.1,
        "Two threads, dark and light, take\nthe next tile when one is done.",
        size=SMALL,
        colour=QUIET,
    )
    arrow(axes, (8.4, 4.4), (10.3, 4.4))
    say(axes, 15.0, 0.7, "one task", size=TEXT, weight="bold")
    box(axes, 10.3, 1.5, 9.4, 5.8, "", EMPTY)
    lines = (
        f"Qᵀ: {m} queries, one in each vector lane",
        f"for each block of {n} keys, last first:",
        "  Sᵀ = K Qᵀ, masked by selection",
        "  Pᵀ, maximum and sum: no shuffles",
        "  Oᵀ = Oᵀ rescaled + Vᵀ Pᵀ",
    )
    for i, text in enumerate(lines):
        say(axes, 10.7, 2.2 + i * 1.1, text, size=SMALL, ha="left")
    say(
        axes,
        10,
        9.7,
        "Sᵀ in scratch memory: a row for each key, a column for each query",
        size=TEXT,
        weight="bold",
    )
    for row in range(4):
        say(axes, 1.6, 11.0 + row * 1.1, f"key {row}", size=SMALL, ha="right", colour=QUIET)
        for column in range(16):
            own = column < 8
            box(
                axes,
                1.9 + column * 1.1,
                10.5 + row * 1.1,
                1.1,
                1.1,
                "",
                SOFTMAX if own else "#F8E3B5",
                edge="#FFFFFF",
            )
    for half, text in enumerate(("one vector: 8 queries", "the next vector")):
        say(axes, 1.9 + 4.4 + half * 8.8, 15.6, text, size=SMALL)
    say(axes, 10, 16.4, "(AVX2 in float32; AVX-512 has 16 lanes)", size=SMALL, colour=QUIET)
    return figure


# ---- masks -----------------------------------------------------------------------------------------

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


def masks() -> Figure:
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


# ---- shared memory -----------------------------------------------------------------------------------

BANKS, BANK_BYTES, UNIT = 32, 4, 16  # shared memory; ldmatrix reads rows of 16 bytes
UNITS = BANKS * BANK_BYTES // UNIT  # of a row of 128 bytes


def place_of(row: int, unit: int, swizzled: bool) -> int:
    """Where the 16 bytes `unit` of a row lie in it: Smem::Swizzle of sm80/layout.hpp."""
    return unit ^ row % UNITS if swizzled else unit


def rows_of_banks(units: Iterable[tuple[int, int]], swizzled: bool) -> list[int]:
    """For each bank, how many of these (row, unit) lie in it."""
    counts = [0] * BANKS
    per_unit = UNIT // BANK_BYTES
    for row, unit in units:
        first = per_unit * place_of(row, unit, swizzled)
        for bank in range(first, first + per_unit):
            counts[bank] += 1
    return counts


def swizzle() -> Figure:
    phase = [(row, 2) for row in range(8)]  # what the 8 lanes of a phase of ldmatrix ask for
    figure, axes = canvas(6.6, 21, 20.2)
    for panel, swizzled in enumerate((False, True)):
        left, top, wide = 1.2 + panel * 10.2, 3.2, 1.1
        say(
            axes,
            left + 4 * wide,
            0.6,
            ("plain", "swizzled: unit XOR row")[panel],
            size=LARGE,
            weight="bold",
        )
        say(axes, left + 4 * wide, 1.65, "32 banks of 4 bytes", size=SMALL, colour=QUIET)
        for bank in (0, 8, 16, 24):
            say(axes, left + bank / 4 * wide + 0.05, 2.75, f"{bank}", size=SMALL, colour=QUIET, ha="left")  # fmt: skip
        for row in range(8):
            say(axes, left - 0.25, top + row + 0.5, f"{row}", size=SMALL, colour=QUIET, ha="right")
            for unit in range(UNITS):
                place = place_of(row, unit, swizzled)
                colour = K if (row, unit) in phase else EMPTY
                x, y = left + place * wide, top + row
                box(axes, x, y, wide, 1, f"{unit}", colour, edge="#BBBBBB", bold=colour == K)
        counts = rows_of_banks(phase, swizzled)
        base = top + 8 + 4.9
        say(axes, left + 4 * wide, base - 4.3, "reads of each bank", size=SMALL, colour=QUIET)
        for bank, count in enumerate(counts):
            x, width = left + bank * wide / 4, wide / 4
            height = 3.6 * count / 8
            box(axes, x, base - height, width, height, "", WAIT if count > 1 else PRODUCT)
        axes.plot([left, left + 8 * wide], [base, base], color="#999999", linewidth=0.8)
        passes = max(counts)
        used = sum(count > 0 for count in counts)
        say(
            axes,
            left + 4 * wide,
            base + 1.0,
            f"{used} banks, {passes} reads of each:\n{passes} passes"
            if passes > 1
            else f"{used} banks, {passes} read of each:\n{passes} pass",
            weight="bold",
            size=TEXT,
        )
    say(
        axes,
        10.5,
        19.2,
        "Eight rows of 128 bytes. A number is a unit of 16 bytes, 8 elements of a row.\n"
        "Blue: unit 2 of each row, which one phase of ldmatrix reads.",
        size=SMALL,
    )
    return figure


# ---- timelines ---------------------------------------------------------------------------------------


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


# Of the sm80 timeline.
COPY, MULTIPLY, EXPONENTIALS, MEETING = 3.2, 2.0, 2.6, 0.25


def sm80_schedule(stages: int, blocks: int) -> tuple[list[Bar], list[float]]:
    """Bars and barriers of a tile that visits so many blocks, by the rules of ForwardLoader: a copy begins at the
    barrier that says that its place is free, and a barrier waits until the copies that it is for have arrived."""
    bars: list[Bar] = []
    barriers: list[float] = []
    arrived: dict[tuple[str, int], float] = {}
    free_at = {"copies": 0.0}

    def load(what: str, n: int, now: float) -> None:
        # Copies share the road from memory: one after the other.
        begin = max(now, free_at["copies"])
        arrived[what, n] = free_at["copies"] = begin + COPY
        bars.append(Bar("copies", begin, begin + COPY, f"{what}({n})", K if what == "K" else V))

    def synchronise(now: float, *awaited: tuple[str, int]) -> float:
        # All warps have to come.
        ready = max([now + MEETING, *(arrived[x] for x in awaited)])
        bars.append(Bar("warps", now, ready, "", IDLE))
        barriers.append(ready)
        return ready

    def compute(now: float, text: str, length: float, colour: str) -> float:
        bars.append(Bar("warps", now, now + length, text, colour))
        return now + length

    last = blocks - 1
    load("K", last, 0)
    if stages == 2:
        load("V", last, 0)
    now = 0.0
    for n in range(last, -1, -1):
        if stages == 1:
            now = synchronise(now, ("K", n))
            load("V", n, now)
            now = compute(now, f"S({n})", MULTIPLY, PRODUCT)
            now = synchronise(now, ("V", n))
            if n > 0:
                load("K", n - 1, now)
        else:
            now = synchronise(now, ("K", n), ("V", n))
            if n > 0:
                load("K", n - 1, now)
                load("V", n - 1, now)
            now = compute(now, f"S({n})", MULTIPLY, PRODUCT)
        now = compute(now, f"P({n})", EXPONENTIALS, SOFTMAX)
        now = compute(now, "P V", MULTIPLY, PRODUCT)
    return bars, barriers


def sm80_pipeline() -> Figure:
    figure, axes = canvas(5.2, 28, 20.8)
    left, top = 2.6, 2.2
    schedules = [sm80_schedule(stages, 3) for stages in (1, 2)]
    end = max(bar.end for bars, _ in schedules for bar in bars)
    scale = (27.6 - left) / end
    for i, (bars, barriers) in enumerate(schedules):
        y = top + i * 7.4
        title = ("one stage: two barriers a block", "two stages: one barrier a block")[i]
        say(axes, left, y - 0.9, title, size=LARGE, ha="left", weight="bold")
        timeline(axes, bars, ("copies", "warps"), top=y, left=left, scale=scale, height=1.6, step=2.1)  # fmt: skip
        for time in barriers:
            axes.plot(
                [left + time * scale] * 2, [y - 0.25, y + 4.0], color=WAIT, linewidth=1.6, zorder=5
            )
    arrow(axes, (left, 15.6), (27.6, 15.6), colour=QUIET)
    say(axes, 26.0, 15.0, "time", size=SMALL, colour=QUIET)
    entries = (
        (K, "copy of K"),
        (V, "copy of V"),
        (PRODUCT, "product"),
        (SOFTMAX, "softmax"),
        (IDLE, "wait"),
        (WAIT, "barrier"),
    )
    for j, (colour, text) in enumerate(entries):
        x, y = 1.2 + j % 6 * 4.5, 17.0
        if text == "barrier":
            axes.plot([x + 0.35] * 2, [y - 0.1, y + 0.9], color=WAIT, linewidth=1.8)
        else:
            box(axes, x, y, 0.7, 0.8, "", colour, edge="#999999")
        say(axes, x + 1.0, y + 0.4, text, size=SMALL, ha="left")
    say(
        axes,
        14,
        19.1,
        "One tile that visits three blocks, from the last to the first.\nLengths of bars are chosen, not measured.",
        size=SMALL,
        colour=QUIET,
    )
    return figure


# Of Hopper's timeline.
COPY_BOX, WGMMA, SOFTMAX_OF_BLOCK, START, STORE = 1.3, 2.0, 3.2, 0.5, 2.2
WARPGROUPS = 2


def sm90_schedule(blocks: int, stages: int) -> list[Bar]:
    """A tile and the first scores of the next one, by the rules of Loader, Consumer and Turns: products run in the
    order in which they were started, warpgroups start theirs in turns, a copy waits until its place is empty."""
    bars: list[Bar] = []
    # K(n - 1) before V(n); `blocks` more than the number is the next tile's.
    order: list[tuple[str, int]] = [("K", 0)]
    for n in range(1, blocks + 1):
        order += [("K", n), ("V", n - 1)]
    released: dict[tuple[str, int], list[float]] = {}
    arrived: dict[tuple[str, int], float] = {}
    loader = tensor_cores = turn = 0.0

    def number(n: int) -> str:
        return f"({blocks - 1 - n})" if n < blocks else ", next tile"

    def await_copy(wanted: tuple[str, int]) -> float:
        nonlocal loader
        while wanted not in arrived:
            what, n = order[len(arrived)]
            before = released.get((what, n - stages), [])
            assert n < stages or len(before) == WARPGROUPS
            begin = max([loader, *before])
            loader = arrived[what, n] = begin + COPY_BOX
            colour = K if what == "K" else V
            bars.append(Bar("copies (TMA)", begin, loader, f"{what}{number(n)}", colour))
        return arrived[wanted]

    def multiply(now: float, w: int, text: str) -> float:
        nonlocal tensor_cores
        begin = max(now, tensor_cores)
        tensor_cores = begin + WGMMA
        bars.append(Bar("tensor cores", begin, tensor_cores, f"{w + 1}: {text}", SHADES[w]))
        return tensor_cores

    ready = [0.0] * WARPGROUPS
    for n in range(blocks + 1):
        for w in range(WARPGROUPS):
            lane = f"warpgroup {w + 1}"

            def start(now: float, lane: str = lane, w: int = w) -> float:
                if now > ready[w]:
                    bars.append(Bar(lane, ready[w], now, "", IDLE))
                bars.append(Bar(lane, now, now + START, "start", PRODUCT))
                ready[w] = now + START
                return ready[w]

            def busy_until(
                end: float, text: str, colour: str, lane: str = lane, w: int = w
            ) -> None:
                if end > ready[w]:
                    bars.append(Bar(lane, ready[w], end, text, colour))
                    ready[w] = end

            if n == blocks:  # the last product needs no turn; then the next tile's first scores
                output = multiply(
                    start(max(ready[w], await_copy(("V", n - 1)))), w, f"P V{number(n - 1)}"
                )
                turn = start(max(ready[w], turn, await_copy(("K", n))))
                multiply(turn, w, f"S{number(n)}")
                busy_until(output, "", IDLE)
                busy_until(output + STORE, "writes O", OUTPUT)
                continue
            begin = max(ready[w], turn, await_copy(("K", n)))
            if n > 0:
                begin = max(begin, await_copy(("V", n - 1)))
            turn = start(begin)
            scores = output = multiply(turn, w, f"S{number(n)}")
            released.setdefault(("K", n), []).append(scores)
            if n > 0:
                output = multiply(turn, w, f"P V{number(n - 1)}")
                released.setdefault(("V", n - 1), []).append(output)
            busy_until(scores, "", IDLE)
            busy_until(scores + SOFTMAX_OF_BLOCK, f"softmax{number(n)}", SOFTMAX)
            busy_until(output, "", IDLE)
    return bars


def sm90_timeline() -> Figure:
    bars = sm90_schedule(blocks=3, stages=2)
    end = max(bar.end for bar in bars)
    lanes = ("copies (TMA)", "tensor cores", "warpgroup 1", "warpgroup 2")
    figure, axes = canvas(8.8, 17, end + 6.4)
    top, wide = 2.0, 3.75
    for i, lane in enumerate(lanes):
        x = 1.3 + i * (wide + 0.2)
        say(axes, x + wide / 2, 1.0, lane, size=TEXT, weight="bold")
        axes.add_patch(Rectangle((x, top), wide, end, facecolor="#F6F6F6", edgecolor="none"))
    for bar in bars:
        x = 1.3 + lanes.index(bar.lane) * (wide + 0.2)
        size = 7.0 if bar.text == "start" else SMALL
        box(axes, x, top + bar.begin, wide, bar.end - bar.begin, bar.text, bar.colour, size=size)
    arrow(axes, (0.6, top), (0.6, top + end), colour=QUIET)
    axes.text(
        0.25,
        top + end / 2,
        "time",
        fontsize=SMALL,
        color=QUIET,
        rotation=90,
        va="center",
        ha="center",
    )
    y = top + end + 1.0
    for j, (colour, text) in enumerate(
        (
            (SHADES[0], "products of 1"),
            (SHADES[1], "products of 2"),
            (SOFTMAX, "softmax"),
            (IDLE, "waits"),
        )
    ):
        box(axes, 1.3 + j * 4.2, y, 0.7, 0.8, "", colour, edge="#999999")
        say(axes, 2.2 + j * 4.2, y + 0.4, text, size=SMALL, ha="left")
    told = (
        "A tile that visits three blocks of keys, two places in each ring, two warpgroups.\n"
        "Lengths of bars are chosen, not measured."
    )
    say(axes, 8.5, y + 2.1, told, size=SMALL, colour=QUIET)
    return figure


# ---- fragments ---------------------------------------------------------------------------------------


def accumulator_place(lane: int, register: int) -> tuple[int, int]:
    """(row, column) of c0 to c3 of mma.sync m16n8k16: TileLayout::first_coordinate and the distances after it."""
    return lane // 4 + 8 * (register // 2), lane % 4 * 2 + register % 2


def operand_place(lane: int, register: int) -> tuple[int, int]:
    """(row, column) of a0 to a7, the left operand of the same instruction."""
    return lane // 4 + 8 * (register // 2 % 2), lane % 4 * 2 + register % 2 + 8 * (register // 4)


def fragments() -> Figure:
    lane_of: dict[tuple[int, int], int] = {}
    names: dict[tuple[int, int], str] = {}
    for lane in range(32):
        for register in range(8):
            row, column = accumulator_place(lane, register % 4)
            column += 8 * (register // 4)  # of the second accumulator
            assert (row, column) == operand_place(lane, register)
            lane_of[row, column] = lane
            names[row, column] = f"c{register % 4}, a{register}"
    figure, axes = canvas(7.6, 19, 21.6)
    left, top = 2.2, 3.4
    told = 5  # the lane whose elements are coloured
    for (row, column), lane in lane_of.items():
        own = lane == told
        shade = "#FFFFFF" if lane // 4 % 2 else "#F1F1F1"
        x, y = left + column, top + row * 0.92
        box(
            axes,
            x,
            y,
            1,
            0.92,
            "" if own else f"{lane}",
            SOFTMAX if own else shade,
            size=SMALL,
            edge="#CCCCCC",
        )
        if own:
            c, a = names[row, column].split(", ")
            say(axes, x + 0.5, y + 0.27, c, size=7.5, weight="bold")
            say(axes, x + 0.5, y + 0.67, a, size=7.5, weight="bold")
    for i, text in enumerate(("S of keys 0 to 7", "S of keys 8 to 15")):
        box(
            axes,
            left + 8 * i + 0.05,
            2.2,
            7.9,
            0.95,
            f"{text}: c0 to c3 of a lane",
            PRODUCT,
            size=SMALL,
        )
    say(
        axes,
        left + 8,
        1.2,
        "two accumulators of S = Q Kᵀ, as mma.sync leaves them",
        size=TEXT,
        weight="bold",
    )
    base = top + 16 * 0.92
    box(
        axes,
        left + 0.05,
        base + 0.25,
        15.9,
        0.95,
        "P of 16 keys: a0 to a7 of a lane",
        K,
        size=SMALL,
    )
    say(
        axes,
        left + 8,
        base + 2.0,
        "one left operand of O += P V, as mma.sync takes it",
        size=TEXT,
        weight="bold",
    )
    for row in range(0, 16, 2):
        say(
            axes,
            left - 0.3,
            top + (row + 0.5) * 0.92,
            f"{row}",
            size=SMALL,
            colour=QUIET,
            ha="right",
        )
    lane_told = (
        "Numbers are lanes. Orange: the elements of lane 5, with their registers in S and in P."
    )
    say(axes, left + 8, base + 3.1, lane_told, size=SMALL, colour=QUIET)
    axes.text(
        0.7,
        top + 8 * 0.92,
        "query rows",
        fontsize=SMALL,
        color=QUIET,
        rotation=90,
        va="center",
        ha="center",
    )
    return figure


# ---- who does what in a thread block of Hopper's --------------------------------------------------------


def sm90_roles() -> Figure:
    config = fc.default_config(128, "bfloat16", "sm_90")
    warpgroups, stages = config.num_warps // 4, config.stages
    of_q, of_block = 64 * config.head_dim * 2, config.block_n * config.head_dim * 2  # bytes
    figure, axes = canvas(7.4, 20, 21.4)
    box(axes, 0.3, 0.3, 19.4, 1.3, "global memory: Q, K, V", "#E8E8E8", size=TEXT)
    box(axes, 0.3, 3.4, 7.6, 2.6, "warpgroup 0, warp 0:\none lane loads (TMA)", K, size=TEXT)
    box(
        axes,
        12.1,
        3.4,
        7.6,
        2.6,
        "warpgroup 0, warps 1 to 3:\ninspect V for NaN",
        "#FFFFFF",
        edge="#999999",
    )
    arrow(axes, (4.1, 1.6), (4.1, 3.4))
    say(axes, 4.5, 2.45, "copies of boxes", size=SMALL, ha="left", colour=QUIET)

    axes.add_patch(
        Rectangle((0.3, 7.9), 19.4, 6.1, facecolor=EMPTY, edgecolor="#BBBBBB", linewidth=0.8)
    )
    told = (of_q * warpgroups + 2 * stages * of_block) // 1024
    say(axes, 10, 8.5, f"shared memory: {told} KB of tiles, and barriers", size=SMALL, colour=QUIET)
    for w in range(warpgroups):
        box(
            axes,
            0.8,
            9.2 + w * 2.3,
            4.4,
            1.9,
            f"Q of warpgroup {w + 1}\n{of_q // 1024} KB",
            Q,
            size=SMALL,
        )
    for row, (name, colour) in enumerate((("K", K), ("V", V))):
        for i in range(stages):
            text = f"{name}, place {i}\n{of_block // 1024} KB"
            box(axes, 5.7 + i * 4.65, 9.2 + row * 2.3, 4.4, 1.9, text, colour, size=SMALL)
    arrow(axes, (2.6, 6.0), (2.6, 7.9))
    say(axes, 2.9, 6.95, "waits for empty,\nannounces full", size=SMALL, ha="left", colour=QUIET)
    arrow(axes, (15.9, 7.9), (15.9, 6.0), style="<|-|>")
    say(
        axes,
        15.5,
        6.95,
        "V of partial blocks,\nbefore it is full",
        size=SMALL,
        ha="right",
        colour=QUIET,
    )

    for w in range(warpgroups):
        x = 0.3 + w * 9.9
        box(
            axes,
            x,
            16.2,
            9.5,
            3.0,
            f"warpgroup {w + 1}: 64 rows of the tile\nS and O in registers,\nproducts and softmax",
            SHADES[w],
            size=TEXT,
        )
        arrow(axes, (x + 3.4, 14.0), (x + 3.4, 16.2), colour=INK)
        say(axes, x + 3.1, 15.1, "full: wait", size=SMALL, ha="right", colour=QUIET)
        arrow(axes, (x + 6.1, 16.2), (x + 6.1, 14.0), colour=WAIT, dashed=True)
        say(axes, x + 6.4, 15.1, "empty: arrive", size=SMALL, ha="left", colour=QUIET)
    arrow(axes, (5.0, 19.2), (14.95, 19.2), bend=0.14, style="<|-|>", colour=WAIT)
    say(
        axes,
        10,
        20.75,
        "take turns in starting products (named barriers)",
        size=SMALL,
        colour=QUIET,
    )
    return figure


# ---- the backward --------------------------------------------------------------------------------------


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


def backward() -> Figure:
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


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "call": call,
    "config": config,
    "tile": tile,
    "masks": masks,
    "swizzle": swizzle,
    "sm80_pipeline": sm80_pipeline,
    "sm90_timeline": sm90_timeline,
    "fragments": fragments,
    "sm90_roles": sm90_roles,
    "backward": backward,
    "cpu": cpu,
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
