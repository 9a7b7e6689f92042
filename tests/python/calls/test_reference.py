"""The reference implementations against an independent one: loops over rows, in float64."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
from flashcute import ArgumentError
from flashcute.reference import chunked, naive, namespace

Array = Any
FUNCTIONS = [naive, chunked]
LENGTHS = [0, 1, 3, 64, 70, 130]


def row_by_row(
    q: Array, k: Array, v: Array, causal: bool, scale: float | None = None
) -> tuple[Array, Array]:
    """bshd inputs; (out, lse). A row's sums are over the keys that it sees, and no others exist."""
    batch, rows, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    out = np.zeros((batch, rows, heads, v.shape[-1]))
    lse = np.full((batch, heads, rows), -math.inf)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // kv_heads)
            for i in range(rows):
                seen = max(0, i + 1 + keys - rows) if causal else keys
                if seen == 0:
                    continue
                scores = k[b, :seen, kv] @ q[b, i, h] * (scale or head_dim**-0.5)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights @ v[b, :seen, kv] / weights.sum()
                lse[b, h, i] = scores.max() + np.log(weights.sum())
    return out, lse


def inputs(
    rows: int, keys: int, *, heads: int = 2, kv_heads: int = 2, head_dim: int = 8
) -> tuple[Array, Array, Array]:
    random = np.random.default_rng()
    return (
        random.standard_normal((2, rows, heads, head_dim)),
        random.standard_normal((2, keys, kv_heads, head_dim)),
        random.standard_normal((2, keys, kv_heads, head_dim + 4)),
    )


def converted(library: str, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    if library == "numpy":
        return arrays
    torch = pytest.importorskip("torch")
    return tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays)


def assert_close(got: Array, expected: Array) -> None:
    """Float64 results: equal but for the order of their sums."""
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)


libraries = pytest.mark.parametrize("library", ["numpy", "torch"])
functions = pytest.mark.parametrize("function", FUNCTIONS)
masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@libraries
@functions
@masks
@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("keys", LENGTHS)
def test_matches_rows(library: str, function: Any, causal: bool, rows: int, keys: int) -> None:
    """Masks aligned to the top left, empty lengths, rows without keys that are not zero."""
    arrays = inputs(rows, keys)
    expected, expected_lse = row_by_row(*arrays, causal)
    out, lse = function(*converted(library, arrays), causal, return_lse=True)
    assert_close(out, expected)
    assert_close(lse, expected_lse)


@masks
@pytest.mark.parametrize(("block_m", "block_n"), [(1, 1), (1, 64), (48, 7), (64, 1), (500, 500)])
def test_blocks_do_not_matter(causal: bool, block_m: int, block_n: int) -> None:
    """Off-by-one in the range of visited blocks, or in which of them need the mask."""
    arrays = inputs(65, 50)
    expected, expected_lse = row_by_row(*arrays, causal)
    out, lse = chunked(*arrays, causal, block_m=block_m, block_n=block_n, return_lse=True)
    assert_close(out, expected)
    assert_close(lse, expected_lse)


@libraries
@functions
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_heads(library: str, function: Any, kv_heads: int) -> None:
    """Query heads that read another group's K/V head."""
    arrays = inputs(33, 40, heads=6, kv_heads=kv_heads)
    expected, _ = row_by_row(*arrays, True)
    out = function(*converted(library, arrays), True)
    assert_close(out, expected)


@libraries
@functions
def test_layouts(library: str, function: Any) -> None:
    """Heads and rows mixed up; views that are not contiguous."""
    arrays = converted(library, inputs(20, 30, heads=4))
    bhsd = tuple(x.swapaxes(1, 2) for x in arrays)
    out, lse = function(*arrays, True, return_lse=True)
    out_bhsd, lse_bhsd = function(*bhsd, True, layout="bhsd", return_lse=True)
    assert out.shape == (2, 20, 4, 12)
    assert lse.shape == (2, 4, 20)
    np.testing.assert_array_equal(out_bhsd.swapaxes(1, 2), out)
    np.testing.assert_array_equal(lse_bhsd, lse)


@functions
def test_scale(function: Any) -> None:
    """A scale that is not applied, or applied twice; the scale 0, taken for absent."""
    q, k, v = inputs(9, 11)
    expected, expected_lse = row_by_row(q, k, v, False, scale=0.7)
    out, lse = function(q, k, v, scale=0.7, return_lse=True)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    uniform = np.broadcast_to(v.mean(1, keepdims=True), out.shape)
    assert_close(function(q, k, v, scale=0.0), uniform)


@libraries
@functions
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_masked_keys_are_not_multiplied(
    library: str, function: Any, poison: float, which: str
) -> None:
    """0 * NaN: a row must not notice keys that it does not see, and must notice those it does."""
    rows = keys = 70
    first = 40  # poisoned from here on
    q, k, v = inputs(rows, keys)
    expected, expected_lse = row_by_row(q, k, v, True)
    {"k": k, "v": v}[which][:, first:] = poison
    with np.errstate(invalid="ignore"):
        out, lse = function(*converted(library, (q, k, v)), True, return_lse=True)
    out, lse = np.asarray(out), np.asarray(lse)
    assert_close(out[:, :first], expected[:, :first])
    assert_close(lse[..., :first], expected_lse[..., :first])
    if which == "v":
        assert not np.isfinite(out[:, first:]).any()
        assert_close(lse, expected_lse)
    elif math.isnan(poison):
        assert np.isnan(out[:, first:]).all()
        assert np.isnan(lse[..., first:]).all()


