"""Hopper's kernel: its options, and what only it can get wrong. (The folder calls runs its default
configurations on a Hopper GPU.)"""

from __future__ import annotations

import dataclasses
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import pytest
from block_counts import expected_block_counts
from conftest import why_no_gpu
from optional_torch import torch
from tensors import run_and_check


def is_hopper() -> bool:
    return not why_no_gpu() and fc._core.driver_info().gpus[0].arch == 90


on_hopper = pytest.mark.skipif(not is_hopper(), reason="needs a GPU of compute capability 9.0")


def defaults(dtype: str) -> list[fc.ForwardConfig]:
    """The default configuration of each bucket of head dims."""
    buckets = [(d, d) for d in (64, 96, 128, 160, 192, 256)] + [(192, 128)]
    return [fc.default_config(d, dtype, "sm_90", head_dim_v=d_v) for d, d_v in buckets]


def random_inputs(cfg: fc.ForwardConfig, batch: int, rows: int, keys: int, heads: int) -> Any:
    """q, k, v as wide as the configuration."""
    sizes = [(rows, cfg.head_dim), (keys, cfg.head_dim), (keys, cfg.head_dim_v)]
    return [torch.randn(batch, n, heads, d, device="cuda", dtype=torch.bfloat16) for n, d in sizes]


def variants() -> list[fc.ForwardConfig]:
    """Every option at another value than the default's, alone and with those that it needs; every head dim."""
    changes: dict[int, list[dict[str, Any]]] = {
        64: [
            {"stages": 2},
            {"stages": 8, "pingpong": True},
            {"block_m": 128, "num_warps": 8, "block_n": 112},
            {"block_m": 64, "num_warps": 4},
            {"cluster": 2},
            {"cluster": 2, "block_m": 64, "num_warps": 4, "stages": 2},
            {"scores_ahead": False},
            {"scores_ahead": False, "pingpong": True, "block_n": 96, "stages": 3},
            {"scores_ahead": False, "block_m": 128, "num_warps": 8, "block_n": 160},
            {"scores_ahead": False, "stale_max": False, "block_n": 128},
            {"late_store": True},
        ],
        96: [
            {"block_m": 192, "num_warps": 12, "block_n": 64, "pingpong": False},
            {"block_n": 96, "stages": 2, "scores_ahead": True},
            {"head_dim_v": 64},
            {"head_dim": 64},
            {"cluster": 2, "stages": 3},
        ],
        128: [
            {"pingpong": False},
            {"stale_max": False},
            {"stale_max": False, "rescale_threshold": 0, "block_n": 176, "stages": 2},
            {"stale_max": False, "optimized_softmax": False},
            {"stale_max": False, "overlap": False},
            {"stale_max": False, "overlap": False, "pingpong": False, "block_n": 16},
            {"rescale_threshold": 1},
            {"late_store": True},
            {"late_store": True, "stale_max": False, "cluster": 2},
            {"scores_ahead": True, "block_n": 80, "stages": 4},
            {"head_dim_v": 64},
            {"cluster": 2},
            {"cluster": 2, "stale_max": False, "overlap": False, "block_n": 16},
        ],
        192: [
            {"head_dim_v": 128},
            {"head_dim_v": 96, "block_n": 64, "stages": 3},
            {"stale_max": False, "block_n": 112},
            {"cluster": 2},
        ],
        256: [
            {"pingpong": True},
            {"late_store": True},
            {"stale_max": False, "block_n": 80},
            {"head_dim": 160, "head_dim_v": 224},
            {"cluster": 2},
        ],
    }
    return [
        fc.default_config(d, dtype, "sm_90").replace(**change)
        for d, listed in changes.items()
        for change in listed
        for dtype in (["float16"] if change.get("stages") == 2 else ["bfloat16"])
    ]


def test_every_variant_is_legal() -> None:
    """Where there is no Hopper GPU, nothing else would look at them."""
    for cfg in variants():
        cfg.check("sm_90")
        assert cfg.kernel == "sm90"


