"""Recorded lines (benchmarks/results/*.jsonl), and the Markdown that tables are made of."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"

Line = dict[str, Any]
# batch, heads, kv_heads, length, head dimension, causal
Cell = tuple[Any, ...]


@functools.cache
def lines(file: str) -> tuple[Line, ...]:
    """Of a file by its name without folder and suffix."""
    text = (ROOT / RESULTS / f"{file}.jsonl").read_text()
    return tuple(json.loads(line) for line in text.splitlines() if line)


def path(file: str) -> str:
    return f"{RESULTS}/{file}.jsonl"


def link(text: str, file: str) -> str:
    return f"[{text}]({path(file)})"


def where(file: str, **fields: Any) -> list[Line]:
    """The lines that have these values."""
    return [x for x in lines(file) if all(x.get(name) == value for name, value in fields.items())]


def one(file: str, **fields: Any) -> Line:
    """The only line that has these values."""
    found = where(file, **fields)
    if len(found) != 1:
        raise ValueError(f"{file}: {len(found)} lines with {fields}")
    return found[0]


def table(header: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0) -> str:
    """A Markdown table; its last `numbers` columns to the right."""
    marks = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    told = [header, marks, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in told)


def rounded(number: float | None, decimals: int = 2) -> str:
    """With more decimals where rounding would hide on which side of 1 the number lies."""
    if number is None:
        return "-"
    text = f"{number:.{decimals}f}"
    return rounded(number, decimals + 1) if (float(text) < 1) != (number < 1) else text


def speed_ups(file: str, peer: str, ours: str = "flashcute") -> dict[Cell, float]:
    """Their median time over ours in each cell."""
    times: dict[Cell, dict[str, list[float]]] = {}
    fields = ("batch", "heads", "kv_heads", "seqlen_q", "head_dim", "causal")
    for line in lines(file):
        if "ms_p50" in line:
            cell = times.setdefault(tuple(line[name] for name in fields), {})
            cell.setdefault(line["impl"], []).append(line["ms_p50"])
    return {
        cell: statistics.median(by_impl[peer]) / statistics.median(by_impl[ours])
        for cell, by_impl in times.items()
    }
