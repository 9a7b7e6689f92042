"""Tables and sentences of docs/kernels/: where the kernels stand, and what was tried."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from lines import Cell, link, one, rounded, speed_ups, table, where

HEAD_DIMS = (64, 128, 256)
MIB = 1 << 20
# The other libraries' kernels as the lines name them, and in words.
PEERS = {
    "sdpa_flash": "FlashAttention-2",
    "sdpa_efficient": "memory-efficient",
    "sdpa_math": "math",
    "sdpa_cudnn": "cuDNN",
    "fa3": "FlashAttention-3",
}


# ---- where a kernel stands -------------------------------------------------------------------------


def by_head_dim(*columns: str) -> str:
    """Speed-ups by head dimension: geometric means, and the lowest and highest cell.

    columns: of each group of three columns file:peer, or file:peer:ours:heading.
    """
    header, by_column = ["head dim"], []
    for column in columns:
        file, peer, *own = column.split(":")
        ours, heading = own or ("flashcute", f"over {PEERS[peer]}")
        header += [link(heading, file), "lowest", "highest"]
        by_column.append(speed_ups(file, peer, ours))
    rows = []
    for head_dim in (*HEAD_DIMS, None):
        row = [head_dim or "all"]
        for found in by_column:
            cells = [x for cell, x in found.items() if head_dim in (None, cell[-2])]
            row += map(rounded, (statistics.geometric_mean(cells), min(cells), max(cells)))
        rows.append(row)
    return table(header, rows, numbers=3 * len(columns))


def beside_cudnn() -> str:
    """The same rounds with cuDNN, which makes the chip hotter."""
    file = "gpu_forward_cudnn"
    found = speed_ups(file, "sdpa_flash")
    widest = [x for cell, x in found.items() if cell[-2] == 256]
    mean = statistics.geometric_mean(found.values())
    cudnn = statistics.geometric_mean(speed_ups(file, "sdpa_cudnn").values())
    return (
        f"With cuDNN in the same rounds ({link('lines', file)}) the chip is hotter and clocks are lower: the\n"
        f"geometric mean over FlashAttention-2 is {mean:.3f}, and head dimension 256 lies "
        f"between {rounded(min(widest))} and {rounded(max(widest))}.\n"
        f"cuDNN's WGMMA kernels take {cudnn:.2f} of our time there."
    )


def memory_of_gradients() -> str:
    """At every length of the grid."""
    told = []
    for file in ("gpu_backward", "gpu_backward_gqa"):
        ours, theirs, deterministic = (
            span({x["peak_bytes"] / MIB for x in where(file, impl=impl)}, ".4g")
            for impl in ("flashcute", "sdpa_flash", "flashcute_deterministic")
        )
        told.append((ours, theirs, deterministic))
    (ours, theirs, deterministic), (ours_g, theirs_g, deterministic_g) = told
    return (
        f"Memory beside the inputs, for 16,384 tokens of 2,048 columns at every length: {ours} MiB (torch's attention\n"
        f"{theirs}), deterministic {deterministic}; with grouped heads {ours_g} ({theirs_g}), "
        f"deterministic {deterministic_g}."
    )


def span(numbers: Iterable[float], form: str) -> str:
    """From the lowest to the highest, once if they read the same."""
    found = sorted(numbers)
    lowest, highest = f"{found[0]:{form}}", f"{found[-1]:{form}}"
    return lowest if lowest == highest else f"{lowest} to {highest}"


def error_of_gradients(peer: str, *files: str) -> str:
    """The largest relative error of any gradient in any cell."""
    names = ("dq_rel_l2", "dk_rel_l2", "dv_rel_l2")
    ours, theirs = (
        max(x[name] for file in files for x in where(file, impl=impl) for name in names)
        for impl in ("flashcute", peer)
    )
    whose = {"sdpa_flash": "FlashAttention-2's", "sdpa_efficient": "the memory-efficient kernel's"}
    return f"The relative error (L2, against float64) of a gradient is at most {ours:.1e}, {whose[peer]} {theirs:.1e}."


def error_of_float32() -> str:
    """Of the output, over the cells."""
    ours, theirs = (
        span({x["rel_l2"] for x in where("gpu_forward_float32", impl=impl)}, ".1e")
        for impl in ("flashcute", "sdpa_efficient")
    )
    return f"Its relative error (L2) is {ours}, where the memory-efficient kernel has {theirs}."


# ---- Hopper's forward ------------------------------------------------------------------------------


def hopper() -> str:
    """Over the faster of FlashAttention-3 and cuDNN in each cell."""
    file = "gpu_forward_hopper"
    found = over_the_faster(file)
    rows = []
    for head_dim in HEAD_DIMS:
        for causal in (False, True):
            cells = {cell: x for cell, x in found.items() if cell[4:] == (head_dim, causal)}
            lowest = min(cells, key=lambda cell: cells[cell])
            own = where(file, impl="flashcute", head_dim=head_dim, causal=causal)
            rows.append(
                [
                    f"{head_dim} {'causal' if causal else 'full'}",
                    rounded(statistics.geometric_mean(cells.values())),
                    f"{rounded(cells[lowest])} ({lowest[3] // 1024}k)",
                    f"{max(x['tflops'] for x in own):.0f}",
                ]
            )
    rows.append(
        [
            "all",
            rounded(statistics.geometric_mean(found.values())),
            rounded(min(found.values())),
            "",
        ]
    )
    header = ["head dim, mask", "geometric mean", "lowest", "ours at best, TFLOP/s"]
    return table(header, rows, numbers=3)


def over_the_faster(file: str) -> dict[Cell, float]:
    """Speed-ups over the faster of the others, cell by cell."""
    by_peer = [speed_ups(file, peer) for peer in ("fa3", "sdpa_cudnn")]
    return {cell: min(found[cell] for found in by_peer) for cell in by_peer[0]}


def hopper_again() -> str:
    """A second run, and another card."""
    told = []
    for file, what in (
        ("gpu_forward_hopper_second_run", "A second run on the same card"),
        ("gpu_forward_hopper_h100", "An H100"),
    ):
        found = {
            c: x
            for c, x in over_the_faster(file).items()
            if c in over_the_faster("gpu_forward_hopper")
        }
        lowest = min(found, key=lambda cell: found[cell])
        told.append(
            f"{what} ({link('lines', file)}) has a mean of\n"
            f"{rounded(statistics.geometric_mean(found.values()))} and a lowest cell of {rounded(found[lowest])} "
            f"({lowest[4]} {'causal' if lowest[5] else 'full'}, {lowest[3] // 1024}k)."
        )
    return "\n".join(told)


def hopper_short() -> str:
    """Few tokens and grouped heads."""
    columns = {"H200": "gpu_forward_hopper_short", "H100": "gpu_forward_hopper_h100"}
    found = {card: over_the_faster(file) for card, file in columns.items()}
    rows = [
        [
            f"{batch} x {seqlen:,}",
            f"{heads} / {kv_heads}",
            *(rounded(cells.get((batch, heads, kv_heads, seqlen, head_dim, causal))) for cells in found.values()),
        ]
        for batch, heads, kv_heads, seqlen, head_dim, causal in found["H200"]
    ]  # fmt: skip
    header = ["batch x length", "query / key heads"]
    return table([*header, *(link(card, file) for card, file in columns.items())], rows, numbers=2)


# ---- what was tried --------------------------------------------------------------------------------


def ablations() -> str:
    """The forward without one of its parts, in TFLOP/s."""
    columns = {
        "d = 64, 128 x 64": (64, "block_m=128,block_n=64,q_in_registers=1"),
        "d = 128, 128 x 64": (128, "block_m=128,block_n=64"),
        "d = 256, 64 x 64": (256, "block_m=64,block_n=64"),
    }
    changes = (
        "as it was",
        "without the softmax",
        "without barriers",
        "without rescaling O",
        "without loading K and V",
    )
    rows = [
        [change, *(f"{ablation(change, *column):.0f}" for column in columns.values())]
        for change in changes
    ]
    return table(["TFLOP/s", *columns], rows, numbers=3)


def ablation(change: str, head_dim: int, config: str) -> float:
    """In the first run: a later one has the configurations again, with other changes."""
    found = where(
        "gpu_ablations",
        kind="ablation",
        change=change,
        head_dim=head_dim,
        config=config,
        causal=False,
    )
    return float(found[0]["tflops"])


# Steps, the notes of their lines, and the configurations at head dimensions 64, 128 and 256.
FLOAT32_STEPS: dict[str, tuple[str, tuple[str, str, str]]] = {
    "FFMA on the CUDA cores, in the layout of the tensor cores": (
        "CUDA cores",
        ("d64_m128_n32_w4_cudacore", "d128_m64_n32_w4_cudacore", "d256_m32_n16_w2_b3_cudacore"),
    ),
    'three products in TF32 (`math="tf32x3"`), infinity clamped in every number': (
        "tf32x3, infinity clamped in every number",
        ("d64_m128_n32_w4_tf32x3", "d128_m64_n16_w4_tf32x3", "d256_m64_n16_w4_tf32x3"),
    ),
    "whether a block is finite asked once, by the barrier that awaits it; no clamping": (
        "tf32x3, finite blocks asked once",
        ("d64_m128_n32_w4_tf32x3", "d128_m64_n16_w4_tf32x3", "d256_m64_n16_w4_tf32x3"),
    ),
}
LAST_FLOAT32_STEP = (
    "V's addresses from one register, as ldmatrix's; large and small products in sums of their own"
)


def float32_steps() -> str:
    """Of the forward at 4,096 tokens without a mask, in TFLOP/s."""
    rows = []
    for step, (note, configs) in FLOAT32_STEPS.items():
        cells = [
            one(
                "gpu_float32_steps",
                note=note,
                config=f"fwd_f32_{config}",
                seqlen_q=4096,
                causal=False,
            )
            for config in configs
        ]
        rows.append([step, *(f"{x['tflops']:.0f}" for x in cells)])
    for step, impl in {
        LAST_FLOAT32_STEP: "flashcute",
        "the memory-efficient kernel": "sdpa_efficient",
    }.items():
        cells = [
            one("gpu_forward_float32", impl=impl, head_dim=d, seqlen_q=4096, causal=False)
            for d in HEAD_DIMS
        ]
        rows.append([step, *(f"{x['tflops']:.0f}" for x in cells)])
    return table(["step", *(f"d = {d}" for d in HEAD_DIMS)], rows, numbers=3)


FLOAT32_TILES = {
    "d64_f32": (64, "64 x 64, P and dS in registers"),
    "d64_f32_columns": (64, "the same, dQ by 16 columns at a time"),
    "d64_f32_c2": (64, "64 x 64, two warps share the columns"),
    "d64_f32_m32n64": (64, "32 x 64, two blocks an SM"),
    "d64_f32_m32n64_b3": (64, "32 x 64, three blocks an SM"),
    "d64_f32_n128w8": (64, "64 x 128, eight warps"),
    "d64_f32_n128w8c2": (64, "the same, two share the columns"),
    "d128_f32_w8c2": (128, "64 x 64, eight warps, two share the columns"),
    "d128_f32_m32n64w8c2": (128, "32 x 64, the same"),
    "d128_f32_m32n32c2": (128, "32 x 32, four warps, two share the columns, two blocks an SM"),
    "d256_f32_m32n32c2": (256, "32 x 32, four warps, two share the columns"),
    "d256_f32_m32n64w8c2": (256, "32 x 64, eight warps, two share the columns"),
}


def float32_gradient_tiles() -> str:
    """Over torch's memory-efficient kernel at 8k without a mask; the fastest of a head dimension in bold."""
    ratios = {
        variant: one(
            "gpu_backward_steps", step="float32", variant=variant, seqlen=8192, causal=False
        )["ratio_to_sdpa_efficient"]
        for variant in FLOAT32_TILES
    }
    best = {
        d: max(ratios[v] for v, (dim, _) in FLOAT32_TILES.items() if dim == d) for d in HEAD_DIMS
    }
    rows = [
        [d, tile, f"**{rounded(ratios[v])}**" if ratios[v] == best[d] else rounded(ratios[v])]
        for v, (d, tile) in FLOAT32_TILES.items()
    ]
    return table(["head dim", "tile", "speed-up"], rows, numbers=1)
