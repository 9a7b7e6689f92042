"""Tables of docs/learn, steps 1 to 5: the one measured effect of each step."""

from __future__ import annotations

from lines import one, path, rounded, table, where

MASKS = {False: "none", True: "causal"}


def source(file: str) -> str:
    """Which machine, from which lines."""
    first = where(file, impl="flashcute")[0]
    gpu = first["device"].removeprefix("NVIDIA ").partition(",")[0]
    name = path(file)
    return f"One {gpu}, {first['dtype']}; lines: [{name.rpartition('/')[2]}]({name})."


# ---- one option of the sm80 kernel switched off -----------------------------------------------------

# What is written in the table, and the lines with and without it.
OPTIONS = {
    "rescale_threshold": ("`rescale_threshold=0`", "flashcute", "flashcute[rescale_threshold=0]"),
    "async_copy": ("`async_copy=False`", "flashcute", "flashcute[async_copy=0]"),
    "eager_load_blocks": (
        "`eager_load_blocks=False`, both with `stages=1`",
        "flashcute[stages=1]",
        "flashcute[eager_load_blocks=0,stages=1]",
    ),
    "swizzled": ("`swizzled=False`", "flashcute", "flashcute[swizzled=0]"),
}


def options(*names: str) -> str:
    """What each of these options brings: speed with it and without it, everything else as it is."""
    file, rows = "gpu_options", []
    for name in names:
        changed, *impls = OPTIONS[name]
        for head_dim in (64, 128):
            for causal, mask in MASKS.items():
                lines = [one(file, impl=x, head_dim=head_dim, causal=causal) for x in impls]
                before, after = lines
                speeds = [f"{line['tflops']:.0f}" for line in lines]
                longer = rounded(after["ms_p50"] / before["ms_p50"])
                rows.append([changed, head_dim, mask, *speeds, longer])
    header = ["changed", "head dimension", "mask", "TFLOP/s before", "after", "times as long"]
    return f"{table(header, rows, numbers=3)}\n\n{source(file)} 4,096 tokens, the mma.sync kernel."


def tiles() -> str:
    """Tiles at head dimension 128, without and with a causal mask."""
    file, rows = "gpu_tiles", []
    tried = {
        (64, 64, 3): "flashcute",
        (64, 96, 3): "flashcute[block_n=96]",
        (64, 128, 2): "flashcute[block_n=128,blocks_per_sm=2]",
        (128, 32, 2): "flashcute[block_m=128,block_n=32,blocks_per_sm=2]",
        (128, 48, 2): "flashcute[block_m=128,block_n=48,blocks_per_sm=2]",
        (128, 64, 2): "flashcute[block_m=128,block_n=64,blocks_per_sm=2]",
    }
    for (block_m, block_n, blocks), impl in tried.items():
        lines = [one(file, impl=impl, head_dim=128, causal=causal) for causal in MASKS]
        told = f"_m{block_m}_n{block_n}_w4" + ("" if blocks == 2 else f"_b{blocks}")
        assert all(line["config"].endswith(told) for line in lines), impl
        rows.append([block_m, block_n, blocks, *(f"{line['tflops']:.0f}" for line in lines)])
    header = ["`block_m`", "`block_n`", "`blocks_per_sm`", "TFLOP/s", "TFLOP/s, causal"]
    text = f"{table(header, rows, numbers=5)}\n\n{source(file)} "
    return f"{text}4,096 tokens, head dimension 128, the mma.sync kernel with four warps and one stage."
