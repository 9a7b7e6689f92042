"""Hopper's gradients: which calls take them, their options, and what only they can get wrong. (The folder calls runs
their default configurations on a Hopper GPU.)"""

from __future__ import annotations

from typing import Any

import flashcute as fc
import numpy as np
import pytest
from conftest import why_no_gpu
from optional_torch import torch


def is_hopper() -> bool:
    return not why_no_gpu() and fc._core.driver_info().gpus[0].arch == 90


on_hopper = pytest.mark.skipif(not is_hopper(), reason="needs a GPU of compute capability 9.0")
HEAD_DIMS = [64, 128]


def default(d: int, dtype: str = "bfloat16", **other: Any) -> fc.BackwardConfig:
    return fc.default_backward_config(d, dtype, "sm_90", deterministic=False, **other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("d", "kernel"), [(8, "sm90"), (72, "sm90"), (128, "sm90"), (136, "sm80")])
def test_default(dtype: str, d: int, kernel: str) -> None:
    """Head dims up to 128 take Hopper's kernels, wider ones those of other GPUs; deterministic gradients too."""
    assert default(d, dtype).kernel == kernel
    assert default(8, dtype, head_dim_v=d).kernel == kernel
    assert fc.default_backward_config(d, dtype, "sm_90", deterministic=True).kernel == kernel
    assert fc.default_backward_config(d, dtype, "sm_100", deterministic=False).kernel == "sm80"


def test_prebuild_of_a_mask_that_they_do_not_serve() -> None:
    """A list in which nothing serves the mask would build nothing, and say nothing."""
    with pytest.raises(fc.ConfigError, match=r"^cfgs: BackwardConfig.* full and causal masks only"):
        fc.prebuild(default(64), "sm_90", variant=fc.Variant(window=(8, 8)))


def variants() -> list[fc.BackwardConfig]:
    """Every option at another value than the default's."""
    changes: list[dict[str, Any]] = [
        {"late_dq": False},
        {"stages": 1, "dout_stages": 1},
        {"stages": 2, "late_dq": False},
        {"first_stores": True},
        {"launches": "separate"},
        {"deterministic": True},
        {"deterministic": True, "launches": "separate", "late_dq": False},
    ]
    return [default(d).replace(**change) for d in HEAD_DIMS for change in changes] + [
        default(128).replace(stages=2, dout_stages=3)
    ]


