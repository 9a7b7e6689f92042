"""Sizes at the ends: offsets beyond 32 bits, many batches and heads, nothing to do."""

from __future__ import annotations

import mmap

import flashcute as fc
import numpy as np
import oracle
import pytest
from optional_torch import torch
from tensors import attend, both_masks, problem, qkv, random_tensors, same_bits

NAN = float("nan")
INF = float("inf")

# ---- offsets beyond 32 bits -----------------------------------------------------------------------

FAR = 2**31 + 8  # elements: two steps overflow 32 bits, signed after one and unsigned after two


def far_buffer(device: str) -> torch.Tensor:
    """More than 2^32 fp16 elements, of which next to none are ever touched."""
    elements = 2 * FAR + 4096
    if device == "cuda":
        if torch.cuda.mem_get_info()[0] < 3 * elements:
            pytest.skip("needs 13 GB of GPU memory")
        return torch.empty(elements, dtype=torch.float16, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        pages = mmap.mmap(-1, 2 * elements, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for 8.6 GB that are never touched: {error}")
    return torch.from_numpy(np.frombuffer(pages, np.float16))


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "seqlen", "heads"])
@pytest.mark.parametrize("far", ["q", "k", "v", "out"])
def test_offsets_beyond_32_bits(
    rng: np.random.Generator, device: str, dimension: int, far: str
) -> None:
    """Row, head and batch offsets are 64-bit, for each tensor alone."""
    shape = (3, 3, 3, 8)
    tensors = dict(zip("qkv", random_tensors(rng, device, shape, shape, shape), strict=True))
    tensors["out"] = torch.full_like(tensors["q"], NAN)
    expected, lse_expected = attend(*(tensors[x] for x in "qkv"), causal=True)

    strides = [24, 8]  # of the other two dimensions
    strides.insert(dimension, FAR)
    view = far_buffer(device).as_strided(shape, [*strides, 1], 64)
    tensors[far] = view.copy_(tensors[far])
    result, lse = fc.flash_attention(**tensors, causal=True, return_lse=True)
    assert result is tensors["out"]
    assert same_bits(result, expected)
    assert same_bits(lse, lse_expected)


# ---- many batches and heads -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [65_535, 65_536, 65_537])
@pytest.mark.parametrize("kind", ["batch", "heads", "both"])
def test_many_batches_and_heads(
    rng: np.random.Generator, device: str, count: int, kind: str
) -> None:
    """A grid's y and z end at 65,535: beyond it others raise, or silently compute nothing."""
    heads = {"batch": 1, "heads": count, "both": 3}[kind]
    batch = {"batch": count, "heads": 1, "both": count // 3 + 1}[kind]
    q, k, v = qkv(rng, device, sq=2, sk=3, batch=batch, heads=heads, kv_heads=1, d=8)
    out = torch.full_like(q, NAN)
    _, lse = fc.flash_attention(q, k, v, causal=True, out=out, return_lse=True)
    oracle.assert_accurate(problem(q, k, v, causal=True), out, lse)


# ---- nothing to do --------------------------------------------------------------------------------


@both_masks
@pytest.mark.parametrize(
    ("batch", "sq", "sk", "heads"),
    [(0, 4, 4, 2), (2, 0, 4, 2), (2, 4, 0, 2), (2, 0, 0, 2), (2, 4, 4, 0), (0, 0, 0, 0)],
)
@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
def test_zero_sizes(
    device: str,
    causal: bool,
    batch: int,
    sq: int,
    sk: int,
    heads: int,
    library: str,
    return_lse: bool,
) -> None:
    """No batch, no queries, no keys, no heads: legal, and the shapes are right."""
    shapes = [(batch, sq, heads, 8), (batch, sk, heads, 8), (batch, sk, heads, 8)]
    if library == "numpy":
        if device == "cuda":
            pytest.skip("NumPy is on the CPU")
        tensors = [np.ones(shape, np.float16) for shape in shapes]
    else:
        tensors = [torch.ones(shape, dtype=torch.float16, device=device) for shape in shapes]
    result = fc.flash_attention(*tensors, causal=causal, return_lse=return_lse)
    out, lse = result if return_lse else (result, None)
    assert tuple(out.shape) == shapes[0]
    assert lse is None or tuple(lse.shape) == (batch, heads, sq)
    expected = 0.0 if sk == 0 else 1.0
    assert (out == expected).all()
