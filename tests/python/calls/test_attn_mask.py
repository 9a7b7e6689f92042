"""attn_mask and documents in the calls of arrays: as arguments, in a Variant, and what is refused. Of torch's roads:
torch_calls/test_torch_block_mask.py; of block masks themselves: test_block_mask.py."""

from __future__ import annotations

from typing import Any

import flashcute as fc
import numpy as np
import pytest
from flashcute import _core

BATCH, HEADS, ROWS, KEYS, DIM = 2, 4, 70, 135, 8
SIZES = BATCH, HEADS, ROWS, KEYS
CFG, BACKWARD = (
    make(DIM, "float64", "cpu") for make in (fc.default_config, fc.default_backward_config)
)
RNG = np.random.default_rng(0)
Q = RNG.standard_normal((BATCH, ROWS, HEADS, DIM))
K, V = RNG.standard_normal((2, BATCH, KEYS, 2, DIM))
MASK = RNG.random(SIZES) < 0.5
NUMBERS = (
    np.sort(RNG.integers(-1, 3, (BATCH, ROWS)), 1).astype(np.int32),
    np.sort(RNG.integers(-1, 3, KEYS)).astype(np.int32),
)


def shown_by(documents: Any) -> np.ndarray:
    """(batch or 1, 1, seqlen_q, seqlen_k)."""
    rows, keys = (np.atleast_2d(x) for x in documents)
    same = rows[:, None, :, None] == keys[:, None, None, :]
    return same & (rows >= 0)[:, None, :, None]


