"""Tables of docs/guides/io.md and docs/guides/profiling.md: bytes and memory, what profilers and ablations found."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from flashcute._cli import ncu, profile_
from flashcute._cli.problem import ITEM_BYTES, Case
from flashcute._cli.traffic import flash_dram, matrix_bytes, standard
from lines import Line, lines, one, rounded, table, where

NAIVE = "gpu_naive"
MEBI = 2**20


# ---- bytes and memory ------------------------------------------------------------------------------


def case_of(line: Line) -> Case:
    return Case(*(line.get(name) for name in Case._fields))


def naive_pairs() -> list[tuple[Line, Line]]:
    """Ours and the naive computation of each case."""
    return [
        (x, one(NAIVE, impl="naive", seqlen_q=x["seqlen_q"], causal=x["causal"]))
        for x in where(NAIVE, impl="flashcute")
    ]


def memory() -> str:
    """What both allocate, beside the bytes of the score matrices and the output."""
    rows = []
    for ours, naive in naive_pairs():
        case = case_of(naive)
        scores = case.score_count * ITEM_BYTES[case.dtype]
        output = matrix_bytes(case).out
        rows.append([
            f"{case.seqlen_q:,}", mask_of(case), mib(2 * scores + output), mib(naive["peak_bytes"]),
            mib(output), mib(ours["peak_bytes"]),
            f"{naive['peak_bytes'] / ours['peak_bytes']:.0f}",
        ])  # fmt: skip
    header = ["length", "mask", "S, P and O", "naive, measured", "O", "flashcute, measured"]
    return table([*header, "naive / flashcute"], rows, numbers=5)


def rates() -> str:
    """The bytes of theory over the measured time: how far from the bandwidth of DRAM both are."""
    rows = []
    for ours, naive in naive_pairs():
        case = case_of(naive)
        row: list[object] = [f"{case.seqlen_q:,}", mask_of(case)]
        for line, traffic in ((naive, standard(case)), (ours, flash_dram(case))):
            row += [
                f"{traffic.total / 1e9:.2f}",
                f"{line['ms_p50']:.2f}",
                f"{traffic.total / line['ms_p50'] / 1e9:.2f}",
            ]
        rows.append(row)
    header = ["length", "mask"]
    for name in ("naive", "flashcute"):
        header += [f"{name}: GB", "ms", "TB/s"]
    return table(header, rows, numbers=6)


def mask_of(case: Case) -> str:
    return "causal" if case.causal else "full"


def mib(count: float) -> str:
    return f"{count / MEBI:,.0f} MiB"


BYTES, PROFILE = "gpu_io", "gpu_profile"


def counted(level: str) -> str:
    """What ncu counted at DRAM or at L2 over theory, by head dimension, mask and length."""
    rows = []
    for x in in_order(lines(BYTES)):
        case, found = case_of(x), x["measured"]
        row: list[object] = [case.head_dim, mask_of(case), f"{case.seqlen_q:,}"]
        if level == "dram":
            for name in ("read", "written"):
                theory = x["theory"]["flash_dram"][name]
                row += [mib(theory), rounded(found[f"dram_{name}"] / theory, 3)]
        else:
            theory = sum(x["theory"]["flash_l2"].values())
            twice = theory + matrix_bytes(case).q
            row += [mib(theory), *(rounded(found["l2_of_sms"] / y) for y in (theory, twice))]
        rows.append(row)
    columns = {
        "dram": ["read, theory", "measured / theory", "written, theory", "measured / theory"],
        "l2": ["L2, theory", "of SMs, measured / theory", "with the prefetch of Q"],
    }[level]
    return table(["d", "mask", "length", *columns], rows, numbers=len(columns))


def in_order(found: Iterable[Line]) -> list[Line]:
    return sorted(found, key=lambda x: (x["head_dim"], x["causal"], x["seqlen_q"]))


def counted_dram() -> str:
    """A sentence: how much more DRAM is read than theory says."""
    ratios: dict[tuple[int, int], list[float]] = {}
    for x in in_order(lines(BYTES)):
        ratio = x["measured"]["dram_read"] / x["theory"]["flash_dram"]["read"]
        ratios.setdefault((x["head_dim"], x["seqlen_q"]), []).append(ratio)
    most = max(ratios, key=lambda cell: max(ratios[cell]))
    others = [ratio for cell, found in ratios.items() if cell != most for ratio in found]
    full, causal = ratios[most]
    return (
        f"DRAM is read {rounded(min(others), 3)} to {rounded(max(others))} times as much as theory says; only at head\n"
        f"dimension {most[0]} and {most[1]:,} tokens it is {rounded(full)} times without a mask and {rounded(causal)} "
        "times under the causal one."
    )


def counted_further() -> str:
    """A sentence: what L2 counts beside the requests of the multiprocessors."""
    ratios = [
        (x["l2"] - x["l2_of_sms"]) / (x["dram_read"] + x["dram_written"])
        for x in (line["measured"] for line in lines(BYTES))
    ]
    return (
        "The bytes of all requests to L2 exceed those of the multiprocessors by "
        f"{rounded(min(ratios))} to {rounded(max(ratios))} times the bytes that\nDRAM reads and writes."
    )


# ---- what the profiler found -------------------------------------------------------------------------

ABLATIONS, GRADIENTS, HOPPER = "gpu_ablations", "gpu_backward_steps", "gpu_hopper_steps"
BEFORE = "a9da978"  # the kernel as it was in these runs, beside the steps that were tried


def shared_memory() -> str:
    """Of the mma.sync forward, and FlashAttention-2's."""
    names = {"flashcute": "flashcute", "sdpa_flash": "FlashAttention-2 (torch)"}
    rows = [
        [
            names[x["impl"]],
            x["head_dim"],
            tile(x["config"]),
            f"{x['shared_memory_wavefronts_percent_of_peak']:.0f} %",
        ]
        for x in where(ABLATIONS, kind="profile")
    ]
    return table(["kernel", "head dimension", "queries x keys", "shared memory"], rows, numbers=1)


def tile(config: str | None) -> str:
    words = {w[0]: w[1:] for w in (config or "").split("_") if w[:1] in "mn" and w[1:].isdigit()}
    return f"{words['m']} x {words['n']}" if words else "-"


def gradients() -> str:
    """Of the kernel `gradients` of the mma.sync backward."""
    rows = [
        [
            x["head_dim"],
            f"`{x['variant']}`",
            f"{x['shared_wavefronts'] / 1e6:.0f}",
            f"{x['shared_percent_of_peak']:.0f} %",
            f"{x['issue_active_percent']:.0f} %",
            f"{x['ms']:.2f}",
        ]
        for x in where(GRADIENTS, kind="backward_profile")
    ]
    header = [
        "head dimension",
        "variant",
        "million wavefronts",
        "shared memory",
        "issue slots",
        "ms",
    ]
    return table(header, rows, numbers=4)


def hopper_units() -> str:
    """Of Hopper's forward: tensor cores and exponential unit."""
    rows = []
    for x in lines(HOPPER):
        if BEFORE in x.get("tensor_percent", {}):
            shares = [f"{x[f'{unit}_percent'][BEFORE]:.0f} %" for unit in ("tensor", "mufu")]
            rows.append([x["head_dim"], *shares, f"{x['kcycles'][BEFORE]:,.0f}"])
    header = ["head dimension", "tensor cores", "exponential unit", "thousand cycles"]
    return table(header, rows, numbers=3)


def hopper_stalls() -> str:
    """Samples of the main loop at head dimension 64, by what a warp waits for."""
    found = [x for x in where(HOPPER, kind="profile") if "stall_percent" in x]
    reasons: dict[str, Any] = {name: None for x in found for name in x["stall_percent"]}
    rows = [
        [
            f"`{reason}`",
            *(
                f"{x['stall_percent'][reason]:.0f} %" if reason in x["stall_percent"] else "-"
                for x in found
            ),
        ]
        for reason in reasons
    ]
    return table(["reason", *(f"`{x['variant']}`" for x in found)], rows, numbers=len(found))


def ablation_shares() -> str:
    """How much faster the mma.sync forward is without a part, which gives wrong results."""
    columns = {
        64: "block_m=128,block_n=64,q_in_registers=1",
        128: "block_m=128,block_n=64",
        256: "block_m=64,block_n=64",
    }
    changes = (
        "without the softmax",
        "without barriers",
        "without rescaling O",
        "without loading K and V",
    )
    rows = []
    for change in changes:
        row = [change]
        for head_dim, config in columns.items():
            runs = where(ABLATIONS, kind="ablation", head_dim=head_dim, config=config, causal=False)
            # The first of them is of the same run; "as it was" was timed again later.
            base, without = (
                next(x["tflops"] for x in runs if x["change"] == c) for c in ("as it was", change)
            )
            row.append(rounded(without / base))
        rows.append(row)
    return table(["rate / rate with all parts", *(f"d = {d}" for d in columns)], rows, numbers=3)


# ---- what `profile` says of the kernels as they are ---------------------------------------------------


def percent_of(line: Line, names: ncu.Names) -> str:
    return f"{line['metrics'][names[0]]:.0f} %"


def milliseconds(line: Line) -> float:
    return 1e3 * float(line["metrics"][profile_.DURATION[0]])


