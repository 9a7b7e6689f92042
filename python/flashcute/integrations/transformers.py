"""Hugging Face transformers: ``attn_implementation="fcute"``.

    >>> from flashcute.integrations.transformers import register
    >>> register()
    >>> model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fcute")

transformers keeps two tables of functions by name, one of attentions and one of masks. `register` adds a name to both
and patches nothing. Importing this module imports neither transformers nor torch.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from .._call import SDPA
from .._core import ArgumentError, UnsupportedError
from .._import_hook import when_imported
from ..attention import flash_attention

Tensor = Any
Attention = Callable[..., tuple[Tensor, None]]

NAME = "fcute"

# transformers looks for these inside a name, and then takes it for something of its own.
RESERVED = {
    "flash": "a package of FlashAttention, or a kernel to download",
    "sdpa": "torch's attention",
    "flex_attention": "torch's FlexAttention",
    "eager": "its own attention in plain torch",
    "/": "a kernel to download",
    ":": "a kernel to download",
    "|": "a prefix of continuous batching",
}

# What models hand down to every layer, and what changes no score: other parts of a model read it.
READ_ELSEWHERE = frozenset(
    {
        "cache",
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",  # the rotation is in query and key already
        "position_ids",
        "return_dict",
        "seq_idx",  # of state-space layers; attention has it as a mask
        "use_cache",
    }
)

# Arguments that change the result, and that nothing here can compute.
NO_KERNEL = {
    "softcap": "scores that are capped",
    "sinks": "attention sinks of each query",
    "indices": "keys that are chosen for each query",
    "block_indices": "blocks of keys that are chosen for each query",
    "head_mask": "heads that are switched off",
    "output_attentions": "attention weights as a result",
}


# Models, by the model_type of their configuration, that hand the window of a layer to its attention function. Others
# leave it to the mask alone (Qwen2-MoE, Phi-MoE), and would attend to everything without one.
HAND_DOWN_THE_WINDOW = frozenset(
    {
        "flint",
        "gemma3_text",
        "gpt_oss",
        "granite_swa",
        "granitemoe_swa",
        "mimo_v2_flash",
        "mistral",
        "mixtral",
        "qwen2",
        "starcoder2",
    }
)


# ---- registration ----------------------------------------------------------------------------------

_registered: set[str] = set()


def register(name: str = NAME, *, on_unsupported: str = "warn", accept: Iterable[str] = ()) -> None:
    """Makes flashcute known to transformers: models then take it by ``attn_implementation=name``.

    name: any that transformers does not take for something of its own: without "flash", "sdpa", "flex_attention",
        "eager", "/", ":" and "|", and not registered by others.
    on_unsupported: what to do with masks of floats, biases and dropout, which no kernel covers yet. "warn" (once for
        each of them) and "silent" let torch's scaled_dot_product_attention compute the call; "error" raises
        UnsupportedError, as all three do beside attention sinks, which torch has not.
    accept: names of further keyword arguments that a model hands to its attention and that change no score. What is
        neither here nor known to flashcute is refused, never ignored.

    A second call with the same name replaces the first one's settings.

    Raises ArgumentError (a ValueError) for a name or a setting that is not allowed, and UnsupportedError (a
    NotImplementedError) if transformers is missing or too old.
    """
    require_free_name(name)
    if on_unsupported not in ("warn", "silent", "error"):
        raise ArgumentError(
            f"on_unsupported: expected 'warn', 'silent' or 'error', got {on_unsupported!r}"
        )
    accepted = checked_names(accept)
    transformers, masking = found_transformers()
    if name not in _registered and name in transformers.AttentionInterface().valid_keys():
        raise ArgumentError(f"name: expected a free one, got {name!r}, which is registered already")
    when_imported("torch._dynamo", _keep_out_of_the_trace)
    attention = attention_function(on_unsupported, accepted)
    transformers.AttentionInterface.register(name, attention)
    # Without a mask function of the same name transformers makes no mask at all, and padding is attended to.
    transformers.AttentionMaskInterface.register(name, mask_function(masking))
    _registered.add(name)


def require_free_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"name: expected a string, got {name!r}")
    for part, meaning in RESERVED.items():
        if part in name:
            raise ArgumentError(
                f"name: expected one without {part!r}, got {name!r}: transformers takes it for {meaning}"
            )


def checked_names(accept: Iterable[str]) -> frozenset[str]:
    names = (
        [accept] if isinstance(accept, str) or not isinstance(accept, Iterable) else list(accept)
    )
    if isinstance(accept, str) or not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"accept: expected a list of names, got {accept!r}")
    if known := sorted(NO_KERNEL.keys() & names):
        raise ArgumentError(f"accept: expected names of what changes no score, got {known[0]!r}")
    return frozenset(names)


def found_transformers() -> tuple[Any, Any]:
    """The library, and its module that makes masks. Raises UnsupportedError where they are not what the attention
    function counts on."""
    wanted = "transformers: expected version 5.4 or later, with torch"
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise UnsupportedError(
            f"{wanted}, got none that can be imported ({error}). pip install transformers torch"
        ) from error
    try:
        # Attributes of transformers are imported when they are asked for, and fail then.
        masking = import_module("transformers.masking_utils")
        complete = transformers.AttentionInterface and transformers.AttentionMaskInterface
        complete = complete and "q_offset" in inspect.signature(masking.sdpa_mask).parameters
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(f"{wanted}, got {transformers.__version__}: {error}") from error
    if not complete:
        raise UnsupportedError(f"{wanted}, got {transformers.__version__}, which is too old")
    return transformers, masking


# ---- the mask function -----------------------------------------------------------------------------


def mask_function(masking: Any) -> Callable[..., Tensor | None]:
    """transformers' own masks, but none where a causal window is all that one would say and the model hands the window
    to its attention too: kernels have it."""

    def fcute_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Any = masking.causal_mask_function,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        **others: Any,
    ) -> Tensor | None:
        sizes = batch_size, q_length, kv_length, q_offset, kv_offset
        if (
            local_size
            and (q_length == 1 or model_type_of(others) in HAND_DOWN_THE_WINDOW)
            and needs_no_mask(*sizes[1:], local_size)
            and causal_window(mask_function, masking) == local_size
        ):
            # Without the window: None if it is causal and nothing else, padding included.
            rest = masking.sdpa_mask(*sizes, attention_mask=attention_mask, **others)
            if rest is None:
                return None
        given = {"mask_function": mask_function, "attention_mask": attention_mask}
        mask: Tensor | None = masking.sdpa_mask(*sizes, **given, local_size=local_size, **others)
        return mask

    return fcute_mask


def model_type_of(arguments: dict[str, Any]) -> object:
    return getattr(arguments.get("config"), "model_type", None)


def needs_no_mask(
    q_length: int, kv_length: int, q_offset: Any, kv_offset: Any, window: int
) -> bool:
    """Whether the attention function knows from the lengths alone what a causal window shows: as many keys as queries,
    or one query after no more keys than the window shows. Static caches, of which keys may not be written yet, have
    offsets that are tensors, or more keys than that."""
    if not (type(q_offset) is int and type(kv_offset) is int):
        return False
    last = q_offset - kv_offset + q_length == kv_length  # the last query's own key is the last one
    return last and (q_length == kv_length or (q_length == 1 and kv_length <= window))


def causal_window(function: Any, masking: Any) -> int | None:
    """How many keys up to its own a query sees by transformers' function of a causal window. None for any other
    function, also for one that this makes a part of."""
    make = getattr(masking, "sliding_window_causal_mask_function", None)
    if make is None or sys.modules["torch"].compiler.is_compiling():
        return None
    [overlay, causal] = _parts(make(1))
    parts = _parts(function) if _same_code(function, make(1)) else ()
    if len(parts) != 2 or not _same_code(parts[0], overlay) or parts[1] is not causal:
        return None
    window = inspect.getclosurevars(parts[0]).nonlocals.get("sliding_window")
    return window if type(window) is int else None


def _parts(function: Any) -> tuple[Any, ...]:
    """Of a function of transformers' and_masks, those that it joins."""
    return tuple(inspect.getclosurevars(function).nonlocals.get("mask_functions", ()))


