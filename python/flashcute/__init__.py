"""FlashAttention on CuTe: readable, switchable attention kernels for NVIDIA GPUs and CPUs.

    >>> import flashcute
    >>> out = flashcute.flash_attention(q, k, v, causal=True)

It takes arrays of NumPy, torch, CuPy and JAX (on the CPU) through DLPack, and gives each library its own kind back.
Begin with `flash_attention` (attention, with gradients for torch tensors) and `explain` (what a call runs, and why);
`forward` and `backward` take a `ForwardConfig` or `BackwardConfig` of your choice.
"""

from __future__ import annotations

import sys as _sys
from importlib import import_module as _import_module
from os import fsencode as _fsencode
from pathlib import Path as _Path

from . import _arrays, _core
from ._core import (
    ArgumentError,
    BackwardConfig,
    BackwardExplanation,
    CacheError,
    CompileError,
    ConfigError,
    DeviceError,
    DriverError,
    Explanation,
    FlashcuteError,
    ForwardConfig,
    UnsupportedError,
)
from ._import_hook import when_imported as _when_imported
from .attention import backward, backward_workspace_size, flash_attention, forward
from .block_mask import BlockMask
from .configurations import configs, default_backward_config, default_config, prebuild
from .drop_in import scaled_dot_product_attention
from .inspection import count_blocks, explain
from .variant import Variant

# Nothing is searched, opened or initialised yet: these are only told. As bytes, because a folder's name need not be
# UTF-8; of sys.path only what import itself looks at.
_package = _Path(_core.__file__).parent
_headers = _package / "include"
_core.set_search_paths(
    [_fsencode(folder) for folder in _sys.path if isinstance(folder, str) and folder],
    [_fsencode(_headers), _fsencode(_headers / "cccl")],
    _fsencode(_package / "flashcute_compiler"),
)
_core.set_exporter(_arrays.export)

# torch's programs that were saved name the operators: they are there when both are imported, in either order.
_when_imported("torch", lambda: _import_module("._torch", __name__))

for _exception in (FlashcuteError, *FlashcuteError.__subclasses__()):
    _exception.__module__ = __name__  # where users import them from

__version__: str = _core.build_version()

__all__ = [
    "ArgumentError",
    "BackwardConfig",
    "BackwardExplanation",
    "BlockMask",
    "CacheError",
    "CompileError",
    "ConfigError",
    "DeviceError",
    "DriverError",
    "Explanation",
    "FlashcuteError",
    "ForwardConfig",
    "UnsupportedError",
    "Variant",
    "backward",
    "backward_workspace_size",
    "configs",
    "count_blocks",
    "default_backward_config",
    "default_config",
    "explain",
    "flash_attention",
    "forward",
    "prebuild",
    "reference",
    "scaled_dot_product_attention",
    "sdpa",
]


def __getattr__(name: str) -> object:
    if name in ("reference", "sdpa"):  # they need an array library, torch: loaded when asked for
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
