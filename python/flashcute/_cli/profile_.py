"""``profile``: one kernel under Nsight Compute, reduced to twelve metrics that say what bounds it."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from .. import Variant, backward, flash_attention, forward
from . import ncu
from .cases import (
    add_case_arguments,
    backward_config,
    case_arguments,
    cases_of,
    forward_config,
    gpu_arch,
)
from .kits import Call, Kit, choose_kit
from .options import Commands, UsageError
from .problem import Case
from .provenance import provenance
from .recorded import append_line, opened_to_append
from .table import format_bytes

WARM_UP = 2  # calls before the one that is profiled: the first may compile and load the kernel

# ---- the metrics -----------------------------------------------------------------------------------

DURATION = ("gpu__time_duration.sum",)
SM = ("sm__throughput.avg.pct_of_peak_sustained_elapsed",)
TENSOR = (
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
)
EXPONENTIALS = ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",)
ISSUE = ("smsp__issue_active.avg.pct_of_peak_sustained_active",)
SHARED = ("l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",)
WAVEFRONTS = ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",)
CONFLICTS = ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",)
L2 = ("lts__throughput.avg.pct_of_peak_sustained_elapsed",)
DRAM = (
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)
OCCUPANCY = ("sm__warps_active.avg.pct_of_peak_sustained_active",)
REGISTERS = ("launch__registers_per_thread",)
SHARED_SIZE = ("launch__shared_mem_per_block",)
LOCAL_LOADS = ("l1tex__t_bytes_pipe_lsu_mem_local_op_ld.sum",)
LOCAL_STORES = ("l1tex__t_bytes_pipe_lsu_mem_local_op_st.sum",)
ABSENT = "n/a"  # the chip, or this version of ncu, does not count it

# What warps wait for, by ncu's names, and what that is in these kernels.
STALL_MEANINGS = {
    "barrier": "for the other warps of the thread block, at a barrier",
    "branch_resolving": "for the target of a branch",
    "dispatch_stall": "for the dispatcher, often while the tensor cores read registers",
    "drain": "for their stores to leave, at the end",
    "gmma": "for WGMMA: products, or the registers that they read",
    "imc_miss": "for constants that are not in the cache",
    "lg_throttle": "for the queue of global and local memory",
    "long_scoreboard": "for global, local or L2 memory, or for a barrier in shared memory",
    "math_pipe_throttle": "for a unit that computes, which is busy: the tensor cores or the exponential unit",
    "membar": "for a memory fence",
    "mio_throttle": "for the queue of shared memory and of exponentials",
    "misc": "for something else",
    "no_instruction": "for instructions: the loop does not fit the instruction cache",
    "not_selected": "for nothing: another warp was issued",
    "selected": "for nothing: they are issued",
    "short_scoreboard": "for shared memory or an exponential",
    "sleeping": "asleep",
    "tex_throttle": "for the texture queue",
    "wait": "a fixed number of cycles for the instruction before: too few warps, or chains of instructions",
    "warpgroup_arrive": "for the other warps of the warpgroup, or for products, before WGMMA",
}
NOT_WAITING = ("selected", "not_selected")

Values = Mapping[str, float]


class Metric(NamedTuple):
    key: str  # in JSON lines
    title: str
    counters: tuple[ncu.Names, ...]  # of which it is told; the reasons of stalls are a section
    told: Callable[[Values], str]  # its value in words
    meaning: str  # what it says of an attention kernel, and what to do


def percent(names: ncu.Names) -> Callable[[Values], str]:
    return lambda values: f"{values[names[0]]:.1f} %" if names[0] in values else ABSENT


def told_duration(values: Values) -> str:
    seconds = values.get(DURATION[0])
    return ABSENT if seconds is None else f"{1e3 * seconds:.4g} ms"


def told_conflicts(values: Values) -> str:
    conflicts, wavefronts = values.get(CONFLICTS[0]), values.get(WAVEFRONTS[0])
    if conflicts is None:
        return ABSENT
    of_all = (
        f" ({100 * conflicts / wavefronts:.1f} % of {wavefronts:,.0f} wavefronts)"
        if wavefronts
        else ""
    )
    return f"{conflicts:,.0f}{of_all}"


def told_occupancy(values: Values) -> str:
    registers, shared = values.get(REGISTERS[0]), values.get(SHARED_SIZE[0])
    # Hopper's kernels give registers of the loading warps to those that compute, after the launch.
    limits = [] if registers is None else [f"{registers:.0f} registers a thread at launch"]
    limits += [] if shared is None else [f"{format_bytes(shared)} of shared memory a block"]
    return percent(OCCUPANCY)(values) + (f" ({', '.join(limits)})" if limits else "")


def told_spills(values: Values) -> str:
    loads, stores = values.get(LOCAL_LOADS[0]), values.get(LOCAL_STORES[0])
    if loads is None or stores is None:
        return ABSENT
    return f"{format_bytes(loads)} read, {format_bytes(stores)} written"


def told_stalls(values: Values) -> str:
    reason = top_stall(values)
    if reason is None:
        return ABSENT
    found = ncu.stalls_of(dict(values))
    return f"{reason}, {100 * found[reason] / sum(found.values()):.0f} %: {STALL_MEANINGS.get(reason, 'see its name')}"


def top_stall(values: Values) -> str | None:
    """The reason why most warps wait."""
    return next(
        (x for x, n in ncu.stalls_of(dict(values)).items() if x not in NOT_WAITING and n), None
    )


METRICS = (
    Metric(
        "duration", "duration", (DURATION,), told_duration,
        "Time of one launch with cold caches, at the clock that the GPU chooses; compare it with `bench`, whose calls "
        "repeat: where they differ much, look at the launch (nsys), not at the kernel.",
    ),
    Metric(
        "sm", "SM throughput", (SM,), percent(SM),
        "The busiest pipe of the multiprocessors, of all cycles (tensor cores to issue slots: of cycles with a warp, "
        "so they may be above it); above 80 % the kernel is bound by one of these, under 60 % it waits, or memory is "
        "the bound: shared memory, L2 or DRAM.",
    ),
    Metric(
        "tensor", "tensor cores", (TENSOR,), percent(TENSOR),
        "Cycles in which the tensor cores multiply, by mma.sync or WGMMA: the only work that counts as FLOP; if it is "
        "low, the lines below say what they wait for.",
    ),
    Metric(
        "exponentials", "exponential unit", (EXPONENTIALS,), percent(EXPONENTIALS),
        "The XU pipe computes one exp2 a score; at head dimension 64 it may be as busy as the tensor cores, and then "
        "only overlapping softmax and products helps (pingpong, scores_ahead).",
    ),
    Metric(
        "issue", "issue slots", (ISSUE,), percent(ISSUE),
        "Cycles in which a scheduler issues an instruction; above 80 % there are too many instructions for each "
        "product (masks, conversions, spills): read the SASS; WGMMA kernels need few.",
    ),
    Metric(
        "shared", "shared memory", (SHARED,), percent(SHARED),
        "Bandwidth that loads and stores of threads (ldmatrix) and the operands of WGMMA use, but not TMA; if it is "
        "high, read less for each product: larger block_m, q_in_registers, column_warps.",
    ),
    Metric(
        "conflicts", "bank conflicts", (CONFLICTS, WAVEFRONTS), told_conflicts,
        "Extra passes because lanes hit the same bank; with swizzled=1 expect few: many mean that a layout and its "
        "copies do not fit each other.",
    ),
    Metric(
        "l2", "L2", (L2,), percent(L2),
        "Tiles read K and V through L2 once for each block_m queries; if it is high, take larger tiles or a cluster "
        "(`io` says how many bytes there should be).",
    ),
    Metric(
        "dram", "DRAM", (DRAM,), percent(DRAM),
        "Each of Q, K, V and O should pass once, so long sequences leave DRAM idle; if it is high, the problem is "
        "short or has few queries, or L2 does not keep K and V: see `io --ncu`.",
    ),
    Metric(
        "occupancy", "occupancy", (OCCUPANCY, REGISTERS, SHARED_SIZE), told_occupancy,
        "Resident warps of those that the multiprocessor could hold; 12 to 25 % is by design here, since registers and "
        "shared memory hold the tiles: raise it (blocks_per_sm) only where warps wait for latency.",
    ),
    Metric(
        "spills", "local memory", (LOCAL_LOADS, LOCAL_STORES), told_spills,
        "Registers that did not fit and went to memory, counted at L1; a few in the prologue cost nothing, in the loop "
        "they cost issue slots: smaller tiles, fewer blocks_per_sm, and tools/sass.py shows where.",
    ),
    Metric(
        "stall", "warps wait", (), told_stalls,
        "The most frequent reason, as a share of all resident warps; it is the place to look next, and no fault if "
        "the tensor cores are busy.",
    ),
)  # fmt: skip

ALL_METRICS = tuple(names for metric in METRICS for names in metric.counters)

UNITS = {
    "the tensor cores": TENSOR,
    "the exponential unit": EXPONENTIALS,
    "the issue slots": ISSUE,
    "shared memory": SHARED,
    "L2": L2,
    "DRAM": DRAM,
}
BUSY = 60.0
LIMIT = 80.0  # from here on a unit is the bound
ALIKE = 5.0  # per cent by which units are equally busy


def verdict(values: Values) -> str:
    """The busiest unit in a sentence, with those that are about as busy."""
    busy = {unit: values[names[0]] for unit, names in UNITS.items() if names[0] in values}
    if not busy:
        return "No unit was counted."
    unit, share = max(busy.items(), key=lambda item: item[1])
    if share >= BUSY:
        alike = [f"{unit}, {x:.0f} %" for unit, x in busy.items() if x > share - ALIKE]
        told = f"Busiest: {'; '.join(alike)}."
        return told if share >= LIMIT else f"{told} None is at its limit: the kernel also waits."
    return (
        f"No unit is busy (at most {unit}, {share:.0f} %): the kernel waits, and `warps wait` says for what; if there "
        "are fewer thread blocks than multiprocessors, the problem is too small."
    )


# ---- what is profiled ------------------------------------------------------------------------------


def kernels_of(*, gradients: bool) -> str:
    """Names of the kernels (core/kernel_id.hpp), which are extern "C": the function's name is all of it."""
    return "^flashcute_sm[0-9]+_" + ("bwd_" if gradients else "fwd_")


