"""torch's scaled_dot_product_attention, and all that calls its flash attention, on flashcute's kernels.

    >>> import flashcute.sdpa
    >>> with flashcute.sdpa.activate():
    ...     model(batch).loss.backward()      # code that knows torch alone

It uses torch's own registry (`torch.nn.attention.register_flash_attention_impl`, torch 2.11 and later): no function is
patched. The name of the implementation is "flashcute". docs/start/sdpa.md tells what reaches it and what does not.
"""

from __future__ import annotations

import threading
import warnings
from importlib import import_module
from typing import Any

from ._core import ArgumentError, UnsupportedError
from ._import_hook import when_imported as _when_imported

NAME = "flashcute"
DEVICES = ("cpu", "cuda")
FIRST_TORCH_WITH_REGISTRY = "2.11"

__all__ = ["NAME", "Activation", "activate", "fallbacks", "is_active", "served", "why_not"]


class Activation:
    """What `activate` returns: `restore()`, or the end of a with statement, takes it back."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.devices = devices

    def __enter__(self) -> Activation:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Gives the devices back that no other activation holds. After the last one, torch has the implementation again
        that was active before the first. Does nothing the second time, nor where another implementation has been
        activated, or torch's own restored, in between: theirs stays."""
        with _lock:
            if self not in _live:
                return
            _live.remove(self)
            if not is_active():
                _live.clear()
            elif _live:
                _registry().activate_flash_attention_impl(NAME)
            elif _before is None:
                _registry().restore_flash_attention_impl()
            else:
                _registry().activate_flash_attention_impl(_before)


_lock = threading.RLock()
_live: list[Activation] = []
_before: str | None = None  # the implementation that was active before the first of these


def activate(device: str | None = None) -> Activation:
    """Makes flashcute the flash attention of torch, for the whole process and all of its threads.

    device: "cuda", "cpu", or None for both.

    Returns an Activation. Activations may overlap: a device is flashcute's until the last one that named it has been
    restored. What flashcute does not compute goes to torch's own kernel; see `why_not` and `fallbacks`.

    Where there is a GPU, this initialises CUDA, to warn if torch would prefer cuDNN to flash attention.

    Raises ArgumentError for another device, and UnsupportedError without torch 2.11 or later.
    """
    if device not in (None, *DEVICES):
        raise ArgumentError(f"device: expected 'cpu', 'cuda' or None, got {device!r}")
    global _before
    registry = _registry()
    made = Activation(DEVICES if device is None else (device,))
    with _lock:
        if not is_active():
            _live.clear()  # another implementation took their place
        if not _live:
            _before = registry.current_flash_attention_impl()
        _live.append(made)
        try:
            registry.activate_flash_attention_impl(NAME)
        except BaseException:
            _live.remove(made)
            raise
    if "cuda" in made.devices and _cudnn_is_preferred():
        warnings.warn(
            "torch prefers cuDNN to flash attention on this GPU, so scaled_dot_product_attention does not reach "
            "flashcute. Call torch.backends.cuda.enable_cudnn_sdp(False), or use "
            "torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)",
            stacklevel=2,
        )
    return made


def is_active() -> bool:
    """Whether flashcute is torch's flash attention now, by whomever it was activated. False without torch."""
    try:
        return bool(_registry().current_flash_attention_impl() == NAME)
    except UnsupportedError:
        return False


def why_not(
    query: Any,
    key: Any,
    value: Any,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> str | None:
    """Why torch's own kernel computes a call of scaled_dot_product_attention for which torch has chosen flash
    attention; None if flashcute does, once it is active.

    query, key, value: torch tensors, (batch, heads, seqlen, head_dim). They are not computed with.
    dropout_p, scale: as in the call.

    The answer depends on shapes, dtypes, device and these options alone, so the gradients of a call are always computed
    by whoever computed its output. Which backend torch chooses is not asked: torch.nn.attention.sdpa_kernel says that.
    """
    _registry()
    return _served().refusal(query, key, value, "bhsd", dropout_p, scale)  # type: ignore[no-any-return]


def served() -> dict[str, int]:
    """How many calls that arrived through `activate` flashcute has computed since the start of the process, by the name
    of torch's operator. Those of flashcute.scaled_dot_product_attention are not among them."""
    return dict(_served().taken) if _torch_is_there() else {}


def fallbacks() -> dict[str, int]:
    """How many calls torch's own attention has computed since the start of the process, by the reason; also those of
    flashcute.scaled_dot_product_attention. The logger "flashcute" warns of the first one for each reason."""
    return dict(_served().left) if _torch_is_there() else {}


# ---- torch -----------------------------------------------------------------------------------------


def _torch_is_there() -> bool:
    try:
        import_module("torch")
    except ImportError:
        return False
    return True


def _served() -> Any:
    return import_module("._torch.served", __package__)


def _registry() -> Any:
    """torch.nn.attention, which has the registry."""
    if not _torch_is_there():
        raise UnsupportedError(
            f"flashcute.sdpa needs torch {FIRST_TORCH_WITH_REGISTRY} or later, and torch is not installed"
        )
    attention = import_module("torch.nn.attention")
    if not hasattr(attention, "restore_flash_attention_impl"):
        version = import_module("torch").__version__
        raise UnsupportedError(
            f"flashcute.sdpa needs the registry of torch {FIRST_TORCH_WITH_REGISTRY} or later, and this is "
            f"torch {version}. flashcute.scaled_dot_product_attention works with it"
        )
    return attention


def _override() -> Any:
    """What torch's registry calls, without arguments, to activate the implementation."""
    aten = import_module("._torch.aten", __package__)
    named = {device for activation in _live for device in activation.devices}
    # Activated by torch.nn.attention.activate_flash_attention_impl("flashcute"): for all devices.
    everything = not _live or _before == NAME
    return aten.Overrides(DEVICES if everything else sorted(named))


def _cudnn_is_preferred() -> bool:
    """Asks torch itself, about tensors that both backends take."""
    torch = import_module("torch")
    if not torch.cuda.is_available():
        return False
    q = torch.empty((1, 1, 128, 64), dtype=torch.float16, device="cuda")
    chosen = torch.ops.aten._fused_sdp_choice(q, q, q)
    return bool(chosen == int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value))


def _register() -> None:
    try:
        registry = _registry()
    except UnsupportedError:
        return  # activate() says it
    registry.register_flash_attention_impl(NAME, register_fn=_override)


_when_imported("torch.nn.attention", _register)  # a name in torch's list, and no more
