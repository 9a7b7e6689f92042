"""Tables of Hopper's gradients, and of the widths of its forward."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from lines import Cell, Line, link, one, rounded, speed_ups, table, where

from tables.kernels import span as from_to

FILE, STEPS, WIDTHS = "gpu_sm90_backward", "gpu_sm90_backward_steps", "gpu_sm90_widths"
HEAD_DIMS = (64, 128)
MASKS = {"full": False, "causal": True}
LENGTHS = (1024, 2048, 4096, 8192, 16384)
MMA_SYNC, PROMPT = "flashcute[kernel=sm80]", "flashcute[late_dq=0]"


# ---- where they stand ------------------------------------------------------------------------------


def rates() -> str:
    """TFLOP/s of every case, and the speed-up over the faster of the others."""
    columns = {
        "flashcute": "ours",
        "sdpa_cudnn": "cuDNN",
        "sdpa_flash": "FlashAttention-2",
        MMA_SYNC: "our mma.sync",
    }
    faster = over_the_faster()
    rows = []
    for head_dim in HEAD_DIMS:
        for mask, causal in MASKS.items():
            for length in LENGTHS:
                of = {"head_dim": head_dim, "causal": causal, "seqlen_q": length}
                found = {impl: one(FILE, impl=impl, **of) for impl in columns}
                told = [f"{x['tflops']:.0f}" for x in found.values()]
                ratio = next(
                    x for cell, x in faster.items() if cell[3:] == (length, head_dim, causal)
                )
                rows.append([f"{head_dim} {mask}", f"{length // 1024}k", *told, rounded(ratio)])
    header = ["head dim, mask", "length", *columns.values(), "speed-up over the faster"]
    return table(header, rows, numbers=5)


def over_the_faster() -> dict[Cell, float]:
    """Over the faster of cuDNN and FlashAttention-2, cell by cell."""
    by_peer = [speed_ups(FILE, peer) for peer in ("sdpa_cudnn", "sdpa_flash")]
    return {cell: min(found[cell] for found in by_peer) for cell in by_peer[0]}


def summary() -> str:
    """Means over each of the others, and where cuDNN is faster."""
    cudnn, flash, mma = (speed_ups(FILE, x) for x in ("sdpa_cudnn", "sdpa_flash", MMA_SYNC))
    slower = [x for x in cudnn.values() if x < 1]
    of_full = span(x for cell, x in cudnn.items() if cell[4:] == (128, False))
    return (
        f"Geometric means of the {len(cudnn)} cases: {mean(cudnn)} over cuDNN, {mean(flash)} over FlashAttention-2,\n"
        f"and {mean(mma)} over our own mma.sync kernels. cuDNN is faster in {len(slower)} cases: head dimension 128\n"
        f"without a mask, where the speed-up is {of_full}, and its causal case at 1k. Over all cases the speed-up\n"
        f"over cuDNN is {span(cudnn.values())}."
    )


def mean(found: dict[Cell, float]) -> str:
    return rounded(statistics.geometric_mean(found.values()))


def span(numbers: Iterable[float]) -> str:
    found = sorted(numbers)
    return f"{rounded(found[0])} to {rounded(found[-1])}"


def errors() -> str:
    """The largest relative error of each gradient in any case."""
    told = []
    for impl, whose in {
        "flashcute": "ours",
        "sdpa_cudnn": "cuDNN's",
        "sdpa_flash": "FlashAttention-2's",
        MMA_SYNC: "our mma.sync kernels'",
    }.items():
        found = where(FILE, impl=impl)
        told.append(
            [
                whose,
                *(f"{max(x[f'{name}_rel_l2'] for x in found):.2e}" for name in ("dq", "dk", "dv")),
            ]
        )
    return table(["relative error (L2)", "dq", "dk", "dv"], told, numbers=3)


def memory() -> str:
    """At every length of the grid."""
    ours, cudnn, flash = (
        from_to({x["peak_bytes"] / 2**20 for x in where(FILE, impl=impl)}, ".4g")
        for impl in ("flashcute", "sdpa_cudnn", "sdpa_flash")
    )
    return (
        f"Memory beside the inputs, for 16,384 tokens of 2,048 columns: {ours} MiB, in cuDNN {cudnn},\n"
        f"in FlashAttention-2 {flash}."
    )


def late_dq() -> str:
    """Its effect by head dimension, mask and length: the time without it over the time with it."""
    found = speed_ups(FILE, PROMPT)
    rows = [
        [
            f"{head_dim} {mask}",
            *(
                rounded(next(x for cell, x in found.items() if cell[3:] == (n, head_dim, causal)))
                for n in LENGTHS
            ),
        ]
        for head_dim in HEAD_DIMS
        for mask, causal in MASKS.items()
    ]
    header = ["head dim, mask", *(f"{n // 1024}k" for n in LENGTHS)]
    return table(header, rows, numbers=len(LENGTHS))


# ---- what was tried --------------------------------------------------------------------------------


def options() -> str:
    """TFLOP/s of the first run's variants at head dimensions 64 and 128."""
    columns = {
        "as it is": "the kernel today",
        "prompt_dq": "`late_dq=False`",
        "early_exponentials": "early exponentials",
        "early_exponentials,open_end": "these, and an open end",
        "kernel=sm80": "our mma.sync",
        "sdpa_cudnn": "cuDNN",
    }
    rows = []
    for head_dim in reversed(HEAD_DIMS):
        for mask, causal in MASKS.items():
            for length in (1024, 4096, 16384):
                of = {"head_dim": head_dim, "causal": causal, "seqlen": length}
                found = {x["variant"]: x for x in where(STEPS, step="options", **of)}
                told = [f"{found[x]['tflops']:.0f}" if x in found else "-" for x in columns]
                ratio = found["as it is"]["tflops"] / found["sdpa_cudnn"]["tflops"]
                rows.append([f"{head_dim} {mask}", f"{length // 1024}k", *told, rounded(ratio)])
    return table(["head dim, mask", "length", *columns.values(), "over cuDNN"], rows, numbers=7)


ABLATIONS = {
    "base": "as it was",
    "noadd": "without the bulk additions to dQ",
    "noexp": "without exponentials",
    "nohold": "P not held at 1",
    "ds3": "three places for dS",
    "skew": "one warpgroup begins 900 clocks later",
    "earlydv": "dV begun before dP is waited for",
    "earlydv_ds3": "the same, three places for dS",
    "look": "whether the next Q and dO have come asked early",
    "dkfirst": "dK before dQ",
    "dqlater": "dV and dQ waited for together",
}


def ablations() -> str:
    """At head dimension 128, and the change in percent."""
    cells = ((4096, False), (16384, False), (16384, True))
    base = [ablation("base", *cell) for cell in cells]
    rows = []
    for variant, what in ABLATIONS.items():
        found = [ablation(variant, *cell) for cell in cells]
        told = [
            f"{x:.0f}" + ("" if variant == "base" else f" ({100 * (x / before - 1):+.0f} %)")
            for x, before in zip(found, base, strict=True)
        ]
        rows.append([what, *told])
    return table(["TFLOP/s", "4k full", "16k full", "16k causal"], rows, numbers=3)


def ablation(variant: str, length: int, causal: bool) -> float:
    x = one(STEPS, step="ablations", variant=variant, seqlen=length, causal=causal)
    return float(x["tflops"])


METRICS = {
    "tensor cores": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "exponential unit": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "shared memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
}


def profile() -> str:
    """Of the three launches of one call."""
    rows = []
    for head_dim in HEAD_DIMS:
        for launch in ("prepare", "gradients_full", "finish"):
            x = one(STEPS, step="profile", variant=launch, head_dim=head_dim)
            told = [f"{x['metrics'][name]:.0f} %" for name in METRICS.values()]
            ms = 1e3 * x["metrics"]["gpu__time_duration.sum"]
            rows.append([head_dim, f"`{launch.partition('_')[0]}`", f"{ms:.3g}", *told])
    return table(["head dim", "launch", "ms", *METRICS], rows, numbers=1 + len(METRICS))


def share() -> str:
    """Of `prepare` and `finish` in the three launches."""
    shares = []
    for head_dim in HEAD_DIMS:
        ms = {
            x["variant"]: x["metrics"]["gpu__time_duration.sum"]
            for x in where(STEPS, step="profile", head_dim=head_dim)
        }
        shares.append(100 * (ms["prepare"] + ms["finish"]) / sum(ms.values()))
    return (
        f"The first and the last only read and write. They take {from_to(shares, '.1f')} % of the time of 16k tokens\n"
        f"without a mask; the rest of this page is about `gradients`."
    )


def late_dq_first() -> str:
    """Its effect in the first run at head dimension 128 without a mask, in percent."""
    of = {"step": "options", "head_dim": 128, "causal": False}
    found = [
        100 * (one(STEPS, variant="as it is", seqlen=n, **of)["tflops"] / prompt["tflops"] - 1)
        for prompt in where(STEPS, variant="prompt_dq", **of)
        for n in [prompt["seqlen"]]
    ]
    return (
        f"One H200 ({link('lines', FILE)}), one run.\n"
        "At head dimension 128 without a mask it brings nothing in this run; in another it brought "
        f"{from_to(found, '.0f')} %\nthere ([the notebook](docs/kernels/sm90_backward_notebook.md))."
    )


def cold() -> str:
    """The rate of the profiler's one call beside those of calls that repeat."""
    x = one(STEPS, step="profile", variant="gradients_full", head_dim=128)
    flop = 10 * x["batch"] * x["heads"] * x["seqlen"] ** 2 * x["head_dim"]
    once = flop / x["metrics"]["gpu__time_duration.sum"] / 1e12
    bench = one(FILE, impl="flashcute", head_dim=128, causal=False, seqlen_q=16384)["tflops"]
    first = one(
        STEPS, step="options", variant="as it is", head_dim=128, causal=False, seqlen=16384
    )["tflops"]
    return (
        f"`gradients` of one call at head dimension 128, 16k without a mask, runs at {once:.0f} TFLOP/s under the\n"
        f"profiler, with cold caches; all three launches of calls that repeat, at {bench:.0f} in the benchmark and at\n"
        f"{first:.0f} in the first run."
    )


# ---- widths of the forward -------------------------------------------------------------------------

RETILED = 160
WIDTH_CASES = {80: (80, None), 96: (96, None), 160: (160, None), 192: (192, None), "192 / 128": (192, 128)}  # fmt: skip


def widths() -> str:
    """The forward at head dimensions between the powers of two, beside the others; without those that have another
    tile since."""
    rows = []
    for width, (head_dim, head_dim_v) in WIDTH_CASES.items():
        if head_dim == RETILED:
            continue
        for mask, causal in MASKS.items():
            for length in (1024, 4096, 16384):
                of = {"head_dim": head_dim, "head_dim_v": head_dim_v, "causal": causal}
                found = {x["impl"]: x for x in where(WIDTHS, seqlen_q=length, **of)}
                if "flashcute" not in found:
                    continue
                ours = found["flashcute"]
                told = [f"{found[x]['tflops']:.0f}" for x in ("flashcute", "fa3", "sdpa_cudnn")]
                best = min(found[x]["ms_p50"] for x in ("fa3", "sdpa_cudnn"))
                ratio = rounded(best / ours["ms_p50"])
                rows.append([f"{width} {mask}", f"{length // 1024}k", tile(ours), *told, ratio])
    header = ["head dim, mask", "length", "tile", "ours", "FlashAttention-3", "cuDNN"]
    return table([*header, "speed-up over the faster"], rows, numbers=4)


def tile(line: Line) -> str:
    """ "96: 128 x 128" of "fwd_bf16_d96_m128_n128_w8_sm90_st4"."""
    words = line["config"].split("_")
    number = {x.rstrip("0123456789"): x.lstrip("abcdefghijklmnopqrstuvwxyz") for x in words[2:]}
    width = number["d"] + (f" / {number['dv']}" if "dv" in number else "")
    return f"{width}: {number['m']} x {number['n']}"


def widths_summary() -> str:
    by_peer = {}
    for peer in ("fa3", "sdpa_cudnn"):
        by_peer[peer] = [
            found[peer]["ms_p50"] / found["flashcute"]["ms_p50"] for found in width_cells()
        ]
    told = [
        f"{rounded(statistics.geometric_mean(x))} ({rounded(min(x))} to {rounded(max(x))})"
        for x in by_peer.values()
    ]
    return (
        f"Geometric means of these {len(by_peer['fa3'])} cases, with the lowest and the highest: {told[0]} over\n"
        f"FlashAttention-3, {told[1]} over cuDNN."
    )


def width_cells() -> list[dict[str, Line]]:
    cells: dict[tuple[object, ...], dict[str, Line]] = {}
    for x in where(WIDTHS, status="ok"):
        if x["head_dim"] == RETILED:
            continue
        cell = (x["head_dim"], x["head_dim_v"], x["causal"], x["seqlen_q"])
        cells.setdefault(cell, {})[x["impl"]] = x
    return list(cells.values())


def width_candidates() -> str:
    """Other tiles: their TFLOP/s over those of the default, at each length without a mask."""
    rows = []
    for width, (head_dim, head_dim_v) in WIDTH_CASES.items():
        of = {"head_dim": head_dim, "head_dim_v": head_dim_v, "causal": False}
        default = {x["seqlen_q"]: x for x in where(WIDTHS, impl="flashcute", **of)}
        others: dict[str, dict[int, Line]] = {}
        for x in where(WIDTHS, **of):
            if x["impl"].startswith("flashcute["):
                others.setdefault(x["impl"][10:-1], {})[x["seqlen_q"]] = x
        for words, found in others.items():
            told = [
                rounded(default[n]["ms_p50"] / found[n]["ms_p50"]) if n in found else "-"
                for n in default
            ]
            rows.append([width, tile(next(iter(default.values()))), f"`{words}`", *told])
    return table(["head dim", "default", "instead", "1k", "4k", "16k"], rows, numbers=3)
