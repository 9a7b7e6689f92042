"""The pipeline of the mma.sync forward, with one stage and with two."""

from __future__ import annotations

from matplotlib.figure import Figure

from sketches.style import (
    IDLE,
    LARGE,
    PRODUCT,
    QUIET,
    SMALL,
    SOFTMAX,
    WAIT,
    K,
    V,
    arrow,
    box,
    canvas,
    say,
)
from sketches.timeline import Bar, timeline

# How long each takes.
COPY, MULTIPLY, EXPONENTIALS, MEETING = 3.2, 2.0, 2.6, 0.25


def schedule(stages: int, blocks: int) -> tuple[list[Bar], list[float]]:
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


def draw() -> Figure:
    figure, axes = canvas(5.2, 28, 20.8)
    left, top = 2.6, 2.2
    schedules = [schedule(stages, 3) for stages in (1, 2)]
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