@functions
def test_rows_without_keys_ignore_nan(function: Any) -> None:
    """Rows that see nothing: 0 and -inf, whatever is in K and V (pytorch 103749)."""
    q, k, v = inputs(8, 3)
    k[...] = v[...] = np.nan
    out, lse = function(q, k, v, True, return_lse=True)
    assert (out[:, :5] == 0).all()
    assert (lse[..., :5] == -np.inf).all()
    assert np.isnan(out[:, 5:]).all()
    assert np.isnan(lse[..., 5:]).all()


@functions
def test_blocks_of_minus_infinity(function: Any) -> None:
    """exp(-inf - -inf) when all the scores of the first block are -inf (pytorch 127055)."""
    q, k, v = inputs(5, 150)
    q[...] = 1
    k[:, :100] = -np.inf
    with np.errstate(invalid="ignore"):
        out, lse = function(q, k, v, return_lse=True)
    expected, expected_lse = row_by_row(q, k[:, 100:], v[:, 100:], False)
    assert_close(out, expected)
    assert_close(lse, expected_lse)


@functions
def test_visible_minus_infinity_is_not_an_empty_row(function: Any) -> None:
    """A row that sees keys, all with the score -inf: its softmax is not defined, so NaN, not 0."""
    q, k, v = inputs(4, 6)
    q[...], k[...] = 1, -np.inf
    with np.errstate(invalid="ignore"):
        out, lse = function(q, k, v, True, return_lse=True)
    assert np.isnan(out).all()
    assert (lse == -np.inf).all()


@functions
def test_large_scores(function: Any) -> None:
    """exp that overflows: no maximum subtracted, or a block's instead of the row's."""
    q, k, v = inputs(20, 200)
    k *= np.linspace(1, 1000, 200)[:, None, None]
    expected, expected_lse = row_by_row(q, k, v, False)
    out, lse = function(q, k, v, return_lse=True)
    assert_close(out, expected)
    assert_close(lse, expected_lse)


@libraries
@functions
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes(library: str, function: Any, dtype: str) -> None:
    """Results of another dtype than the inputs', 16-bit sums, an LSE that is rounded to 16 bits."""
    rounded = tuple(x.astype(dtype) for x in inputs(60, 500))
    expected, expected_lse = row_by_row(*(x.astype("float64") for x in rounded), True)
    out, lse = function(*converted(library, rounded), True, return_lse=True)
    out, lse = np.asarray(out), np.asarray(lse)
    assert out.dtype == dtype
    assert lse.dtype == "float32"
    # naive rounds the scores, so that its LSE has their error; chunked rounds only its output.
    float32_error = 32 * 2.0**-23
    error = 4 * 2.0**-10 if dtype == "float16" else float32_error
    lse_error = error if function is naive else float32_error
    assert np.max(np.abs(out - expected)) <= error * np.max(np.abs(expected))
    assert np.max(np.abs(lse - expected_lse)) <= lse_error * np.max(np.abs(expected_lse))


@functions
def test_bfloat16(function: Any) -> None:
    """bfloat16 of torch and of ml_dtypes: the same numbers through both libraries."""
    torch = pytest.importorskip("torch")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = tuple(x.astype(ml_dtypes.bfloat16) for x in inputs(30, 300))
    tensors = tuple(torch.from_numpy(x.astype("float32")).bfloat16() for x in arrays)
    from_numpy = function(*arrays, True)
    from_torch = function(*tensors, True)
    assert from_numpy.dtype == ml_dtypes.bfloat16
    assert from_torch.dtype == torch.bfloat16
    difference = from_numpy.astype("float64") - from_torch.double().numpy()
    assert np.max(np.abs(difference)) <= 2**-7 * np.max(np.abs(from_numpy.astype("float64")))


@functions
@masks
def test_gradients(function: Any, causal: bool) -> None:
    """NaN gradients of rows without keys: the references must be differentiable where torch is."""
    torch = pytest.importorskip("torch")
    q, k, v = (x[:1, :, :1].requires_grad_() for x in converted("torch", inputs(7, 5)))
    assert torch.autograd.gradcheck(lambda q, k, v: function(q, k, v, causal), (q, k, v))


def test_namespace_of_old_numpy() -> None:
    """An array without __array_namespace__, such as torch's: its module is found, not imported."""

    class Old:
        __module__ = "numpy.core"

    assert namespace(Old()) is sys.modules["numpy"]


@functions
def test_arguments(function: Any) -> None:
    """A misspelt layout or impossible head counts that give numbers."""
    q, k, v = inputs(4, 4, heads=3, kv_heads=2)
    with pytest.raises(ArgumentError, match="divides"):
        function(q, k, v)
    q, k, v = inputs(4, 4)
    with pytest.raises(ArgumentError, match="layout"):
        function(q, k, v, layout="sbhd")
    with pytest.raises(ArgumentError, match="block_n"):
        chunked(q, k, v, block_n=0)
