"""What ``plot`` shows, as data: from recorded lines to charts and tables. Without matplotlib; see drawing.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from .options import UsageError
from .problem import EPSILON, ITEM_BYTES, Case
from .recorded import (
    POSITIVE,
    Key,
    Line,
    case_key,
    case_label,
    counted,
    expect_one,
    head_ratio,
    is_timed,
    markdown_table,
    medians,
    origin_text,
    pass_of,
    ratio_text,
)
from .table import format_bytes, geometric_mean
from .traffic import (
    Ceilings,
    flash_dram,
    lse_bytes,
    matrix_bytes,
    published_ceilings,
    standard,
)

OURS = "flashcute"

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in print.
STYLES = {
    "flashcute": ("flashcute", "#D55E00", "o"),
    "flashcute_deterministic": ("flashcute, deterministic", "#E69F00", "P"),
    "fa3": ("FlashAttention-3", "#CC79A7", "v"),
    "fa4": ("FlashAttention-4", "#882255", "<"),
    "sdpa_flash": ("torch, FlashAttention-2", "#0072B2", "s"),
    "sdpa_cudnn": ("torch, cuDNN", "#009E73", "^"),
    "sdpa_efficient": ("torch, memory-efficient", "#56B4E9", "D"),
    "sdpa_math": ("torch, math", "#999999", "x"),
    "sdpa": ("torch", "#0072B2", "s"),
    "naive": ("naive", "#000000", "+"),
    "varlen_attn": ("torch, varlen_attn", "#0072B2", "s"),
    "flex": ("torch, FlexAttention compiled", "#009E73", "^"),
    "flex_built": ("the same, both masks made", "#E69F00", "D"),
    "xformers": ("xFormers", "#F0E442", "h"),
}
OTHER_STYLES = (("#E69F00", "P"), ("#F0E442", "*"), ("#CC79A7", "h"), ("#56B4E9", "X"))

Point = tuple[float, float]


class Curve(NamedTuple):
    """Of one implementation in one panel."""

    name: str  # tells the style
    points: tuple[Point, ...]
    hollow: bool = False


class Panel(NamedTuple):
    title: str
    curves: tuple[Curve, ...]
    rows: tuple[str, ...] = ()  # of dots: what lies at y = 0, 1, ...


class Rule(NamedTuple):
    """A line to compare with."""

    across: str  # "x", "y": where this axis has the value; "slope": y = value * x
    value: float
    label: str = ""


class Chart(NamedTuple):
    kind: str
    title: str  # for readers who do not see it
    form: str  # lengths: curves over the sequence length; dots: one row for each case; scatter: both axes logarithmic
    panels: tuple[tuple[Panel, ...], ...]
    x: str
    y: str
    footer: str
    table: str  # Markdown
    shown: int  # how many lines
    rules: tuple[Rule, ...] = ()
    bytes_y: bool = False  # logarithmic, with units of bytes

    @property
    def digest(self) -> str:
        """Of all that is shown, to six digits: a picture with another one is out of date."""
        rounded = json.dumps(_rounded(self._replace(table="", shown=0)), ensure_ascii=False)
        return hashlib.sha256(rounded.encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return [_rounded(x) for x in value] if isinstance(value, list | tuple) else value


# ---- what all of them share --------------------------------------------------------------------


def label(name: str) -> str:
    return STYLES[name][0] if name in STYLES else name


def ordered_names(names: Iterable[str]) -> list[str]:
    """Those with a style in its order, then the others."""
    found = dict.fromkeys(names)
    return [x for x in STYLES if x in found] + sorted(x for x in found if x not in STYLES)


def head_dim_and_mask(head_dim: int, causal: bool) -> str:
    return f"head dim {head_dim}, {'causal' if causal else 'full'}"


def format_length(seqlen: float) -> str:
    """4096 as "4k"."""
    return f"{seqlen / 1024:.0f}k" if seqlen >= 1024 and seqlen % 1024 == 0 else f"{seqlen:.0f}"


def self_attention(lines: Iterable[Line]) -> list[Line]:
    """Results of calls or gradients that were right, with as many keys as queries and without a window, for one
    device and dtype, either calls or gradients, and one number of query heads for each key head."""
    lines = list(lines)
    found = [
        x
        for x in lines
        if x["kind"] in ("forward", "backward")
        and x.get("status", "ok") == "ok"
        and x.get("window") is None
        and x["seqlen_q"] == x["seqlen_k"]
    ]
    same_machine(found)
    expect_one(found, head_ratio, "numbers of query heads for each key head", "--kv-ratio")
    if not found:
        raise UsageError(
            "no measurement matches: expected lines of bench, forward or backward, with status ok, as many keys as "
            f"queries and no window; {came(lines)}"
        )
    return found


def came(lines: Iterable[Line]) -> str:
    """For messages: which lines there are."""
    return f"the selected lines: {counted(lines) or 'none'}"


def has_rate(line: Line) -> bool:
    return POSITIVE.holds(line.get("tflops"))


def same_machine(lines: Sequence[Line]) -> None:
    expect_one(lines, lambda x: x.get("device"), "devices", "--device")
    expect_one(lines, lambda x: x.get("dtype"), "dtypes", "--dtype")
    expect_one(lines, pass_of, "passes", "--pass")


# head dimension, causal, sequence length, implementation
Cell = tuple[int, bool, int, str]
# (head dimension, causal) -> sequence length -> implementation -> value
Grid = dict[tuple[int, bool], dict[int, dict[str, float]]]


def cell(line: Line) -> Cell:
    return line["head_dim"], line["causal"], line["seqlen_q"], line["impl"]


def grid(values: dict[Cell, float]) -> Grid:
    found: Grid = {}
    for (head_dim, causal, seqlen, impl), value in sorted(values.items()):
        found.setdefault((head_dim, causal), {}).setdefault(seqlen, {})[impl] = value
    return found


def one_problem_a_length(lines: Sequence[Line]) -> None:
    """Raises UsageError where a point of a curve would stand for several problems."""
    problems: dict[tuple[Any, ...], dict[Key, Line]] = {}
    for x in lines:
        problems.setdefault(cell(x)[:3], {})[case_key(x)] = x
    for (head_dim, causal, seqlen), found in problems.items():
        if len(found) > 1:
            field, value = next(
                (name, value)
                for key in found
                for name, value in key
                if any(dict(other).get(name) != value for other in found)
            )
            raise UsageError(
                f"several problems with {head_dim_and_mask(head_dim, causal)}, length {seqlen}: "
                f"{'; '.join(sorted(case_label(x) for x in found.values()))}; "
                f"choose with --where, for example --where {field}={value}"
            )


def over_length(values: Grid, names: Sequence[str]) -> tuple[tuple[Panel, ...], ...]:
    """A row of panels for each head dimension, a column for each mask."""
    head_dims = sorted({head_dim for head_dim, _ in values})
    masks = sorted({causal for _, causal in values})
    return tuple(
        tuple(
            Panel(
                head_dim_and_mask(head_dim, causal),
                tuple(
                    Curve(name, points)
                    for name in names
                    if (points := points_of(values.get((head_dim, causal), {}), name))
                ),
            )
            for causal in masks
        )
        for head_dim in head_dims
    )


def points_of(lengths: dict[int, dict[str, float]], name: str) -> tuple[Point, ...]:
    return tuple((float(seqlen), row[name]) for seqlen, row in lengths.items() if name in row)


def grid_table(
    values: Grid, names: Sequence[str], cells: Callable[[dict[str, float]], dict[str, str]]
) -> str:
    rows = []
    for (head_dim, causal), lengths in values.items():
        for seqlen, row in lengths.items():
            texts = cells(row)
            what = [f"{head_dim} {'causal' if causal else 'full'}", str(seqlen)]
            rows.append(what + [texts.get(name, "-") for name in names])
    header = ["head dim, mask", "seqlen", *(label(name) for name in names)]
    return markdown_table(header, rows)


def described(what: str, names: Iterable[str], lines: Sequence[Line]) -> str:
    first = lines[0]
    where = ", ".join(str(first[x]) for x in ("device", "dtype") if first.get(x))
    told = {"forward": "forward", "backward": "gradients"}.get(pass_of(first), pass_of(first))
    return f"{what}: {'; '.join(label(name) for name in names)} ({told}, {where})"


# ---- tflops ------------------------------------------------------------------------------------


def tflops(lines: Iterable[Line]) -> Chart:
    """TFLOP/s over the sequence length."""
    found = [x for x in self_attention(lines) if has_rate(x)]
    if not found:
        raise UsageError("no line holds tflops above 0")
    one_problem_a_length(found)
    speeds = medians(found, cell, lambda x: x["tflops"])
    unit, factor = ("GFLOP/s", 1e3) if max(speeds.values()) < 2 else ("TFLOP/s", 1.0)
    values = grid({key: speed * factor for key, speed in speeds.items()})
    names = ordered_names(x["impl"] for x in found)

    def cells(row: dict[str, float]) -> dict[str, str]:
        best = max(row.values())
        texts = {name: f"{speed:.0f}" for name, speed in row.items()}
        return {name: f"**{x}**" if row[name] == best else x for name, x in texts.items()}

    return Chart(
        kind="tflops",
        title=described(f"{unit} by sequence length", names, found),
        form="lengths",
        panels=over_length(values, names),
        x="sequence length",
        y=unit,
        footer=origin_text(found),
        table=f"{unit}, the fastest of a row in bold\n\n" + grid_table(values, names, cells),
        shown=len(found),
    )


# ---- speed-up ----------------------------------------------------------------------------------


def meaning_of_ratio(ours: str) -> str:
    return f"their time / {label(ours)}'s: above 1, {label(ours)} is faster"


class SpeedUp(NamedTuple):
    line: Line  # of ours
    peer: str
    ratio: float


def speed_ups(lines: Sequence[Line], ours: str, peers: Sequence[str] | None) -> list[SpeedUp]:
    """Their median time over ours, in each case that both were timed in."""
    times = medians(lines, lambda x: (case_key(x), x["impl"]), lambda x: x["ms_p50"])
    own = {case_key(x): x for x in lines if x["impl"] == ours}
    found = []
    for (case, impl), time in times.items():
        is_peer = not impl.startswith(OURS) if peers is None else impl in peers
        if case in own and impl != ours and is_peer:
            found.append(SpeedUp(own[case], impl, time / times[(case, ours)]))
    if not found:
        timed = ", ".join(sorted({x["impl"] for x in lines})) or "no times of implementations"
        raise UsageError(
            f"no case was timed with both {ours} and another implementation: the lines hold {timed}; "
            "see --ours, and --impls for other variants of flashcute"
        )
    return found


def speedup(
    lines: Iterable[Line],
    ours: str = OURS,
    peers: Sequence[str] | None = None,
    by: str | None = None,
) -> Chart:
    """Their time over ours, by length or by case; by default by length where no two cases share one."""
    timed = [x for x in lines if is_timed(x) and x.get("status", "ok") == "ok"]
    same_machine(timed)
    found = speed_ups(timed, ours, peers)
    if by is None:
        by = "length" if fits_lengths(found) else "case"
    impls = {ours, *(x.peer for x in found)}
    cases = {case_key(x.line) for x in found}
    used = [x for x in timed if x["impl"] in impls and case_key(x) in cases]
    if by == "length":
        return speedup_by_length(found, used, ours)
    marks = [Mark(x.line.get("head_dim"), row_label(x.line), x.peer, x.ratio) for x in found]
    return of_marks("speedup", marks, used, ours)


def fits_lengths(found: Sequence[SpeedUp]) -> bool:
    """Whether curves over the length can show these cases."""
    cells = {(case_key(x.line), *cell(x.line)[:3]) for x in found if "seqlen_q" in x.line}
    return (
        all(x.line["kind"] in ("forward", "backward") and not x.line.get("window") for x in found)
        and all(x.line["seqlen_q"] == x.line["seqlen_k"] for x in found)
        and len({one[1:] for one in cells}) == len(cells)
    )


def speedup_by_length(found: Sequence[SpeedUp], lines: Sequence[Line], ours: str) -> Chart:
    kept = self_attention(lines)
    one_problem_a_length(kept)
    kept_cases = {case_key(x) for x in kept}
    ratios = {(*cell(x.line)[:3], x.peer): x.ratio for x in found if case_key(x.line) in kept_cases}
    values = grid(ratios)
    names = ordered_names(x.peer for x in found)
    means = [mean_text([x for key, x in ratios.items() if key[3] == name]) for name in names]
    table = grid_table(values, names, lambda row: {x: ratio_text(y) for x, y in row.items()})
    return Chart(
        kind="speedup",
        title=described(f"Their time over {label(ours)}'s by sequence length", names, kept),
        form="lengths",
        panels=over_length(values, names),
        x="sequence length",
        y=f"their time / {label(ours)}'s",
        footer=f"above 1, {label(ours)} is faster; {origin_text(kept)}",
        table=f"{meaning_of_ratio(ours)}\n\n{table}\n| geometric mean |  | {' | '.join(means)} |",
        shown=len(kept),
        rules=(Rule("y", 1.0),),
    )


def mean_text(ratios: Sequence[float]) -> str:
    mean = geometric_mean(ratios)
    return "-" if mean is None else ratio_text(mean)


def row_label(line: Line) -> str:
    """The case without what the panel and the footer tell."""
    if line["kind"] == "packed" and "case" in line:
        name = line["case"].replace("_", " ").replace("lognormal", "log-normal")
        mask = "causal" if line["causal"] else "full"
        return f"{name}, {mask}, {line['heads']}/{line['kv_heads']} heads"
    told: Line = {"head_dim": None, "dtype": None, "pass": None}
    if line["kind"] == "backward":
        told["kind"] = "forward"
    return case_label(line | told)


class Mark(NamedTuple):
    head_dim: int | None
    case: str
    peer: str
    ratio: float


def of_marks(
    kind: str, marks: Sequence[Mark], lines: Sequence[Line], ours: str = OURS, also: str = ""
) -> Chart:
    """A panel for each head dimension, a row for each case, a mark for each library."""
    names = ordered_names(mark.peer for mark in marks)
    panels, rows = [], []
    for head_dim in sorted({mark.head_dim for mark in marks}, key=lambda d: d or 0):
        own = [mark for mark in marks if mark.head_dim == head_dim]
        cases = tuple(dict.fromkeys(mark.case for mark in own))
        curves = tuple(
            Curve(
                name,
                tuple((x.ratio, float(cases.index(x.case))) for x in own if x.peer == name),
            )
            for name in names
        )
        title = "" if head_dim is None else f"head dim {head_dim}"
        panels.append((Panel(title, tuple(x for x in curves if x.points), cases),))
        for case in cases:
            ratios = {mark.peer: mark.ratio for mark in own if mark.case == case}
            texts = [ratio_text(ratios[name]) if name in ratios else "-" for name in names]
            rows.append([str(head_dim or "-"), case, *texts])
    means = [mean_text([mark.ratio for mark in marks if mark.peer == name]) for name in names]
    rows.append(["", "geometric mean", *means])
    header = ["head dim", "case", *(label(name) for name in names)]
    return Chart(
        kind=kind,
        title=described(f"Their time over {label(ours)}'s by case", names, lines),
        form="dots",
        panels=tuple(panels),
        x=meaning_of_ratio(ours),
        y="",
        footer=", ".join(filter(None, (origin_text(lines), also))),
        table=f"{meaning_of_ratio(ours)}\n\n{markdown_table(header, rows, left=2)}",
        shown=len(lines),
        rules=(Rule("x", 1.0),),
    )


# ---- masks -------------------------------------------------------------------------------------


DOCUMENT_FIELDS = {
    *("tokens", "head_dim", "ms_flex_documents", "ms_flex_build"),
    *("ms_mapped_documents", "ms_build_documents"),
}


def masks(lines: Iterable[Line], peers: Sequence[str] | None = None) -> Chart:
    """Packed sequences, and documents in one row, beside other libraries."""
    lines = list(lines)
    shown = [
        x
        for x in lines
        if (x["kind"] == "packed" and is_timed(x) and pass_of(x) == "forward")
        or (x["kind"] == "block_masks" and set(x) >= DOCUMENT_FIELDS)
    ]
    marks = [x for x in (*packed(shown), *documents(shown)) if peers is None or x.peer in peers]
    if not marks:
        raise UsageError(
            "no measurement matches: expected lines of packed sequences or of documents (packed, block_masks) beside "
            f"another implementation; {came(lines)}"
        )
    expect_one(shown, lambda x: x.get("device"), "devices", "--device")
    return of_marks("masks", marks, shown, also="forward")


def packed(lines: Iterable[Line]) -> Iterator[Mark]:
    """Peers are measured beside ours in the same case: one line for each implementation."""
    found = [x for x in lines if x["kind"] == "packed"]
    if found:
        for x in speed_ups(found, OURS, None):
            yield Mark(x.line["head_dim"], row_label(x.line), x.peer, x.ratio)


def documents(lines: Iterable[Line]) -> Iterator[Mark]:
    for x in lines:
        if x["kind"] == "block_masks":
            case = f"documents {format_length(x['tokens'])}, causal, 32/8 heads"
            theirs, own = x["ms_flex_documents"], x["ms_mapped_documents"]
            yield Mark(x["head_dim"], case, "flex", theirs / own)
            built = (theirs + x["ms_flex_build"]) / (own + x["ms_build_documents"])
            yield Mark(x["head_dim"], case, "flex_built", built)


# ---- memory ------------------------------------------------------------------------------------


def memory(lines: Iterable[Line]) -> Chart:
    """Peak memory beside the inputs, for each query head of each sequence: so problems with other numbers of them
    compare. Where several share a length, the largest. A peak of 0 is below what the meter of the CPU notices."""
    found = [x for x in self_attention(lines) if x.get("peak_bytes")]
    if not found:
        raise UsageError("no line holds peak_bytes above 0")
    peaks: dict[Cell, float] = {}
    for x in found:
        key, peak = cell(x), x["peak_bytes"] / (x["batch"] * x["heads"])
        peaks[key] = max(peak, peaks.get(key, 0.0))
    values = grid(peaks)
    names = ordered_names(x["impl"] for x in found)
    table = grid_table(values, names, lambda row: {x: format_bytes(y) for x, y in row.items()})
    what = "peak memory beside the inputs, for each head of each sequence"
    return Chart(
        kind="memory",
        title=described(what[0].upper() + what[1:], names, found),
        form="lengths",
        panels=over_length(values, names),
        x="sequence length",
        y="peak memory / (batch x heads)",
        footer=f"beside the inputs, the output included; {origin_text(found)}",
        table=f"{what}\n\n{table}",
        shown=len(found),
        bytes_y=True,
    )


# ---- error -------------------------------------------------------------------------------------

# What each pass gives, and the field of its error.
RESULTS: dict[str, tuple[tuple[str, str], ...]] = {
    "forward": (("output", "rel_l2"),),
    "backward": tuple((f"gradient of {x}", f"d{x}_rel_l2") for x in "qkv"),
}


def error(lines: Iterable[Line], relative_to: str | None = None) -> Chart:
    """The relative L2 error against float64, or its ratio to that of another implementation in the same dtype."""
    found = self_attention(lines)
    results = RESULTS[pass_of(found[0])]
    found = [x for x in found if all(x.get(field) is not None for _, field in results)]
    if not found:
        raise UsageError(f"no line holds {', '.join(field for _, field in results)}")
    rows = sorted({(x["head_dim"], x["causal"]) for x in found})
    row_names = tuple(head_dim_and_mask(*row) for row in rows)
    names = [x for x in ordered_names(x["impl"] for x in found) if x != relative_to]
    if relative_to is not None and len(names) == len({x["impl"] for x in found}):
        raise UsageError(f"--relative-to: no line of {relative_to}, only of {', '.join(names)}")
    panels, table_rows = [], []
    for title, field in results:
        errors = medians(
            found,
            lambda x: (x["head_dim"], x["causal"], x["impl"]),
            lambda x, field=field: x[field],  # type: ignore[misc]
        )
        if relative_to is not None:
            errors = {
                (*row, impl): value / errors[(*row, relative_to)]
                for (*row, impl), value in errors.items()
                if errors.get((*row, relative_to))  # one key: both are exact
            }
        curves = [
            Curve(
                name,
                tuple(
                    (errors[(*row, name)], float(y))
                    for y, row in enumerate(rows)
                    if (*row, name) in errors
                ),
            )
            for name in names
        ]
        panels.append(Panel(title, tuple(x for x in curves if x.points), row_names))
        form = "{:.2f}" if relative_to is not None else "{:.2e}"
        for row, row_name in zip(rows, row_names, strict=True):
            texts = [
                form.format(errors[(*row, name)]) if (*row, name) in errors else "-"
                for name in names
            ]
            table_rows.append([title, row_name, *texts])
    if relative_to is None:
        what = "error against float64: |x - exact| / |exact|, Euclidean norms"
        rules = rounding_of(found[0]["dtype"])
    else:
        what = f"error against float64, over that of {label(relative_to)} in the same dtype"
        rules = (Rule("x", 1.0),)
    header = ["result", "head dim, mask", *(label(name) for name in names)]
    return Chart(
        kind="error",
        title=described(what[0].upper() + what[1:], names, found),
        form="dots",
        panels=(tuple(panels),),
        x=what,
        y="",
        footer=origin_text(found),
        table=f"{what}\n\n{markdown_table(header, table_rows, left=2)}",
        shown=len(found),
        rules=rules,
    )


def rounding_of(dtype: str) -> tuple[Rule, ...]:
    """Where the dtype is known."""
    if dtype not in EPSILON:
        return ()
    unit = EPSILON[dtype] / 2
    return (Rule("x", unit, f"one rounding to {dtype}, at most: {unit:.2g}"),)


# ---- roofline ----------------------------------------------------------------------------------


STORES_SCORES = ("naive", "sdpa_math")


def case_of(line: Line) -> Case:
    return Case(**{name: line[name] for name in Case._fields if line.get(name) is not None})


def theoretical_bytes(line: Line) -> float | None:
    """What must cross the memory: each input and result once; what stores the scores writes and reads them and the
    probabilities too. None for the gradients of the latter, which depend on what autograd keeps, and for a dtype that
    is not known."""
    if line["dtype"] not in ITEM_BYTES:
        return None
    case, stores_scores = case_of(line), line["impl"] in STORES_SCORES
    if pass_of(line) == "forward":
        return float((standard if stores_scores else flash_dram)(case).total)
    # And the gradients of each.
    return None if stores_scores else float(2 * sum(matrix_bytes(case)) + lse_bytes(case))


def measured_bytes(lines: Iterable[Line]) -> dict[tuple[Any, ...], float]:
    """What Nsight Compute counted at DRAM, by problem and configuration, in the lines of `io --ncu`."""
    found = [x for x in lines if x["kind"] == "io" and x.get("measured")]
    names = ("dram_read", "dram_written")
    return {
        traffic_key(x): float(sum(x["measured"][name] for name in names))
        for x in found
        if all(POSITIVE.holds(x["measured"].get(name)) for name in names)
    }


def traffic_key(line: Line) -> tuple[Any, ...]:
    return case_of(line), line.get("config")


def ceilings_of(line: Line, tflops: float | None, bandwidth_gb: float | None) -> Ceilings | None:
    """As given, else as published; None where neither is known."""
    device = line.get("device") or "a device without a name"
    known = published_ceilings(device, line["dtype"])
    if known is None and (tflops is None) != (bandwidth_gb is None):
        raise UsageError(
            f"--peak-tflops, --bandwidth-gb: expected both, for nothing is known of {device}"
        )
    if known is None:
        return Ceilings(tflops, bandwidth_gb) if tflops and bandwidth_gb else None
    return Ceilings(tflops or known.tflops, bandwidth_gb or known.bandwidth_gb)


def roofline(
    lines: Iterable[Line], tflops: float | None = None, bandwidth_gb: float | None = None
) -> Chart:
    """TFLOP/s over FLOP per byte of memory traffic, under what the device can do."""
    lines = list(lines)
    counted = measured_bytes(x for x in lines if x.get("window") is None)
    found = [x for x in self_attention(lines) if has_rate(x) and is_timed(x)]
    moved = {
        id(x): traffic
        for x in found
        if (traffic := measured_or_theoretical(x, counted)) is not None
    }
    found = [x for x in found if id(x) in moved]
    if not found:
        raise UsageError("no line whose FLOP per byte is known")
    measured = [x for x in found if is_counted(x, counted)]
    ceilings = ceilings_of(found[0], tflops, bandwidth_gb)
    names = ordered_names(x["impl"] for x in found)
    head_dims = sorted({x["head_dim"] for x in found})
    points: dict[tuple[Any, ...], Point] = {}
    intensities = medians(
        found, roofline_key, lambda x: x["tflops"] * x["ms_p50"] * 1e9 / moved[id(x)]
    )
    speeds = medians(found, roofline_key, lambda x: x["tflops"])
    for key, x in intensities.items():
        points[key] = (x, speeds[key])
    panels = tuple(
        Panel(
            f"head dim {head_dim}",
            tuple(
                Curve(name, own, causal)
                for name in names
                for causal in (False, True)
                if (
                    own := tuple(
                        sorted(xy for k, xy in points.items() if k[:3] == (head_dim, causal, name))
                    )
                )
            ),
        )
        for head_dim in head_dims
    )
    rows = []
    for (head_dim, causal, name, seqlen, *_), (x, y) in sorted(
        points.items(), key=lambda one: (one[0][:2], one[0][3], names.index(one[0][2]))
    ):
        part = "-" if ceilings is None else f"{100 * y / ceilings.at(x):.0f} %"
        mask = "causal" if causal else "full"
        rows.append([f"{head_dim} {mask}", str(seqlen), label(name), f"{x:.0f}", f"{y:.1f}", part])
    header = [
        "head dim, mask",
        "seqlen",
        "implementation",
        "FLOP/byte",
        "TFLOP/s",
        "of the ceiling",
    ]
    if len(measured) == len(found):
        source = "bytes of memory as measured"
    else:
        source = "bytes of memory in theory: inputs and results once"
        source += ", as measured where lines of io --ncu hold them" if measured else ""
        if any(name in STORES_SCORES for name in names):
            source += "; naive: also scores and probabilities, written and read"
    rules: tuple[Rule, ...] = ()
    if ceilings is not None:
        rules = (
            Rule("slope", ceilings.bandwidth_gb / 1e3, f"{ceilings.bandwidth_gb:,.0f} GB/s"),
            Rule("y", ceilings.tflops, f"{ceilings.tflops:,.0f} TFLOP/s"),
        )
    return Chart(
        kind="roofline",
        title=described("TFLOP/s over FLOP per byte of memory", names, found),
        form="scatter",
        panels=(panels,),
        x="FLOP per byte",
        y="TFLOP/s",
        footer=f"{source}; {origin_text(found)}",
        table=markdown_table(header, rows, left=3),
        shown=len(found) + len(counted),
        rules=rules,
    )


def roofline_key(line: Line) -> tuple[Any, ...]:
    names = ("head_dim", "causal", "impl", "seqlen_q", "batch", "heads", "kv_heads")
    return tuple(line[name] for name in names)


def is_counted(line: Line, counted: dict[tuple[Any, ...], float]) -> bool:
    return (
        pass_of(line) == "forward"
        and line["impl"].startswith(OURS)
        and line.get("config") is not None
        and traffic_key(line) in counted
    )


def measured_or_theoretical(line: Line, counted: dict[tuple[Any, ...], float]) -> float | None:
    return counted[traffic_key(line)] if is_counted(line, counted) else theoretical_bytes(line)
