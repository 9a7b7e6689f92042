"""A configuration, and the kernel that it names."""

from __future__ import annotations

import flashcute as fc
from matplotlib.figure import Figure

from sketches.style import EMPTY, LARGE, QUIET, SMALL, TEXT, arrow, box, canvas, say


def draw() -> Figure:
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
