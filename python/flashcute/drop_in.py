"""torch's scaled_dot_product_attention as a function of flashcute."""

from __future__ import annotations

from typing import Any

from ._arrays import Array, Torch, library_of
from ._core import ArgumentError


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention with the signature and the meaning of torch.nn.functional.scaled_dot_product_attention.

    query: (..., heads, seqlen_q, d), a torch tensor, as key and value.  key: (..., heads, seqlen_k, d).
        value: (..., heads, seqlen_k, d_v). At least 2 dimensions. Leading dimensions broadcast against each other,
        heads included; those before heads become one batch, without a copy where strides allow it. All have one dtype:
        float16, bfloat16, float32 or float64.
    attn_mask: broadcastable to (..., heads, seqlen_q, seqlen_k). bool: True means that the key is seen; a float is
        added to the scaled scores. Or a CausalBias of torch.nn.attention.bias.
    dropout_p: the probability with which a weight is dropped, from 0 to 1. It is applied whenever it is given.
    is_causal: query i sees key j if and only if j <= i, whatever the lengths: aligned to the first key, unlike `causal`
        of flash_attention, which is aligned to the last.
    scale: factor of the scores; default d**-0.5.
    enable_gqa: key and value may have fewer heads than query; their number divides query's.

    Returns (..., heads, seqlen_q, d_v) of query's dtype. A row that sees no key is 0.

    flashcute computes it, with gradients, under torch.compile and autocast, for no attn_mask, a boolean one or a
    CausalBias, no dropout, and head dimensions from 1 to 256. Everything else goes to torch's own function with the
    arguments as they came; `flashcute.sdpa.fallbacks()` counts these calls by reason, and the logger "flashcute" warns
    of the first for each.

    Raises ArgumentError (a ValueError) where torch raises: attn_mask with is_causal, shapes that do not broadcast,
    heads that differ without enable_gqa or do not divide, dropout_p out of range, dtypes or devices that differ.

    Source: the documentation of torch.nn.functional.scaled_dot_product_attention; Dao, FlashAttention-2,
    arXiv 2307.08691.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(library_of(type(x)), Torch):
            raise ArgumentError(
                f"{name}: expected a torch tensor, got {type(x).__module__}.{type(x).__qualname__}. For other arrays: "
                'flash_attention(..., layout="bhsd", diagonal="start" if causal)'
            )
    from ._torch.drop_in import attend

    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
