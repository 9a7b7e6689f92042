"""Wrong results, which the commands have to notice."""

from __future__ import annotations

from typing import Any

import pytest
from flashcute._cli import peers


def break_flashcute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes flash_attention, as the commands call it, wrong in one row."""
    real = peers.flash_attention

    def broken(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        out = result[0] if isinstance(result, tuple) else result
        out[-1, -1] = 0.0
        return result

    monkeypatch.setattr(peers, "flash_attention", broken)
