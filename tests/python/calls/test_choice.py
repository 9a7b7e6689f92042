"""Which kernel a call takes, and what it says where there is none."""

from __future__ import annotations

import flashcute as fc
import numpy as np
import pytest
from conftest import Runner, narrow_configurations
from optional_torch import torch
from tensors import attend, qkv, same_bits


def test_explain_tells_what_runs(rng: np.random.Generator, device: str) -> None:
    """Backend, configuration, kernel, its origin, and why not another: the call cannot take a
    road of which explain does not tell."""
    q, k, v = qkv(rng, device, d=64)
    told = fc.explain(q, k, v, causal=True)
    hopper = device == "cuda" and fc._core.driver_info().gpus[0].arch == 90
    assert told.backend == {"cpu": "cpu", "cuda": "sm90" if hopper else "sm80"}[device]
    assert told.config.dtype == "float16"
    if device == "cpu":
        assert told.config == fc.default_config(64, "float16", "cpu")
    else:  # perhaps the tile for small grids
        assert told.config in fc.configs()
    other = {"cpu": "sm80", "cuda": "cpu"}[device]
    assert other in dict(told.rejected)
    if device == "cpu":
        assert told.kernel == fc._core.build_info().cpu_isa
    else:
        options = told.config.name.replace("_sm90", "")  # a kernel's name begins with it
        assert told.kernel == f"flashcute_{told.backend}_{options}_causal"
        assert told.image.startswith(("ahead of time", "run-time compilation"))
    others = {c.name for c in fc.configs()} - {told.config.name}
    assert others <= dict(told.rejected).keys()
    assert all(reason for _, reason in told.rejected)
    # The explained configuration is the one that runs: the same bits.
    assert same_bits(attend(q, k, v)[0], fc.forward(told.config, q, k, v))


@pytest.mark.gpu
def test_what_no_gpu_kernel_covers_raises() -> None:
    """No silent fallback, no silent no-op: it raises and says what to use, and explain agrees."""
    q = torch.ones(1, 16, 2, 64, dtype=torch.float64, device="cuda")
    out = torch.full_like(q, 7)
    with pytest.raises(fc.UnsupportedError, match=r"^q: .*float64.*scaled_dot_product_attention"):
        fc.flash_attention(q, q, q, out=out)
    torch.cuda.synchronize()
    assert (out == 7).all()
    told = fc.explain(q, q, q)
    assert told.backend == ""
    assert told.config is None
    assert "float64" in dict(told.rejected)["sm80"]


@pytest.mark.compiles(narrow_configurations())
def test_every_head_dim_runs_or_raises(device: str, prebuilt: None) -> None:
    """1 to 257, each: the mean of the values, or an exception; never an output that nobody wrote
    ."""
    ran = set()
    for d in range(1, 258):
        q = torch.ones(1, 3, 1, d, dtype=torch.float16, device=device)
        try:
            out = fc.flash_attention(q, q, q)
        except fc.ArgumentError:
            continue
        assert (out == 1).all(), d
        ran.add(d)
    assert ran == set(range(1, 257))


@pytest.mark.gpu
def test_a_failed_launch_raises(fresh: Runner) -> None:
    """After a kernel of somebody else has failed, CUDA refuses every launch: the call says so
    instead of returning an output that nobody wrote. In a process of its own, whose context
    is lost."""
    done = fresh("""
        import torch, flashcute as fc
        q, k, v = (torch.randn(1, 100, 2, 64, dtype=torch.float16, device="cuda") for _ in range(3))
        out = torch.empty_like(q)
        fc.flash_attention(q, k, v, out=out)
        torch.cuda.synchronize()
        try:
            torch.zeros(4, device="cuda")[torch.tensor([1000], device="cuda")]
            torch.cuda.synchronize()
        except RuntimeError:
            pass
        else:
            raise SystemExit("the failure that this test needs did not happen")
        try:
            fc.flash_attention(q, k, v, out=out)
        except fc.DriverError as error:
            print("DriverError:", error, flush=True)
        else:
            print("it returned", flush=True)
        import os
        os._exit(0)  # the context is lost: no destructor may touch it
    """)
    assert "DriverError: cu" in done.stdout, done.stdout
    assert "CUDA_ERROR_" in done.stdout
