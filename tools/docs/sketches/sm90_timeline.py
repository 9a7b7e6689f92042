"""Hopper's warpgroups on a time line."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sketches.style import (
    IDLE,
    OUTPUT,
    PRODUCT,
    QUIET,
    SHADES,
    SMALL,
    SOFTMAX,
    TEXT,
    K,
    V,
    arrow,
    box,
    canvas,
    say,
)
from sketches.timeline import Bar

# How long each takes.
COPY_BOX, WGMMA, SOFTMAX_OF_BLOCK, START, STORE = 1.3, 2.0, 3.2, 0.5, 2.2
WARPGROUPS = 2


def schedule(blocks: int, stages: int) -> list[Bar]:
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


def draw() -> Figure:
    bars = schedule(blocks=3, stages=2)
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