def launches_of_call(case: Case, options: argparse.Namespace) -> int:
    """Kernels of one call: the forward has one; gradients three, or two (core/backward_config.hpp, passes_of)."""
    if not options.backward:
        return 1
    cfg = backward_config(case, gpu_arch(), options)
    splits_dq = cfg.deterministic if cfg.kernel == "sm80" else cfg.head_dim > 128
    return 2 if splits_dq else 3


def job_of(
    case: Case, options: argparse.Namespace, metrics: tuple[ncu.Names, ...], *, stalls: bool = False
) -> ncu.Job:
    gradients = bool(getattr(options, "backward", False))
    count = launches_of_call(case, options) if gradients else 1
    program = [sys.executable, "-m", "flashcute", "profile", "--only-launch"]
    program += [*(["--backward"] if gradients else []), *case_arguments(case, options)]
    return ncu.Job(
        program=tuple(program),
        kernels=kernels_of(gradients=gradients),
        skipped=WARM_UP * count,
        launches=count,
        metrics=metrics,
        stalls=stalls,
    )


def launch(kit: Kit, case: Case, options: argparse.Namespace) -> None:
    """What runs under the profiler: the call, and as many before it as are skipped."""
    call = (
        gradients_call(kit, case, options) if options.backward else forward_call(kit, case, options)
    )
    for _ in range(WARM_UP + 1):
        call()
    kit.synchronize()


