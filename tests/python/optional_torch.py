"""torch, or what stands for it where it is not installed.

Tests write ``from optional_torch import torch``. Without torch a test is skipped where it first uses it, and says why;
all that make do with NumPy run. FLASHCUTE_TEST_TORCH=0 leaves an installed torch aside.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import pytest

REASON = "needs torch"


class NeedsTorch:
    """Whatever is taken from torch while tests are collected; skips the test that is running."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._wanted()

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self._wanted()

    def __repr__(self) -> str:
        return "torch"

    def _wanted(self) -> NeedsTorch:
        if "PYTEST_CURRENT_TEST" in os.environ:
            pytest.skip(REASON)
        return self


if os.environ.get("FLASHCUTE_TEST_TORCH") == "0":
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import raises ImportError
try:
    import torch
except ImportError:
    torch = NeedsTorch()

available = not isinstance(torch, NeedsTorch)
# For tests that use torch through flashcute or another program.
needs_torch = pytest.mark.skipif(not available, reason=REASON)


def needed_by(value: object) -> bool:
    """Whether a parameter of a test was made with torch, which is not there."""
    if isinstance(value, dict):
        return any(needed_by(x) for x in value.values())
    if isinstance(value, list | tuple):
        return any(needed_by(x) for x in value)
    return isinstance(value, NeedsTorch)


def imported_by(code: str) -> bool:
    """Whether a script for a fresh process imports torch."""
    return re.search(r"^\s*(import|from)\b[^#;]*\btorch\b", code, re.MULTILINE) is not None
