"""Tables of docs/guides/io.md and docs/guides/profiling.md: bytes and memory, what profilers and ablations found."""

from __future__ import annotations

import json
from typing import Any

from flashcute._cli import ncu, profile_
from flashcute._cli.problem import ITEM_BYTES, Case
from flashcute._cli.traffic import flash_dram, matrix_bytes, standard
from lines import ROOT, Line, lines, link, one, rounded, table, where

NAIVE = "gpu_naive"
MEBI = 2**20
KINDS_WITH_BYTES = ("io", "ncu_profile")


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


def recorded_bytes() -> str:
    """Whether any line holds bytes that ncu counted: the sentence must not outlive the first of them."""
    found = [
        file.stem
        for file in sorted((ROOT / "benchmarks/results").glob("*.jsonl"))
        if any(holds_bytes(json.loads(x)) for x in file.read_text().splitlines() if x)
    ]
    if not found:
        return (
            "**No bytes have been recorded yet.** The folder [benchmarks/results](benchmarks/results) has no line in\n"
            "which Nsight Compute counted bytes of DRAM or L2. So all bytes on this page are theory; only memory and\n"
            "times were measured."
        )
    return "Recorded so far: " + ", ".join(link(file, file) for file in found) + "."


def holds_bytes(line: Line) -> bool:
    found = line.get("measured") or line.get("metrics") or {}
    return line.get("kind") in KINDS_WITH_BYTES and any(
        name.startswith(("dram", "l2", "lts__t_bytes")) for name in found
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
