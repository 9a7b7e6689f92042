"""Text tables and units."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns two spaces apart: the first `left` ones to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


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


def geometric_mean(numbers: Sequence[float]) -> float | None:
    return statistics.geometric_mean(numbers) if numbers else None