def _same_code(a: Any, b: Any) -> bool:
    return getattr(a, "__code__", a) is getattr(b, "__code__", b)


# ---- the attention function ------------------------------------------------------------------------


def attention_function(on_unsupported: str, accepted: frozenset[str]) -> Attention:
    """What transformers calls in each layer."""

    def fcute_attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        deterministic: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query: (batch, heads, seqlen_q, d).  key, value: (batch, kv_heads, seqlen_k, d or d_v).
        attention_mask: None, or (batch, heads, seqlen_q, seqlen_k) with any of them 1; bool (True: keep), or a float
            that is added to the scaled scores. A mask says everything, so with one nothing else is causal.
        s_aux: (heads,), attention sinks: a logit of each query head beside its scaled scores, with the value 0.

        Returns the output, (batch, seqlen_q, heads, d_v), contiguous, and None for the weights.
        """
        require_known(accepted, {"softcap": softcap, **kwargs})
        lengths = query.shape[2], key.shape[2]
        require_mask(attention_mask, sliding_window, cu_seq_lens_q, cu_seq_lens_k, lengths)
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        packed = cu_seq_lens_q is not None
        if packed and attention_mask is None:
            require_packed_kernel(position_bias, dropout)
        if attention_mask is not None or (query.shape[2] == 1 and not packed):
            causal = False  # one query without a mask is the last one, which sees all keys
        mask = attention_mask
        if packed and mask is not None:
            mask = within_sequences(mask, query, key, cu_seq_lens_q, cu_seq_lens_k)
        mask = with_bias(mask, position_bias)
        if s_aux is not None:
            s_aux = checked_sinks(s_aux, query)
            require_kernel(attention_mask, position_bias, dropout)
        if mask is None and cu_seq_lens_q is not None:
            return packed_attention(
                query, key, value, cu_seq_lens_q, cu_seq_lens_k, causal=causal, sliding_window=sliding_window,
                sink=s_aux, scale=scaling, deterministic=deterministic, on_unsupported="error",
            ), None  # fmt: skip
        out = flash_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            causal,
            # Without a mask there are as many keys as queries, or the cache is static and empty before the call:
            # its first keys are the queries' own, and those that follow are not written yet.
            diagonal="start" if causal else "end",
            window=None if mask is not None else window_of(sliding_window, key.shape[2]),
            sink=s_aux,
            scale=scaling,
            attn_mask=mask,
            dropout_p=dropout,
            deterministic=deterministic,
            on_unsupported=fallback_of(on_unsupported, attention_mask, position_bias, dropout),
        )
        return out.contiguous(), None

    return fcute_attention


def require_packed_kernel(bias: Tensor | None, dropout: float) -> None:
    """Raises where torch's attention, which knows no packed sequences, would have to compute them."""
    for name, given in (("position_bias", bias), ("dropout", dropout or None)):
        if given is not None:
            raise UnsupportedError(
                f"{name}: expected none beside cu_seq_lens_q without a mask, got one: no kernel of flashcute covers it "
                f"yet, and {SDPA} has no packed sequences. Use attn_implementation='eager'"
            )


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    *,
    sliding_window: int | None,
    **options: Any,
) -> Tensor:
    """Of sequences that lie one after the other in the rows of the batch, as a data collator flattens them."""
    torch = sys.modules["torch"]
    batch, _, rows, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    starts_q, starts_k = (x.to(torch.int32).contiguous() for x in (starts_q, starts_k))
    window = None if sliding_window is None else (sliding_window - 1, -1)
    out: Tensor = flash_attention(
        q, k, v, window=window, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **options
    )
    return out.unflatten(0, (batch, rows)).contiguous()