@pytest.mark.gpu
@pytest.mark.slow
@on_hopper
@pytest.mark.parametrize("compiled", variants(), indirect=True, ids=lambda c: c.name)
def test_against_fp64(rng: np.random.Generator, compiled: fc.ForwardConfig) -> None:
    """One tile or many a block, lengths that fill no tile, rows that see nothing, groups of heads."""
    cfg = compiled
    long = 15 * cfg.block_n  # more blocks than any loop over pairs begins with
    sizes = [(300, 450, 0), (129, 65, 8), (1, 257, 24), (65, 1, 0), (400, 100, 0)]
    for sq, sk, narrower in [*sizes, (65, long, 0), (129, long + cfg.block_n + 7, 0)]:
        for causal in (False, True):
            p = oracle.make_problem(
                rng, cfg.dtype, seqlen_q=sq, seqlen_k=sk, heads=4, kv_heads=2, causal=causal,
                d=cfg.head_dim - narrower, d_v=cfg.head_dim_v - narrower,
            )  # fmt: skip
            run_and_check(p, "cuda", cfg=cfg, tiny=sk == 1)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rising_maxima(rng: np.random.Generator, d: int, dtype: str, causal: bool) -> None:
    """Blocks are visited from the last to the first. Scores that rise by hundreds on the way make stale maxima
    wrong in every block, for some rows of a warp and not for others; those that fall make all later
    ones 0."""
    sk = 1500
    slope = np.linspace(1, 0, sk)[None, :, None, None]
    for steepness in (4.0, 60.0, 400.0):
        for rising in (True, False):
            p = oracle.make_problem(
                rng, dtype, seqlen_q=700, seqlen_k=sk, heads=2, d=d, causal=causal
            )
            k = p.k + steepness * (slope if rising else slope[:, ::-1]) * p.q[:, :1].mean(
                1, keepdims=True
            )
            run_and_check(dataclasses.replace(p, k=oracle.rounded(k, dtype)), "cuda")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 96, 128, 160, 192, 256])
def test_very_negative_scores(rng: np.random.Generator, d: int, causal: bool) -> None:
    """A row's first maximum is far below 0: exponentials relative to 0 would all be 0."""
    p = oracle.make_problem(
        rng, "bfloat16", seqlen_q=300, seqlen_k=900, heads=2, d=d, causal=causal
    )
    q, k = (oracle.rounded(sign * (np.abs(x) + 4), "bfloat16") for sign, x in ((1, p.q), (-1, p.k)))
    run_and_check(dataclasses.replace(p, q=q, k=k), "cuda")


def alone_and_paired() -> list[Any]:
    """The default configurations, and the same for clusters, which nobody compiles ahead of time."""
    alone = defaults("bfloat16")
    clusters = [cfg.replace(cluster=2) for cfg in alone]
    return alone + [pytest.param(cfg, marks=pytest.mark.slow) for cfg in clusters]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("compiled", alone_and_paired(), indirect=True, ids=lambda c: c.name)
def test_more_tiles_than_blocks(compiled: fc.ForwardConfig) -> None:
    """A thread block computes one tile after another, and the softmax of a tile begins while the output of the one
    before is added to: every tile against the same one computed alone, many times."""
    torch.manual_seed(0)
    q, k, v = random_inputs(compiled, 24, 777, 777, 8)
    for causal in (False, True):
        alone = torch.cat(
            [
                fc.forward(compiled, *(x[i : i + 1] for x in (q, k, v)), causal=causal)
                for i in range(24)
            ]
        )
        for _ in range(20):
            together = fc.forward(
                compiled, q, k, v, causal=causal, out=torch.full_like(v, float("nan"))
            )
            assert torch.equal(together, alone)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("compiled", alone_and_paired(), indirect=True, ids=lambda c: c.name)
def test_warpgroups_with_less_to_do(rng: np.random.Generator, compiled: fc.ForwardConfig) -> None:
    """Warpgroups pass over the blocks of keys that only others of the tile see, and over tiles of which no row is
    theirs: every offset of the diagonal within a tile, and tiles of few rows, each of which would hang or read
    another place if a warpgroup gave one back too often or too early."""
    for sq, sk in [
        (1, 700),
        (64, 500),
        (65, 1300),
        (129, 400),
        (193, 193),
        (200, 1000),
        (900, 901),
    ]:
        for shift in (0, 17, 100):
            p = oracle.make_problem(
                rng, "bfloat16", seqlen_q=sq, seqlen_k=sk + shift, heads=2, causal=True,
                d=compiled.head_dim, d_v=compiled.head_dim_v,
            )  # fmt: skip
            run_and_check(p, "cuda", cfg=compiled)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("compiled", alone_and_paired(), indirect=True, ids=lambda c: c.name)
