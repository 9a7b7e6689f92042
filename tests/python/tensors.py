"""Random tensors, the list of all calls, and what tests ask of results."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import pytest
from flashcute import reference
from optional_torch import torch

both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def random_tensors(
    rng: np.random.Generator, device: str, *shapes: tuple[int, ...], dtype: str = "float16"
) -> list[torch.Tensor]:
    return [
        # Not from_numpy(...).to(...): NumPy gives empty arrays strides of 0, which `to` keeps.
        torch.empty(shape, dtype=getattr(torch, dtype), device=device).copy_(
            torch.from_numpy(rng.standard_normal(shape))
        )
        for shape in shapes
    ]


def qkv(
    rng: np.random.Generator,
    device: str,
    *,
    sq: int = 100,
    sk: int = 150,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 64,
    dtype: str = "float16",
) -> list[torch.Tensor]:
    kv = (batch, sk, kv_heads, d)
    return random_tensors(rng, device, (batch, sq, heads, d), kv, kv, dtype=dtype)


def problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False
) -> oracle.Problem:
    dtype = str(q.dtype).removeprefix("torch.")
    return oracle.Problem(*(oracle.to_numpy(x) for x in (q, k, v)), dtype, causal)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit. NaN is refused: equal NaN would hide that nothing was computed."""
    assert not a.isnan().any()
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def attend(*qkv: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return fc.flash_attention(*qkv, return_lse=True, **options)


def tensor(x: np.ndarray, dtype: str, where: str, layout: str = "bshd") -> torch.Tensor:
    """A contiguous tensor in `layout` from an array in bshd."""
    t = torch.empty(x.shape, dtype=getattr(torch, dtype), device=where)
    t.copy_(torch.from_numpy(x))  # not .to(): empty arrays of NumPy have strides of 0
    return t.transpose(1, 2).contiguous() if layout == "bhsd" else t


def bshd(out: torch.Tensor, layout: str) -> torch.Tensor:
    return out.transpose(1, 2) if layout == "bhsd" else out


def run_and_check(
    p: oracle.Problem,
    where: str,
    *,
    layout: str = "bshd",
    cfg: fc.ForwardConfig | None = None,
    tiny: bool = False,
) -> None:
    """Computes the problem, into memory that held NaN, and applies the accuracy rule to out and
    LSE."""
    q, k, v = (tensor(x, p.dtype, where, layout) for x in (p.q, p.k, p.v))
    options = {"causal": p.causal, "scale": p.scale, "layout": layout, "return_lse": True}
    out, lse = (
        fc.forward(cfg, q, k, v, **options) if cfg else fc.flash_attention(q, k, v, **options)
    )
    assert out.dtype == q.dtype
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert out.device == q.device
    assert lse.dtype == (torch.float64 if p.dtype == "float64" else torch.float32)
    tf32 = cfg is not None and (p.dtype, cfg.math, where) == ("float32", "tensor_core", "cuda")
    oracle.assert_accurate(p, bshd(out, layout), lse, tiny=tiny, tf32=tf32)


VARIANT = (
    "causal", "diagonal", "window", "prefix", "seqlens_q", "seqlens_k", "cu_seqlens_q", "cu_seqlens_k", "sink"
)  # fmt: skip


def same_bits_under_any_mask(head_dim: int, dtype: str, arch: str | int) -> fc.BackwardConfig:
    """Of gradients with the same bits in every run. Hopper's own would be refused beside windows, lengths, sinks and
    maps."""
    other = "sm_100" if arch == 90 else arch
    return fc.default_backward_config(head_dim, dtype, other, deterministic=True)


def with_variant(**options: Any) -> dict[str, Any]:
    """The keywords of flash_attention as those of forward and backward, which take some of them as one value."""
    said = {name: options.pop(name) for name in VARIANT if name in options}
    return {**options, "variant": fc.Variant(**said)}


def every_call(q: Any, lse: Any = None) -> dict[str, Callable[..., object]]:
    """Every public function of q, k and v, by name, as a function of its keyword options. lse: where it is not that of
    (1, 4, 2, 8)."""
    cfg = fc.default_config(8, "float32", "cpu")
    gradients = fc.default_backward_config(8, "float32", "cpu")
    lse = np.zeros((1, 2, 4), np.float32) if lse is None else lse
    return {
        "flash_attention": lambda **o: fc.flash_attention(q, q, q, **o),
        "forward": lambda **o: fc.forward(cfg, q, q, q, **with_variant(**o)),
        "backward": lambda **o: fc.backward(gradients, q, q, q, q, q, lse, **with_variant(**o)),
        "explain": lambda **o: fc.explain(q, q, q, **o),
        "count_blocks": lambda **o: fc.count_blocks(cfg, q, q, q, **with_variant(**o)),
        "naive": lambda **o: reference.naive(q, q, q, **o),
        "chunked": lambda **o: reference.chunked(q, q, q, **o),
        "naive_gradients": lambda **o: reference.naive_gradients(q, q, q, q, **o),
    }


def require_refused(
    name: str, call: Callable[..., Any], options: dict[str, Any], says: str
) -> None:
    """That one of every_call raises ArgumentError with this text. explain, where the problem is one of the arrays,
    tells it."""
    if name == "explain":
        told = call(**options)
        assert told.backend == ""
        assert any(re.match(says, why) for _, why in told.rejected), told
        return
    with pytest.raises(fc.ArgumentError, match=f"^{says}"):
        call(**options)
