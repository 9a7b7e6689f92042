"""The functions of flash_attn.bert_padding: between padded batches and the tokens that count, packed.

Their arguments and results are flash-attn 2.8's. All are differentiable in their first argument.
"""

from __future__ import annotations

from .._torch.framework import Tensor, torch

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices], of (n, ...) and integers (m,): (m, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, ...) with values (m, ...) at the different integers `indices` (m,)."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(input[indices], input): what a block takes, and what its residual connection adds to."""
    return index_first_axis(input, indices), input


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens that count.

    hidden_states: (batch, seqlen, ...).
    attention_mask: (batch, seqlen), bool or integers: 1 where a token counts.
    unused_mask: (batch, seqlen), 1 where a token is packed too but does not count.

    Returns (packed hidden_states, (total, ...); indices of its tokens in the flattened batch, int64 (total,);
    cu_seqlens, int32 (batch + 1,); the largest length; how many tokens of each sequence count, int32 (batch,)). Waits
    for the GPU.
    """
    packed = attention_mask if unused_mask is None else attention_mask + unused_mask
    hidden_states, indices, cu_seqlens, longest = _packed(
        hidden_states, packed, packed.sum(-1, dtype=torch.int32)
    )
    return hidden_states, indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs rows that hold several sequences each, one after the other, and then padding.

    hidden_states: (batch, seqlen, ...).
    attention_mask_in_length: (batch, seqlen), integers: each row has the lengths of its sequences, and zeros elsewhere.

    Returns (packed hidden_states, (total, ...); indices, int64 (total,); cu_seqlens, int32 (sequences + 1,); the
    largest length). Waits for the GPU.
    """
    lengths = attention_mask_in_length
    position = torch.arange(lengths.shape[1], device=lengths.device)
    counts = position < lengths.sum(-1, keepdim=True)
    return _packed(hidden_states, counts, lengths[lengths != 0].to(torch.int32))


def _packed(
    hidden_states: Tensor, mask: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, int(lengths.max()) if len(lengths) else 0


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of unpad_input: (total, ...) to (batch, seqlen, ...), with zeros where nothing was packed."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )
