"""NaN, infinity, rows that see no key, and memory beside the tensors: what reaches a result and what must not."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from optional_torch import torch
from tensors import attend, both_masks, problem, qkv, same_bits

NAN = float("nan")
INF = float("inf")

# ---- rows that see no key -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    ("sq", "sk", "causal"),
    [(5, 0, False), (5, 0, True), (300, 0, True), (20, 3, True), (600, 5, True), (700, 257, True)],
)
def test_rows_without_keys(
    rng: np.random.Generator, device: str, dtype: str, sq: int, sk: int, causal: bool
) -> None:
    """out is exactly 0 and LSE exactly -inf, also where whole tiles are empty; the other rows
    are right."""
    if device == "cuda" and dtype == "float64":
        pytest.skip("no GPU kernel")
    q, k, v = qkv(rng, device, sq=sq, sk=sk, dtype=dtype)
    out, lse = attend(q, k, v, causal=causal)
    empty = sq - sk if causal else sq
    assert (out[:, :empty] == 0).all()
    assert (lse[:, :, :empty] == -INF).all()
    assert torch.isfinite(lse[:, :, empty:]).all()
    oracle.assert_accurate(problem(q, k, v, causal), out, lse)


# ---- NaN and infinity -----------------------------------------------------------------------------


def rows_of_key(sq: int, sk: int, j: int, causal: bool) -> torch.Tensor:
    return torch.from_numpy(oracle.visible(sq, sk, causal)[:, j].copy())


@both_masks
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("row", [0, 77, 99])
def test_bad_query_poisons_its_row(
    rng: np.random.Generator, device: str, causal: bool, value: float, row: int
) -> None:
    """NaN or infinity in a query: its row, of its head, is NaN in out and LSE; every other is
    untouched."""
    q, k, v = qkv(rng, device)
    clean, clean_lse = attend(q, k, v, causal=causal)
    q[1, row, 2, 5] = value
    out, lse = attend(q, k, v, causal=causal)
    # Keys of both signs at d = 5: scores of +inf and -inf, so the maximum is +inf and inf - inf is
    # NaN.
    assert out[1, row, 2].isnan().all()
    assert not torch.isfinite(lse[1, 2, row])
    out[1, row, 2] = clean[1, row, 2]
    lse[1, 2, row] = clean_lse[1, 2, row]
    assert same_bits(out, clean)
    assert same_bits(lse, clean_lse)


@both_masks
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("j", [0, 60, 149])
def test_bad_key_poisons_the_rows_that_see_it(
    rng: np.random.Generator, device: str, causal: bool, value: float, j: int
) -> None:
    """NaN or a score of +inf: NaN in out, not finite in LSE, in exactly the rows that see the
    key."""
    q, k, v = qkv(rng, device)
    q[..., 3] = q[..., 3].abs() + 0.5  # the score of the infinite key is +inf
    clean, clean_lse = attend(q, k, v, causal=causal)
    k[1, j, 1, 3] = value  # key head 1 serves query heads 2 and 3
    out, lse = attend(q, k, v, causal=causal)
    seen = rows_of_key(100, 150, j, causal).to(device)
    bad = torch.zeros(out.shape[:3], dtype=torch.bool, device=device)
    bad[1, :, 2:] = seen[:, None]
    assert torch.equal(out.isnan().all(dim=-1), bad)
    assert torch.equal(out.isnan().any(dim=-1), bad)
    assert torch.equal(~torch.isfinite(lse), bad.transpose(1, 2))
    assert same_bits(out[~bad], clean[~bad])
    assert same_bits(lse[~bad.transpose(1, 2)], clean_lse[~bad.transpose(1, 2)])


@both_masks
def test_key_with_score_minus_infinity_counts_nothing(
    rng: np.random.Generator, device: str, causal: bool
) -> None:
    """exp(-inf) is 0: the key is as if it were not there, and nothing becomes NaN."""
    q, k, v = qkv(rng, device, sq=33, sk=34)
    q[..., 3] = q[..., 3].abs() + 0.5
    k[:, 33, :, 3] = -INF  # only the last row sees it under the causal mask
    out, lse = attend(q, k, v, causal=causal)
    without, lse_without = attend(q, k[:, :33], v[:, :33], causal=False)
    rows = slice(32, 33) if causal else slice(None)
    oracle.assert_close(out[:, rows], oracle.to_numpy(without[:, rows]), 2.0**-10, "out")
    oracle.assert_close(lse[:, :, rows], oracle.to_numpy(lse_without[:, :, rows]), 1e-5, "lse")
    assert torch.isfinite(out).all()


@both_masks
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("j", [0, 60, 149])
def test_bad_value_poisons_the_rows_that_see_it(
    rng: np.random.Generator, device: str, causal: bool, value: float, j: int
) -> None:
    """NaN or infinity in v reaches one column of exactly the rows that see it: p * inf is inf,
    and a masked 0 * NaN is never computed. LSE does not depend on v."""
    q, k, v = qkv(rng, device)
    clean, clean_lse = attend(q, k, v, causal=causal)
    v[1, j, 1, 7] = value
    out, lse = attend(q, k, v, causal=causal)
    expected = clean.clone()
    seen = rows_of_key(100, 150, j, causal).to(device)
    expected[1, :, 2:, 7] = torch.where(seen[:, None], value, expected[1, :, 2:, 7])
    bad = expected.isnan()
    assert torch.equal(out.isnan(), bad), f"{int((out.isnan() & ~bad).sum())} elements too many"
    assert same_bits(out[~bad], expected[~bad])
    assert same_bits(lse, clean_lse)


# ---- what lies beyond -----------------------------------------------------------------------------


@both_masks
@pytest.mark.parametrize("d", [8, 40, 64])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (70, 90), (64, 128), (129, 257)])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_poison_beyond_the_tensor_does_not_leak(
    rng: np.random.Generator, device: str, causal: bool, d: int, sq: int, sk: int, poison: float
) -> None:
    """Tensors are cut out of larger memory that is NaN before, between and after them, in every
    dimension: nothing of it is multiplied, not even by 0, and nothing is written there."""
    tensors = qkv(rng, device, sq=sq, sk=sk, d=d)
    clean, clean_lse = attend(*tensors, causal=causal)

    def cut_out(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b, s, h, _ = x.shape
        larger = torch.full((b + 2, s + 300, h + 2, d + 64), poison, dtype=x.dtype, device=device)
        return larger, larger[1 : b + 1, 7 : s + 7, 1 : h + 1, 24 : d + 24]

    views = [cut_out(x)[1].copy_(x) for x in tensors]
    memory, out = cut_out(tensors[0])
    out.fill_(NAN)
    _, lse = attend(*views, causal=causal, out=out)
    assert same_bits(out, clean)
    assert same_bits(lse, clean_lse)
    out.fill_(poison)
    untouched = memory.isnan() if poison != poison else memory == poison
    assert untouched.all(), "something beside out was written"


@pytest.mark.parametrize("which", ["k", "v"])
def test_poison_in_masked_keys_does_not_leak(
    rng: np.random.Generator, device: str, which: str
) -> None:
    """Row i of a causal call is right whatever keys and values from i + 1 on hold, at every
    place of the diagonal in a tile: in each run everything after one row is NaN."""
    length = 150
    q, k, v = qkv(rng, device, sq=length, sk=length)
    clean, clean_lse = attend(q, k, v, causal=True)
    for i in (0, 1, 14, 15, 16, 31, 63, 64, 127, 128, 148):
        poisoned = {"k": k.clone(), "v": v.clone()}
        poisoned[which][:, i + 1 :] = NAN
        out, lse = attend(q, poisoned["k"], poisoned["v"], causal=True)
        leaked = out[:, : i + 1].isnan().any(dim=-1).sum()
        assert leaked == 0, f"NaN after row {i} leaks into {int(leaked)} rows that do not see it"
        assert same_bits(out[:, : i + 1], clean[:, : i + 1])
        assert same_bits(lse[:, :, : i + 1], clean_lse[:, :, : i + 1])