def waits(line: Line) -> list[str]:
    """Why most warps wait, as shares of all resident warps; the most frequent reason first."""
    found = ncu.stalls_of(line["metrics"])
    every = sum(found.values())
    return [
        f"`{x}` {100 * n / every:.0f} %" for x, n in found.items() if x not in profile_.NOT_WAITING
    ]


def profiled_forward() -> str:
    """Hopper's forward: a column for each head dimension and mask."""
    found = in_order(x for x in lines(PROFILE) if "_fwd_" in x["kernel"])
    units = {
        "tensor cores": profile_.TENSOR,
        "exponential unit": profile_.EXPONENTIALS,
        "issue slots": profile_.ISSUE,
        "shared memory": profile_.SHARED,
        "L2": profile_.L2,
        "DRAM": profile_.DRAM,
    }
    rows = [
        ["ms", *(f"{milliseconds(x):.3f}" for x in found)],
        ["TFLOP/s", *(f"{case_of(x).flops / milliseconds(x) / 1e9:.0f}" for x in found)],
        *([unit, *(percent_of(x, names) for x in found)] for unit, names in units.items()),
        *(
            ["most warps wait" if i == 0 else "then", *(waits(x)[i] for x in found)]
            for i in range(2)
        ),
    ]
    cases = [case_of(x) for x in found]
    header = ["", *(f"d = {x.head_dim}, {mask_of(x)}" for x in cases)]
    return table(header, rows, numbers=len(cases))


def profiled_gradients() -> str:
    """The three passes of the gradients, by head dimension."""
    units = profile_.TENSOR, profile_.SHARED, profile_.L2, profile_.DRAM
    rows = []
    for x in lines(PROFILE):
        if "_bwd_" in x["kernel"]:
            spilled = x["metrics"][profile_.LOCAL_LOADS[0]] + x["metrics"][profile_.LOCAL_STORES[0]]
            rows.append([
                x["head_dim"], f"`{profile_.pass_of(x['kernel'])}`", waits(x)[0], f"{milliseconds(x):.3f}",
                *(percent_of(x, unit) for unit in units), mib(spilled),
            ])  # fmt: skip
    header = ["d", "pass", "most warps wait", "ms", "tensor cores", "shared memory", "L2", "DRAM"]
    return table([*header, "spills"], rows, numbers=6)


def share_of_gradients() -> str:
    """A sentence: how much of a call the pass that multiplies takes."""
    found = [x for x in lines(PROFILE) if "_bwd_" in x["kernel"]]
    shares = []
    for head_dim in dict.fromkeys(x["head_dim"] for x in found):
        times = {
            profile_.pass_of(x["kernel"]): milliseconds(x)
            for x in found
            if x["head_dim"] == head_dim
        }
        shares.append(100 * times["gradients"] / sum(times.values()))
    return f"The pass that multiplies, `gradients`, has {min(shares):.0f} to {max(shares):.0f} % of the time."


ROWS_OF_WARPGROUP, WAVEFRONT_BYTES = 64, 128


def wgmma_operands() -> str:
    """Wavefronts of shared memory that the operands of WGMMA need, beside those that were counted."""
    rows = []
    for x in in_order(x for x in lines(PROFILE) if "_fwd_" in x["kernel"] and not x["causal"]):
        case, (block_n,) = case_of(x), map(int, re.findall(r"_n(\d+)_", x["kernel"]))
        turns = (
            case.batch * case.heads * case.seqlen_q // ROWS_OF_WARPGROUP * case.seqlen_k // block_n
        )
        read = 2 * case.head_dim * (ROWS_OF_WARPGROUP + 2 * block_n)
        expected = turns * read / WAVEFRONT_BYTES
        counted = x["metrics"][profile_.WAVEFRONTS[0]]
        rows.append([
            case.head_dim, block_n, f"{read / 1024:.0f} KiB", f"{turns:,}",
            f"{expected / 1e6:.1f}", f"{counted / 1e6:.1f}", rounded(counted / expected, 3),
        ])  # fmt: skip
    header = [
        "d",
        "block_n",
        "operands of a turn",
        "turns",
        "million wavefronts",
        "counted",
        "counted / operands",
    ]
    return table(header, rows, numbers=6)


# ---- what the command says ---------------------------------------------------------------------------


def metrics() -> str:
    """The twelve metrics of `profile`, as it tells them."""
    rows = []
    for metric in profile_.METRICS:
        counters = [f"`{names[0]}`" for names in metric.counters]
        counters = counters or [f"section `{ncu.STALL_SECTION}`"]
        rows.append([metric.title, "<br>".join([metric.meaning, *counters])])
    return table(["metric", "what it says, and what to do; its counters in ncu"], rows)


def stall_reasons() -> str:
    """What warps wait for."""
    rows = [[f"`{reason}`", meaning] for reason, meaning in profile_.STALL_MEANINGS.items()]
    return table(["reason", "warps wait"], rows)
