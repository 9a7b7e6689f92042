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

    budget_s: float  # of its timed calls: known beforehand
    flops: float  # of one call of everything that is timed


def seconds_left(done: Sequence[tuple[Work, float]], todo: Sequence[Work]) -> float | None:
    """From the seconds that cases took. None before the first case.

    What a case takes on top of its budget is fitted by least squares as a + b FLOPs: checks take about the same time
    in each case, and calls longer than the budget take theirs.
    """
    if not done:
        return None
    # In units of the mean, so that no square overflows.
    mean = sum(work.flops for work, _ in done) / len(done) or 1.0
    sizes = [work.flops / mean for work, _ in done]
    extras = [seconds - work.budget_s for work, seconds in done]
    extra = sum(extras) / len(done)
    spread = sum((size - 1) ** 2 for size in sizes)
    if spread < 0.01:
        slope = extra / 2  # of one size nothing can be told: half and half
    else:
        slope = sum((x - 1) * (y - extra) for x, y in zip(sizes, extras, strict=True)) / spread
    slope = max(0.0, slope)
    constant = extra - slope
    if constant < 0 < extra:
        constant, slope = (
            0.0,
            sum(x * y for x, y in zip(sizes, extras, strict=True)) / sum(x * x for x in sizes),
        )
    rest = [work.budget_s + constant + slope * work.flops / mean for work in todo]
    return sum(max(0.0, seconds) for seconds in rest)


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
