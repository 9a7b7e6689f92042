"""The forward benchmark: verify, time in interleaved rounds, record, compare.

What the backward does in another way is in class Verifier; see bench_backward.py.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .. import FlashcuteError, reference
from . import peers
from .kits import Call, Inputs, Kit, choose_kit, in_layout
from .options import DTYPES, UsageError
from .peers import Flashcute, Implementation
from .problem import (
    Case,
    Errors,
    Result,
    Window,
    complaint,
    errors,
    fp64_reference,
    naive_result,
)
from .provenance import provenance
from .table import format_number, format_table, geometric_mean
from .timing import interleaved_ms

GPU_IMPLEMENTATIONS = tuple(name for name in peers.NAMES if name not in ("sdpa", "fa3"))
CPU_IMPLEMENTATIONS = ("flashcute", "sdpa", "naive")
SPOT_ROWS = 8

Line = dict[str, Any]  # of JSON


class GridSize(NamedTuple):
    """What the named grids are made of."""

    seqlens: tuple[int, ...]
    tokens: int
    hidden: int


GRIDS = {
    ("quick", "cuda"): GridSize((1024, 4096), 16384, 2048),
    ("peers", "cuda"): GridSize((1024, 2048, 4096, 8192, 16384), 16384, 2048),
    ("quick", "cpu"): GridSize((512, 2048), 4096, 256),
    ("peers", "cpu"): GridSize((1024, 2048, 4096, 8192, 16384), 16384, 256),
}
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
    implementations = make_implementations(verifier, options)
    cases = list(make_cases(kit, options))
    lines: list[Line] = []
    for i, case in enumerate(cases):
        variants = with_and_without_window(case)
        if options.deadline_s is not None and time.monotonic() - start > options.deadline_s:
            print(f"--deadline-s: {len(cases) - i} of {len(cases)} cases were not started")
            break
        for measured in run_case(kit, variants, implementations, verifier, options):
            kind = {"kind": verifier.kind}
            if measured["window"] is not None:
                kind = {"kind": "window", "pass": verifier.kind}
            line = {**kind, **common, "seed": options.seed, **measured}
            if options.note is not None:
                line["note"] = options.note
            lines.append(line)
            if out is not None:
                out.write(json.dumps(line, allow_nan=False) + "\n")
                out.flush()
        told = lines[-len(variants) * len(implementations) :]
        for variant in variants:
            print(progress(variant, [x for x in told if x["window"] == variant.window]), flush=True)
    print("\n" + summary(lines, [one.name for one in implementations], kit.device))
    wrong = [x for x in lines if x["status"] == "wrong" and x["impl"].startswith("flashcute")]
    return 1 if wrong else 0


# ---- what to run -------------------------------------------------------------------------------


def make_implementations(verifier: Verifier, options: argparse.Namespace) -> list[Implementation]:
    names = options.impls
    if names is None:
        gpu = verifier.kit.device == "cuda"
        names = GPU_IMPLEMENTATIONS if gpu else CPU_IMPLEMENTATIONS
    found: list[Implementation] = []
    for name in dict.fromkeys(names):
        try:
            found.append(verifier.implementation(name))
        except UsageError as problem:
            print(f"without {name}: {problem}")
    found += [verifier.changed(changes) for changes in options.config]
    if not found:
        raise UsageError("--impls: none of these is here")
    return found


def make_cases(kit: Kit, options: argparse.Namespace) -> Iterator[Case]:
    dtype = options.dtype or ("bfloat16" if kit.device == "cuda" else "float32")
    grid = GRIDS.get((options.grid, kit.device))
    if grid is None:
        for case in read_cases(Path(options.grid), dtype):
            yield case if case.window is not None else case._replace(window=options.window)
        return
    for head_dim in options.head_dims or HEAD_DIMS:
        for causal in options.causal:
            for seqlen in options.seqlens or grid.seqlens:
                batch = options.batch or max(1, (options.tokens or grid.tokens) // seqlen)
                heads = options.heads or max(1, (options.hidden or grid.hidden) // head_dim)
                if heads % options.kv_ratio != 0:
                    raise UsageError(f"--kv-ratio: expected a divisor of {heads} heads")
                kv_heads = heads // options.kv_ratio
                sizes = batch, heads, kv_heads, seqlen, seqlen, head_dim
                yield Case(*sizes, causal, dtype, options.window)


def read_cases(file: Path, dtype: str) -> Iterator[Case]:
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        for row in rows:
            row = {"kv_heads": row["heads"], "seqlen_k": row["seqlen_q"], "dtype": dtype, **row}
            case = Case(**row)
            sizes = case[: Case._fields.index("causal")]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(f"sizes must be positive integers, got {row}")
            if case.heads % case.kv_heads != 0:
                raise ValueError(f"kv_heads must divide heads, got {row}")
            if case.dtype not in DTYPES or type(case.causal) is not bool:
                raise ValueError(
                    f"expected a dtype among {DTYPES} and a bool for causal, got {row}"
                )
            yield case._replace(window=read_window(case.window))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UsageError(
            f"--grid {file}: expected quick, peers, or a file with JSON lines of {Case._fields}: "
            f"{type(problem).__name__}: {problem}"
        ) from None


def read_window(found: Any) -> Window:
    """From JSON, which has lists."""
    if found is None:
        return None
    if not isinstance(found, list) or [type(x) for x in found] != [int, int] or min(found) < -1:
        raise ValueError(f"window must be two integers >= -1, got {found}")
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
    products = 2  # matrix products of the algorithm, by which FLOP/s are counted

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.verdicts: dict[tuple[str, Case], Verdict] = {}

    def implementation(self, name: str) -> Implementation:
        """Raises UsageError if what it needs is not here."""
        return peers.make(name, self.kit)

    def changed(self, changes: dict[str, Any]) -> Implementation:
        """flashcute with changes to its default configuration."""
        return Flashcute(self.kit, changes)

    def check(self, one: Implementation, case: Case, inputs: Inputs) -> tuple[str | None, Line]:
        """Why the results are not accepted, and what was found."""
        verdict = self.on_small_problem(one, case)
        found: Line = {} if verdict.errors is None else dict(verdict.errors._asdict())
        if verdict.wrong is not None:
            return verdict.wrong, found
        wrong, found["spot_max_error"] = self.on_rows(one, case, inputs, verdict.naive)
        return wrong, found

    def timed_call(self, one: Implementation, inputs: Inputs, case: Case) -> Call:
        """Of inputs in the implementation's layout."""
        return functools.partial(one.call, *inputs, case.causal, window=case.window)

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
            inputs = small.random_inputs(self.kit)
            given = self.kit, *inputs, small.causal, small.window
            ref = fp64_reference(*given)
            naive = errors(naive_result(*given), ref)
            found = errors(one.result(*given), ref)
            wrong = complaint(found, naive, ref, small.dtype)
            self.verdicts[key] = Verdict(wrong and f"{small.label}: {wrong}", found, naive)
        return self.verdicts[key]

    def on_rows(
        self, one: Implementation, case: Case, inputs: Inputs, naive: Errors
    ) -> tuple[str | None, float]:
        """Random rows, and the first and last, of the real problem: (complaint, max error).

        The bound for them is that of the small problem's norm, which depends little on the length.
        """
        import numpy as np

        q, k, v = inputs
        out = one.output(self.kit, q, k, v, case.causal, case.window)
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
            expected.append(self.kit.to_numpy(reference.naive(row, keys, values)))
            got.append(self.kit.to_numpy(out[b : b + 1, i : i + 1, h : h + 1]))
        ref = Result(np.concatenate(expected), None)
        found = errors(Result(np.concatenate(got), None), ref)
        wrong = complaint(found._replace(max_error=0.0), naive, ref, case.dtype)
        return wrong and f"{case.label}, rows: {wrong}", found.max_error


