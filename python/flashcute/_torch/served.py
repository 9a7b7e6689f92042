"""Which calls of torch's flash attention flashcute takes, and a count of what it took and left."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache
from typing import Any

from .._import_hook import when_imported
from .framework import Tensor, torch

_logger = logging.getLogger("flashcute")

taken: Counter[str] = Counter()  # by operator
left: Counter[str] = Counter()  # by reason

DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16),  # of these alone torch has flash attention there
}


LARGEST_SCALE = 2e38  # kernels multiply by scale * log2(e) in float32


class NotServedError(Exception):
    """The reason why torch's own kernel takes a call. No user sees it."""


def leave(reason: str) -> None:
    """Counts a call that torch's own attention computes, and logs the first one for each reason."""
    left[reason] += 1
    if left[reason] == 1:
        _logger.warning("torch's own attention computes, not flashcute: %s", reason)


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    dropout_p: float,
    scale: float | None,
    *,
    packed: bool = False,
) -> str | None:
    """Why a call of flash attention stays with torch; None if flashcute computes it.

    Forward and backward ask this of the same shapes, dtypes, device and options and so take the same side. Strides do
    not count: autograd may hand on tensors with others.
    """
    rank = 3 if packed else 4
    if not q.dim() == k.dim() == v.dim() == rank:
        return f"tensors of other than {rank} dimensions"
    if q.dtype not in DTYPES.get(q.device.type, ()):
        return f"{q.dtype} on {q.device.type}"
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return "tensors of several dtypes or devices"
    head, row = (-3, -2) if layout == "bhsd" else (-2, -3)
    heads, keys, head_dim = k.shape[head], k.shape[row], q.shape[-1]
    if not (k.shape[-1] == v.shape[-1] == head_dim and 1 <= head_dim <= 256):
        return "a head dimension above 256, or several"
    one_batch = packed or q.shape[0] == k.shape[0] == v.shape[0]
    fits = one_batch and v.shape[head] == heads
    if not (fits and v.shape[row] == keys and heads > 0 and q.shape[head] % heads == 0):
        return "shapes that flash attention does not define"
    if dropout_p != 0.0:
        return "dropout"
    if scale is not None and not 0.0 <= scale <= LARGEST_SCALE:
        return "a scale below 0 or above 2e38"
    if q.is_cuda and _capability(q.device) < (8, 0):
        return "a GPU below compute capability 8.0"
    return None


def _keep_out_of_the_trace() -> None:
    torch.compiler.assume_constant_result(leave)


when_imported("torch._dynamo", _keep_out_of_the_trace)


@cache
def _capability(device: Any) -> tuple[int, int]:
    found: tuple[int, int] = torch.cuda.get_device_capability(device)
    return found
