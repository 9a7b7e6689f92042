"""What threads of the CPU compute."""

from __future__ import annotations

import flashcute as fc
from matplotlib.figure import Figure

from sketches.style import (
    EMPTY,
    PRODUCT,
    QUIET,
    SHADES,
    SMALL,
    SOFTMAX,
    TEXT,
    arrow,
    box,
    canvas,
    say,
)


def draw() -> Figure:
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