def require_known(accepted: frozenset[str], arguments: dict[str, Any]) -> None:
    """Raises UnsupportedError for an argument that changes the result, or may."""
    for name, given in arguments.items():
        if given is None or given is False or name in READ_ELSEWHERE or name in accepted:
            continue
        reason = NO_KERNEL.get(name)
        if reason:
            raise UnsupportedError(
                f"{name}: expected None, got one: {reason} are not supported yet. Use "
                "attn_implementation='eager'"
            )
        raise UnsupportedError(
            f"{name}: expected no such argument, got one of {type(given).__name__}: flashcute does not know what it "
            f"changes. If it changes no score, register(accept=[{name!r}]) accepts it; else use "
            "attn_implementation='eager'"
        )


def checked_sinks(sinks: Tensor, query: Tensor) -> Tensor:
    """In a dtype that kernels take: float32, which holds those of 16 bits exactly, or the query's."""
    torch, heads = sys.modules["torch"], query.shape[1]
    got = tuple(sinks.shape) if isinstance(sinks, torch.Tensor) else type(sinks).__name__
    if got != (heads,):
        raise ArgumentError(
            f"s_aux: expected None or a tensor of one logit for each query head, ({heads},), got {got}"
        )
    return sinks if sinks.dtype in (torch.float32, query.dtype) else sinks.float()


