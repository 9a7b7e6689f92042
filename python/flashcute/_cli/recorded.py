"""Recorded measurements: files of JSON lines as ``bench --out`` writes them, and which of their lines are wanted."""

from __future__ import annotations

import argparse
import collections
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .options import UsageError, list_of, positive_int

Line = dict[str, Any]

# What tells one measured problem from another, in every kind of line; a field that a line lacks does not count.
CASE_FIELDS = (
    *("kind", "pass", "preset", "case", "schedule", "call", "batch", "heads", "kv_heads"),
    *("seqlen", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v", "causal", "window", "sink"),
    *("dtype", "layers", "parameters", "steps", "cold_l2"),
)
Key = tuple[tuple[str, Any], ...]


class Field(NamedTuple):
    meaning: str
    holds: Callable[[Any], bool]  # whether it is that


NAME = Field("a name", lambda x: isinstance(x, str))
COUNT = Field("a positive integer", lambda x: type(x) is int and x > 0)
POSITIVE = Field("a positive number", lambda x: type(x) in (int, float) and 0 < x < math.inf)
MAGNITUDE = Field("a number >= 0", lambda x: type(x) in (int, float) and 0 <= x < math.inf)

SIZES = ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim")
PROBLEM = (*SIZES, "causal", "dtype")
# What `checked` looks at: a value of another type would be a traceback, or a wrong picture, much later.
FIELDS = {
    **dict.fromkeys(("impl", "dtype", "device", "status", "pass"), NAME),
    **dict.fromkeys((*SIZES, "seqlen", "head_dim_v"), COUNT),
    **dict.fromkeys(("causal", "sink"), Field("true or false", lambda x: isinstance(x, bool))),
    "window": Field(
        "two integers",
        lambda x: isinstance(x, list) and [type(side) for side in x] == [int, int],
    ),
    "measured": Field("an object", lambda x: isinstance(x, dict)),
    **dict.fromkeys(("ms_p10", "ms_p50", "ms_p90", "ms_p99"), POSITIVE),
    **dict.fromkeys(("peak_bytes", "rel_l2", "dq_rel_l2", "dk_rel_l2", "dv_rel_l2"), MAGNITUDE),
}
# What lines have without exception, by kind.
NEEDED = {
    "forward": ("impl", *PROBLEM),
    "backward": ("impl", *PROBLEM),
    "packed": ("heads", "kv_heads", "head_dim", "causal"),
    "io": PROBLEM,
}


# ---- files -------------------------------------------------------------------------------------


def read(files: Iterable[Path]) -> list[Line]:
    """All lines, in the order of the files. Raises UsageError for a file that is no such thing."""
    return [line for file in files for line in read_file(file)]


def read_file(file: Path) -> list[Line]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as problem:
        raise UsageError(f"{file}: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file}: expected JSON lines, got bytes that are no text") from None
    lines = []
    for number, row in enumerate(text.splitlines(), 1):
        if not row.strip():
            continue
        try:
            lines.append(checked(parsed(row)))
        except ValueError as problem:
            raise UsageError(f"{file}, line {number}: expected {problem}") from None
    if not lines:
        raise UsageError(f"{file}: expected JSON lines, got an empty file")
    return lines


def parsed(row: str) -> Any:
    """Raises ValueError with what was expected."""

    def refuse(constant: str) -> None:
        raise ValueError(f"JSON, which has no {constant}")

    try:
        return json.loads(row, parse_constant=refuse)
    except json.JSONDecodeError as problem:
        raise ValueError(f"JSON: {problem}") from None


def checked(line: Any) -> Line:
    """The same. What it lets through, charts and comparisons can work with."""
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        raise ValueError('an object with a "kind", as bench --out writes')
    missing = [name for name in NEEDED.get(line["kind"], ()) if line.get(name) is None]
    if missing:
        raise ValueError(f"{missing[0]}, which lines of kind {line['kind']} have")
    for name, field in FIELDS.items():
        value = line.get(name)
        if value is not None and not field.holds(value):
            raise ValueError(f"{field.meaning} as {name}, got {value!r}")
    return line


def opened_to_append(option: str, file: str) -> TextIO:
    """Before anything is measured, since what cannot be recorded need not be. Raises UsageError naming the option."""
    try:
        return open(file, "a", encoding="utf-8")
    except OSError as problem:
        raise UsageError(f"{option} {file}: {problem.strerror}") from None


def append_line(out: TextIO, line: Line) -> None:
    """At once: a run that is interrupted keeps the lines that it has."""
    out.write(json.dumps(line, allow_nan=False) + "\n")
    out.flush()


def is_timed(line: Line) -> bool:
    """Whether it holds the time of an implementation."""
    return line.get("ms_p50") is not None and line.get("impl") is not None


def counted(lines: Iterable[Line]) -> str:
    """ "3 compile, 1 forward (skipped)": how many of each kind, by status where that is not ok."""
    kinds = collections.Counter(
        x["kind"] + (f" ({x['status']})" if x.get("status", "ok") != "ok" else "") for x in lines
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


# ---- one line ----------------------------------------------------------------------------------


def pass_of(line: Line) -> str:
    """forward or backward, for lines of the kinds that have both too."""
    return str(line.get("pass") or line["kind"])


def head_ratio(line: Line) -> int | None:
    """Query heads for each key head."""
    heads, kv_heads = line.get("heads"), line.get("kv_heads")
    return None if heads is None or not kv_heads else int(heads) // int(kv_heads)


def case_key(line: Line) -> Key:
    """Of the problem that was measured; hashable. What is at its default is as if the line did not have the field,
    which older lines have not."""
    defaults = {"sink": False, "head_dim_v": line.get("head_dim")}
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name in CASE_FIELDS
        if (value := line.get(name)) is not None and value != defaults.get(name)
    )


def case_label(line: Line) -> str:
    """Short words for the problem, of what the line knows."""
    of_bench = ("forward", "backward", "window")
    words = [] if line["kind"] in of_bench else [line["kind"].replace("_", " ")]
    if pass_of(line) == "backward":
        words.append("gradients")
    words += [str(line[name]) for name in ("preset", "case", "schedule", "call") if line.get(name)]
    if line.get("batch") is not None:
        words.append(f"b{line['batch']}")
    lengths = [line[name] for name in ("seqlen", "seqlen_q", "seqlen_k") if line.get(name)]
    if lengths:
        words.append("s" + "/".join(str(x) for x in dict.fromkeys(lengths)))
    heads = [line[name] for name in ("heads", "kv_heads") if line.get(name)]
    if heads:
        words.append("h" + "/".join(str(x) for x in dict.fromkeys(heads)))
    dims = [line[name] for name in ("head_dim", "head_dim_v") if line.get(name)]
    if dims:
        words.append("d" + "/".join(str(x) for x in dict.fromkeys(dims)))
    if line.get("causal") is not None:
        words.append("causal" if line["causal"] else "full")
    if line.get("window") is not None:
        words.append("window {},{}".format(*line["window"]))
    words += ["sink"] if line.get("sink") else []
    words += [str(line["dtype"])] if line.get("dtype") else []
    return " ".join(words)


# ---- which lines -------------------------------------------------------------------------------


class Condition(NamedTuple):
    """Of --where: a field and the value that it must have."""

    field: str
    value: Any

    def holds(self, line: Line) -> bool:
        found = line.get(self.field)
        return bool(found == self.value) or str(found) == str(self.value)


def condition(text: str) -> Condition:
    """Type of an argument like "batch=4" or "commit=9f0f9f8"."""
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, for example batch=4, got {text!r}")
    try:
        return Condition(field, json.loads(value))
    except json.JSONDecodeError:
        return Condition(field, value)


def implementation_names(text: str) -> list[str]:
    """Type of a list of names; commas between brackets part none: flashcute[block_m=64,stages=2],fa3."""
    names, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            names.append("")
        else:
            names[-1] += letter
    if depth != 0 or not all(names):
        raise argparse.ArgumentTypeError(f"expected NAME,NAME,... got {text!r}")
    return names


def add_filters(parser: Any) -> None:
    """Options that select lines; `wanted` reads them."""
    parser.add_argument("--device", metavar="TEXT", help="only devices whose name contains this")
    parser.add_argument("--dtype", metavar="NAME", help="only this one")
    parser.add_argument(
        "--pass", dest="passes", choices=("forward", "backward"), help="only this one"
    )
    parser.add_argument(
        "--impls",
        type=implementation_names,
        metavar="NAME,...",
        help="only these implementations (default: all that were measured)",
    )
    parser.add_argument(
        "--head-dims", type=list_of(positive_int), metavar="64,128", help="only these"
    )
    parser.add_argument(
        "--kv-ratio", type=positive_int, metavar="N", help="only N query heads for each key head"
    )
    parser.add_argument(
        "--where",
        type=condition,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="only lines whose field has this value, for example batch=4; may be given several times",
    )


def wanted(
    lines: Iterable[Line], options: argparse.Namespace, impls: Sequence[str] | None
) -> list[Line]:
    """Those that the options of add_filters let through; of these implementations, where given."""
    return [
        x
        for x in lines
        if (options.device is None or options.device in str(x.get("device")))
        and (options.dtype is None or options.dtype == x.get("dtype"))
        and (options.passes is None or options.passes == pass_of(x))
        and (impls is None or x.get("impl") in impls)
        and (options.head_dims is None or x.get("head_dim") in options.head_dims)
        and (options.kv_ratio is None or options.kv_ratio == head_ratio(x))
        and all(one.holds(x) for one in options.where)
    ]


def expect_one(lines: Iterable[Line], of: Callable[[Line], Any], what: str, option: str) -> None:
    """Raises UsageError where lines that are shown together differ in what they must not."""
    found = sorted({str(of(x)) for x in lines if of(x) is not None})
    if len(found) > 1:
        raise UsageError(f"several {what} in the lines: {', '.join(found)}; choose with {option}")


# ---- what they say -----------------------------------------------------------------------------


def medians(
    lines: Iterable[Line], key: Callable[[Line], Any], value: Callable[[Line], float]
) -> dict[Any, float]:
    """By key, in the order of first appearance; a case that was measured several times has the median."""
    found: dict[Any, list[float]] = {}
    for x in lines:
        found.setdefault(key(x), []).append(value(x))
    return {name: statistics.median(values) for name, values in found.items()}


def origin_text(lines: Sequence[Line]) -> str:
    """Where the numbers come from: every distinct value."""

    def values(field: str) -> list[str]:
        return [str(x) for x in dict.fromkeys(line.get(field) for line in lines) if x is not None]

    parts = [*values("device"), *values("dtype"), *values("library")]
    parts += [f"torch {version}" for version in values("torch")]
    parts += [f"cuDNN {cudnn_version(number)}" for number in values("cudnn")]
    parts += sorted({f"{x['impl']} {x['impl_version']}" for x in lines if of_another_package(x)})
    parts += [f"driver {version}" for version in values("driver")]
    commits = [commit[:7] if is_hash(commit) else commit for commit in values("commit")]
    if commits:
        *first, last = commits
        parts.append(f"commits {', '.join(first)} and {last}" if first else f"commit {last}")
    return ", ".join(parts)


def of_another_package(line: Line) -> bool:
    """Whether the implementation's version is neither flashcute's nor torch's."""
    of_torch = ("flashcute", "sdpa", "naive")
    return bool(line.get("impl_version")) and not line.get("impl", "").startswith(of_torch)


def is_hash(text: str) -> bool:
    return len(text) == 40 and set(text) <= set("0123456789abcdef")


def cudnn_version(number: str) -> str:
    """ "9.19.0" of 91900."""
    if not number.isdigit() or len(number) < 5:
        return number
    return f"{int(number) // 10000}.{int(number) // 100 % 100}.{int(number) % 100}"


def ratio_text(ratio: float, decimals: int = 2) -> str:
    """With more decimals where rounding would hide on which side of 1 the number lies."""
    text = f"{ratio:.{decimals}f}"
    return ratio_text(ratio, decimals + 1) if (float(text) < 1) != (ratio < 1) else text


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns to the left, the others to the right."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])
