"""Which lane holds which element of a tile."""

from __future__ import annotations

from matplotlib.figure import Figure

from sketches.style import PRODUCT, QUIET, SMALL, SOFTMAX, TEXT, K, box, canvas, say


def accumulator_place(lane: int, register: int) -> tuple[int, int]:
    """(row, column) of c0 to c3 of mma.sync m16n8k16: TileLayout::first_coordinate and the distances after it."""
    return lane // 4 + 8 * (register // 2), lane % 4 * 2 + register % 2


def operand_place(lane: int, register: int) -> tuple[int, int]:
    """(row, column) of a0 to a7, the left operand of the same instruction."""
    return lane // 4 + 8 * (register // 2 % 2), lane % 4 * 2 + register % 2 + 8 * (register // 4)


def draw() -> Figure:
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
