"""The same row has the same bits, whatever else is in the batch and however many threads compute."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Runner
from tensors import attend, both_masks, qkv, same_bits

NAN = float("nan")
INF = float("inf")


@both_masks
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("sq", "sk"), [(300, 300), (1, 700), (77, 1000)])
def test_batch_invariance(
    rng: np.random.Generator, device: str, causal: bool, dtype: str, sq: int, sk: int
) -> None:
    """A sequence alone gives the bits it gives among others; so does a head, and so does a
    second run."""
    q, k, v = qkv(rng, device, batch=5, sq=sq, sk=sk, dtype=dtype)
    out, lse = attend(q, k, v, causal=causal)
    again, lse_again = attend(q, k, v, causal=causal)
    assert same_bits(again, out)
    assert same_bits(lse_again, lse)
    for b in range(5):
        alone, lse_alone = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=causal)
        assert same_bits(alone[0], out[b])
        assert same_bits(lse_alone[0], lse[b])
    head, lse_head = attend(q[:, :, 2:3], k[:, :, 1:], v[:, :, 1:], causal=causal)
    assert same_bits(head[:, :, 0], out[:, :, 2])
    assert same_bits(lse_head[:, 0], lse[:, 2])


def test_number_of_threads_does_not_change_bits(fresh: Runner) -> None:
    """Tiles are shared out among threads; what a tile gives is not."""
    code = """
        import hashlib, numpy as np, flashcute as fc
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((2, 500, 3, 40)).astype(np.float16) for _ in range(3))
        out, lse = fc.flash_attention(q, k, v, causal=True, return_lse=True)
        print(hashlib.sha256(out.tobytes() + lse.tobytes()).hexdigest())
    """
    results = {fresh(code, FLASHCUTE_NUM_THREADS=str(n)).stdout for n in (1, 2, 3, 8)}
    assert len(results) == 1
