"""Variant, what is computed as one value: where it is taken, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flashcute as fc
import numpy as np
import pytest

Q = np.ones((2, 4, 2, 8), np.float32)
CFG, BACKWARD = (
    make(8, "float32", "cpu") for make in (fc.default_config, fc.default_backward_config)
)
LSE = np.zeros((2, 2, 4), np.float32)
SINK = np.ones(2, np.float32)
LENGTHS = np.ones(2, np.int32)
SEEN = np.ones((4, 4), bool)


def forward(**options: Any) -> Any:
    return fc.forward(CFG, Q, Q, Q, **options)


def backward(**options: Any) -> Any:
    return fc.backward(BACKWARD, Q, Q, Q, Q, Q, LSE, **options)


def explain(**options: Any) -> Any:
    return fc.explain(Q, Q, Q, cfg=CFG, **options)


def count_blocks(**options: Any) -> Any:
    return fc.count_blocks(CFG, Q, Q, Q, **options)


calls = pytest.mark.parametrize("call", [forward, backward, explain, count_blocks])


@calls
@pytest.mark.parametrize("wrong", [True, "causal", {"causal": True}, fc.Variant])
def test_no_variant(call: Callable[..., Any], wrong: Any) -> None:
    """By name."""
    with pytest.raises(fc.ArgumentError, match=r"^variant: expected a Variant or None, got"):
        call(variant=wrong)


@calls
@pytest.mark.parametrize("causal", [True, np.True_])
def test_causal_beside_a_variant(call: Callable[..., Any], causal: Any) -> None:
    """Two that say which mask: one would be ignored."""
    with pytest.raises(fc.ArgumentError, match=r"^(causal|variant): expected (none|None) beside"):
        call(variant=fc.Variant(window=(1, 1)), causal=causal)
    call(variant=fc.Variant(causal=True), causal=False)


@pytest.mark.parametrize(
    "part",
    [
        {"causal": True},
        {"causal": True, "diagonal": 3},
        {"window": (1, 1)},
        {"causal": True, "prefix": 0},
        {"seqlens_q": LENGTHS},
        {"seqlens_k": LENGTHS},
        {"sink": SINK},
        {"attn_mask": SEEN},
        {"documents": LENGTHS[:1].repeat(4)},
        {"block_mask": fc.BlockMask.from_dense(SEEN)},
    ],
    ids=lambda part: next(iter(part)),
)
def test_explain(part: dict[str, Any]) -> None:
    """It takes what flash_attention takes, or with a configuration what forward takes, and not both."""
    assert fc.explain(Q, Q, Q, **part).backend == "cpu"
    assert explain(**part).backend == "cpu"
    assert explain(variant=fc.Variant(**part)).backend == "cpu"
    with pytest.raises(fc.ArgumentError, match=r"^variant: expected None beside causal, diagonal"):
        explain(variant=fc.Variant(**part), **part)
    with pytest.raises(fc.ArgumentError, match=r"^variant: expected None without cfg"):
        fc.explain(Q, Q, Q, variant=fc.Variant(**part))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"causal": "yes"}, "causal"),
        ({"diagonal": 3}, "diagonal"),
        ({"window": (1,)}, "window"),
        ({"prefix": 3}, "prefix"),
        ({"causal": True, "prefix": -3}, "prefix"),
        ({"seqlens_q": [1, 2]}, "seqlens_q"),
        ({"seqlens_k": 3}, "seqlens_k"),
        ({"sink": 0.5}, "sink"),
        ({"attn_mask": 3}, "attn_mask"),
        ({"attn_mask": np.ones(4, np.int8)}, "attn_mask"),
        ({"documents": 3}, "documents"),
        ({"documents": [1, 2]}, r"documents\[0\]"),
        ({"block_mask": SEEN}, "block_mask"),
    ],
    ids=str,
)
def test_bad_parts(parts: Any, says: str) -> None:
    """Told where the variant is made, not where it is used."""
    with pytest.raises(fc.ArgumentError, match=f"^{says}: expected"):
        fc.Variant(**parts)


def test_a_value() -> None:
    """Not changed between the forward and the backward; made anew with changes; compared by identity, as arrays are."""
    variant = fc.Variant(causal=True, sink=SINK)
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant.causal = False  # type: ignore[misc]
    assert dataclasses.replace(variant, window=(3, 0)).sink is SINK
    assert variant == variant
    assert variant != fc.Variant(causal=True, sink=SINK)
    assert len({variant, variant}) == 1
    with pytest.raises(TypeError, match="positional"):
        fc.Variant(True)  # type: ignore[misc]


def test_gradients_of_a_sink() -> None:
    """A fourth gradient where there is a sink, and only there."""
    assert len(backward()) == 3
    assert len(backward(variant=fc.Variant(seqlens_q=LENGTHS))) == 3
    variant = fc.Variant(sink=SINK)
    dsink = backward(variant=variant)[3]
    assert (dsink.dtype, dsink.shape) == (SINK.dtype, SINK.shape)
    to = np.full(2, np.nan, np.float32)
    assert backward(variant=variant, dsink=to)[3] is to
    np.testing.assert_array_equal(to, dsink)


@pytest.mark.parametrize(
    ("sink", "dsink", "says"),
    [
        (None, np.zeros(2, np.float32), "expected None without a sink"),
        (SINK, np.zeros(3, np.float32), r"expected .*\(heads,\)"),
        (SINK, np.zeros((2, 1), np.float32), r"expected .*\(heads,\)"),
        (SINK, np.zeros(2), "expected dtype float32, got float64"),
        (SINK, np.zeros(4, np.float32)[::2], "expected a contiguous"),
        (SINK, SINK, "expected memory of its own, got memory that sink uses too"),
        (SINK, LSE.reshape(-1)[:2], "expected memory of its own, got memory that lse uses too"),
        (SINK, [0.0, 0.0], "expected an array that supports DLPack"),
    ],
    ids=["no sink", "shape", "dimensions", "dtype", "stride", "the sink", "lse", "list"],
)
def test_bad_memory_for_the_gradient_of_a_sink(sink: Any, dsink: Any, says: str) -> None:
    """Written past its end, or over what is still read."""
    with pytest.raises(fc.ArgumentError, match=f"^dsink: {says}"):
        backward(variant=fc.Variant(sink=sink), dsink=dsink)


@pytest.mark.parametrize(
    "name",
    ["diagonal", "window", "prefix", "seqlens_q", "seqlens_k", "sink", "attn_mask", "documents", "block_mask"],
)  # fmt: skip
def test_parts_are_no_arguments_of_their_own(name: str) -> None:
    """forward and backward have one way to say it, so that they are told the same."""
    for call in (forward, backward, count_blocks):
        with pytest.raises(TypeError, match=name):
            call(**{name: None})
