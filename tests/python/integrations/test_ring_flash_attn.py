"""ring-flash-attn, a package that was written for flash-attn's private functions, under flashcute.compat.install: two
processes, each with half of the sequence, against dense attention in fp64."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import oracle_backward
import pytest
from conftest import environment
from optional_torch import needs_torch

RANKS = 2

# ring_flash_attn.adapters patch transformers, of which they import names that newer versions have not.
PROCESS = """
import sys, types
import numpy as np
import flashcute.compat
flashcute.compat.install()
adapters = sys.modules["ring_flash_attn.adapters"] = types.ModuleType("ring_flash_attn.adapters")
adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None

import torch, torch.distributed as dist
from ring_flash_attn import zigzag_ring_flash_attn_func

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
arrays = np.load("inputs.npz")
q, k, v, dout = (torch.from_numpy(arrays[name][rank]).half() for name in ("q", "k", "v", "dout"))
for x in (q, k, v):
    x.requires_grad_()
out, lse, _ = zigzag_ring_flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
out.backward(dout)
found = dict(out=out, lse=lse, dq=q.grad, dk=k.grad, dv=v.grad)
np.savez(f"outputs{rank}.npz", **{name: x.detach().float().numpy() for name, x in found.items()})
dist.destroy_process_group()
"""


def dealt(x: np.ndarray, axis: int = 1) -> np.ndarray:
    """What each rank has: of four chunks the first gets the first and the last, which makes the work equal."""
    chunks = np.split(x, 2 * RANKS, axis)
    return np.stack([np.concatenate((chunks[i], chunks[-1 - i]), axis) for i in range(RANKS)])


def gathered(parts: list[np.ndarray], axis: int = 1) -> np.ndarray:
    halves = [np.split(x, 2, axis) for x in parts]
    return np.concatenate([x[0] for x in halves] + [x[1] for x in halves[::-1]], axis)


@needs_torch
@pytest.mark.skipif(
    importlib.util.find_spec("ring_flash_attn") is None, reason="needs ring-flash-attn"
)
def test_zigzag(rng: np.random.Generator, tmp_path: Path) -> None:
    """Partial results merged by another log-sum-exp, and gradients written beside the halves of its buffers. In
    float16: in float32 it takes its buffers for copies of them."""
    p = oracle_backward.make_problem(
        rng, "float16", seqlen_q=48, seqlen_k=48, heads=4, kv_heads=2, d=16, causal=True
    )
    inputs = {name: dealt(getattr(p, name)).astype(np.float32) for name in ("q", "k", "v", "dout")}
    np.savez(tmp_path / "inputs.npz", **inputs)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store")],
            cwd=tmp_path,
            env=environment(OMP_NUM_THREADS="1"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    outputs = [np.load(tmp_path / f"outputs{rank}.npz") for rank in range(RANKS)]
    out, dq, dk, dv = (gathered([x[name] for x in outputs]) for name in ("out", "dq", "dk", "dv"))
    lse = gathered([x["lse"] for x in outputs], axis=2)
    oracle.assert_accurate(oracle.Problem(p.q, p.k, p.v, p.dtype, True), out, lse)
    oracle_backward.assert_accurate(p, (dq, dk, dv))
