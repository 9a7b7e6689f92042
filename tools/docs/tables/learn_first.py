"""Tables of docs/learn, steps 1 to 5: the one measured effect of each step."""

from __future__ import annotations

from lines import one, table

from tables.options import source

MASKS = {False: "none", True: "causal"}


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
