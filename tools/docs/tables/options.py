"""Tables of one option: what the recorded lines say of kernels with and without it. Options are written as `bench
--config` takes them."""

from __future__ import annotations

from collections.abc import Sequence

from flashcute import ForwardConfig
from lines import Line, one, path, rounded, table, where

LENGTH = 4096
HEAD_DIMS = (64, 128, 256)
MASKS = {"none": False, "causal": True}
FILE = "gpu_options"

# Of `effect`: what a page may ask for, and its headers.
COLUMNS = {
    "change": ["changed"],
    "head_dim": ["head dimension"],
    "mask": ["mask"],
    "rates": ["TFLOP/s before", "after"],
    "time": ["times as long"],
}
NUMBERS = ("rates", "time")  # come last


def effect(columns: str, *changes: str) -> str:
    """Speed with each of these changes and without it, all else alike. `columns`: names of COLUMNS with commas; without
    "mask" of calls without one. A change is of the default configuration, or of another one: "CHANGED / BASE"."""
    chosen = columns.split(",")
    if not COLUMNS.keys() >= set(chosen) or ("change" not in chosen and len(changes) > 1):
        raise ValueError(
            f"columns: expected some of {', '.join(COLUMNS)}, with several changes also change, got {columns}"
        )
    rows: list[list[object]] = []
    for change in changes:
        found = pairs(change, tuple(MASKS) if "mask" in chosen else ("none",))
        if not found:
            raise ValueError(f"{FILE}: no line with {change}")
        for mask, before, after in found:
            cells: dict[str, list[object]] = {
                "change": [told(change)],
                "head_dim": [after["head_dim"]],
                "mask": [mask],
                "rates": [f"{x['tflops']:.0f}" for x in (before, after)],
                "time": [rounded(after["ms_p50"] / before["ms_p50"])],
            }
            rows.append([cell for name in chosen for cell in cells[name]])
    header = [title for name in chosen for title in COLUMNS[name]]
    numbers = sum(len(COLUMNS[name]) for name in chosen if name in NUMBERS)
    text = table(header, rows, numbers)
    return f"{text}\n\n{source(FILE)} {LENGTH:,} tokens, the mma.sync kernel."


def pairs(change: str, masks: Sequence[str]) -> list[tuple[str, Line, Line]]:
    """The mask, and the lines without and with the change, of each head dimension that was timed with it."""
    changed, _, base = (x.strip() for x in change.partition("/"))
    found = []
    for head_dim in HEAD_DIMS:
        for mask in masks:
            cell = {"head_dim": head_dim, "causal": MASKS[mask], "seqlen_q": LENGTH, "status": "ok"}
            for after in where(FILE, impl=implementation(changed), **cell):
                found.append((mask, one(FILE, impl=implementation(base), **cell), after))
    return found


def implementation(changes: str) -> str:
    return f"flashcute[{changes}]" if changes else "flashcute"


def told(change: str) -> str:
    """In Python's words; what both kernels have is told apart."""
    changed, _, base = (x.strip() for x in change.partition("/"))
    both = base.split(",") if base else []
    own = [in_python(x) for x in changed.split(",") if x not in both]
    beside = f", both with `{', '.join(map(in_python, both))}`" if both else ""
    return f"`{', '.join(own)}`{beside}"


def in_python(change: str) -> str:
    name, _, value = change.partition("=")
    is_boolean = isinstance(getattr(ForwardConfig(), name), bool)
    return f"{name}={bool(int(value))}" if is_boolean else change


def source(file: str) -> str:
    """Which machine, from which lines."""
    first = where(file, impl="flashcute")[0]
    gpu = first["device"].removeprefix("NVIDIA ").partition(",")[0]
    name = path(file)
    return f"One {gpu}, {first['dtype']}; lines: [{name.rpartition('/')[2]}]({name})."


def rates(file: str, head_dims: str, *configurations: str) -> str:
    """TFLOP/s of each of these configurations by head dimension and mask; "" is the default. What was not timed is
    left empty: an option may need others changed, which depend on the head dimension."""
    dims = [int(x) for x in head_dims.split(",")]
    masks = {"full": False, "causal": True}
    rows = []
    for words in configurations:
        row = [f"`{words.replace(',', ', ')}`" if words else "default"]
        for head_dim in dims:
            for causal in masks.values():
                cell = where(file, head_dim=head_dim, causal=causal, seqlen_q=LENGTH)
                found = [x["tflops"] for x in cell if has_options(x, words)]
                row.append(f"{found[0]:.0f}" if found else "-")
        rows.append(row)
    columns = [f"{head_dim} {mask}" for head_dim in dims for mask in masks]
    return table(["configuration", *columns], rows, numbers=len(columns))


def has_options(line: Line, words: str) -> bool:
    """Whether a line is of our kernel with these options, and with others only where these need them."""
    name, _, written = line["impl"].rstrip("]").partition("[")
    implied = {"stale_max=0", "scores_ahead=0"}
    asked, given = (set(filter(None, x.split(","))) for x in (words, written))
    return name == "flashcute" and asked - implied == given - implied and asked <= given
