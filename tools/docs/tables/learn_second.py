"""Tables of the steps 6 to 10 of docs/learn: what each mechanism brings."""

from __future__ import annotations

from lines import Line, one, rounded, table, where

HEAD_DIMS = (64, 128, 256)
MASKS = {"full": False, "causal": True}
LENGTH = 4096


def tensor_cores() -> str:
    """Products by tensor cores and by CUDA cores: speed and error of the forward without a mask."""
    rows = []
    for head_dim in (64, 128):
        of = {"head_dim": head_dim, "causal": False, "seqlen_q": LENGTH}
        slow = one("gpu_options", impl="flashcute[math=cuda_core,q_in_registers=0]", **of)
        rows.append(
            ["bfloat16", head_dim, *_both(one("gpu_options", impl="flashcute", **of), slow)]
        )
    for head_dim in HEAD_DIMS:
        of = {"head_dim": head_dim, "causal": False, "seqlen_q": LENGTH, "impl": "flashcute"}
        slow = one("gpu_float32_steps", note="CUDA cores", **of)
        rows.append(["float32", head_dim, *_both(one("gpu_forward_float32", **of), slow)])
    header = ["dtype", "head dim", "tensor cores, TFLOP/s", "CUDA cores, TFLOP/s"]
    return table([*header, "relative error", "relative error, CUDA cores"], rows, numbers=5)


def _both(fast: Line, slow: Line) -> list[str]:
    speeds = [
        f"{x['tflops']:.0f}" if x["tflops"] > 10 else f"{x['tflops']:.1f}" for x in (fast, slow)
    ]
    return [*speeds, *(f"{x['rel_l2']:.1e}" for x in (fast, slow))]


def deterministic() -> str:
    """Gradients by five products and atomic additions, and by seven without: time and memory."""
    rows = []
    for head_dim in HEAD_DIMS:
        for mask, causal in MASKS.items():
            of = {"head_dim": head_dim, "causal": causal, "seqlen_q": LENGTH}
            five = one("gpu_backward", impl="flashcute", **of)
            seven = one("gpu_backward", impl="flashcute_deterministic", **of)
            times = five["ms_p50"], seven["ms_p50"]
            memory = [f"{x['peak_bytes'] / 2**20:.0f}" for x in (five, seven)]
            rows.append(
                [head_dim, mask, *map(rounded, times), rounded(times[1] / times[0]), *memory]
            )
    header = ["head dim", "mask", "five products, ms", "seven, ms", "seven / five"]
    return table([*header, "five, MiB", "seven, MiB"], rows, numbers=5)


# The variants of run 27 (docs/kernels/sm90_forward_notebook.md) that became the default, and their tiles.
PROFILED = {64: ("early_ahead_n64", 192, 64), 128: ("early", 128, 128), 256: ("early", 128, 64)}
MULTIPROCESSORS = 132  # of an H200


def both_kernels() -> str:
    """TFLOP/s of both forward kernels without a mask, at the length where each is fastest, and cycles of Hopper's."""
    rows = []
    for head_dim in HEAD_DIMS:
        row: list[object] = [head_dim]
        for file in ("gpu_forward", "gpu_forward_hopper"):
            ours = where(file, impl="flashcute", head_dim=head_dim, causal=False)
            best = max(ours, key=lambda x: x["tflops"])
            row.append(f"{best['tflops']:.0f}")
        _, block_m, block_n = PROFILED[head_dim]
        cycles, products = _cycles_of_block(head_dim), 4 * block_m * block_n * head_dim / 4096
        rows.append([*row, f"{cycles:,.0f}", rounded(cycles / products)])
    header = ["head dim", "mma.sync, TFLOP/s", "Hopper's, TFLOP/s"]
    return table([*header, "Hopper's, cycles a block of keys", "/ its products"], rows, numbers=4)


def _cycles_of_block(head_dim: int) -> float:
    """Of a multiprocessor: those of the launch, shared by all blocks of all tiles."""
    variant, block_m, block_n = PROFILED[head_dim]
    line = one(
        "gpu_hopper_steps", kind="step", run=27, head_dim=head_dim, causal=False, seqlen=LENGTH
    )
    tiles = line["batch"] * line["heads"] * LENGTH / block_m
    return 1000 * line["kcycles"][variant] * MULTIPROCESSORS / (tiles * LENGTH / block_n)