def test_every_count_of_blocks(rng: np.random.Generator, compiled: fc.ForwardConfig) -> None:
    """Blocks go in pairs from some count on, with scores ahead or not, and one may be left: a loop that ends too
    early or too late loses a block, or takes one of the next tile. Few rows against fp64, and tiles one after the
    other against the same computed alone."""
    torch.manual_seed(0)
    for sk in [blocks * compiled.block_n + more for blocks in range(1, 11) for more in (0, 1)]:
        # More tiles than a GPU has multiprocessors, twice.
        q, k, v = random_inputs(compiled, 72, 200, sk, 2)
        for causal in (False, True):
            p = oracle.make_problem(
                rng, "bfloat16", seqlen_q=70, seqlen_k=sk, heads=2, causal=causal,
                d=compiled.head_dim, d_v=compiled.head_dim_v,
            )  # fmt: skip
            run_and_check(p, "cuda", cfg=compiled)
            alone = [
                fc.forward(compiled, *(x[i : i + 1] for x in (q, k, v)), causal=causal)
                for i in range(72)
            ]
            out = torch.full(
                (*q.shape[:3], compiled.head_dim_v), float("nan"), device="cuda", dtype=q.dtype
            )
            together = fc.forward(compiled, q, k, v, causal=causal, out=out)
            assert torch.equal(together, torch.cat(alone))


@pytest.mark.gpu
@pytest.mark.slow
@on_hopper
def test_scores_ahead_change_no_bit() -> None:
    """When scores are multiplied is no business of the results."""
    ahead = fc.default_config(64, "bfloat16", "sm_90")
    assert ahead.scores_ahead
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1500, 3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for causal in (False, True):
        results = [
            fc.forward(cfg, q, k, v, causal=causal, return_lse=True)
            for cfg in (ahead, ahead.replace(scores_ahead=False))
        ]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.slow
@on_hopper
@pytest.mark.parametrize("d", [64, 128, 256])
def test_late_store_changes_no_bit(d: int) -> None:
    """Nor when the output is written: over many tiles of a thread block, of no, one and many blocks of keys."""
    cfg = fc.default_config(d, "bfloat16", "sm_90")
    torch.manual_seed(0)
    for rows, keys in ((1, 1), (1500, 1500), (700, 2000), (3000, 100)):
        q, k, v = (
            torch.randn(2, n, h, d, device="cuda", dtype=torch.bfloat16)
            for n, h in ((rows, 8), (keys, 2), (keys, 2))
        )
        for causal in (False, True):
            results = [
                fc.forward(cfg.replace(late_store=late), q, k, v, causal=causal, return_lse=True)
                for late in (False, True)
            ]
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("compiled", alone_and_paired(), indirect=True, ids=lambda c: c.name)
def test_nan_in_a_value(compiled: fc.ForwardConfig) -> None:
    """Rows that see it have it, the others do not, whichever warpgroup's they are: other warps look at V before it is
    multiplied."""
    torch.manual_seed(0)
    q, k, v = random_inputs(compiled, 2, 600, 600, 4)
    for key in (599, 575, 448, 301, 64, 0):
        bad = v.clone()
        bad[:, key, :, 5] = float("nan")
        nan = fc.forward(compiled, q, k, bad, causal=True).isnan()
        expected = torch.zeros_like(nan)
        expected[:, key:, :, 5] = True
        assert torch.equal(nan, expected), key


@pytest.mark.gpu
@pytest.mark.slow
@on_hopper
def test_a_cluster_counts_its_tiles_together() -> None:
    """Tiles of both thread blocks' rows, from the last row on."""
    cfg = fc.default_config(64, "float16", "sm_90").replace(cluster=2)
    for sq, sk in [(1000, 1000), (77, 500), (500, 77)]:
        q, k, v = (torch.randn(2, n, 4, 64, device="cuda").half() for n in (sq, sk, sk))
        expected = expected_block_counts(cfg, sq, sk, True).expand(2, 4, -1, 3)
        assert torch.equal(fc.count_blocks(cfg, q, k, v, causal=True).cpu(), expected)


@pytest.mark.gpu
@on_hopper
def test_expanded_keys(rng: np.random.Generator) -> None:
    """Stride 0 over heads and batch, as torch's expand makes it."""
    q = torch.randn(3, 200, 4, 64, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(1, 300, 1, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    expected = fc.flash_attention(q, *(x.repeat(3, 1, 4, 1) for x in (k, v)), causal=True)
    found = fc.flash_attention(q, *(x.expand(3, 300, 4, 64) for x in (k, v)), causal=True)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@on_hopper
def test_explain_names_the_kernel() -> None:
    q = torch.zeros(1, 64, 1, 128, device="cuda", dtype=torch.bfloat16)
    told = fc.explain(q, q, q)
    assert (told.backend, told.config.kernel) == ("sm90", "sm90")
    assert told.image == "ahead of time" or not fc._core.build_info().image_archs
    narrow = torch.zeros(1, 64, 1, 36, device="cuda", dtype=torch.bfloat16)
    told = fc.explain(narrow, narrow, narrow)
    assert told.backend == "sm80"
    assert "head_dim 36 is not a multiple of 8" in dict(told.rejected)["sm90"]
