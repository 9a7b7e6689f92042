"""Text tables and units."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns two spaces apart: the first `left` ones to the left, the others to the right.

    The last cell of a row that is too short takes the rest of its line.
    """
    lines = [header, *rows]
    columns = len(header)
    widths = [
        max(len(line[i]) for line in lines if i < len(line) - (len(line) < columns))
        for i in range(columns)
    ]

    def formatted(line: Sequence[str]) -> str:
        full = line if len(line) == columns else line[:-1]
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(full, widths, strict=False))
        ]
        return "  ".join([*cells, *line[len(full) :]]).rstrip()

    return "\n".join(formatted(line) for line in lines)


def format_bytes(count: float | None) -> str:
    """ "3.2 MiB"; "-" for what was not measured."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_number(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def format_digits(number: float | None, digits: int = 3) -> str:
    """ "0.0123", "1.23", "1234": with at least so many significant digits, and no exponent."""
    if number is None:
        return "-"
    before = math.floor(math.log10(abs(number))) + 1 if number else 1
    return f"{number:.{max(0, digits - before)}f}"


def format_seconds(seconds: float) -> str:
    """ "45 s", "2 min 10 s", "1 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def geometric_mean(numbers: Sequence[float]) -> float | None:
    return statistics.geometric_mean(numbers) if numbers else None
