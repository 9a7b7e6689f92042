"""``io``: the bytes that attention moves, in theory and as Nsight Compute counts them."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from .. import ForwardConfig
from . import ncu, profile_
from .cases import add_case_arguments, cases_of, forward_config, gpu_arch
from .kits import choose_kit
from .options import Commands, UsageError, positive_float
from .problem import ITEM_BYTES, Case
from .provenance import provenance
from .recorded import append, opened_to_append
from .table import format_bytes, format_number, format_table

LSE_BYTES = 4  # float32
# An H200 (SXM) by NVIDIA's data sheet: 1,979 TFLOP/s of bfloat16 with sparsity, which is half without; 4.8 TB/s.
PEAK_TFLOPS, BANDWIDTH_TB = 989.0, 4.8
LONGEST = 2**24  # sequence: its tiles are looked at one by one

LEVELS = ("standard, DRAM", "flash, DRAM", "flash, L2")
COUNTERS = {
    "dram_read": ("dram__bytes_read.sum", "dram__bytes_op_read.sum"),
    "dram_written": ("dram__bytes_write.sum", "dram__bytes_op_write.sum"),
    "l2": ("lts__t_bytes.sum",),
    "l2_sectors_of_sms": ("lts__t_sectors_srcunit_tex.sum",),
    "seconds": ("gpu__time_duration.sum",),
}
SECTOR_BYTES = 32


# ---- theory ----------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Bytes that pass a level of memory."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


class Tile(NamedTuple):
    """Query rows [row, row + rows) of one head, and the blocks [begin, end) of keys that they visit; blocks
    [full_begin, full_end) need no test of their elements."""

    row: int
    rows: int
    begin: int
    full_begin: int
    full_end: int
    end: int

    def keys(self, case: Case, block_n: int) -> int:
        """That are loaded: a block at the end of the sequence has only the keys that exist."""
        return max(0, min(self.end * block_n, case.seqlen_k) - self.begin * block_n)


def tiles_of(case: Case, cfg: ForwardConfig) -> Iterator[Tile]:
    """Of one head, as the kernel of `cfg` cuts them: policy/query_tile.hpp and policy/kv_blocks.hpp in Python, and
    without arrays, so that a million rows cost nothing. `count_blocks` returns what the kernel itself counts."""
    size = cfg.block_m * cfg.cluster
    # Hopper's kernel cuts from the last row on: an incomplete tile has the first rows.
    short = -case.seqlen_q % size if cfg.kernel == "sm90" else 0
    for start in range(-short, case.seqlen_q, size):
        row, stop = max(0, start), min(start + size, case.seqlen_q)
        first, last = (bounds(case.keys_of(i)) for i in (row, stop - 1))
        begin = first[0] // cfg.block_n
        end = -(-last[1] // cfg.block_n)
        if first[0] >= last[1]:
            yield Tile(row, stop - row, 0, 0, 0, 0)
            continue
        full_end = min(max(first[1] // cfg.block_n, begin), end)
        full_begin = min(max(-(-last[0] // cfg.block_n), begin), full_end)
        yield Tile(row, stop - row, begin, full_begin, full_end, end)


def bounds(keys: range) -> tuple[int, int]:
    return keys.start, max(keys.stop, 0)


class Blocks(NamedTuple):
    """Blocks of keys in all heads, as `count_blocks` sums up."""

    full: int
    partial: int
    skipped: int

    @property
    def visited(self) -> int:
        return self.full + self.partial


def blocks_of(case: Case, cfg: ForwardConfig) -> Blocks:
    all_blocks = -(-case.seqlen_k // cfg.block_n)
    full = partial = skipped = 0
    for tile in tiles_of(case, cfg):
        visited, whole = tile.end - tile.begin, tile.full_end - tile.full_begin
        full += whole
        partial += visited - whole
        skipped += all_blocks - visited
    heads = case.batch * case.heads
    return Blocks(heads * full, heads * partial, heads * skipped)


def standard(case: Case) -> Traffic:
    """Three kernels that store the scores: S = Q Kᵀ, P = softmax(S), O = P V. Each reads what the one before has
    written; S and P have the dtype of the inputs; a mask saves nothing."""
    item = ITEM_BYTES[case.dtype]
    queries, keys = matrix_bytes(case)
    scores = case.score_count * item
    return Traffic(read=queries + keys + scores + scores + keys, written=scores + scores + queries)


def flash_dram(case: Case) -> Traffic:
    """Each of Q, K, V is read once, O and the log-sum-exp are written once: what one tile has read, others find in L2.
    Keys that no query sees are not read."""
    queries, keys = matrix_bytes(case)
    first, last = bounds(case.keys_of(0)), bounds(case.keys_of(case.seqlen_q - 1))
    seen = max(0, last[1] - first[0]) / case.seqlen_k
    return Traffic(queries + round(2 * keys * seen), queries + lse_bytes(case))


def flash_l2(case: Case, cfg: ForwardConfig) -> Traffic:
    """What tiles ask of L2: each reads its rows of Q once, and K and V of every block that it visits. Query heads that
    share K and V read them each for itself; thread blocks of a cluster read them together."""
    queries, _ = matrix_bytes(case)
    loaded = sum(tile.keys(case, cfg.block_n) for tile in tiles_of(case, cfg))
    keys = case.batch * case.heads * loaded * 2 * case.head_dim * ITEM_BYTES[case.dtype]
    return Traffic(queries + keys, queries + lse_bytes(case))


def matrix_bytes(case: Case) -> tuple[int, int]:
    """Of Q, or O; of K, or V."""
    row = case.batch * case.head_dim * ITEM_BYTES[case.dtype]
    return row * case.heads * case.seqlen_q, row * case.kv_heads * case.seqlen_k


def lse_bytes(case: Case) -> int:
    return case.batch * case.heads * case.seqlen_q * LSE_BYTES


def traffic_of(level: str, case: Case, cfg: ForwardConfig) -> Traffic:
    if level == "flash, L2":
        return flash_l2(case, cfg)
    return flash_dram(case) if level == "flash, DRAM" else standard(case)


def intensity(case: Case, traffic: Traffic) -> float:
    """FLOP for each byte; under a causal mask half of all pairs count, by convention."""
    return case.flops / traffic.total


def bound_by_computing_from(level: str, case: Case, cfg: ForwardConfig, ratio: float) -> int | None:
    """The length (of queries and keys) from which each byte brings at least `ratio` FLOP; None if there is none, or
    with a window, where longer sequences bring no more."""
    if case.window is not None:
        return None

    def enough(length: int) -> bool:
        longer = case._replace(seqlen_q=length, seqlen_k=length)
        return intensity(longer, traffic_of(level, longer, cfg)) >= ratio

    longest = LONGEST
    if not enough(longest):
        return None
    shortest = 0
    while longest - shortest > 1:
        middle = (longest + shortest) // 2
        shortest, longest = (shortest, middle) if enough(middle) else (middle, longest)
    return longest


# ---- the command -----------------------------------------------------------------------------------


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "io",
        help="bytes that attention moves: in theory, and measured by ncu",
        description="Prints the bytes that the forward moves: by the standard algorithm, which stores the scores, and "
        "by flash attention at DRAM and at L2, with the tiles and the visited blocks of the real configuration. "
        "Arithmetic intensity is FLOP for each byte; from the length in the last column on, computing takes longer "
        "than moving. With --ncu the kernel runs under Nsight Compute, and what it counts stands beside.",
    )
    add_case_arguments(parser)
    parser.add_argument(
        "--arch",
        metavar="sm_NN",
        help="the GPU whose default configuration is taken (default: GPU 0, without one sm_90)",
    )
    parser.add_argument(
        "--peak",
        type=positive_float,
        default=PEAK_TFLOPS,
        metavar="TFLOP/S",
        help=f"of the GPU for this dtype (default: {PEAK_TFLOPS:g}, an H200 in 16 bits by its data sheet)",
    )
    parser.add_argument(
        "--bandwidth",
        type=positive_float,
        default=BANDWIDTH_TB,
        metavar="TB/S",
        help=f"of its memory (default: {BANDWIDTH_TB:g}, the same)",
    )
    parser.add_argument(
        "--ncu", action="store_true", help="measure with Nsight Compute; needs a GPU"
    )
    parser.add_argument("--out", metavar="FILE", help="append a JSON line for each case")
    parser.add_argument("--commit", metavar="TEXT", help="what to record as the commit")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    cases = cases_of(options)
    longest = max(max(case.seqlen_q, case.seqlen_k) for case in cases)
    if longest > LONGEST:
        raise UsageError(f"--seqlen, --seqlen-k: expected at most {LONGEST:,}, got {longest:,}")
    program = None
    if options.ncu:
        ncu.require_gpu()
        if options.arch not in (None, gpu_arch()):
            raise UsageError(
                f"--arch: expected {gpu_arch()}, the GPU here, with --ncu, got {options.arch}"
            )
        program = ncu.require_ncu()
    arch = options.arch or gpu_arch()
    configs = [forward_config(case, arch, options) for case in cases]
    common = provenance(choose_kit("auto", prefer_numpy=True), options.commit)
    ratio = options.peak / options.bandwidth
    with nullcontext() if options.out is None else opened_to_append("--out", options.out) as out:
        print(
            f"{options.peak:g} TFLOP/s and {options.bandwidth:g} TB/s: each byte of DRAM must bring {ratio:.0f} FLOP"
        )
        for case, cfg in zip(cases, configs, strict=True):
            found = None if program is None else measured(program, case, options)
            print("\n" + told(case, cfg, arch, ratio, found), flush=True)
            if out is not None:
                append(out, common | record(case, cfg, arch, found))
    return 0


def told(
    case: Case, cfg: ForwardConfig, arch: str, ratio: float, found: dict[str, float] | None
) -> str:
    blocks = blocks_of(case, cfg)
    rows = []
    for level in LEVELS:
        traffic = traffic_of(level, case, cfg)
        at_dram = level.endswith("DRAM")
        from_length = bound_by_computing_from(level, case, cfg, ratio) if at_dram else None
        told_from = "never" if from_length is None else f"{from_length:,}"
        if not at_dram or case.window is not None:
            told_from = "-"
        rows.append(
            [level, *map(format_bytes, (*traffic, traffic.total)),
             f"{intensity(case, traffic):.1f}", f"{standard(case).total / traffic.total:.2f}", told_from]
        )  # fmt: skip
    header = ["", "read", "written", "all", "FLOP/byte", "standard / this", "computing from"]
    text = (
        f"{case.label} {case.dtype}, {cfg.name} on {arch}\n"
        f"tiles of {cfg.block_m * cfg.cluster} queries; blocks of {cfg.block_n} keys: {blocks.full:,} visited whole, "
        f"{blocks.partial:,} with a test, {blocks.skipped:,} skipped\n\n{format_table(header, rows)}"
    )
    if found is not None:
        text += "\n\n" + told_beside(case, cfg, found)
    return text


def told_beside(case: Case, cfg: ForwardConfig, found: dict[str, float]) -> str:
    """What ncu counted, beside theory."""
    dram, l2 = flash_dram(case), flash_l2(case, cfg)
    beside = {
        "DRAM, read": ("dram_read", dram.read),
        "DRAM, written": ("dram_written", dram.written),
        "L2, all requests": ("l2", l2.total),
        "L2, of SMs": ("l2_of_sms", l2.total),
    }
    rows = []
    for what, (key, theory) in beside.items():
        value = found.get(key)
        ratio = None if value is None else value / theory
        rows.append([what, format_bytes(theory), format_bytes(value), format_number(ratio, ".3f")])
    return format_table(["", "theory", "measured", "measured / theory"], rows)


def measured(program: str, case: Case, options: argparse.Namespace) -> dict[str, float]:
    """What ncu counts in one launch, with caches that it has emptied before."""
    job = profile_.job_of(case, options, tuple(COUNTERS.values()))
    with tempfile.TemporaryDirectory(prefix="flashcute_io_") as folder:
        (launch,) = ncu.profile(program, job, str(Path(folder) / "io.ncu-rep"))[:1]
    found = {
        key: launch.metrics[names[0]]
        for key, names in COUNTERS.items()
        if names[0] in launch.metrics
    }
    if "l2_sectors_of_sms" in found:
        found["l2_of_sms"] = SECTOR_BYTES * found["l2_sectors_of_sms"]
    return found


def record(
    case: Case, cfg: ForwardConfig, arch: str, found: dict[str, float] | None
) -> dict[str, Any]:
    names = ("standard", "flash_dram", "flash_l2")
    theory = {name: traffic_of(level, case, cfg) for name, level in zip(names, LEVELS, strict=True)}
    return {
        "kind": "io",
        **case._asdict(),
        "arch": arch,
        "config": str(cfg.name),
        "blocks": blocks_of(case, cfg)._asdict(),
        "theory": {name: traffic._asdict() for name, traffic in theory.items()},
        "measured": found,
    }
