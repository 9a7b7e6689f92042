"""The tensors of a call."""

from __future__ import annotations

from matplotlib.figure import Figure

from sketches.style import EMPTY, PRODUCT, QUIET, SMALL, TEXT, K, arrow, box, canvas, say


def draw() -> Figure:
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
