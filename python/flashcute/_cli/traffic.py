"""Bytes that attention moves, in theory: by the standard algorithm, which stores the scores, and by flash attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .. import ForwardConfig
from .problem import ITEM_BYTES, Case

LSE_BYTES = 4  # float32
LONGEST = 2**24  # sequence: its tiles are looked at one by one
LEVELS = ("standard, DRAM", "flash, DRAM", "flash, L2")


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
    q, k, v, out = matrix_bytes(case)
    scores = case.score_count * ITEM_BYTES[case.dtype]
    return Traffic(read=q + k + scores + scores + v, written=scores + scores + out)


def flash_dram(case: Case) -> Traffic:
    """Each of Q, K, V is read once, O and the log-sum-exp are written once: what one tile has read, others find in L2.
    Keys that no query sees are not read."""
    q, k, v, out = matrix_bytes(case)
    first, last = bounds(case.keys_of(0)), bounds(case.keys_of(case.seqlen_q - 1))
    seen = max(0, last[1] - first[0]) / case.seqlen_k
    return Traffic(q + round((k + v) * seen), out + lse_bytes(case))


def flash_l2(case: Case, cfg: ForwardConfig) -> Traffic:
    """What tiles ask of L2: each reads its rows of Q once, and K and V of every block that it visits. Query heads that
    share K and V read them each for itself; thread blocks of a cluster read them together. (Hopper's kernel prefetches
    each Q into L2 before it loads it: one more request for these bytes, which moves none of them from L2.)"""
    matrices = matrix_bytes(case)
    loaded = sum(tile.keys(case, cfg.block_n) for tile in tiles_of(case, cfg))
    key_and_value = (case.head_dim + case.value_dim) * ITEM_BYTES[case.dtype]
    return Traffic(
        matrices.q + case.batch * case.heads * loaded * key_and_value,
        matrices.out + lse_bytes(case),
    )


class Matrices(NamedTuple):
    """Bytes of each."""

    q: int
    k: int
    v: int
    out: int


def matrix_bytes(case: Case) -> Matrices:
    item = case.batch * ITEM_BYTES[case.dtype]
    queries, keys = item * case.heads * case.seqlen_q, item * case.kv_heads * case.seqlen_k
    return Matrices(
        q=queries * case.head_dim,
        k=keys * case.head_dim,
        v=keys * case.value_dim,
        out=queries * case.value_dim,
    )


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


# ---- what a device can do ---------------------------------------------------------------------------


class Ceilings(NamedTuple):
    tflops: float
    bandwidth_gb: float  # 1e9 bytes a second

    def at(self, intensity: float) -> float:
        return min(self.tflops, intensity * self.bandwidth_gb / 1e3)


# NVIDIA's data sheets of the H100 (SXM), H200 (SXM) and A100 (SXM): products of dense matrices on tensor cores, so half
# of what they give with sparsity (H100 and H200: 1,979 for 16 bits, 989 for TF32; A100: 624 and 312); memory bandwidth
# 3.35, 4.8, 2.039 (80 GB) and 1.555 TB/s (40 GB). The names are those that the driver gives; other boards with the same
# chip, such as PCIe and NVL, have other clocks and are not these.
PUBLISHED = {
    "NVIDIA H100 80GB HBM3": (989.4, 494.7, 3350.0),
    "NVIDIA H200": (989.4, 494.7, 4800.0),
    "NVIDIA A100-SXM4-80GB": (312.0, 156.0, 2039.0),
    "NVIDIA A100-SXM4-40GB": (312.0, 156.0, 1555.0),
}


def published_ceilings(device: str, dtype: str) -> Ceilings | None:
    """Of a device as lines name it, like "NVIDIA H200, sm_90"; float32 runs on tensor cores as TF32."""
    found = PUBLISHED.get(device.partition(",")[0])
    if found is None or dtype not in ("float16", "bfloat16", "float32"):
        return None
    half, tf32, bandwidth = found
    return Ceilings(tf32 if dtype == "float32" else half, bandwidth)