def test_every_variant_is_legal() -> None:
    """Where there is no Hopper GPU, nothing else would look at them."""
    for cfg in variants():
        cfg.check("sm_90")


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, ...]:
    """In fp64, by torch."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    wide = (x.repeat_interleave(group, 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, next(wide)) / q.shape[-1] ** 0.5
    if causal:
        rows, keys = s.shape[-2:]
        hidden = torch.ones(rows, keys, dtype=torch.bool, device=s.device).triu(keys - rows + 1)
        s = s.masked_fill(hidden, -torch.inf)
    p = torch.where(s.max(-1, keepdim=True).values == -torch.inf, 0.0, s.softmax(-1).nan_to_num())
    out = torch.einsum("bhqk,bkhd->bqhd", p, next(wide))
    return torch.autograd.grad(out, (q, k, v), dout.double())


def run(
    cfg: fc.BackwardConfig, q: Any, k: Any, v: Any, dout: Any, causal: bool
) -> list[torch.Tensor]:
    """Into gradients and a workspace that hold NaN."""
    out, lse = fc.flash_attention(q, k, v, causal, return_lse=True)
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    size = fc.backward_workspace_size(cfg, q, v)
    workspace = torch.full((size,), torch.nan, device="cuda")
    dq, dk, dv = found
    fc.backward(
        cfg, dout, q, k, v, out, lse, causal=causal, dq=dq, dk=dk, dv=dv, workspace=workspace
    )
    return found


def assert_close(found: list[torch.Tensor], want: tuple[torch.Tensor, ...]) -> None:
    for name, x, exact in zip(("dq", "dk", "dv"), found, want, strict=True):
        error = (x.double() - exact).norm() / exact.norm().clamp_min(1e-2)
        assert error < 5e-3, f"{name}: relative error {error:.1e}"


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cfg", variants(), ids=lambda c: c.name)
def test_backward_options(cfg: fc.BackwardConfig, causal: bool) -> None:
    """Rings that are entered too early or read too late, in every order of products; tiles and blocks that are not
    full; groups of heads; strides; a workspace and results that held NaN."""
    for rows, keys in ((300, 450), (129, 65), (1, 257), (65, 1), (400, 100), (1024, 1024)):
        q, dout = (
            torch.randn(2, 4, rows, cfg.head_dim, device="cuda", dtype=torch.bfloat16).transpose(
                1, 2
            )
            for _ in range(2)
        )
        k, v = (
            torch.randn(2, keys, 2, cfg.head_dim + 8, device="cuda", dtype=torch.bfloat16)[..., 8:]
            for _ in range(2)
        )
        assert_close(run(cfg, q, k, v, dout, causal), gradients(q, k, v, dout, causal))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_backward_poison(d: int, where: str, poison: float) -> None:
    """A row of NaN or infinity changes no bit of what does not see it, and is seen by all that does: its products with
    hidden rows are 0 * NaN."""
    cfg = default(d)
    rows, row = 700, 333
    q, k, v, dout = (
        torch.randn(1, rows, 2, d, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    clean = run(cfg, q, k, v, dout, True)
    {"q": q, "k": k, "v": v, "dout": dout}[where][:, row] = poison
    dq, dk, dv = run(cfg, q, k, v, dout, True)
    if where in ("q", "dout"):  # of a query: its own dq, and keys up to it
        assert not dq[:, row].isfinite().any()
        assert not dk[:, : row + 1].isfinite().any()
        assert torch.equal(dk[:, row + 1 :], clean[1][:, row + 1 :])
        assert torch.equal(dv[:, row + 1 :], clean[2][:, row + 1 :])
        others = torch.arange(rows, device="cuda") != row
        torch.testing.assert_close(dq[:, others], clean[0][:, others], rtol=0.02, atol=1e-3)
    else:  # of a key: queries from it on
        assert not dq[:, row:].isfinite().any()
        torch.testing.assert_close(dq[:, :row], clean[0][:, :row], rtol=0.02, atol=1e-3)
        assert not dk[:, row].isfinite().any()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_same_bits_whatever_else_runs(d: int, causal: bool) -> None:
    """A tile that waits for one that is not started never ends where another kernel holds half of the multiprocessors;
    one that does not wait adds in another order; counters of another call, which the workspace still has, let it."""
    cfg = default(d).replace(deterministic=True)
    q, dout = (torch.randn(2, 1000, 16, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(2, 1100, 4, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse = fc.flash_attention(q, k, v, causal, return_lse=True)
    workspace = torch.empty(fc.backward_workspace_size(cfg, q, v), device="cuda")
    half = torch.cuda.get_device_properties(0).multi_processor_count // 2
    long = torch.randn(1, 200_000, 1, 128, device="cuda", dtype=torch.bfloat16)
    tiles = torch.randn(1, 128, half, 128, device="cuda", dtype=torch.bfloat16)
    holding = fc.default_config(128, "bfloat16", "sm_90")
    other = torch.cuda.Stream()
    first: list[torch.Tensor] = []
    for i in range(100):
        workspace.view(torch.int32).random_()
        found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        dq, dk, dv = found
        if i % 10 == 1:
            torch.cuda.synchronize()
            with torch.cuda.stream(other):
                fc.forward(holding, tiles, long, long)  # some 3 ms
        fc.backward(
            cfg, dout, q, k, v, out, lse, causal=causal, dq=dq, dk=dk, dv=dv, workspace=workspace
        )
        first = first or found
        for a, b in zip(found, first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_in_a_graph(deterministic: bool) -> None:
    """Sums of dq that the launches of a replay do not clear would grow from replay to replay; launches that overlap are
    captured as such."""
    cfg = default(128).replace(deterministic=deterministic)
    q, k, v, dout = (
        torch.randn(1, 512, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    run(cfg, q, k, v, dout, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(cfg, q, k, v, dout, True)
    for _ in range(3):
        for x in (q, k, v, dout):
            x.normal_()
        graph.replay()
        assert_close(found, gradients(q, k, v, dout, True))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_passes_wait_for_each_other(d: int) -> None:
    """A pass that begins before the one before it ends, and reads what that has not written; the next work of the
    stream, which overwrites an input while a pass still reads it. Few tiles: the passes are short and overlap most."""
    cfg = default(d)
    for rows in (128, 1000, 3000):
        q, k, v, dout = (
            torch.randn(1, rows, 4, d, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        )
        want = gradients(q, k, v, dout, True)
        out, lse = fc.flash_attention(q, k, v, True, return_lse=True)
        workspace = torch.empty(fc.backward_workspace_size(cfg, q, v), device="cuda")
        found = []
        for _ in range(20):
            inputs = [x.clone() for x in (dout, q, k, v, out, lse)]
            workspace.fill_(torch.nan)
            grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
            dq, dk, dv = grads
            fc.backward(cfg, *inputs, causal=True, dq=dq, dk=dk, dv=dv, workspace=workspace)
            for x in inputs:
                x.fill_(torch.nan)
            found.append([x.clone() for x in grads])
            for x in grads:
                x.fill_(torch.nan)
        for each in found:
            assert_close(each, want)


@pytest.mark.gpu
@on_hopper
def test_backward_chooses() -> None:
    """What Hopper's kernels do not serve takes the others, and explain says why."""
    q, k, v = (torch.randn(1, 256, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def told(*arrays: torch.Tensor, **options: Any) -> Any:
        return fc.explain(*arrays, gradients=True, deterministic=False, **options).gradients

    assert told(q, k, v, causal=True).config.kernel == "sm90"
    assert fc.explain(q, k, v, gradients=True, deterministic=True).gradients.config.kernel == "sm90"
    other = told(q, k, v, window=(8, 8))
    assert other.config.kernel == "sm80"
    assert any(what == "sm90" and "masks" in why for what, why in other.rejected)