def forward_call(kit: Kit, case: Case, options: argparse.Namespace) -> Call:
    q, k, v = case.random_inputs(kit)
    cfg = forward_config(case, kit.arch, options)
    variant = Variant(causal=case.causal, window=case.window)
    return functools.partial(forward, cfg, q, k, v, variant=variant, return_lse=True)


def gradients_call(kit: Kit, case: Case, options: argparse.Namespace) -> Call:
    q, k, v = case.random_inputs(kit)
    out, lse = flash_attention(q, k, v, case.causal, window=case.window, return_lse=True)
    cfg = backward_config(case, kit.arch, options)
    variant = Variant(causal=case.causal, window=case.window)
    dout = kit.normal(q.shape, case.dtype)
    return functools.partial(backward, cfg, dout, q, k, v, out, lse, variant=variant)


# ---- the command -----------------------------------------------------------------------------------


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "profile",
        help="one kernel under Nsight Compute: twelve metrics and what they mean",
        description="Prints the command lines of Nsight Compute (ncu) and Nsight Systems (nsys) for a case, runs the "
        "first, and reduces its report to twelve metrics, each with a sentence that says what it means for an "
        "attention kernel. It profiles one call after two others, with cold caches, and lets the clock run free.",
    )
    add_case_arguments(parser)
    parser.add_argument(
        "--backward",
        action="store_true",
        help="the kernels of the gradients instead of the forward's",
    )
    parser.add_argument(
        "--print",
        dest="only_print",
        action="store_true",
        help="print the command lines, run nothing",
    )
    parser.add_argument(
        "--only-launch",
        action="store_true",
        help="make the calls and measure nothing: what runs under the profiler",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="keep ncu's report (.ncu-rep), for `ncu-ui FILE`"
    )
    parser.add_argument("--json", metavar="FILE", help="append a JSON line for each kernel")
    parser.add_argument("--commit", metavar="TEXT", help="what to record as the commit")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    cases = cases_of(options)
    if len(cases) != 1:
        raise UsageError(f"--seqlen: expected one length, got {len(cases)}")
    (case,) = cases
    if options.only_launch:
        launch(choose_kit("auto", case.dtype), case, options)
        return 0
    check_config(case, options)
    report = report_file(options.out)
    job = job_of(case, options, ALL_METRICS, stalls=True)
    print(f"nsys, for the calls on a time line:\n{shlex.join(ncu.nsys_line(job, 'flashcute'))}\n")
    if options.only_print:
        line = ncu.command_line(
            ncu.find_ncu() or "ncu", job, report or "flashcute.ncu-rep", ncu.first_names(job)
        )
        print(f"ncu, for the counters of one call:\n{shlex.join(line)}")
        return 0
    ncu.require_gpu()
    program = ncu.require_ncu()
    print("ncu, for the counters of one call:")
    with (
        nullcontext() if options.json is None else opened_to_append("--json", options.json) as out,
        tempfile.TemporaryDirectory(prefix="flashcute_profile_") as folder,
    ):
        launches = ncu.profile(program, job, report or str(Path(folder) / "profile.ncu-rep"))
        if out is not None:
            common = provenance(choose_kit("auto", prefer_numpy=True), options.commit)
            for one in launches:
                append_line(out, record(case, one, common))
    for one in launches:
        print("\n" + told(case, one, options))
    if len(launches) > 1:
        print("\n" + shares_of_time(launches))
    if report is not None:
        print(f"\n{report}: the report; `{shlex.join(['ncu-ui', report])}` shows all of it")
    return 0


def check_config(case: Case, options: argparse.Namespace) -> None:
    """Raises before anything runs if no kernel has the configuration."""
    (backward_config if options.backward else forward_config)(case, gpu_arch(), options)


def report_file(name: str | None) -> str | None:
    """With the suffix that ncu appends where it is missing."""
    if name is None:
        return None
    path = Path(name)
    if not path.name or path.is_dir() or not path.resolve().parent.is_dir():
        raise UsageError(f"--out: expected a file in a folder that exists, got {name!r}")
    return name if name.endswith(".ncu-rep") else f"{name}.ncu-rep"


def told(case: Case, one: ncu.Profiled, options: argparse.Namespace) -> str:
    lines = [
        one.name,
        f"{case.label} {case.dtype}; {one.blocks:,} blocks of {one.threads:,} threads",
    ]
    multiplies = pass_of(one.name) not in STREAMING
    if not multiplies:
        lines.append(STREAMED)
    width = max(len(metric.title) for metric in METRICS) + 2
    for metric in METRICS:
        value = metric.told(one.metrics)
        if metric.key == "duration" and not options.backward and DURATION[0] in one.metrics:
            value += f", {case.flops / one.metrics[DURATION[0]] / 1e12:.0f} TFLOP/s"
        gap = "\n" if multiplies or metric is METRICS[0] else ""
        lines.append(f"{gap}  {metric.title.ljust(width)}{value}")
        if multiplies:
            lines += textwrap.wrap(
                metric.meaning, 96, initial_indent="      ", subsequent_indent="      "
            )
    return "\n".join([*lines, "", verdict(one.metrics)])


# Passes of the gradients beside the one that multiplies; what the metrics mean is said of kernels that multiply.
STREAMING = ("prepare", "finish")
STREAMED = "This pass only reads and writes: L2 or DRAM should be busy, the tensor cores idle."


def pass_of(kernel: str) -> str:
    """Of the gradients, by the kernel's name, as in core/enums.hpp; "" of the forward."""
    words = kernel.split("_")
    return next((x for x in ("gradients", "queries", "keys", *STREAMING) if x in words), "")


def shares_of_time(launches: Sequence[ncu.Profiled]) -> str:
    """Of each kernel of a call."""
    seconds = [one.metrics.get(DURATION[0], 0.0) for one in launches]
    of_all = sum(seconds)
    if not of_all:
        return "Time of the kernels: not counted."
    told = (
        f"{pass_of(one.name) or one.name} {100 * time / of_all:.1f} %"
        for one, time in zip(launches, seconds, strict=True)
    )
    return f"Of {1e3 * of_all:.4g} ms: {', '.join(told)}."


def record(case: Case, one: ncu.Profiled, common: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "ncu_profile",
        **common,
        **case._asdict(),
        "kernel": one.name,
        "blocks": one.blocks,
        "threads": one.threads,
        "stall": top_stall(one.metrics),
        "metrics": recorded(one.metrics),
    }


def recorded(metrics: Values) -> dict[str, float]:
    """What was asked for, and why warps wait. ncu also tells hundreds of attributes of device and launch."""
    asked = {names[0] for names in ALL_METRICS}
    return {name: x for name, x in metrics.items() if name in asked or ncu.STALLED.fullmatch(name)}
