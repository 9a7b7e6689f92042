"""flashcute and what it is compared with: one class, one object per implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .. import (
    BackwardConfig,
    ForwardConfig,
    Variant,
    __version__,
    _core,
    backward,
    explain,
    flash_attention,
    forward,
    reference,
)
from .._call import checked_options
from .kits import Array, Call, Inputs, Kit, in_layout
from .options import UsageError, changed_backward_config, changed_config, changes_text
from .problem import ITEM_BYTES, Case, Given, Result, Window

SDPA_BACKENDS = {
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_efficient": "EFFICIENT_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
    "sdpa_math": "MATH",
}
PACKAGES = ("fa3", "fa4", "xformers")  # of other projects; timed where they are named
NAMES = ("flashcute", "sdpa", *SDPA_BACKENDS, *PACKAGES, "naive")
DETERMINISTIC = "flashcute_deterministic"  # gradients only


class Unsupported(Exception):
    """What an implementation lacks, as what its name can be put before: "has no sinks"."""


class Implementation:
    """Attention as somebody computes it.

    `call` takes q, k, v in `layout`, whether the mask is causal (aligned to the bottom right), `window=` and `sink=`,
    and returns the output in the same layout. What cannot do a window or a sink raises Unsupported.
    """

    def __init__(
        self,
        name: str,
        version: str,
        call: Callable[..., Array],
        layout: str = "bshd",
    ) -> None:
        self.name = name
        self.version = version
        self.call = call
        self.layout = layout

    def config_name(self, kit: Kit, case: Case) -> str | None:
        """Of the kernel configuration, where there is such a thing."""
        return None

    def score_bytes(self, case: Case) -> int:
        """What it needs for matrices of seqlen_q x seqlen_k, roughly."""
        return 0

    def result(self, kit: Kit, given: Given) -> Result:
        """The output for bshd inputs, to be checked; as bshd too."""
        return Result(kit.to_numpy(self.output(kit, given)), None)

    def output(self, kit: Kit, given: Given) -> Array:
        """The same, where it was computed."""
        inputs = in_layout(kit, given.inputs, self.layout)
        out = self.call(*inputs, given.causal, window=given.window, sink=given.sink)
        return out if self.layout == "bshd" else kit.swap_heads(out)


class Flashcute(Implementation):
    """With the default configuration, or with changes to it."""

    def __init__(self, kit: Kit, changes: dict[str, Any] | None = None) -> None:
        self.changes = changes or {}
        self.arch = kit.arch
        super().__init__(changed_name(self.changes), __version__, self._run)

    def config(self, head_dim: int, value_dim: int, dtype: str) -> ForwardConfig:
        head_dim_v = None if value_dim == head_dim else value_dim
        return changed_config(head_dim, dtype, self.arch, self.changes, head_dim_v)

    def config_name(self, kit: Kit, case: Case) -> str | None:
        if self.changes:
            return str(self.config(case.head_dim, case.value_dim, case.dtype).name)
        q, k, v, sink = empty_arrays(kit, case)
        told = explain(q, k, v, case.causal, window=case.window, sink=sink)
        return str(told.config.name) if told.config else None

    def result(self, kit: Kit, given: Given) -> Result:
        out, lse = self._poisoned_run(kit, given, return_lse=True)
        return Result(kit.to_numpy(out), kit.to_numpy(lse))

    def output(self, kit: Kit, given: Given) -> Array:
        return self._poisoned_run(kit, given)

    def _poisoned_run(self, kit: Kit, given: Given, **more: Any) -> Any:
        """Into an output full of NaN."""
        shape = (*given.q.shape[:3], given.v.shape[-1])
        to = kit.poisoned(shape, dtype_name(given.q))
        return self._run(
            *given.inputs, given.causal, window=given.window, sink=given.sink, out=to, **more
        )

    def _run(
        self,
        q: Array,
        k: Array,
        v: Array,
        causal: bool,
        *,
        window: Window = None,
        sink: Array | None = None,
        **more: Any,
    ) -> Any:
        if self.changes:
            cfg = self.config(q.shape[-1], v.shape[-1], dtype_name(q))
            variant = Variant(causal=causal, window=window, sink=sink)
            return forward(cfg, q, k, v, variant=variant, **more)
        return flash_attention(q, k, v, causal, window=window, sink=sink, **more)


def empty_arrays(kit: Kit, case: Case) -> tuple[Array, ...]:
    """q, k, v and the sink, to ask which kernel they would have."""
    q, k, v = (kit.empty(shape, case.dtype) for shape in case.shapes())
    return q, k, v, kit.empty((case.heads,), case.dtype) if case.sink else None


def dtype_name(array: Array) -> str:
    return str(array.dtype).rpartition(".")[2]


def changed_name(changes: dict[str, Any]) -> str:
    return f"flashcute[{changes_text(changes)}]" if changes else "flashcute"


class FlashcuteGradients(Implementation):
    """With changes to the default configuration by a call of `backward`; without, `call` is differentiated."""

    def __init__(self, kit: Kit, changes: dict[str, Any] | None = None, name: str = "") -> None:
        self.changes = changes or {}
        self.arch = kit.arch
        super().__init__(name or changed_name(self.changes), __version__, flash_attention)

    def config(self, head_dim: int, value_dim: int, dtype: str, causal: bool) -> BackwardConfig:
        head_dim_v = None if value_dim == head_dim else value_dim
        return changed_backward_config(head_dim, dtype, self.arch, self.changes, head_dim_v, causal)

    def config_name(self, kit: Kit, case: Case) -> str | None:
        if self.changes:
            cfg = self.config(case.head_dim, case.value_dim, case.dtype, case.only_causal)
            return str(cfg.name)
        q, k, v, sink = empty_arrays(kit, case)
        call = checked_options(case.causal, "end", None, "bshd", window=case.window, sink=sink)
        return str(_core.backward_config_for(q, k, v, call).name)

    def gradients(
        self, inputs: Inputs, causal: bool, window: Window, sink: Array | None, dout: Array
    ) -> Call:
        """A call of `backward`, for changes."""
        q, k, v = inputs
        out, lse = flash_attention(q, k, v, causal, window=window, sink=sink, return_lse=True)
        only_causal = causal and window is None and sink is None
        cfg = self.config(q.shape[-1], v.shape[-1], dtype_name(q), only_causal)
        variant = Variant(causal=causal, window=window, sink=sink)
        return functools.partial(backward, cfg, dout, q, k, v, out, lse, variant=variant)


class Naive(Implementation):
    """The matrix of scores, its softmax, and the product with v, as a user would write it."""

    def __init__(self, kit: Kit) -> None:
        if kit.library == "torch":
            super().__init__("naive", kit.version, self._torch, "bhsd")
        else:
            super().__init__("naive", kit.version, reference.naive)
        self.torch: Any = import_module("torch") if kit.library == "torch" else None

    def score_bytes(self, case: Case) -> int:
        if self.torch is not None:
            return 3 * ITEM_BYTES[case.dtype] * case.score_count
        return 3 * max(4, ITEM_BYTES[case.dtype]) * case.score_count

    def _torch(
        self,
        q: Array,
        k: Array,
        v: Array,
        causal: bool,
        *,
        window: Window = None,
        sink: Array | None = None,
    ) -> Array:
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if causal or window is not None:
            rows, keys = scores.shape[-2:]
            seen = visible(self.torch, rows, keys, causal, window, q.device)
            scores = scores.masked_fill_(~seen, float("-inf"))
        if sink is None:
            return scores.softmax(-1) @ v
        further = sink.reshape(-1, 1, 1).expand(*scores.shape[:3], 1)  # a score without a value
        return self.torch.cat([scores, further], -1).softmax(-1)[..., :-1] @ v


def visible(
    torch: Any, rows: int, keys: int, causal: bool, window: Window, device: object
) -> Array:
    """(rows, keys): which key a query sees."""
    left, right = (-1, -1) if window is None else window
    right = 0 if causal else right
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
    seen = seen if right < 0 else seen.tril_(keys - rows + right)
    return seen if left < 0 else seen.triu_(keys - rows - left)


@functools.lru_cache(maxsize=1)  # one of 32k x 32k is a gigabyte
def kept_mask(rows: int, keys: int, causal: bool, window: Window, device: object) -> Array:
    return visible(import_module("torch"), rows, keys, causal, window, device)


class Sdpa(Implementation):
    """torch.nn.functional.scaled_dot_product_attention, by one of its backends or by its choice."""

    def __init__(self, kit: Kit, name: str) -> None:
        torch = self.torch = import_module("torch")
        version = str(torch.__version__)
        if name == "sdpa_cudnn":
            version = f"cudnn {torch.backends.cudnn.version()}"
        super().__init__(name, version, self._run, "bhsd")
        attention: Any = import_module("torch.nn.attention")
        kind = SDPA_BACKENDS.get(name)
        self.backend = getattr(attention.SDPBackend, kind) if kind else None
        self.choose_backend = attention.sdpa_kernel

    def score_bytes(self, case: Case) -> int:
        mask = case.seqlen_q * case.seqlen_k * (1 + ITEM_BYTES[case.dtype])  # and as a bias
        mask = 0 if case.window is None else mask
        scores = 3 * max(4, ITEM_BYTES[case.dtype]) * case.score_count
        return mask + (scores if self.name == "sdpa_math" else 0)

    def _run(
        self,
        q: Array,
        k: Array,
        v: Array,
        causal: bool,
        *,
        window: Window = None,
        sink: Array | None = None,
    ) -> Array:
        require_no_sink(sink)
        if self.backend is None:
            return self._attend(q, k, v, causal, window)
        with self.choose_backend(self.backend):
            return self._attend(q, k, v, causal, window)

    def _attend(self, q: Array, k: Array, v: Array, causal: bool, window: Window) -> Array:
        more: dict[str, Any] = {}
        if window is not None:
            # It has no window. The mask is made once, as a program would do for all of its layers.
            more["attn_mask"] = kept_mask(q.shape[2], k.shape[2], causal, window, q.device)
        elif causal and q.shape[2] == k.shape[2]:
            more["is_causal"] = True
        elif causal:  # is_causal is aligned to the top left
            bias = import_module("torch.nn.attention.bias")
            more["attn_mask"] = bias.causal_lower_right(q.shape[2], k.shape[2])
        if q.shape[1] != k.shape[1]:
            more["enable_gqa"] = True
        return self.torch.nn.functional.scaled_dot_product_attention(q, k, v, **more)


def require_no_sink(sink: Array | None) -> None:
    if sink is not None:
        raise Unsupported("has no sinks")


def flash_attention_3() -> Implementation:
    """The forward pass of the package fa3-fwd."""
    function = import_module("fa3_fwd_interface").flash_attn_func

    def call(
        q: Array,
        k: Array,
        v: Array,
        causal: bool,
        *,
        window: Window = None,
        sink: Array | None = None,
    ) -> Array:
        require_no_sink(sink)
        result = function(q, k, v, causal=causal, window_size=window or (-1, -1))
        return result[0] if isinstance(result, tuple) else result

    metadata = import_module("importlib.metadata")
    return Implementation("fa3", metadata.version("fa3-fwd"), call)


def flash_attention_4() -> Implementation:
    """flash-attention's kernels in CuTe DSL, of the package flash-attn-4. (Its sinks are bfloat16: they are converted
    in each call.)"""
    try:
        function = import_module("flash_attn.cute.interface").flash_attn_func
        version = import_module("importlib.metadata").version("flash-attn-4")
    except (ImportError, OSError) as problem:
        raise UsageError(f"fa4 needs the package flash-attn-4: {problem}") from None

    def call(
        q: Array,
        k: Array,
        v: Array,
        causal: bool,
        *,
        window: Window = None,
        sink: Array | None = None,
    ) -> Array:
        sides = tuple(None if side < 0 else side for side in window or (-1, -1))
        learnable_sink = None if sink is None else sink.bfloat16()
        result = function(q, k, v, causal=causal, window_size=sides, learnable_sink=learnable_sink)
        return result[0] if isinstance(result, tuple) else result

    return Implementation("fa4", version, call)


def xformers_attention() -> Implementation:
    """memory_efficient_attention of xFormers, by the operator that it chooses."""
    try:
        package = import_module("xformers")
        operators = import_module("xformers.ops")
        biases = import_module("xformers.ops.fmha.attn_bias")
    except (ImportError, OSError) as problem:  # also where it is built for another torch
        raise UsageError(f"xformers needs the package xformers: {problem}") from None

    def bias_of(rows: int, keys: int, causal: bool, window: Window) -> object:
        if window is None:
            return biases.LowerTriangularFromBottomRightMask() if causal else None
        left, right = (rows + keys if side < 0 else side for side in window)  # it has no "no limit"
        return biases.LocalAttentionFromBottomRightMask(
            window_left=left, window_right=0 if causal else right
        )

    def call(
        q: Array,
        k: Array,
        v: Array,
        causal: bool,
        *,
        window: Window = None,
        sink: Array | None = None,
    ) -> Array:
        require_no_sink(sink)
        bias = bias_of(q.shape[1], k.shape[1], causal, window)
        heads, kv_heads = q.shape[2], k.shape[2]
        if heads == kv_heads:
            return operators.memory_efficient_attention(q, k, v, attn_bias=bias)
        # (batch, seqlen, kv_heads, group, d): keys and values are repeated by a stride of 0.
        group = heads // kv_heads
        q = q.unflatten(2, (kv_heads, group))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))
        return operators.memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2, 3)

    return Implementation("xformers", str(package.__version__), call)


def make(name: str, kit: Kit) -> Implementation:
    """Raises UsageError if what the implementation needs is not here."""
    if name == "flashcute":
        return Flashcute(kit)
    if name == DETERMINISTIC:
        raise UsageError(f"{name} needs --backward")
    if name == "naive":
        return Naive(kit)
    if kit.library != "torch":
        raise UsageError(f"{name} needs torch on {kit.device}")
    if name == "fa3":
        if find_spec("fa3_fwd_interface") is None:
            raise UsageError("fa3 needs the package fa3-fwd")
        return flash_attention_3()
    if name == "fa4":
        return flash_attention_4()
    if name == "xformers":
        return xformers_attention()
    return Sdpa(kit, name)