def require_kernel(mask: Tensor | None, bias: Tensor | None, dropout: float) -> None:
    """Raises where torch's attention, which knows no sinks, would have to compute them."""
    for reason, given in reasons_for_torch(mask, bias, dropout).items():
        if given is not None:
            raise UnsupportedError(
                f"s_aux: expected no attention sinks beside {reason}, got both: no kernel of flashcute covers {reason} "
                f"yet, and {SDPA} has no sinks. Use attn_implementation='eager'"
            )


def require_mask(
    mask: Tensor | None,
    sliding_window: int | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    lengths: tuple[int, int],
) -> None:
    """Raises where the mask does not say what the other arguments do."""
    queries, keys = lengths
    if mask is not None and mask.dim() != 4:
        raise ArgumentError(
            "attention_mask: expected 4 dimensions, (batch, heads, seqlen_q, seqlen_k), got "
            f"{tuple(mask.shape)}"
        )
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        raise ArgumentError("cu_seq_lens_q, cu_seq_lens_k: expected both or none, got one")
    if mask is not None or cu_seq_lens_q is not None:
        return
    if sliding_window is not None and keys > sliding_window and queries != keys:
        raise UnsupportedError(
            f"sliding_window: expected a mask that has the window of {sliding_window} in it, got none for {queries} "
            f"queries and {keys} keys"
        )


def window_of(sliding_window: int | None, keys: int) -> tuple[int, int] | None:
    """A window of w keys, the query's own included, as flash_attention has it; None if it hides nothing."""
    if sliding_window is None or sliding_window >= keys:
        return None
    return sliding_window - 1, -1


def within_sequences(
    mask: Tensor, query: Tensor, key: Tensor, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor
) -> Tensor:
    """The mask, with queries kept from keys of other packed sequences: it may have been made without knowing of
    them."""
    torch = sys.modules["torch"]
    row, column = (
        torch.searchsorted(ends.contiguous(), torch.arange(x.shape[2], device=x.device), right=True)
        for ends, x in ((cu_seq_lens_q, query), (cu_seq_lens_k, key))
    )
    same = row[:, None] == column[None, :]
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, float("-inf"))


def with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """One mask that says both."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    if mask.dtype == sys.modules["torch"].bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask


# ---- warnings --------------------------------------------------------------------------------------

_warned: set[str] = set()


def reasons_for_torch(
    mask: Tensor | None, bias: Tensor | None, dropout: float
) -> dict[str, object]:
    """What no kernel covers, and whether it is given: not None."""
    added = mask is not None and mask.dtype != sys.modules["torch"].bool
    return {
        "attention masks of floats": mask if added else None,
        "position biases": bias,
        "dropout": dropout or None,
    }


def fallback_of(
    on_unsupported: str, mask: Tensor | None, bias: Tensor | None, dropout: float
) -> str:
    """What flash_attention does where it has no kernel. It would warn of it in each layer."""
    known = reasons_for_torch(mask, bias, dropout)
    reasons = [reason for reason, given in known.items() if given is not None]
    if on_unsupported != "warn" or not reasons:
        return on_unsupported
    for reason in reasons:
        warn_once(reason)
    return "silent"


def warn_once(reason: str) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"{reason}: no kernel of flashcute covers this yet, {SDPA} computes such calls. "
        "register(on_unsupported='silent') accepts that, 'error' refuses them",
        stacklevel=4,
    )


def _keep_out_of_the_trace() -> None:
    """Compiled calls warn when they are traced."""
    sys.modules["torch"].compiler.assume_constant_result(warn_once)
