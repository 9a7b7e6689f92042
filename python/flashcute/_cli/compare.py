"""``compare``: two files of recorded lines, case by case, with what is noise and what is a regression."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import recorded
from .charts import OURS, ordered_names
from .options import Commands, UsageError, positive_float
from .recorded import Key, Line, case_key, case_label, is_timed, markdown_table
from .table import format_table

WORST = 5

DESCRIPTION = """\
Compares the times of two files that bench --out wrote, for each case and implementation.

ratio: A's time over B's, of the medians (ms_p50): above 1, B is faster.

noise: by how much the times of one run scatter. Of each file, half of p90 - p10, as a part of the median;
noise is the root of the sum of the squares of the two. A ratio from 1 / (1 + noise) to 1 + noise is inside
the band of noise, and no change. Lines without p10 and p90 have no band: there every change counts.

rounds: a case that a file holds several times was measured in rounds, in the order of the file. Ratio
and noise are of the medians over the rounds of each file. Round i of A is compared with round i of B,
and a change counts as slower or faster only if at least two of three of these pairs (1 of 1, 2 of 2,
2 of 3, 3 of 4) say so, each by its own band.

regression: flashcute is slower beyond the noise, and the ratio is below --fail-below, in at least two
of three pairs of rounds; or so is its geometric mean over all cases, whose noise is the root of the sum
of the squares of theirs, divided by their number; or flashcute was timed in A, and in B it failed or was
wrong. Other implementations are shown, but cannot fail.

A case that only one file holds is listed and counted; it cannot regress unless B says that it failed.
Lines without a time are passed over and counted. Exit code: 0; 1 if there is a regression; 2 for files
that cannot be compared.
"""


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="two files of recorded lines: what became faster or slower",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A", help="JSON lines, before")
    parser.add_argument("b", type=Path, metavar="B", help="JSON lines, after")
    parser.add_argument(
        "--fail-below",
        type=positive_float,
        default=0.97,
        metavar="RATIO",
        help="the exit code is 1 if a ratio of flashcute is below this, beyond the noise (default: 0.97)",
    )
    parser.add_argument("--markdown", action="store_true", help="Markdown tables")
    recorded.add_filters(parser.add_argument_group("which lines"))
    parser.set_defaults(run=run)


# ---- measurements ------------------------------------------------------------------------------


class Time(NamedTuple):
    """Milliseconds; low and high are p10 and p90, None where they were not recorded."""

    median: float
    low: float | None
    high: float | None

    @property
    def spread(self) -> float | None:
        """Half of what lies between p10 and p90, as a part of the median."""
        if self.low is None or self.high is None:
            return None
        return (self.high - self.low) / (2 * self.median)


class Measured(NamedTuple):
    """One implementation in one case, in one file."""

    line: Line  # the last one
    rounds: tuple[Time, ...]

    @property
    def time(self) -> Time:
        lows = [x.low for x in self.rounds if x.low is not None]
        highs = [x.high for x in self.rounds if x.high is not None]
        return Time(
            statistics.median(x.median for x in self.rounds),
            statistics.median(lows) if lows else None,
            statistics.median(highs) if highs else None,
        )


class Change(NamedTuple):
    """From A to B: the ratio of times, and by which part of it noise may have moved it."""

    ratio: float
    noise: float | None

    @property
    def direction(self) -> int:
        """-1: slower beyond the noise, 1: faster, 0: noise."""
        band = 1 + (self.noise or 0.0)
        return 1 if self.ratio > band else -1 if self.ratio * band < 1 else 0


def change(a: Time, b: Time) -> Change:
    spreads = [a.spread, b.spread]
    noise = None if None in spreads else math.hypot(*(x for x in spreads if x is not None))
    return Change(a.median / b.median, noise)


class Row(NamedTuple):
    """A case and an implementation that both files hold."""

    a: Measured
    b: Measured

    @property
    def label(self) -> str:
        return case_label(self.a.line)

    @property
    def impl(self) -> str:
        return str(self.a.line["impl"])

    @property
    def whole(self) -> Change:
        return change(self.a.time, self.b.time)

    @property
    def pairs(self) -> list[Change]:
        return [change(a, b) for a, b in zip(self.a.rounds, self.b.rounds, strict=False)]

    @property
    def direction(self) -> int:
        for direction in (-1, 1):
            if two_of_three([pair.direction == direction for pair in self.pairs]):
                return direction
        return 0

    def regressed(self, fail_below: float) -> bool:
        slower = [pair.direction < 0 and pair.ratio < fail_below for pair in self.pairs]
        return self.impl.startswith(OURS) and two_of_three(slower)

    @property
    def other_config(self) -> bool:
        return bool(self.a.line.get("config") != self.b.line.get("config"))


def two_of_three(votes: Sequence[bool]) -> bool:
    return sum(votes) >= math.ceil(2 * len(votes) / 3)


class File(NamedTuple):
    timed: dict[tuple[Key, str], Measured]
    others: list[Line]  # without a time

    def status(self, key: tuple[Key, str]) -> str | None:
        """Why a case has no time, where a line says so."""
        for x in self.others:
            if (case_key(x), x.get("impl")) == key and x.get("status", "ok") != "ok":
                return f"{x['status']}: {x['reason']}" if x.get("reason") else str(x["status"])
        return None


def load(path: Path, options: argparse.Namespace) -> File:
    lines = recorded.wanted(recorded.read_file(path), options, options.impls)
    with_time: list[Line] = []
    others: list[Line] = []
    for x in lines:
        (with_time if is_timed(x) and x.get("status", "ok") == "ok" else others).append(x)
    if not with_time:
        raise UsageError(
            f"{path}: no line with the time of an implementation (ms_p50), "
            f"only {recorded.counted(lines) or 'what the options leave out'}"
        )
    try:
        recorded.expect_one(with_time, lambda x: x.get("device"), "devices", "--device")
    except UsageError as problem:
        raise UsageError(f"{path}: {problem}") from None
    timed: dict[tuple[Key, str], Measured] = {}
    for x in with_time:
        key = case_key(x), str(x["impl"])
        rounds = timed[key].rounds if key in timed else ()
        time = Time(x["ms_p50"], x.get("ms_p10"), x.get("ms_p90"))
        timed[key] = Measured(x, (*rounds, time))
    return File(timed, others)


# ---- the report --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    a, b = load(options.a, options), load(options.b, options)
    rows = [Row(a.timed[key], b.timed[key]) for key in a.timed if key in b.timed]
    if not rows:
        raise UsageError(
            f"no case is in both files: {options.a} begins with {first_label(a)}, {options.b} with {first_label(b)}"
        )
    report = Report(options.markdown)
    report.text(f"A: {options.a}: {recorded.origin_text([x.line for x in a.timed.values()])}")
    report.text(f"B: {options.b}: {recorded.origin_text([x.line for x in b.timed.values()])}")
    report.text(
        "ratio: A's time over B's; above 1, B is faster. noise: by how much times scatter; see --help"
    )
    report.cases(rows, options.fail_below)
    report.means(rows)
    report.worst(rows, options.fail_below)
    report.configs([row for row in rows if row.other_config])
    missing = {key: b.status(key) for key in a.timed if key not in b.timed}
    added = {key: a.status(key) for key in b.timed if key not in a.timed}
    report.alone("only in A", [(a.timed[key].line, status) for key, status in missing.items()])
    report.alone("only in B", [(b.timed[key].line, status) for key, status in added.items()])
    for name, file in (("A", a), ("B", b)):
        if file.others:
            report.text(f"passed over in {name}, without a time: {recorded.counted(file.others)}")
    slower = [row for row in rows if row.regressed(options.fail_below)]
    slower_means = [
        impl
        for impl, own in by_impl(rows).items()
        if impl.startswith(OURS) and mean_regressed(own, options.fail_below)
    ]
    broken = [
        key
        for key, status in missing.items()
        if key[1].startswith(OURS) and (status or "").startswith(("failed", "wrong"))
    ]
    report.verdict(len(slower), slower_means, len(broken), options.fail_below)
    if missing:
        report.text(
            f"not compared: {len(missing)} of {len(a.timed)} of A, which B lacks (only in A)"
        )
    return 1 if slower or slower_means or broken else 0


def mean_of(changes: Sequence[Change]) -> Change:
    """The geometric mean of ratios, and its noise if the noises are independent."""
    noises = [x.noise for x in changes if x.noise is not None]
    ratio = statistics.geometric_mean([x.ratio for x in changes])
    return Change(ratio, math.hypot(*noises) / len(changes) if noises else None)


def by_impl(rows: Sequence[Row]) -> dict[str, list[Row]]:
    names = ordered_names(row.impl for row in rows)
    return {name: [row for row in rows if row.impl == name] for name in names}


def mean_regressed(rows: Sequence[Row], fail_below: float) -> bool:
    """Of one implementation, by its means in each round."""
    rounds = max(len(row.pairs) for row in rows)
    means = [mean_of([row.pairs[i] for row in rows if i < len(row.pairs)]) for i in range(rounds)]
    return two_of_three([mean.direction < 0 and mean.ratio < fail_below for mean in means])


def first_label(file: File) -> str:
    line = next(iter(file.timed.values())).line
    return f"{case_label(line)} {line['impl']}"


class Report:
    """Prints paragraphs and tables."""

    def __init__(self, markdown: bool) -> None:
        self.markdown = markdown

    def text(self, text: str) -> None:
        print(text + ("\n" if self.markdown else ""))

    def heading(self, text: str) -> None:
        print(f"### {text}\n" if self.markdown else f"\n{text}")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
        if self.markdown:
            print(markdown_table(header, rows, left) + "\n")
        else:
            print(format_table(header, rows, left))

    def cases(self, rows: Sequence[Row], fail_below: float) -> None:
        self.heading(f"cases in both: {len(rows)}")
        self.table(CASE_HEADER, [case_cells(row, fail_below) for row in rows], 2)

    def means(self, rows: Sequence[Row]) -> None:
        table = []
        for impl, own in by_impl(rows).items():
            mean = mean_of([row.whole for row in own])
            directions = [row.direction for row in own]
            counts = [str(directions.count(x)) for x in (1, 0, -1)]
            cells = [str(len(own)), f"{mean.ratio:.3f}", noise_text(mean.noise)]
            table.append([impl, *cells, *counts])
        self.heading("by implementation")
        header = ["implementation", "cases", "geometric mean", "its noise"]
        self.table([*header, "faster", "noise", "slower"], table, 1)

    def worst(self, rows: Sequence[Row], fail_below: float) -> None:
        slow = sorted((row for row in rows if row.whole.ratio < 1), key=lambda row: row.whole.ratio)
        if slow:
            self.heading(f"the worst {min(WORST, len(slow))}")
            self.table(CASE_HEADER, [case_cells(row, fail_below) for row in slow[:WORST]], 2)

    def configs(self, rows: Sequence[Row]) -> None:
        if rows:
            self.heading("with another configuration")
            configs = [[row.label, row.impl, *map(config_of, (row.a, row.b))] for row in rows]
            self.table(["case", "implementation", "A", "B"], configs, 4)

    def alone(self, heading: str, found: Sequence[tuple[Line, str | None]]) -> None:
        if found:
            self.heading(f"{heading}: {len(found)}")
            table = [[case_label(line), line["impl"], status or "-"] for line, status in found]
            self.table(["case", "implementation", "in the other"], table, 3)

    def verdict(
        self, slower: int, slower_means: Sequence[str], broken: int, fail_below: float
    ) -> None:
        parts = [f"{slower} slower than {fail_below:g} beyond the noise"] if slower else []
        parts += [f"the mean of {impl} below {fail_below:g}" for impl in slower_means]
        parts += [f"{broken} failed or wrong"] if broken else []
        self.text(("" if self.markdown else "\n") + "regressions: " + (", ".join(parts) or "none"))


CASE_HEADER = ("case", "implementation", "A ms", "B ms", "ratio", "noise", "rounds", "change")


def case_cells(row: Row, fail_below: float) -> list[str]:
    whole = row.whole
    verdict = {-1: "slower", 0: "noise", 1: "faster"}[row.direction]
    if row.regressed(fail_below):
        verdict = "regression"
    rounds = "/".join(str(x) for x in dict.fromkeys((len(row.a.rounds), len(row.b.rounds))))
    times = [f"{x.time.median:.4g}" for x in (row.a, row.b)]
    mark = f"{verdict}, other config" if row.other_config else verdict
    return [
        row.label,
        row.impl,
        *times,
        f"{whole.ratio:.3f}",
        noise_text(whole.noise),
        rounds,
        mark,
    ]


def noise_text(noise: float | None) -> str:
    return "-" if noise is None else f"± {100 * noise:.1f} %"


def config_of(one: Measured) -> str:
    return str(one.line.get("config") or "-")
