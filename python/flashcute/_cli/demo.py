"""``demo``: attention over real input, next to the textbook's way of computing it."""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

from .. import __version__, explain
from .kits import Inputs, Kit, add_device_argument, choose_kit, in_layout
from .options import DTYPES, Commands, UsageError, positive_int
from .peers import Flashcute, Implementation, Naive, Sdpa
from .problem import (
    EPSILON,
    ITEM_BYTES,
    Case,
    Given,
    complaint,
    errors,
    fp64_reference,
    naive_result,
)
from .provenance import device_name
from .table import format_bytes, format_number, format_table
from .timing import interleaved_ms

QUICK_TOKENS = 512
TOKENS = 4096


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="attention over real input: errors, time and memory next to the naive computation",
        description="Computes self-attention over the bytes of flashcute's own Python source, "
        "with random weights, full and causal. Prints errors against fp64, and time and memory "
        "next to the naive computation and, if torch is installed, to its attention. The exit "
        "code is 1 if an error of flashcute is out of bounds.",
    )
    add_device_argument(parser)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TOKENS} tokens")
    parser.add_argument(
        "--tokens", type=positive_int, metavar="N", help=f"sequence length (default {TOKENS})"
    )
    parser.add_argument(
        "--heads", type=positive_int, metavar="N", help="default: 16 on a GPU, 4 on the CPU"
    )
    parser.add_argument(
        "--head-dim", type=positive_int, metavar="N", help="default: 128 on a GPU, 64 on the CPU"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: 16 bits on a GPU, float32 on the CPU"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    kit = choose_kit(options.device, options.dtype)
    on_gpu = kit.device == "cuda"
    tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    heads = options.heads or (16 if on_gpu else 4)
    head_dim = options.head_dim or (128 if on_gpu else 64)
    half = "bfloat16" if kit.library == "torch" else "float16"
    dtype = options.dtype or (half if on_gpu else "float32")
    case = Case(1, heads, heads, tokens, tokens, head_dim, False, dtype)
    scores_bytes = case.score_count * ITEM_BYTES[dtype]
    # The naive computation that gives the error bounds holds the scores in the dtype, and several
    # float32 or wider arrays of that size.
    if case.score_count * 5 * max(4, ITEM_BYTES[dtype]) > kit.free_bytes():
        raise UsageError(
            f"the naive computation of {tokens} tokens and {heads} heads needs more memory than is "
            "free: give fewer --tokens or --heads"
        )

    q, k, v = text_inputs(kit, case)
    plan = explain(q, k, v)
    print(f"flashcute {__version__}: self-attention over {tokens} bytes of its own source")
    print(f"device   {device_name(kit)}; arrays of {kit.library} {kit.version}")
    print(f"problem  {heads} heads of {head_dim}, {dtype}")
    print(f"config   {plan.config}")
    print(f"kernel   {plan.kernel}, {plan.image}")

    implementations: list[Implementation] = [Flashcute(kit), Naive(kit)]
    if kit.library == "torch":
        implementations.append(Sdpa(kit, "sdpa"))
    rows: list[list[str]] = []
    problems: list[str] = []
    ratios: list[str] = []
    for causal in (False, True):
        measured = measure(kit, case._replace(causal=causal), implementations, (q, k, v))
        rows += measured.rows
        problems += measured.problems
        ratios.append(f"{measured.speedup:.1f}")
    rate = "TFLOP/s" if on_gpu else "GFLOP/s"
    header = ("", "mask", "max error", "rel. L2", "LSE error", "ms", rate, "memory")
    print("\n" + format_table(header, rows, left=2))
    print(
        f"\nErrors are against fp64 (eps of {dtype}: {EPSILON[dtype]:.1e}). Memory is the "
        f"{kit.memory_meter} during one call."
    )
    print(
        f"flashcute went over K and V block by block with an online softmax, so the {tokens} x "
        f"{tokens} scores of each head\n({format_bytes(scores_bytes)} in all) were never stored: "
        f"{ratios[0]} times as fast as the naive computation, {ratios[1]} times if causal."
    )
    for problem in problems:
        print(f"WRONG: {problem}")
    return 1 if problems else 0


class Measured:
    """Of all implementations on one problem."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []  # of the table
        self.problems: list[str] = []  # of flashcute's results
        self.speedup = 0.0  # of flashcute over the naive computation


def measure(
    kit: Kit, case: Case, implementations: list[Implementation], inputs: Inputs
) -> Measured:
    measured = Measured()
    mask = "causal" if case.causal else "full"
    given = Given(*inputs, case.causal)
    ref = fp64_reference(kit, given)
    naive = errors(naive_result(kit, given), ref)
    medians: dict[str, float] = {}
    for one in implementations:
        found = errors(one.result(kit, given), ref)
        if one.name == "flashcute":
            wrong = complaint(found, naive, ref, case.dtype)
            if wrong:
                measured.problems.append(f"{mask}: {wrong}")
        call = functools.partial(one.call, *in_layout(kit, inputs, one.layout), case.causal)
        call()
        memory = kit.peak_bytes(call)
        repeatable, _ = kit.repeatable(call)
        ms = statistics.median(interleaved_ms(kit, {one.name: repeatable}, 3, 200)[one.name])
        medians[one.name] = ms
        measured.rows.append(
            [
                one.name,
                mask,
                f"{found.max_error:.1e}",
                f"{found.rel_l2:.1e}",
                format_number(found.lse_error, ".1e"),
                f"{ms:.3g}" if ms < 100 else f"{ms:.0f}",
                f"{case.flops / ms / (1e9 if kit.device == 'cuda' else 1e6):.0f}",
                format_bytes(memory),
            ]
        )
    measured.speedup = medians["naive"] / medians["flashcute"]
    return measured


def text_inputs(kit: Kit, case: Case) -> Inputs:
    """q, k and v, (1, tokens, heads, d), of a first layer over the bytes of flashcute's source.

    A byte is embedded at random and its position added as sines; q, k and v are three random
    projections of that.
    """
    import numpy as np

    random = np.random.default_rng(2307_08691)
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)
    text = np.resize(text, case.seqlen_q)  # repeats a text that is too short

    width = 64
    embedding = random.standard_normal((256, width), dtype=np.float32)
    frequencies = 10000.0 ** (-np.arange(width // 2) / (width // 2))
    angles = np.arange(case.seqlen_q)[:, None] * frequencies
    x = embedding[text] + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    def projection() -> Any:
        weights = random.standard_normal((width, case.heads * case.head_dim)) / width**0.5
        shape = (1, case.seqlen_q, case.heads, case.head_dim)
        return kit.array((x @ weights).reshape(shape), case.dtype)

    return projection(), projection(), projection()
