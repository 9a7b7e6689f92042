"""Who does what in a thread block of Hopper's kernel."""

from __future__ import annotations

import flashcute as fc
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sketches.style import (
    EMPTY,
    INK,
    QUIET,
    SHADES,
    SMALL,
    TEXT,
    WAIT,
    K,
    Q,
    V,
    arrow,
    box,
    canvas,
    say,
)


def draw() -> Figure:
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
        "warpgroup 0, warps 1 to 3:\ninspect V, scout tiles",
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
