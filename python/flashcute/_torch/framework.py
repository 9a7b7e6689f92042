"""torch, once it is there."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

from .._arrays import remember_torch

torch: Any = import_module("torch")
Tensor = Any
remember_torch(torch.Tensor)


def warn(text: str) -> None:
    """To the caller of flash_attention; in a traced call once, when it is traced."""
    warnings.warn(text, stacklevel=4)


def has_autocast(kind: str) -> bool:
    """torch's own question, which Dynamo does not trace in every version."""
    return bool(torch.amp.is_autocast_available(kind))