# ---- one case ----------------------------------------------------------------------------------


def run_case(
    kit: Kit,
    variants: list[Case],
    implementations: list[Implementation],
    verifier: Verifier,
    options: argparse.Namespace,
) -> list[Line]:
    """A line for each of the variants and implementations: measured, or why not. The variants have their turns in the
    same rounds, on the same inputs."""
    base = variants[0].random_inputs(kit)
    inputs = {"bshd": base}
    lines: dict[str, Line] = {}
    calls: dict[str, Call] = {}
    for case in variants:
        for one in implementations:
            name = f"{one.name} {case.label}"
            line = lines[name] = {"impl": one.name, "impl_version": one.version, "config": None}
            line.update(case._asdict(), status="ok")
            try:
                prepare(kit, case, one, verifier, inputs, line)
                if line["status"] == "ok":
                    call = verifier.timed_call(one, inputs[one.layout], case)
                    line["peak_bytes"] = kit.peak_bytes(call)
                    calls[name], line["timing"] = kit.repeatable(call)
            except (FlashcuteError, RuntimeError, TypeError, ValueError, AssertionError) as problem:
                # A peer that cannot do the case says so in many ways; the others go on.
                text = str(problem).strip().partition("\n")[0]
                line.update(status="failed", reason=f"{type(problem).__name__}: {text}"[:300])
    import numpy as np

    flops = {f"{one.name} {case.label}": case.flops for case in variants for one in implementations}
    for name, ms in interleaved_ms(kit, calls, options.rounds, options.budget_ms).items():
        p10, p50, p90, p99 = (float(x) for x in np.percentile(ms, (10, 50, 90, 99)))
        lines[name].update(
            rounds=options.rounds,
            samples=len(ms),
            ms_p10=p10,
            ms_p50=p50,
            ms_p90=p90,
            ms_p99=p99,
            tflops=verifier.products / 2 * flops[name] / p50 / 1e9,
        )
    calls.clear()
    gc.collect()
    if len(variants) == 2:
        for one in implementations:
            whole, windowed = (lines[f"{one.name} {case.label}"] for case in variants)
            compare_with_whole(variants, whole, windowed)
    return [json_safe(line) for line in lines.values()]


