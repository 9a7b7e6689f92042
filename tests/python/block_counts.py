"""The blocks that a configuration visits, by brute force from the mask."""

from __future__ import annotations

import flashcute as fc
import oracle
from optional_torch import torch


def expected_block_counts(
    cfg: fc.ForwardConfig,
    sq: int,
    sk: int,
    causal: bool,
    diagonal: int | None = None,
    window: oracle.Window = None,
) -> torch.Tensor:
    """By brute force: (tiles, 3)."""
    seen = oracle.visible(sq, sk, causal, diagonal, window)
    expected = []
    rows = cfg.block_m * cfg.cluster
    first = -(-sq // rows) * rows - sq if cfg.kernel == "sm90" else 0  # rows that the first lacks
    for row in range(-first, sq, rows):
        blocks = [
            seen[max(row, 0) : row + rows, key : key + cfg.block_n]
            for key in range(0, sk, cfg.block_n)
        ]
        whole = sum(bool(b.all()) and b.shape[1] == cfg.block_n for b in blocks)
        partial = sum(bool(b.any()) for b in blocks) - whole
        expected.append([whole, partial, len(blocks) - whole - partial])
    return torch.tensor(expected, dtype=torch.int32).reshape(-1, 3)
