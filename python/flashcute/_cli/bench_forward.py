"""The forward benchmark: verify, time in interleaved rounds, record, compare.

What the backward does in another way is in class Verifier; see bench_backward.py.
"""

from __future__ import annotations

import argparse
import functools
import gc
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .. import FlashcuteError, reference
from . import peers
from .kits import Array, Call, Inputs, Kit, choose_kit, in_layout
from .options import DTYPES, INTERRUPTED, UsageError
from .peers import Flashcute, Implementation
from .presets import PRESETS
from .problem import (
    Case,
    Errors,
    Given,
    Result,
    Window,
    complaint,
    errors,
    fp64_reference,
    naive_result,
)
from .progress import Work, make_progress
from .provenance import provenance
from .recorded import append_line, parsed
from .table import format_bytes, format_digits, format_number, format_table, geometric_mean
from .timing import interleaved_ms

GPU_IMPLEMENTATIONS = tuple(name for name in peers.NAMES if name not in ("sdpa", *peers.PACKAGES))
CPU_IMPLEMENTATIONS = ("flashcute", "sdpa", "naive")
SPOT_ROWS = 8
# Of the lines. 2: also schema, preset, head_dim_v, sink and error_ratio.
SCHEMA = 2

Line = dict[str, Any]  # of JSON
Named = tuple[str | None, Case]  # of a preset


class GridSize(NamedTuple):
    """What the named grids are made of."""

    seqlens: tuple[int, ...]
    tokens: int
    hidden: int
    heads: tuple[int, ...] = ()  # in place of hidden / head_dim


LENGTHS = (1024, 2048, 4096, 8192, 16384)
STUDIED_HEADS = (8, 16, 32)
GRIDS = {
    ("quick", "cuda"): GridSize((1024, 4096), 16384, 2048),
    ("peers", "cuda"): GridSize(LENGTHS, 16384, 2048),
    ("study", "cuda"): GridSize(LENGTHS, 16384, 0, STUDIED_HEADS),
    ("quick", "cpu"): GridSize((512, 2048), 4096, 256),
    ("peers", "cpu"): GridSize(LENGTHS, 16384, 256),
    ("study", "cpu"): GridSize(LENGTHS, 1024, 0, STUDIED_HEADS),  # a batch of 1
}
PRESET_TOKENS = {"cuda": 16384, "cpu": 1}  # on the CPU a batch of 1
HEAD_DIMS = (64, 128)


def run(options: argparse.Namespace, out: TextIO | None) -> int:
    return run_with(Verifier, options, out)


def run_with(
    make_verifier: Callable[[Kit], Verifier], options: argparse.Namespace, out: TextIO | None
) -> int:
    start = time.monotonic()
    kit = choose_kit(options.device, options.dtype, options.seed)
    common = provenance(kit, options.commit)
    print(f"{common['device']}; {common['library']}; {common['commit']}; seed {options.seed}")
    verifier = make_verifier(kit)
    implementations, missing = make_implementations(verifier, options)
    for reason in missing:
        print(reason)
    cases = list(make_cases(kit, options))
    names = [one.name for one in implementations]
    lines: list[Line] = []
    remarks = list(missing)
    interrupted = False
    works = [work_of(case, len(names), verifier) for _, case in cases]
    # A line that changes and lines for another program would meet on a terminal.
    plain = options.plain or options.out == "-"
    with make_progress(works, plain=plain) as progress:
        for i, (preset, case) in enumerate(cases):
            if options.deadline_s is not None and time.monotonic() - start > options.deadline_s:
                rest = len(cases) - i
                remarks.append(f"--deadline-s: {rest} of {len(cases)} cases were not started")
                break
            progress.case(title(preset, case))
            variants = with_and_without_window(case)
            try:
                found = run_case(kit, variants, implementations, verifier, options, progress.step)
            except KeyboardInterrupt:
                interrupted = True
                rest = len(cases) - i
                remarks.append(f"interrupted: {rest} of {len(cases)} cases were not measured")
                break
            for measured in found:
                kind = {"kind": verifier.kind}
                if measured["window"] is not None:
                    kind = {"kind": "window", "pass": verifier.kind}
                origin = {"schema": SCHEMA, **common, "seed": options.seed, "preset": preset}
                line = {**kind, **origin, **measured}
                if options.note is not None:
                    line["note"] = options.note
                lines.append(line)
                if out is not None:
                    append_line(out, line)
            progress.end_case()
            told = lines[-len(variants) * len(implementations) :]
            for variant in variants:
                of_variant = [x for x in told if x["window"] == variant.window]
                print(f"{title(preset, variant)}: {in_short(of_variant)}", flush=True)
    print("\n" + report(lines, names, kit, remarks, options.table))
    if interrupted:
        return INTERRUPTED
    # A configuration of one's own may fail: not every option fits every head dimension.
    bad = [x for x in lines if x["status"] == "failed" and x["impl"] == "flashcute"]
    bad += [x for x in lines if x["status"] == "wrong" and x["impl"].startswith("flashcute")]
    return 1 if bad else 0


