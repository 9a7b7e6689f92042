"""``bench``: the options of the benchmarks, and which one runs."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import sys
from typing import TextIO

from . import bench_backward, bench_forward, bench_host
from .kits import add_device_argument
from .options import (
    DTYPES,
    Commands,
    UsageError,
    boolean,
    bounded_window,
    changes_text,
    config_changes,
    list_of,
    positive_float,
    positive_int,
    seed,
)
from .peers import DETERMINISTIC, NAMES, PACKAGES
from .presets import PRESETS, listing
from .recorded import opened_to_append


def implementation_name(text: str) -> str:
    known = (*NAMES, DETERMINISTIC)
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected names among {', '.join(known)}, got {text!r}")
    return text


def preset_name(text: str) -> str:
    known = (*PRESETS, "help")
    if text not in known:
        raise argparse.ArgumentTypeError(
            f"expected names among {', '.join(PRESETS)}, or help, which lists their shapes; got {text!r}"
        )
    return text


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="verify, then time flashcute and its peers; host overhead; first use",
        description="Verifies every implementation against fp64 on fresh random inputs, then times "
        "all of them in interleaved rounds in one process: CUDA graph replays on a GPU, calls "
        "with equal numbers of threads on the CPU. Writes a JSON line for each case and "
        "implementation, and prints a table. The exit code is 1 if a result of flashcute is wrong, or if it failed. "
        "Ctrl-C ends it with the tables of what was measured, and exit code 130.",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--backward",
        action="store_true",
        help="time gradients, by torch's autograd (with --config by flashcute.backward), instead",
    )
    mode.add_argument(
        "--overhead", action="store_true", help="time what a call costs the host instead"
    )
    mode.add_argument(
        "--first-use",
        action="store_true",
        help="time a first call in new processes instead: compiling, then from the disk cache; --head-dims takes one",
    )
    add_device_argument(parser)
    cases = parser.add_argument_group(
        "cases",
        "the attention of models, or every head dim x mask x sequence length; batch = tokens / seqlen, "
        "heads = hidden / d",
    )
    cases.add_argument(
        "--preset",
        type=list_of(preset_name),
        metavar="NAME,...|help",
        help="the attention of these models; help lists them. On the CPU a batch of 1 and the first of each "
        "preset's lengths; --seqlens, --batch, --tokens and --dtype choose others",
    )
    cases.add_argument(
        "--grid",
        metavar="quick|peers|study|FILE",
        help="quick: two sequence lengths; peers: 1k to 16k; study: 1k to 16k with 8, 16 and 32 heads, on the CPU "
        "with a batch of 1; FILE: JSON lines with batch, heads, seqlen_q, head_dim, causal, and optionally "
        "kv_heads, seqlen_k, dtype, window, head_dim_v, sink, which take no other sizes (default: quick)",
    )
    cases.add_argument("--head-dims", type=list_of(positive_int), metavar="64,128")
    cases.add_argument("--seqlens", type=list_of(positive_int), metavar="1024,4096")
    cases.add_argument("--causal", type=list_of(boolean), metavar="0,1", help="default: both")
    cases.add_argument(
        "--window",
        type=bounded_window,
        metavar="LEFT,RIGHT",
        help="each case also with this window, in the same rounds: how many keys before and after the "
        "diagonal a query sees; -1: no limit, as in --window=-1,0",
    )
    cases.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, on the CPU float32")
    cases.add_argument("--tokens", type=positive_int, metavar="N", help="16384, on the CPU 4096")
    cases.add_argument("--hidden", type=positive_int, metavar="N", help="2048, on the CPU 256")
    cases.add_argument("--batch", type=positive_int, metavar="N", help="instead of --tokens")
    cases.add_argument("--heads", type=positive_int, metavar="N", help="instead of --hidden")
    cases.add_argument(
        "--kv-ratio", type=positive_int, metavar="N", help="query heads per K/V head (default: 1)"
    )
    compared = parser.add_argument_group("implementations")
    compared.add_argument(
        "--impls",
        type=list_of(implementation_name),
        metavar="NAME,...",
        help=f"among {', '.join(NAMES)}, with --backward {DETERMINISTIC}; default: all but sdpa, "
        f"{', '.join(PACKAGES)} and {DETERMINISTIC}, on the CPU flashcute, sdpa, naive",
    )
    compared.add_argument(
        "--config",
        type=config_changes,
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="also time flashcute with its default configuration changed so, for example "
        "block_m=64,num_warps=4; may be given several times",
    )
    method = parser.add_argument_group("method")
    method.add_argument("--rounds", type=positive_int, default=5, metavar="N")
    method.add_argument(
        "--budget-ms",
        type=positive_float,
        default=30.0,
        metavar="MS",
        help="time for each implementation in each round",
    )
    method.add_argument(
        "--deadline-s", type=positive_float, metavar="S", help="start no case after this time"
    )
    method.add_argument(
        "--seed", type=seed, metavar="N", help="of the random inputs (default: a fresh one)"
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--table",
        choices=("both", "details", "summary"),
        default="both",
        help="details: a row for each case and implementation, with p50, p99, memory and error; summary: a row for "
        "each case, with the rates side by side (default: both)",
    )
    shown.add_argument(
        "--plain",
        action="store_true",
        help="a line for each case, in place of one that changes if stderr is a terminal and rich is installed",
    )
    record = parser.add_argument_group("record")
    record.add_argument(
        "--out",
        metavar="FILE",
        help="append the JSON lines to this file; -: write them to stdout, and all else to stderr",
    )
    record.add_argument("--note", metavar="TEXT", help="put into every line")
    record.add_argument(
        "--commit",
        metavar="TEXT",
        help="what to record as the commit (default: that of the checkout which is the current "
        "folder, else the version)",
    )
    parser.set_defaults(run=run, defaults={name: parser.get_default(name) for name in UNHEARD})


def run(options: argparse.Namespace) -> int:
    if "help" in (options.preset or ()):
        print(listing())
        return 0
    refuse_unheard(options)
    if options.seed is None:
        options.seed = secrets.randbits(31)
    if options.out == "-":
        lines = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            return measure(options, lines)
    if options.out is None:
        return measure(options, None)
    with opened_to_append("--out", options.out) as file:
        return measure(options, file)


# What --overhead and --first-use, which time calls of their own, would not hear of.
UNHEARD = (
    "preset", "grid", "head_dims", "seqlens", "causal", "window", "tokens", "hidden", "batch", "heads", "kv_ratio",
    "impls", "config", "rounds", "budget_ms", "deadline_s", "table",
)  # fmt: skip
HEARD = "--device, --dtype, --seed, --out, --note and --commit"


def refuse_unheard(options: argparse.Namespace) -> None:
    """Raises UsageError for an option that would be ignored."""
    if not (options.overhead or options.first_use):
        return
    mode, heard = (
        ("--overhead", HEARD) if options.overhead else ("--first-use", f"--head-dims, {HEARD}")
    )
    for name in UNHEARD:
        value = getattr(options, name)
        if value == options.defaults[name]:
            continue
        option = "--" + name.replace("_", "-")
        if name == "head_dims" and options.first_use:
            if len(value) > 1:
                told = ",".join(map(str, value))
                raise UsageError(f"{option}: expected one beside {mode}, got {told}")
            continue
        raise UsageError(
            f"{option}: expected nothing beside {mode}, which times calls of its own, got {in_words(name, value)}; "
            f"it takes {heard}"
        )


def in_words(name: str, value: object) -> str:
    """An option's value as it is written."""
    if name == "config" and isinstance(value, list):
        return " ".join(map(changes_text, value))
    if isinstance(value, list | tuple):
        return ",".join(str(int(x)) if isinstance(x, bool) else str(x) for x in value)
    return str(value)


def measure(options: argparse.Namespace, out: TextIO | None) -> int:
    if options.overhead:
        return bench_host.overhead(options, out)
    if options.first_use:
        return bench_host.first_use(options, out)
    if options.backward:
        return bench_backward.run(options, out)
    return bench_forward.run(options, out)
