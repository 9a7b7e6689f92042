"""The arguments of a call that say what to compute."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from .._call import Options, missing_feature, rows_of_heads
from .._checks import require_kind
from .._core import ArgumentError
from .._masks import Documents, arrays_of
from .framework import Tensor, has_autocast, torch


def require_tensors(options: Options, others: dict[str, Any] | None = None) -> None:
    """Raises ArgumentError for arrays beside q, k and v that are of another library, which no operator takes."""
    for name, array in (options.arrays | (others or {})).items():
        if not isinstance(array, torch.Tensor):
            raise ArgumentError(
                f"{name}: expected a torch tensor where the call is traced, transformed or left to torch's own "
                f"attention, got {type(array).__qualname__}"
            )


class Problem(NamedTuple):
    """The arguments of a call that say what to compute."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: Options
    attn_mask: Tensor | None
    dropout_p: float
    documents: Documents | None = None

    @property
    def recording(self) -> bool:
        # In what explain is asked about, k and v may be another library's.
        inputs = (self.q, self.k, self.v, self.options.sink, self.attn_mask)
        return bool(
            torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs)
        )

    @property
    def stranger(self) -> str | None:
        """What is wrong with an input that is no torch tensor."""
        for name in ("q", "k", "v"):
            if not isinstance(getattr(self, name), torch.Tensor):
                got = type(getattr(self, name)).__qualname__
                return f"{name}: expected a torch tensor as q, got {got}"
        return None

    @property
    def tensors(self) -> list[Tensor]:
        """All that is read: q, k, v, the masks by element and the tensors among the options."""
        arrays = (*self.options.arrays.values(), *self.masks.values())
        return [self.q, self.k, self.v, *(x for x in arrays if isinstance(x, torch.Tensor))]

    @property
    def masks(self) -> dict[str, Any]:
        """attn_mask and documents, as far as they are given."""
        return arrays_of(self.attn_mask, self.documents)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """batch, heads, seqlen_q, seqlen_k; not of packed sequences."""
        row = -3 if self.options.layout == "bshd" else -2
        return *rows_of_heads(self.q, self.options.layout), self.k.shape[row]

    @property
    def diagonal(self) -> int:
        """Of the causal mask and the window."""
        _, _, rows, keys = self.sizes
        return self.options.offset(rows, keys)

    @property
    def missing(self) -> str | None:
        """Why no kernel can do it, if the features say so already."""
        return missing_feature(self.attn_mask, self.dropout_p, self.options, self.documents)

    def require_kinds(self, traced: bool) -> None:
        """Raises ArgumentError for nested, sparse and other tensors that no road serves."""
        require_kind(traced, q=self.q, k=self.k, v=self.v, **self.options.arrays, **self.masks)

    def without_causal_bias(self) -> Problem:
        """With what torch's CausalBias means, a mask whose elements are not there, said in our words."""
        module, mask = sys.modules.get("torch.nn.attention.bias"), self.attn_mask
        if module is None or self.options.is_packed or not isinstance(mask, module.CausalBias):
            return self
        lower_right = mask.variant == module.CausalVariant.LOWER_RIGHT
        if self.q.dim() != 4 or self.k.dim() != 4:  # who computes will say so
            return self.causal_at(None if lower_right else 0)
        _, _, rows, keys = self.sizes
        if (mask.seq_len_q, mask.seq_len_kv) != (rows, keys):
            raise ArgumentError(
                f"attn_mask: expected a CausalBias of q's and k's lengths, ({rows}, {keys}), got one of "
                f"({mask.seq_len_q}, {mask.seq_len_kv})"
            )
        if self.options.has_lengths or self.options.has_prefix:
            # Of a mask of the tensors' own lengths, beside others.
            seen = torch.ones(rows, keys, dtype=torch.bool, device=self.q.device)
            return self._replace(attn_mask=seen.tril(keys - rows if lower_right else 0))
        bias = keys - rows if lower_right else 0
        if self.options.causal:  # both masks hold
            bias = min(bias, self.diagonal)
        if bias == self.diagonal:
            return self.causal_at(self.options.diagonal)
        if not self.options.has_window:
            return self.causal_at(bias)
        # The window has a diagonal of its own.
        seen = torch.ones(rows, keys, dtype=torch.bool, device=self.q.device).tril(bias)
        return self._replace(attn_mask=seen)

    def causal_at(self, diagonal: int | None) -> Problem:
        """Without a mask of elements."""
        options = self.options._replace(causal=True, diagonal=diagonal)
        return self._replace(options=options, attn_mask=None)

    def autocast(self) -> Problem:
        """With inputs as torch.amp.custom_fwd casts them: all but float64, to autocast's dtype."""
        kind = self.q.device.type
        if not has_autocast(kind) or not torch.is_autocast_enabled(kind):
            return self
        dtype = torch.get_autocast_dtype(kind)

        def cast(x: Any) -> Any:
            narrow = isinstance(x, torch.Tensor) and x.is_floating_point()
            return x.to(dtype) if narrow and x.dtype != torch.float64 else x

        q, k, v, mask = (cast(x) for x in (self.q, self.k, self.v, self.attn_mask))
        sink, options = self.options.sink, self.options
        if isinstance(sink, torch.Tensor) and sink.dtype != torch.float32:  # which goes with any q
            options = options._replace(sink=cast(sink))
        return self._replace(q=q, k=k, v=v, options=options, attn_mask=mask)