def prepare(
    kit: Kit,
    case: Case,
    one: Implementation,
    verifier: Verifier,
    inputs: dict[str, Inputs],
    line: Line,
) -> None:
    """Checks an implementation, and makes the inputs in its layout. `line` says what came of it."""
    too_much = one.score_bytes(case) - int(0.8 * kit.free_bytes())
    if too_much > 0:
        line.update(status="skipped", reason="its S x S matrices do not fit into memory")
        return
    line["config"] = one.config_name(kit, case)
    wrong, found = verifier.check(one, case, inputs["bshd"])
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


def progress(case: Case, lines: Sequence[Line]) -> str:
    parts = [
        f"{x['impl']} {x['ms_p50']:.3g} ms"
        if x["status"] == "ok"
        else f"{x['impl']}: {x['reason']}"
        for x in lines
    ]
    return f"{case.label} {case.dtype}: " + "; ".join(parts)


def summary(lines: Sequence[Line], names: Sequence[str], device: str) -> str:
    """FLOP/s by case and implementation, the ratios of flashcute's, and their geometric means."""
    unit, factor = ("TFLOP/s", 1.0) if device == "cuda" else ("GFLOP/s", 1e3)
    ours = next((name for name in names if name.startswith("flashcute")), None)
    others = [name for name in names if not name.startswith("flashcute")]
    by_case: dict[str, dict[str, float]] = {}
    efficiencies: dict[str, float | None] = {}
    for x in lines:
        case = Case(*(x[field] for field in Case._fields))
        label = f"{case.label} {case.dtype}"
        row = by_case.setdefault(label, {})
        if x["status"] == "ok":
            row[x["impl"]] = x["tflops"] * factor
        if x["impl"] == ours and x["window"] is not None:
            efficiencies[label] = x.get("efficiency")

    ratios: dict[str, list[float]] = {"/best": [], "/sdpa_flash": []}
    table = []
    for label, row in by_case.items():
        cells = [label, *(format_number(row.get(name), ".1f") for name in names)]
        best = max((row[name] for name in others if name in row), default=None)
        for column, divisor in (("/best", best), ("/sdpa_flash", row.get("sdpa_flash"))):
            mine = row.get(ours) if ours else None
            ratio = mine / divisor if mine and divisor else None
            if ratio is not None:
                ratios[column].append(ratio)
            cells.append(format_number(ratio, ".2f"))
        if efficiencies:
            cells.append(format_number(efficiencies.get(label), ".2f"))
        table.append(cells)
    means = [format_number(geometric_mean(x), ".2f") for x in ratios.values()]
    table.append(["geometric mean", *("" for _ in names), *means])
    header = [unit, *names, *ratios]
    note = f"Ratios are of {ours}; /best: to the fastest of the others." if ours else ""
    if efficiencies:
        known = [x for x in efficiencies.values() if x is not None]
        table[-1].append(format_number(geometric_mean(known), ".2f"))
        header.append("/whole")
        note += " With a window only visible pairs count; /whole: to the rate without the window."
    return format_table(header, table) + "\n" + note