def title(preset: str | None, case: Case) -> str:
    return f"{preset} {case.label}" if preset else case.label


def work_of(case: Case, implementations: int, verifier: Verifier) -> Work:
    variants = with_and_without_window(case)
    flops = sum(verifier.flops(x) for x in variants)
    return Work(implementations * len(variants), implementations * flops)


# ---- what to run -------------------------------------------------------------------------------


def make_implementations(
    verifier: Verifier, options: argparse.Namespace
) -> tuple[list[Implementation], list[str]]:
    """What is here, and why the others are not."""
    names = options.impls
    if names is None:
        gpu = verifier.kit.device == "cuda"
        names = GPU_IMPLEMENTATIONS if gpu else CPU_IMPLEMENTATIONS
    found: list[Implementation] = []
    missing: list[str] = []
    for name in dict.fromkeys(names):
        try:
            found.append(verifier.implementation(name))
        except UsageError as problem:
            missing.append(f"left out: {problem}")
    found += [verifier.changed(changes) for changes in options.config]
    if not found:
        raise UsageError("--impls: none of these is here: " + "; ".join(missing))
    return found, missing


def make_cases(kit: Kit, options: argparse.Namespace) -> Iterator[Named]:
    dtype = options.dtype or ("bfloat16" if kit.device == "cuda" else "float32")
    if options.preset is not None:
        yield from preset_cases(kit.device, dtype, options)
        return
    name = options.grid or "quick"
    grid = GRIDS.get((name, kit.device))
    if grid is None:
        refuse_beside(options, "--grid FILE", (*SIZE_OPTIONS, "seqlens", "batch", "tokens"))
        for case in read_cases(Path(name), dtype):
            yield None, case if case.window is not None else case._replace(window=options.window)
        return
    kv_ratio = options.kv_ratio or 1
    for head_dim in options.head_dims or HEAD_DIMS:
        for heads in heads_of(grid, head_dim, options):
            if heads % kv_ratio != 0:
                raise UsageError(f"--kv-ratio: expected a divisor of {heads} heads, got {kv_ratio}")
            for causal in options.causal or (False, True):
                for seqlen in options.seqlens or grid.seqlens:
                    batch = options.batch or max(1, (options.tokens or grid.tokens) // seqlen)
                    sizes = batch, heads, heads // kv_ratio, seqlen, seqlen, head_dim
                    yield None, Case(*sizes, causal, dtype, options.window)


def heads_of(grid: GridSize, head_dim: int, options: argparse.Namespace) -> tuple[int, ...]:
    if options.heads is not None:
        return (options.heads,)
    if options.hidden is None and grid.heads:
        return grid.heads
    return (max(1, (options.hidden or grid.hidden) // head_dim),)


SIZE_OPTIONS = ("head_dims", "causal", "hidden", "heads", "kv_ratio")


def refuse_beside(options: argparse.Namespace, source: str, names: Sequence[str]) -> None:
    """Raises UsageError for an option of which nothing would be heard, since the cases have what it says."""
    for name in names:
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{source} says what {option} would: expected one of the two")


def preset_cases(device: str, dtype: str, options: argparse.Namespace) -> Iterator[Named]:
    """The lengths of each preset; on the CPU its first."""
    refuse_beside(options, "--preset", ("grid", "window", *SIZE_OPTIONS))
    tokens = options.tokens or PRESET_TOKENS[device]
    for name in dict.fromkeys(options.preset):
        preset = PRESETS[name]
        seqlens = options.seqlens or preset.seqlens[: 1 if device == "cpu" else None]
        for case in preset.cases(dtype, seqlens, options.batch, tokens):
            yield name, case


def read_cases(file: Path, dtype: str) -> Iterator[Case]:
    try:
        rows = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(
            f"--grid {file}: expected quick, peers, study, or a file with JSON lines: {problem}"
        ) from None
    if not any(row.strip() for row in rows):
        raise UsageError(f"--grid {file}: expected JSON lines, got an empty file")
    for number, row in enumerate(rows, 1):
        if row.strip():
            try:
                yield case_from(parsed(row), dtype)
            except ValueError as problem:
                raise UsageError(f"--grid {file}, line {number}: expected {problem}") from None


def case_from(row: Any, dtype: str) -> Case:
    """Raises ValueError with what was expected."""
    if not isinstance(row, dict):
        raise ValueError(f"an object, got {row!r}")
    for name in row:
        if name not in Case._fields:
            raise ValueError(f"fields among {', '.join(Case._fields)}, got {name}")
    for name in ("batch", "heads", "seqlen_q", "head_dim", "causal"):
        if name not in row:
            raise ValueError(f"{name}, got {row}")
    case = Case(**{"kv_heads": row["heads"], "seqlen_k": row["seqlen_q"], "dtype": dtype, **row})
    sizes = (*case[: Case._fields.index("causal")], case.value_dim)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"sizes that are positive integers, got {row}")
    if case.heads % case.kv_heads != 0:
        raise ValueError(f"kv_heads that divide heads, got {row}")
    if case.dtype not in DTYPES:
        raise ValueError(f"a dtype among {', '.join(DTYPES)}, got {case.dtype!r}")
    if not isinstance(case.causal, bool) or not isinstance(case.sink, bool):
        raise ValueError(f"true or false as causal and sink, got {row}")
    if case.head_dim_v == case.head_dim:
        case = case._replace(head_dim_v=None)
    return case._replace(window=read_window(case.window))


def read_window(found: Any) -> Window:
    """From JSON, which has lists."""
    if found is None:
        return None
    if not isinstance(found, list) or [type(x) for x in found] != [int, int] or min(found) < -1:
        raise ValueError(f"two integers >= -1 as window, got {found}")
    left, right = found
    return left, right


def with_and_without_window(case: Case) -> list[Case]:
    """What is timed by turns: a window beside the same problem without it."""
    return [case] if case.window is None else [case._replace(window=None), case]


# ---- whether the results are right -------------------------------------------------------------


class Verdict(NamedTuple):
    """Of an implementation on a kind of problem."""

    wrong: str | None  # why its results are not accepted
    errors: Errors | None  # on the whole small problem
    naive: Errors  # of the naive computation in the same dtype


class Verifier:
    """Makes implementations, checks them against fp64, on a whole small problem and on rows of the real one, and
    knows what to time."""

    kind = "forward"

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.verdicts: dict[tuple[str, Case], Verdict] = {}

    def implementation(self, name: str) -> Implementation:
        """Raises UsageError if what it needs is not here."""
        return peers.make(name, self.kit)

    def changed(self, changes: dict[str, Any]) -> Implementation:
        """flashcute with changes to its default configuration."""
        return Flashcute(self.kit, changes)

    def flops(self, case: Case) -> float:
        """Of the algorithm's matrix products, by which FLOP/s are counted."""
        return case.flops

    def check(
        self, one: Implementation, case: Case, inputs: Inputs, sink: Array | None
    ) -> tuple[str | None, Line]:
        """Why the results are not accepted, and what was found."""
        verdict = self.on_small_problem(one, case)
        found: Line = {}
        if verdict.errors is not None:
            found.update(verdict.errors._asdict())
            found["error_ratio"] = error_ratio(verdict.errors, verdict.naive)
        if verdict.wrong is not None:
            return verdict.wrong, found
        wrong, found["spot_max_error"] = self.on_rows(one, case, inputs, sink, verdict.naive)
        return wrong, found

    def timed_call(
        self, one: Implementation, inputs: Inputs, sink: Array | None, case: Case
    ) -> Call:
        """Of inputs in the implementation's layout."""
        return functools.partial(one.call, *inputs, case.causal, window=case.window, sink=sink)

    def small(self, case: Case) -> Case:
        """Same head dim, mask, dtype and head ratio; lengths that no tile divides; a window of which both bounds hide
        something."""
        ratio = case.heads // case.kv_heads
        window = case.window and (min(case.window[0], 97), min(case.window[1], 41))
        return case._replace(
            batch=2, heads=2 * ratio, kv_heads=2, seqlen_q=333, seqlen_k=333, window=window
        )

    def on_small_problem(self, one: Implementation, case: Case) -> Verdict:
        small = self.small(case)
        key = one.name, small
        if key not in self.verdicts:
            inputs, sink = small.random_inputs(self.kit), small.random_sink(self.kit)
            given = Given(*inputs, small.causal, small.window, sink)
            ref = fp64_reference(self.kit, given)
            naive = errors(naive_result(self.kit, given), ref)
            found = errors(one.result(self.kit, given), ref)
            wrong = complaint(found, naive, ref, small.dtype)
            self.verdicts[key] = Verdict(wrong and f"{small.label}: {wrong}", found, naive)
        return self.verdicts[key]

    def on_rows(
        self,
        one: Implementation,
        case: Case,
        inputs: Inputs,
        sink: Array | None,
        naive: Errors,
    ) -> tuple[str | None, float]:
        """Random rows, and the first and last, of the real problem: (complaint, max error).

        The bound for them is that of the small problem's norm, which depends little on the length.
        """
        import numpy as np

        q, k, v = inputs
        out = one.output(self.kit, Given(q, k, v, case.causal, case.window, sink))
        random = np.random.default_rng()
        places = [(0, 0, 0), (case.batch - 1, case.seqlen_q - 1, case.heads - 1)]
        sizes = (case.batch, case.seqlen_q, case.heads)
        places += [
            (int(b), int(i), int(h)) for b, i, h in random.integers(0, sizes, (SPOT_ROWS, 3))
        ]
        got, expected = [], []
        for b, i, h in places:
            seen = case.keys_of(i)
            kv = h * case.kv_heads // case.heads
            row = self.kit.double(q[b : b + 1, i : i + 1, h : h + 1])
            keys, values = (
                self.kit.double(x[b : b + 1, seen.start : seen.stop, kv : kv + 1]) for x in (k, v)
            )
            logit = None if sink is None else self.kit.double(sink[h : h + 1])
            expected.append(self.kit.to_numpy(reference.naive(row, keys, values, sink=logit)))
            got.append(self.kit.to_numpy(out[b : b + 1, i : i + 1, h : h + 1]))
        ref = Result(np.concatenate(expected), None)
        found = errors(Result(np.concatenate(got), None), ref)
        wrong = complaint(found._replace(max_error=0.0), naive, ref, case.dtype)
        return wrong and f"{case.label}, rows: {wrong}", found.max_error


def error_ratio(found: Errors, naive: Errors) -> float | None:
    """The largest error over that of the naive computation in the same dtype."""
    return found.max_error / naive.max_error if naive.max_error else None


# ---- one case ----------------------------------------------------------------------------------


def run_case(
    kit: Kit,
    variants: list[Case],
    implementations: list[Implementation],
    verifier: Verifier,
    options: argparse.Namespace,
    step: Callable[[str], object],
) -> list[Line]:
    """A line for each of the variants and implementations: measured, or why not. The variants have their turns in the
    same rounds, on the same inputs. `step` is told what is done."""
    if variants[0].input_bytes > usable_bytes(kit):
        why_not = {"status": "skipped", "reason": "its inputs do not fit into memory"}
        return [first_fields(one, case) | why_not for case in variants for one in implementations]
    base = variants[0].random_inputs(kit)
    sink = variants[0].random_sink(kit)
    inputs = {"bshd": base}
    lines: dict[str, Line] = {}
    calls: dict[str, Call] = {}
    for case in variants:
        for one in implementations:
            name = f"{one.name} {case.label}"
            line = lines[name] = first_fields(one, case)
            step(f"checking {one.name}")
            try:
                prepare(kit, case, one, verifier, inputs, sink, line)
                if line["status"] == "ok":
                    call = verifier.timed_call(one, inputs[one.layout], sink, case)
                    line["peak_bytes"] = kit.peak_bytes(call)
                    calls[name], line["timing"] = kit.repeatable(call)
            except peers.Unsupported as problem:
                line.update(status="skipped", reason=str(problem))
            except REFUSALS as problem:
                # A peer that cannot do the case says so in many ways; the others go on.
                text = str(problem).strip().partition("\n")[0]
                line.update(status="failed", reason=f"{type(problem).__name__}: {text}"[:500])
    import numpy as np

    flops = {
        f"{one.name} {case.label}": verifier.flops(case)
        for case in variants
        for one in implementations
    }

    def on_round(number: int) -> None:
        step(f"timing, round {number} of {options.rounds}")

    times = interleaved_ms(kit, calls, options.rounds, options.budget_ms, on_round)
    for name, ms in times.items():
        p10, p50, p90, p99 = (float(x) for x in np.percentile(ms, (10, 50, 90, 99)))
        lines[name].update(
            rounds=options.rounds,
            samples=len(ms),
            ms_p10=p10,
            ms_p50=p50,
            ms_p90=p90,
            ms_p99=p99,
            tflops=flops[name] / p50 / 1e9,
        )
    calls.clear()
    gc.collect()
    if len(variants) == 2:
        for one in implementations:
            whole, windowed = (lines[f"{one.name} {case.label}"] for case in variants)
            compare_with_whole(variants, whole, windowed)
    return [json_safe(line) for line in lines.values()]


REFUSALS = (FlashcuteError, RuntimeError, TypeError, ValueError, AssertionError, MemoryError)


def first_fields(one: Implementation, case: Case) -> Line:
    """Of each line; the status may change."""
    version = {"impl": one.name, "impl_version": one.version, "config": None}
    return {**version, **case._asdict(), "status": "ok"}


def usable_bytes(kit: Kit) -> int:
    return int(0.8 * kit.free_bytes())


def prepare(
    kit: Kit,
    case: Case,
    one: Implementation,
    verifier: Verifier,
    inputs: dict[str, Inputs],
    sink: Array | None,
    line: Line,
) -> None:
    """Checks an implementation, and makes the inputs in its layout. `line` says what came of it."""
    if one.score_bytes(case) > usable_bytes(kit):
        line.update(status="skipped", reason="its S x S matrices do not fit into memory")
        return
    line["config"] = one.config_name(kit, case)
    wrong, found = verifier.check(one, case, inputs["bshd"], sink)
    line.update(found)
    if wrong is not None:
        line.update(status="wrong", reason=wrong)
    elif one.layout not in inputs:
        inputs[one.layout] = in_layout(kit, inputs["bshd"], one.layout)


def compare_with_whole(variants: list[Case], whole: Line, windowed: Line) -> None:
    """How a window compares with the same call without it. visible: the part of the pairs that are left. efficiency:
    the rate at which these are computed, over that without the window; 1 is ideal."""
    without, with_window = (case.visible_pairs for case in variants)
    visible = windowed["visible"] = with_window / without
    if "ms_p50" in whole and "ms_p50" in windowed:
        windowed["ms_without"] = whole["ms_p50"]
        windowed["efficiency"] = visible * whole["ms_p50"] / windowed["ms_p50"]


def json_safe(line: Line) -> Line:
    """JSON has no NaN and no infinity; what is wrong says so in `status`."""
    return {
        name: None if isinstance(x, float) and not abs(x) < float("inf") else x
        for name, x in line.items()
    }


# ---- what it says ------------------------------------------------------------------------------


def in_short(lines: Sequence[Line]) -> str:
    """Times, what went wrong, and the names of what was skipped, whose reasons come at the end of all cases."""
    told = [
        f"{x['impl']} {format_digits(x['ms_p50'])} ms"
        if x["status"] == "ok"
        else f"{x['impl']} {x['status']}: {textwrap.shorten(x['reason'], 60, placeholder=' ...')}"
        for x in lines
        if x["status"] != "skipped"
    ]
    skipped = [x["impl"] for x in lines if x["status"] == "skipped"]
    return "; ".join([*told, f"skipped: {', '.join(skipped)}"] if skipped else told)


def report(
    lines: Sequence[Line], names: Sequence[str], kit: Kit, remarks: Sequence[str], tables: str
) -> str:
    """The tables that are asked for, and what is not in them."""
    parts = []
    if lines and tables != "summary":
        parts.append(details(lines, names, kit))
    if lines and tables != "details":
        parts.append(summary(lines, names, kit.device))
    reasons = [*remarks, *reasons_of(lines)]
    if reasons:
        parts.append("Not measured:\n" + "\n".join(filled(x, "  ", "    ") for x in reasons))
    return "\n\n".join(parts)


def filled(text: str, first: str = "", other: str = "") -> str:
    """As wide as the terminal, if that is neither very narrow nor very wide."""
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=other,
        break_long_words=False,
        break_on_hyphens=False,
    )


def reasons_of(lines: Sequence[Line]) -> list[str]:
    """Of what has no times: each reason once, with its cases."""
    every = len(by_title(lines))
    cases: dict[str, list[str]] = {}
    for x in lines:
        if x["status"] != "ok":
            reason = f"{x['impl']}, {x['status']}: {x['reason']}"
            cases.setdefault(reason, []).append(title_of(x, lines))
    return [f"{reason} ({shortened(titles, every)})" for reason, titles in cases.items()]


def shortened(titles: Sequence[str], every: int, most: int = 4) -> str:
    if len(titles) == every > 1:
        return "in all cases"
    more = len(titles) - most
    return "; ".join(titles[:most]) + (f"; and {more} more" if more > 0 else "")


def title_of(line: Line, lines: Sequence[Line]) -> str:
    """Of a line among these: with the dtype only where it differs."""
    case = Case(*(line[field] for field in Case._fields))
    dtype = f" {case.dtype}" if len({x["dtype"] for x in lines}) > 1 else ""
    return title(line["preset"], case) + dtype


def by_title(lines: Sequence[Line]) -> dict[str, dict[str, Line]]:
    """title -> implementation -> line."""
    found: dict[str, dict[str, Line]] = {}
    for x in lines:
        found.setdefault(title_of(x, lines), {})[x["impl"]] = x
    return found


def ours_among(names: Sequence[str]) -> str | None:
    return next((name for name in names if name.startswith("flashcute")), None)


def rate_unit(device: str) -> tuple[str, float]:
    return ("TFLOP/s", 1.0) if device == "cuda" else ("GFLOP/s", 1e3)


def details(lines: Sequence[Line], names: Sequence[str], kit: Kit) -> str:
    """A row for each case and implementation."""
    unit, factor = rate_unit(kit.device)
    ours = ours_among(names)
    compared = ours is not None and len(names) > 1
    speed_up = ["speed-up"] if compared else []
    header = ["", "p50 ms", "p99 ms", unit, "memory", "max error", "/naive", *speed_up]
    rows: list[list[str]] = []
    for label, row in by_title(lines).items():
        rows.append([label])
        mine = row.get(ours, {}).get("ms_p50") if ours else None
        for name, x in row.items():
            if x["status"] != "ok":
                rows.append([f"  {name}", x["status"]])
                continue
            error = largest_error(x)
            cells = [
                f"  {name}",
                format_digits(x["ms_p50"]),
                format_digits(x["ms_p99"]),
                format_digits(x["tflops"] * factor),
                format_bytes(x["peak_bytes"]),
                format_number(error, ".1e"),
                format_number(x["error_ratio"], ".2f"),
            ]
            if compared:
                ratio = x["ms_p50"] / mine if mine and name != ours else None
                cells.append("" if name == ours else format_number(ratio, ".2f"))
            rows.append(cells)
    note = f"memory: the {kit.memory_meter} during one call. max error: against fp64, on a smaller problem"
    note += " of the same kind; /naive: over that of the naive computation in the same dtype."
    if compared:
        note += f" speed-up: its p50 / that of {ours}."
    return format_table(header, rows) + "\n" + filled(note)


def largest_error(line: Line) -> float | None:
    """Of the output, or of the gradients."""
    found = [
        x
        for name, x in line.items()
        if name.endswith("max_error") and name != "spot_max_error" and x is not None
    ]
    return max(found, default=None)


def summary(lines: Sequence[Line], names: Sequence[str], device: str) -> str:
    """FLOP/s by case and implementation, the ratios of flashcute's, and their geometric means."""
    unit, factor = rate_unit(device)
    ours = ours_among(names)
    others = [name for name in names if not name.startswith("flashcute")]
    windowed = any(x["window"] is not None for x in lines)
    ratios: dict[str, list[float]] = {}
    if ours is not None and others:
        ratios["/best"] = []
        if "sdpa_flash" in others:
            ratios["/sdpa_flash"] = []
    efficiencies: list[float] = []
    table = []
    for label, row in by_title(lines).items():
        rates = {name: x["tflops"] * factor for name, x in row.items() if x["status"] == "ok"}
        cells = [label, *(format_number(rates.get(name), ".1f") for name in names)]
        best = max((rates[name] for name in others if name in rates), default=None)
        mine = rates.get(ours) if ours else None
        for column, divisor in (("/best", best), ("/sdpa_flash", rates.get("sdpa_flash"))):
            if column in ratios:
                ratio = mine / divisor if mine and divisor else None
                if ratio is not None:
                    ratios[column].append(ratio)
                cells.append(format_number(ratio, ".2f"))
        if windowed:
            efficiency = row[ours].get("efficiency") if ours in row else None
            if efficiency is not None:
                efficiencies.append(efficiency)
            cells.append(format_number(efficiency, ".2f"))
        table.append(cells)
    header = [unit, *names, *ratios]
    means = [format_number(geometric_mean(x), ".2f") for x in ratios.values()]
    notes = []
    if ratios:
        notes.append(f"Ratios are of {ours}; /best: to the fastest of the others.")
    if windowed:
        header.append("/whole")
        means.append(format_number(geometric_mean(efficiencies), ".2f"))
        notes.append(
            "With a window only visible pairs count; /whole: to the rate without the window."
        )
    if means:
        table.append(["geometric mean", *("" for _ in names), *means])
    return "\n".join([format_table(header, table), *notes])