def textbook(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp, from the definition."""
    k, v = (np.repeat(x, HEADS // 2, 2) for x in (K, V))
    scores = np.where(seen, np.einsum("bihd,bjhd->bhij", Q, k) * DIM**-0.5, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(scores).sum(-1))
    weights = np.exp(scores - np.where(np.isinf(lse), 0, lse)[..., None])
    return np.einsum("bhij,bjhd->bihd", weights, v), lse


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


GIVEN: dict[str, dict[str, Any]] = {
    "attn_mask": {"attn_mask": MASK},
    "for all": {"attn_mask": MASK[0, 0]},
    "documents": {"documents": NUMBERS},
    "all three": {
        "attn_mask": MASK[:, :1],
        "documents": NUMBERS,
        "block_mask": fc.BlockMask.from_dense(MASK[:1, ::-1]),
    },
}
SEEN = {
    "attn_mask": MASK,
    "for all": MASK[0, 0],
    "documents": shown_by(NUMBERS),
    "all three": MASK[:, :1] & shown_by(NUMBERS) & MASK[:1, ::-1],
}


@pytest.mark.parametrize("kind", GIVEN)
def test_values(kind: str) -> None:
    """A mask that is lost, or switches another one off; in the call, or in a Variant."""
    expected = textbook(SEEN[kind])
    close(fc.flash_attention(Q, K, V, return_lse=True, **GIVEN[kind]), expected)
    variant = fc.Variant(**GIVEN[kind])
    close(fc.forward(CFG, Q, K, V, variant=variant, return_lse=True), expected)
    turned = [x.swapaxes(1, 2) for x in (Q, K, V)]
    out = fc.forward(CFG, *turned, variant=variant, layout="bhsd")
    close([out.swapaxes(1, 2)], expected[:1])


@pytest.mark.parametrize("kind", GIVEN)
def test_gradients_are_those_of_the_mask(kind: str) -> None:
    """Gradients of another function than was computed: dv is P, and dq and dk are differences of the output."""
    variant = fc.Variant(**GIVEN[kind])
    out, lse = fc.forward(CFG, Q, K, V, variant=variant, return_lse=True)
    dout = RNG.standard_normal(out.shape)
    found = fc.backward(BACKWARD, dout, Q, K, V, out, lse, variant=variant)
    step = 1e-6
    for i, x in enumerate((Q, K, V)):
        direction = RNG.standard_normal(x.shape)
        moved = [
            [y + sign * step * direction if j == i else y for j, y in enumerate((Q, K, V))]
            for sign in (1, -1)
        ]
        up, down = (fc.flash_attention(*tensors, **GIVEN[kind]) for tensors in moved)
        slope = ((up - down) * dout).sum() / (2 * step)
        np.testing.assert_allclose((found[i] * direction).sum(), slope, rtol=1e-6)


STRIDES = {
    "backwards": lambda m: m[..., ::-1, ::-1],
    "every other": lambda m: np.repeat(m, 2, -1)[..., ::2],
    "transposed": lambda m: np.asfortranarray(m),
    "part of a larger": lambda m: np.pad(m, ((0, 0), (0, 0), (3, 2), (1, 5)))[..., 3:-2, 1:-5],
    "read-only": lambda m: np.broadcast_to(m[:1, :, :1], SIZES),
}


@pytest.mark.parametrize("kind", STRIDES)
def test_strides(kind: str) -> None:
    """A mask that is read as if it were contiguous, or that must not be written to and is refused."""
    mask = STRIDES[kind](MASK)
    close([fc.flash_attention(Q, K, V, attn_mask=mask)], textbook(mask)[:1])


def test_strides_of_documents() -> None:
    numbers = NUMBERS[0][:, ::-1], np.repeat(NUMBERS[1], 2)[::2]
    expected = textbook(shown_by(numbers))[:1]
    close([fc.flash_attention(Q, K, V, documents=numbers)], expected)


@pytest.mark.parametrize("kind", GIVEN)
def test_count_blocks(kind: str) -> None:
    """Cells that are visited though no query of theirs sees a key."""
    hidden = np.ones((ROWS, KEYS), bool)
    hidden[:64, 64:128] = False
    given = {**GIVEN[kind], "attn_mask": GIVEN[kind].get("attn_mask", True) & hidden}
    cfg = CFG.replace(block_m=64, block_n=64)
    counts = fc.count_blocks(cfg, Q, K, V, variant=fc.Variant(**given))
    assert counts.shape == (BATCH, HEADS, 2, 3)
    assert (counts.sum(-1) == 3).all()
    assert (counts[:, :, 0, 2] >= 1).all()
    every = fc.count_blocks(cfg, Q, K, V, variant=fc.Variant(attn_mask=np.ones((1, 1), bool)))
    assert (every[..., 0] + every[..., 1] == 3).all()


def test_explain_makes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """An explanation that takes as long as the call, or of a call without the mask."""

    def build(*_: object, **__: object) -> None:
        raise AssertionError("made")

    monkeypatch.setattr(_core, "build_block_mask", build)
    for given in GIVEN.values():
        for told in (
            fc.explain(Q, K, V, **given),
            fc.explain(Q, K, V, cfg=CFG, variant=fc.Variant(**given)),
        ):
            assert told.backend == "cpu"
            assert any("block mask of up to" in note for note in told.notes)
    wrong = fc.explain(Q, K, V, attn_mask=MASK[..., :-1])
    assert wrong.backend == ""
    assert any(why.startswith("attn_mask: ") for _, why in wrong.rejected)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"attn_mask": MASK[..., :-1]}, r"attn_mask: expected a shape .*\(2, 4, 70, 135\), got \(2, 4, 70, 134\)"),
        ({"attn_mask": MASK[:, :2]}, r"attn_mask: expected a shape .*got \(2, 2, 70, 135\)"),
        ({"attn_mask": MASK[None]}, r"attn_mask: expected a shape .*got \(1, 2, 4, 70, 135\)"),
        ({"attn_mask": MASK.astype(np.int8)}, "attn_mask: expected an array of dtype bool .*int8"),
        ({"attn_mask": [[True]]}, "attn_mask: expected an array"),
        ({"attn_mask": np.ma.masked_array(MASK)}, "attn_mask: expected a plain array"),
        ({"documents": NUMBERS[0]}, "documents: expected a pair .*70 .*135"),
        ({"documents": NUMBERS[::-1]}, r"documents\[0\]: expected int32 .*\(70,\), got int32 \(135,\)"),
        ({"documents": (NUMBERS[0], NUMBERS[1].astype(np.int64))}, r"documents\[1\]: expected int32 .*got int64"),
        ({"documents": (NUMBERS[0][:, None], NUMBERS[1])}, r"documents\[0\]: expected int32 .*\(2, 1, 70\)"),
        ({"documents": (*NUMBERS, NUMBERS[0])}, "documents: expected an array, or a pair .*3"),
        ({"documents": [1, 2]}, r"documents\[0\]: expected an array that supports DLPack"),
    ],
)  # fmt: skip
def test_what_does_not_fit(given: Any, says: str) -> None:
    """Read past its end, or broadcast to what was not meant; an error that names no argument."""
    with pytest.raises(fc.ArgumentError, match=f"^{says}"):
        fc.flash_attention(Q, K, V, **given)
    with pytest.raises(fc.ArgumentError, match=f"^{says}"):
        fc.forward(CFG, Q, K, V, variant=fc.Variant(**given))


@pytest.mark.parametrize("name", ["attn_mask", "documents", "block_mask"])
def test_beside_packed_sequences(name: str) -> None:
    """A mask of rows that are of several sequences."""
    given = {
        "attn_mask": MASK[0, 0],
        "documents": (NUMBERS[0][0], NUMBERS[1]),
        "block_mask": fc.BlockMask.from_dense(MASK[0, 0]),
    }[name]
    starts = {"cu_seqlens_q": np.int32([0, ROWS]), "cu_seqlens_k": np.int32([0, KEYS])}
    with pytest.raises(fc.ArgumentError, match=rf"^{name}: .*cu_seqlens_q"):
        fc.flash_attention(Q[0], K[0], V[0], **starts, **{name: given})
    with pytest.raises(fc.ArgumentError, match=rf"^{name}: .*cu_seqlens_q"):
        fc.forward(CFG, Q[0], K[0], V[0], variant=fc.Variant(**starts, **{name: given}))


def test_a_float_mask_in_a_variant() -> None:
    """A bias that is taken for a mask."""
    with pytest.raises(fc.UnsupportedError, match=r"^float attn_mask is not supported yet"):
        fc.Variant(attn_mask=np.zeros((ROWS, KEYS)))


@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (2, 4, 0, 3), (2, 4, 5, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    """A mask of nothing."""
    batch, heads, rows, keys = shape
    q, k = np.ones((batch, rows, heads, DIM)), np.ones((batch, keys, 2, DIM))
    for mask in (np.ones(shape, bool), np.ones((1, 1), bool)):
        out, lse = fc.flash_attention(q, k, k, attn_mask=mask, return_lse=True)
        assert not out.any()
        assert (lse == -np.inf).all()


class Foreign:
    """An array of a library that flashcute does not know."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


def test_arrays_of_unknown_libraries() -> None:
    """An error about `out`, which was given, where it is the mask's words that cannot be made."""
    mask = fc.flash_attention(Q, K, V, attn_mask=Foreign(MASK))
    close([mask], textbook(MASK)[:1])
    with pytest.raises(fc.ArgumentError, match=r"^attn_mask: expected None beside .*block_mask="):
        fc.flash_attention(Foreign(Q), K, V, attn_mask=MASK, out=np.empty_like(Q))
