"""What a long run says while it goes on: which case, what is done with it, and the time left.

All of it goes to stderr, so that stdout has results alone. On a terminal, with rich installed, it is one line that
changes in place; otherwise one line a case.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NamedTuple

from .table import format_seconds


class Work(NamedTuple):
    """What a case costs."""

    calls: int  # that are checked and timed
    flops: float  # of one of each


def seconds_left(done: Sequence[tuple[Work, float]], todo: Sequence[Work]) -> float | None:
    """From the seconds that cases took. None before the first case.

    They are fitted by least squares as a * calls + b * FLOPs, neither below 0: the checks and the turns of a call take
    about the same time in each case, but for a call that is longer than its turn.
    """
    if not done:
        return None
    unit = max(work.flops for work, _ in done) or 1.0  # or the squares were lost in rounding
    points = [(work.calls, work.flops / unit, seconds) for work, seconds in done]
    cc, cf, ff, cs, fs = (
        sum(point[i] * point[j] for point in points)
        for i, j in ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2))
    )
    determinant = cc * ff - cf * cf
    if not ff:  # nothing is computed
        a, b = cs / cc, 0.0
    elif determinant < 1e-3 * cc * ff:  # cases of one kind do not tell the two apart: half and half
        a, b = cs / cc / 2, fs / ff / 2
    else:
        a, b = (ff * cs - cf * fs) / determinant, (cc * fs - cf * cs) / determinant
        if a < 0:
            a, b = 0.0, fs / ff
        elif b < 0:
            a, b = cs / cc, 0.0
    return sum(a * work.calls + b * work.flops / unit for work in todo)


class Progress:
    """Over cases one after another, as a context: `case` begins one and ends the one before it. This one says nothing
    but a line a case."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = works
        self.done: list[tuple[Work, float]] = []
        self.label = ""
        self.start = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def case(self, label: str) -> None:
        self.label, self.start = label, time.monotonic()
        self.show("")

    def step(self, what: str) -> None:
        """What is done with the case now."""

    def end_case(self) -> None:
        self.done.append((self.works[len(self.done)], time.monotonic() - self.start))

    def show(self, what: str) -> None:
        print(f"{self.where()}: {self.label}", file=sys.stderr, flush=True)

    def where(self) -> str:
        number = len(self.done)
        text = f"case {number + 1} of {len(self.works)}"
        left = seconds_left(self.done, self.works[number:])
        if left is None:
            return text
        left = max(0.0, left - (time.monotonic() - self.start))
        return f"{text}, {format_seconds(left)} left"


class RichProgress(Progress):
    """A bar and one line, drawn anew at each step only: a thread that refreshes it would run beside timed calls."""

    def __init__(self, works: Sequence[Work]) -> None:
        super().__init__(works)
        console = import_module("rich.console").Console(stderr=True)
        # What is printed meanwhile goes above the line, if it goes to the terminal at all.
        self.live: Any = import_module("rich.live").Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self.table: Any = import_module("rich.table").Table
        self.text: Any = import_module("rich.text").Text
        self.bar: Any = import_module("rich.progress_bar").ProgressBar

    def __enter__(self) -> Progress:
        self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def step(self, what: str) -> None:
        self.show(what)

    def show(self, what: str) -> None:
        line = self.text(no_wrap=True, overflow="ellipsis")
        line.append(self.where(), style="bold")
        line.append(f": {self.label}" + (f": {what}" if what else ""))
        grid = self.table.grid(padding=(0, 1, 0, 0))
        grid.add_row(self.bar(total=len(self.works), completed=len(self.done), width=20), line)
        self.live.update(grid, refresh=True)


def make_progress(works: Sequence[Work], *, plain: bool) -> Progress:
    if plain or not sys.stderr.isatty() or find_spec("rich") is None:
        return Progress(works)
    return RichProgress(works)
