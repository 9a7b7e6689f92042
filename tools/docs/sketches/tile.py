"""A tile of queries and the blocks of keys that it visits."""

from __future__ import annotations

import flashcute as fc
from matplotlib.figure import Figure

from sketches.style import OUTPUT, QUIET, SMALL, SOFTMAX, TEXT, K, Q, V, arrow, box, canvas, say


def draw() -> Figure:
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
