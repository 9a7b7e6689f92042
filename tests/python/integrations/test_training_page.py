"""docs/start/train.md."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

import torch
from conftest import Runner

PAGE = Path(__file__).parents[3] / "docs" / "start" / "train.md"


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")
def test_snippets_run(fresh: Runner) -> None:
    """What a reader copies: one after the other, as under torchrun with a single process."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 8
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fresh("\n".join(blocks), timeout=300, **rank)
