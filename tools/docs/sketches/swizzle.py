"""Rows in the banks of shared memory, plain and swizzled."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.figure import Figure

from sketches.style import EMPTY, LARGE, PRODUCT, QUIET, SMALL, TEXT, WAIT, K, box, canvas, say

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


def draw() -> Figure:
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
