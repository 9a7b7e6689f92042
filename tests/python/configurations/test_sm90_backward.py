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
HEAD_DIMS = [64, 128, 192, 256]
NARROW = [64, 128]


def default(d: int, dtype: str = "bfloat16", **other: Any) -> fc.BackwardConfig:
    return fc.default_backward_config(d, dtype, "sm_90", deterministic=False, **other)


def same_bits(d: int) -> fc.BackwardConfig:
    return fc.default_backward_config(d, "bfloat16", "sm_90", deterministic=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("d", [8, 72, 128, 136, 256])
def test_default(dtype: str, d: int) -> None:
    """Float16 and bfloat16 take Hopper's kernels on Hopper only. Wide heads are always deterministic, others are where
    it is asked for."""
    for head_dim, head_dim_v in ((d, d), (8, d), (d, 8)):
        wide = d > 128
        cfg = default(head_dim, dtype, head_dim_v=head_dim_v)
        assert (cfg.kernel, cfg.deterministic) == ("sm90", wide)
        ordered = fc.default_backward_config(
            head_dim, dtype, "sm_90", head_dim_v=head_dim_v, deterministic=True
        )
        assert (ordered.kernel, ordered.deterministic) == ("sm90", True)
    assert fc.default_backward_config(d, dtype, "sm_100", deterministic=False).kernel == "sm80"


def test_default_by_mask() -> None:
    """Under a causal mask tiles are shorter, and what they begin with counts for more. What `flash_attention` takes has
    to be what a user is told to take."""
    for d in HEAD_DIMS:
        cfg = default(d, causal=True)
        assert (cfg != default(d)) == (d == 128)
        assert fc.default_backward_config(d, arch="sm_80", causal=True) == (
            fc.default_backward_config(d, arch="sm_80")
        )
    assert (default(128, causal=True).kernel, default(128, causal=True).k_stages) == ("sm90", 2)


def test_widths() -> None:
    """Without a tile of their own, heads of 192 and values of 128 would be computed as if they were of 256."""
    for d, d_v, width in ((136, 8, (192, 128)), (192, 136, (192, 192)), (200, 8, (256, 256))):
        cfg = default(d, head_dim_v=d_v)
        assert (cfg.head_dim, cfg.head_dim_v) == width


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"deterministic": False}, "it must be true"),
        ({"late_dq": False}, "late_dq"),
        ({"persistent": False}, "persistent"),
        ({"early_reads": True}, "early_reads with head_dim 128"),
        ({"k_stages": 2}, "k_stages of 1 or 2, with head_dim above 128 of 1"),
        ({"stages": 1}, "stages above 1"),
        ({"stages": 3}, "shared memory"),
        ({"block_m": 64}, "block_m x block_n"),
        ({"head_dim_v": 128}, "head_dim_v"),
    ],
)
def test_rules_of_wide_heads(change: dict[str, Any], problem: str) -> None:
    """A configuration that no kernel computes has to be refused before it is compiled."""
    with pytest.raises(fc.ConfigError, match=problem):
        default(256).replace(**change).check("sm_90")


@pytest.mark.parametrize("cfg", [same_bits(64), default(256)])
def test_prebuild_of_a_mask_that_they_do_not_serve(cfg: fc.BackwardConfig) -> None:
    """A list in which nothing serves the mask would build nothing, and say nothing."""
    with pytest.raises(fc.ConfigError, match=r"^cfgs: BackwardConfig.* full and causal masks only"):
        fc.prebuild(cfg, "sm_90", variant=fc.Variant(window=(8, 8)))


