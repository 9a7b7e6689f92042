"""Who does what in a thread block of Hopper's gradients."""

from __future__ import annotations

import flashcute as fc
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sketches.style import (
    EMPTY,
    INK,
    OUTPUT,
    QUIET,
    SHADES,
    SMALL,
    SOFTMAX,
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
    config = fc.default_backward_config(128, "bfloat16", "sm_90", deterministic=False)
    keys = config.block_n * config.head_dim * 2  # bytes
    queries = config.block_m * config.head_dim * 2
    ds, dq = config.block_m * config.block_n * 2, config.block_m * config.head_dim * 4
    figure, axes = canvas(8.6, 20, 24.4)
    box(axes, 0.3, 0.3, 19.4, 1.3, "global memory: Q, K, V, dO, LSE, delta; sums of dQ", "#E8E8E8")

    serving = (
        (0.3, 6.2, "warp 0:\none lane loads (TMA)", K),
        (6.9, 6.2, "warps 1 and 2:\nadd dQ to the sums", OUTPUT),
        (13.5, 6.2, "warp 3: looks for\nNaN and infinity", "#FFFFFF"),
    )
    for x, width, text, colour in serving:
        box(axes, x, 3.4, width, 2.6, text, colour, edge="#999999")
    arrow(axes, (3.4, 1.6), (3.4, 3.4))
    arrow(axes, (10.0, 3.4), (10.0, 1.6))
    say(axes, 3.7, 2.5, "copies of boxes", size=SMALL, ha="left", colour=QUIET)
    say(axes, 10.3, 2.5, "bulk additions in float32", size=SMALL, ha="left", colour=QUIET)

    axes.add_patch(
        Rectangle((0.3, 7.8), 19.4, 8.4, facecolor=EMPTY, edgecolor="#BBBBBB", linewidth=0.8)
    )
    told = (
        (1 + config.k_stages) * keys + (config.stages + config.dout_stages) * queries + 2 * ds + dq
    ) // 1024
    say(axes, 10, 8.4, f"shared memory: {told} KB of tiles, and barriers", size=SMALL, colour=QUIET)
    for row, (name, colour) in enumerate((("K", K), ("V", V))):
        box(axes, 0.8, 9.1 + row * 2.3, 3.9, 1.9, f"{name}: {keys // 1024} KB", colour, size=SMALL)
    rings = (("Q", config.stages, Q), ("dO", config.dout_stages, Q))
    for row, (name, places, colour) in enumerate(rings):
        for i in range(places):
            text = f"{name}, place {i}\n{queries // 1024} KB"
            box(axes, 5.2 + i * 4.7, 9.1 + row * 2.3, 4.4, 1.9, text, colour, size=SMALL)
    for i in range(2):
        text = f"dS, place {i}\n{ds // 1024} KB"
        box(axes, 0.8 + i * 4.7, 13.7, 4.4, 1.9, text, SOFTMAX, size=SMALL)
        text = f"dQ of {i + 1}\n{dq // 2048} KB"
        box(axes, 10.2 + i * 4.7, 13.7, 4.4, 1.9, text, OUTPUT, size=SMALL)
    arrow(axes, (3.4, 6.0), (3.4, 7.8))
    say(axes, 3.7, 6.9, "Q, dO: empty, full", size=SMALL, ha="left", colour=QUIET)
    arrow(axes, (10.0, 7.8), (10.0, 6.0))
    say(axes, 10.3, 6.9, "dQ: full, empty", size=SMALL, ha="left", colour=QUIET)
    arrow(axes, (16.6, 7.8), (16.6, 6.0), style="<|-|>")

    for w in range(2):
        x = 0.3 + w * 9.9
        text = (
            f"warpgroup {w + 1}: 64 keys\ndK, dV, S and dP in registers,\ndQ of half of the columns"
        )
        box(axes, x, 18.4, 9.5, 3.4, text, SHADES[w], size=TEXT)
        arrow(axes, (x + 2.0, 16.2), (x + 2.0, 18.4), colour=INK)
        say(axes, x + 2.3, 17.3, "K, V, Q, dO, dS", size=SMALL, ha="left", colour=QUIET)
        arrow(axes, (x + 8.2, 18.4), (x + 8.2, 16.2), colour=INK)
        say(axes, x + 7.9, 17.3, "dS, dQ", size=SMALL, ha="right", colour=QUIET)
    arrow(axes, (5.0, 21.8), (14.95, 21.8), bend=0.14, style="<|-|>", colour=WAIT)
    told_of_ds = "each multiplies dS of both, an iteration later (late dQ)"
    say(axes, 10, 23.6, told_of_ds, size=SMALL, colour=QUIET)
    return figure
