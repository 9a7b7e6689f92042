"""Debug mode: the blocks that kernels visit are those that the mask shows."""

from __future__ import annotations

import flashcute as fc
import numpy as np
import pytest
from block_counts import expected_block_counts
from optional_torch import torch
from tensors import both_masks, qkv


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cfg": None}, "^cfg: expected a ForwardConfig"),
        ({"q": [1, 2]}, "^q: expected an array"),
        ({"v": None}, "^v: expected an array"),
        ({"q": torch.ones(3, 4)}, "^q: expected 4 dimensions"),
        ({"v": torch.ones(())}, "^v: expected 4 dimensions"),
        ({"causal": "yes"}, "^causal: expected True or False"),
        ({"layout": "shbd"}, "^layout: expected"),
    ],
)
def test_block_counts_of_bad_input(change: dict, says: str) -> None:
    """A debugging aid that answers a typo with an AttributeError helps nobody."""
    q = torch.ones(1, 4, 2, 8)
    arguments = {"cfg": fc.default_config(8, "float32", "cpu"), "q": q, "k": q, "v": q, **change}
    with pytest.raises(fc.ArgumentError, match=says):
        fc.count_blocks(**arguments)


@pytest.mark.parametrize(("sq", "sk"), [(300, 300), (77, 500), (500, 77), (1, 1), (5, 0)])
@both_masks
def test_block_counts_are_what_the_mask_says(
    rng: np.random.Generator, device: str, sq: int, sk: int, causal: bool
) -> None:
    """A block that no query of a tile sees is not visited, and one that all see is not tested
    element by element. Counted by brute force, for every tile."""
    q, k, v = qkv(rng, device, sq=sq, sk=sk)
    arch = "cpu" if device == "cpu" else fc._core.driver_info().gpus[0].arch
    cfg = fc.default_config(64, "float16", arch)
    counts = fc.count_blocks(cfg, q, k, v, causal=causal)
    assert counts.dtype == torch.int32
    assert torch.equal(counts.cpu(), expected_block_counts(cfg, sq, sk, causal).expand(2, 4, -1, 3))