def variants() -> list[fc.BackwardConfig]:
    """Every option at another value than the default's."""
    changes: list[dict[str, Any]] = [
        {"late_dq": False},
        {"persistent": False},
        {"stages": 1, "dout_stages": 1},
        {"stages": 2, "late_dq": False},
        {"stages": 2, "k_stages": 2},
        {"stages": 2, "k_stages": 2, "late_dq": False},
        {"k_stages": 1},
        {"deterministic": True},
        {"deterministic": True, "stages": 2, "k_stages": 2},
        {"deterministic": True, "late_dq": False},
        {"deterministic": True, "persistent": False},
    ]

    def changed(d: int, change: dict[str, Any]) -> fc.BackwardConfig:
        return (same_bits(d) if change.get("deterministic") else default(d)).replace(**change)

    narrow = dict.fromkeys(changed(d, change) for d in NARROW for change in changes)
    return [
        *narrow,
        default(128).replace(stages=2, dout_stages=3),
        default(128).replace(early_reads=False),
        same_bits(128).replace(early_reads=False),
        default(256),
        default(256).replace(dout_stages=1),
        default(192),
        default(192).replace(stages=2, dout_stages=3),
        default(192, head_dim_v=128),
    ]


def test_every_variant_is_legal() -> None:
    """Where there is no Hopper GPU, nothing else would look at them."""
    for cfg in variants():
        cfg.check("sm_90")


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    causal: bool,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """In fp64, by torch. `seen`: what the mask shows, broadcast to (batch, heads, rows, keys)."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    wide = (x.repeat_interleave(group, 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, next(wide)) / q.shape[-1] ** 0.5
    if causal:
        rows, keys = s.shape[-2:]
        hidden = torch.ones(rows, keys, dtype=torch.bool, device=s.device).triu(keys - rows + 1)
        s = s.masked_fill(hidden, -torch.inf)
    if seen is not None:
        s = s.masked_fill(~seen, -torch.inf)
    p = torch.where(s.max(-1, keepdim=True).values == -torch.inf, 0.0, s.softmax(-1).nan_to_num())
    out = torch.einsum("bhqk,bkhd->bqhd", p, next(wide))
    return torch.autograd.grad(out, (q, k, v), dout.double())


def run(
    cfg: fc.BackwardConfig, q: Any, k: Any, v: Any, dout: Any, causal: bool, **masks: Any
) -> list[torch.Tensor]:
    """Into gradients and a workspace that hold NaN."""
    variant = fc.Variant(causal=causal, **masks)
    out, lse = fc.flash_attention(q, k, v, causal, return_lse=True, **masks)
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    size = fc.backward_workspace_size(cfg, q, v, variant=variant)
    workspace = torch.full((size,), torch.nan, device=q.device)
    dq, dk, dv = found
    gradients = fc.backward(
        cfg, dout, q, k, v, out, lse, variant=variant, dq=dq, dk=dk, dv=dv, workspace=workspace
    )
    return list(gradients)


def assert_close(found: list[torch.Tensor], want: tuple[torch.Tensor, ...]) -> None:
    """Elements below 1e-3 count as that. Beside one key dq and dk are 0, and what is computed is how the rounding of
    two fp32 sums, of dP and of delta, differs: 1e-6 of terms that are added up to head_dim times."""
    for name, x, exact in zip(("dq", "dk", "dv"), found, want, strict=True):
        error = (x.double() - exact).norm() / exact.norm().clamp_min(1e-3 * exact.numel() ** 0.5)
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
            torch.randn(2, 4, rows, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for d in (cfg.head_dim, cfg.head_dim_v)
        )
        k, v = (
            torch.randn(2, keys, 2, d + 8, device="cuda", dtype=torch.bfloat16)[..., 8:]
            for d in (cfg.head_dim, cfg.head_dim_v)
        )
        assert_close(run(cfg, q, k, v, dout, causal), gradients(q, k, v, dout, causal))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("cfg", [x for x in variants() if x.head_dim <= 128], ids=lambda c: c.name)
def test_many_tiles_of_a_thread_block(cfg: fc.BackwardConfig) -> None:
    """What a tile leaves for the next one of its thread block: more tiles than a GPU has multiprocessors, twice. Of
    each head's four the last two are seen by no query, and the first two by two blocks or more, or by one. Where each
    query head has keys of its own, deterministic ones add from the first keys on in some heads."""
    for rows, seen_keys, kv_heads in ((300, 250, 2), (50, 200, 2), (300, 300, 4)):
        q, dout = (normal(80, rows, 4, cfg.head_dim) for _ in range(2))
        k, v = (normal(80, 500, kv_heads, cfg.head_dim) for _ in range(2))
        diagonal = seen_keys - rows
        i, j = torch.arange(rows, device="cuda"), torch.arange(500, device="cuda")
        found = run(cfg, q, k, v, dout, True, diagonal=diagonal)
        seen = j <= i[:, None] + diagonal
        assert_close(found, gradients(q, k, v, dout, False, seen))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_backward_poison(d: int, where: str, poison: float) -> None:
    """A row of NaN or infinity changes no bit of what does not see it, and is seen by all that does: its products with
    hidden rows are 0 * NaN."""
    cfg = default(d, causal=True)
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


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def int32(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, device="cuda", dtype=torch.int32)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("d", NARROW)
@pytest.mark.parametrize(
    ("left", "right", "offset"), [(7, 0, 0), (200, 7, -130), (5, 333, 40), (0, 127, 0), (900, 0, 1)]
)
def test_backward_window(d: int, left: int, right: int, offset: int) -> None:
    """Blocks that are partial on both sides, at a diagonal that meets no edge of a tile; queries that see no key."""
    rows, keys = 700, 800
    q, dout = normal(2, rows, 4, d), normal(2, rows, 4, d)
    k, v = normal(2, keys, 2, d), normal(2, keys, 2, d)
    distance = torch.arange(keys, device="cuda") - torch.arange(rows, device="cuda")[:, None]
    seen = (distance >= offset - left) & (distance <= offset + right)
    found = run(default(d), q, k, v, dout, False, window=(left, right), diagonal=offset)
    assert_close(found, gradients(q, k, v, dout, False, seen))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("d", NARROW)
@pytest.mark.parametrize("causal", [False, True])
def test_backward_lengths_and_sink(d: int, causal: bool) -> None:
    """Rows that do not exist hold NaN: their gradients are 0, and no product brings NaN from them."""
    queries, keys = int32([600, 33, 0, 128, 513]), int32([700, 600, 9, 0, 385])
    q, dout = normal(5, 600, 4, d), normal(5, 600, 4, d)
    k, v = normal(5, 700, 2, d), normal(5, 700, 2, d)
    i, j = torch.arange(600, device="cuda"), torch.arange(700, device="cuda")
    no_query, no_key = i >= queries[:, None], j >= keys[:, None]
    seen = ~no_query[:, :, None] & ~no_key[:, None, :]
    if causal:
        seen &= j <= i[:, None] + (keys - queries)[:, None, None]
    for x, absent in ((q, no_query), (dout, no_query), (k, no_key), (v, no_key)):
        x[absent] = torch.nan
    masks = {"seqlens_q": queries, "seqlens_k": keys}
    found = run(default(d), q, k, v, dout, causal, **masks)
    for x, absent in zip(found, (no_query, no_key, no_key), strict=True):
        assert (x[absent] == 0).all()
    clean_q, clean_k, clean_v, clean_dout = (x.nan_to_num() for x in (q, k, v, dout))
    want = gradients(clean_q, clean_k, clean_v, clean_dout, False, seen[:, None])
    assert_close(found, want)
    # A sink far below all scores changes nothing, and has no gradient. The same sum of a sink that counts, by mma.sync.
    sink = torch.full((4,), -1e4, device="cuda")
    *with_sink, dsink = run(default(d), q, k, v, dout, causal, sink=sink, **masks)
    assert_close(with_sink, want)
    assert (dsink == 0).all()
    sink = torch.randn(4, device="cuda")
    found = run(default(d), q, k, v, dout, causal, sink=sink, **masks)
    other = fc.default_backward_config(d, "bfloat16", "sm_100", deterministic=False)
    same = run(other, q, k, v, dout, causal, sink=sink, **masks)
    assert_close(found[:3], tuple(x.double() for x in same[:3]))
    torch.testing.assert_close(found[3], same[3], rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("d", NARROW)
@pytest.mark.parametrize("causal", [False, True])
def test_backward_packed(d: int, causal: bool) -> None:
    """Every other sequence, and all that belongs to none, is NaN: boxes of TMA hold rows of both."""
    lengths = [0, 1, 127, 300, 128, 129, 700, 64, 65]
    starts = [5 + sum(lengths[:n]) for n in range(len(lengths) + 1)]
    q, k, v, dout = (normal(starts[-1] + 70, 4, d) for _ in range(4))
    for x in (q, k, v, dout):
        x[:5], x[starts[-1] :] = torch.nan, torch.nan
        for n in range(1, len(lengths), 2):
            x[starts[n] : starts[n + 1]] = torch.nan
    found = run(default(d), q, k, v, dout, causal, cu_seqlens_q=int32(starts))
    for n in range(2, len(lengths), 2):
        rows = slice(starts[n], starts[n + 1])
        alone = gradients(q[None, rows], k[None, rows], v[None, rows], dout[None, rows], causal)
        assert_close([x[None, rows] for x in found], alone)
    for x in found:
        assert (x[:5] == 0).all()
        assert (x[starts[-1] :] == 0).all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("d", NARROW)
def test_backward_block_mask(d: int) -> None:
    """Cells that are empty, whole and partial, of one map for each head, two of which share a tile of keys."""
    q, dout = normal(2, 700, 4, d), normal(2, 700, 4, d)
    k, v = normal(2, 800, 2, d), normal(2, 800, 2, d)
    seen = torch.rand(2, 4, 700, 800, device="cuda") < 0.5
    seen[:, :2, :300, 100:] = False
    seen[:, 1:, 300:, 256:600] = True
    mask = fc.BlockMask.from_dense(seen)
    assert_close(
        run(default(d), q, k, v, dout, False, block_mask=mask),
        gradients(q, k, v, dout, False, seen),
    )


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_same_bits_whatever_else_runs(d: int, causal: bool) -> None:
    """A tile that waits for one that is not started never ends where another kernel holds half of the multiprocessors;
    one that does not wait adds in another order; counters of another call, which the workspace still has, let it."""
    cfg = same_bits(d)
    batch, kv_heads = (
        (5, 16) if causal else (2, 4)
    )  # so many tiles that some heads add from the first keys on
    q, dout = (torch.randn(batch, 1000, 16, d, device="cuda", dtype=torch.bfloat16) for _ in "qd")
    k, v = (
        torch.randn(batch, 1100, kv_heads, d, device="cuda", dtype=torch.bfloat16) for _ in "kv"
    )
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
    """Sums of dq that the launches of a replay do not clear would grow from replay to replay."""
    cfg = same_bits(128) if deterministic else default(128, causal=True)
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
def test_backward_chooses() -> None:
    """What Hopper's kernels do not serve takes the others, and explain says why."""
    q, k, v = (normal(1, 256, 2, 128) for _ in range(3))
    wide = normal(1, 256, 2, 256)

    def told(*arrays: torch.Tensor, deterministic: bool = False, **options: Any) -> Any:
        return fc.explain(*arrays, gradients=True, deterministic=deterministic, **options).gradients

    for deterministic in (False, True):
        assert told(q, k, v, causal=True, deterministic=deterministic).config.kernel == "sm90"
    for masks in (
        {"window": (8, 8)},
        {"seqlens_k": int32([200])},
        {"sink": torch.zeros(2, device="cuda")},
        {"block_mask": fc.BlockMask.from_documents(int32([0] * 200 + [1] * 56)[None])},
    ):
        assert told(q, k, v, **masks).config.kernel == "sm90"
        for other in (told(q, k, v, deterministic=True, **masks), told(wide, wide, wide, **masks)):
            assert other.config.kernel == "sm80"
            assert any(
                what == "sm90" and "full and causal masks only" in why
                for what, why in other.rejected
            )
    odd = torch.randn(1, 256, 2, 132, device="cuda", dtype=torch.bfloat16)[..., :128]
    other = told(odd, k, v)
    assert other.config.kernel == "sm80"
    assert any(what == "sm90" and "16" in why for what, why in other.rejected)
