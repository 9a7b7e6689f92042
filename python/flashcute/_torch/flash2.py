"""What flash-attn 2, and torch's operators after it, mean by causal and window arguments."""

from __future__ import annotations

from typing import Any

Bound = int | None


def window_of(causal: bool, left: Bound, right: Bound, keys: Any) -> tuple[Bound, Bound]:
    """(left, right) as flash_attention has them, beside its causal mask.

    A bound is off if it is None, negative, or no shorter than the keys. Causal is a right bound of 0, in place of the
    given one.
    """
    left = None if left is None or left < 0 or left >= keys else left
    right = None if causal or right is None or right < 0 or right >= keys else right
    if left is not None and right is None and not causal:
        right = keys  # as flash-attn 2 has it: with more queries than keys that hides some
    return left, right
