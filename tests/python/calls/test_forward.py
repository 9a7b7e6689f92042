"""Values: every kind of shape, dtype, layout and option against the fp64 oracle, by the accuracy
rule."""

from __future__ import annotations

import dataclasses
import math

import flashcute as fc
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optional_torch import torch
from tensors import both_masks, bshd, run_and_check, tensor

CPU_DTYPES = ["float16", "bfloat16", "float32", "float64"]
WHERE = [("cpu", dtype) for dtype in CPU_DTYPES] + [
    pytest.param("cuda", dtype, marks=pytest.mark.gpu)
    for dtype in ("float16", "bfloat16", "float32")
]
HEAD_DIMS = [
    *(("cpu", d) for d in (1, 3, 8, 40, 64, 72, 96, 128, 200, 256)),
    *(pytest.param("cuda", d, marks=pytest.mark.gpu) for d in range(8, 257, 8)),
]
# (of q and k, of v)
HEAD_DIM_PAIRS = [(64, 128), (192, 128), (8, 256), (256, 8), (72, 40)]
LENGTHS = [
    (0, 0), (0, 5), (5, 0), (1, 1), (1, 300), (239, 1), (3, 799), (64, 64), (113, 203), (128, 217),
    (108, 256), (256, 108), (1023, 1024), (1024, 1023),
]  # fmt: skip

both_layouts = pytest.mark.parametrize("layout", ["bshd", "bhsd"])
everywhere = pytest.mark.parametrize(("where", "dtype"), WHERE)


# ---- the table -----------------------------------------------------------------------------------


@everywhere
@both_masks
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{x[0]}x{x[1]}")
def test_lengths(
    rng: np.random.Generator, where: str, dtype: str, causal: bool, lengths: tuple[int, int]
) -> None:
    """Partial tiles, single rows and keys, nothing at all; causal is bottom-right aligned."""
    sq, sk = lengths
    heads, batch = (2, 1) if max(lengths) > 1000 else (4, 2)
    p = oracle.make_problem(
        rng,
        dtype,
        batch=batch,
        seqlen_q=sq,
        seqlen_k=sk,
        heads=heads,
        kv_heads=2,
        d=64,
        causal=causal,
    )
    run_and_check(p, where)


@pytest.mark.parametrize(("where", "d"), HEAD_DIMS)
@both_masks
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_head_dims(rng: np.random.Generator, where: str, dtype: str, causal: bool, d: int) -> None:
    """Head dims that are not the compiled width, nor a multiple of 16, run and are right."""
    if where == "cuda" and dtype == "float64":
        pytest.skip("no GPU kernel: test_choice.py checks that it is refused")
    p = oracle.make_problem(
        rng, dtype, seqlen_q=113, seqlen_k=203, heads=2, kv_heads=1, d=d, causal=causal
    )
    run_and_check(p, where)


@everywhere
@both_masks
@pytest.mark.parametrize(("d", "d_v"), HEAD_DIM_PAIRS)
def test_head_dims_of_values(
    rng: np.random.Generator, where: str, dtype: str, causal: bool, d: int, d_v: int
) -> None:
    """v and the output have a width of their own; the scale is that of q and k."""
    p = oracle.make_problem(
        rng, dtype, seqlen_q=113, seqlen_k=203, heads=2, kv_heads=1, d=d, d_v=d_v, causal=causal
    )
    for layout in ("bshd", "bhsd"):
        run_and_check(p, where, layout=layout)


@everywhere
@both_layouts
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 2), (6, 1)])
def test_grouped_heads_and_layouts(
    rng: np.random.Generator, where: str, dtype: str, layout: str, heads: int, kv_heads: int
) -> None:
    """Query head h uses key head h // (heads / kv_heads), whichever dimension the heads are in."""
    p = oracle.make_problem(
        rng, dtype, seqlen_q=70, seqlen_k=90, heads=heads, kv_heads=kv_heads, d=40, causal=True
    )
    run_and_check(p, where, layout=layout)


@everywhere
@both_masks
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.3, 8.0])
def test_scale(
    rng: np.random.Generator, where: str, dtype: str, causal: bool, scale: float
) -> None:
    """0 is a scale, not "not given" (it must give the mean, masked keys left out); a large one
    gives one-hot rows."""
    p = oracle.make_problem(
        rng, dtype, seqlen_q=97, seqlen_k=130, heads=2, d=64, causal=causal, scale=scale
    )
    run_and_check(p, where)
    if scale == 0:
        _, lse = p.expected()
        seen = oracle.visible(97, 130, causal).sum(axis=1)
        np.testing.assert_allclose(lse, np.broadcast_to(np.log(seen), lse.shape), rtol=1e-14)


@everywhere
@both_masks
def test_very_negative_scores(
    rng: np.random.Generator, where: str, dtype: str, causal: bool
) -> None:
    """Scores near -250: exp of them is 0 in fp32, and a padded key's score of 0 would win."""
    p = oracle.make_problem(rng, dtype, seqlen_q=65, seqlen_k=65, heads=2, d=64, causal=causal)
    p = dataclasses.replace(
        p,
        q=oracle.rounded(np.abs(p.q) + 4, dtype),
        k=oracle.rounded(-np.abs(p.k) - 4, dtype),
        scale=0.15,
    )
    assert p.expected()[1].max() < -100
    run_and_check(p, where)


@everywhere
def test_rising_maxima(rng: np.random.Generator, where: str, dtype: str) -> None:
    """Row maxima that rise from block to block by 2^1 to 2^16: a row whose correction is skipped or
    applied once too often."""
    p = oracle.make_problem(rng, dtype, seqlen_q=130, seqlen_k=1024, heads=2, d=64)
    q, k = np.zeros_like(p.q), p.k.copy()
    q[..., 0] = (0.25 * 2.0 ** (np.arange(130) % 5))[None, :, None]
    k[..., 0] = (4 * (15 - np.arange(1024) // 64) - np.arange(1024) % 3)[None, :, None]
    run_and_check(dataclasses.replace(p, q=q, k=k, scale=math.log(2)), where)


# ---- configurations ------------------------------------------------------------------------------

CPU_TILES = [(16, 16), (64, 32), (48, 80), (128, 64), (128, 256), (256, 128)]


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@both_masks
@pytest.mark.parametrize("tile", CPU_TILES, ids=lambda t: f"m{t[0]}_n{t[1]}")
def test_tiles_on_the_cpu(
    rng: np.random.Generator, dtype: str, causal: bool, tile: tuple[int, int]
) -> None:
    """Every tile size gives the result: tile edges beside sequence ends and the diagonal."""
    cfg = fc.ForwardConfig(dtype=dtype, head_dim=64, block_m=tile[0], block_n=tile[1], num_warps=1)
    p = oracle.make_problem(
        rng, dtype, seqlen_q=150, seqlen_k=259, heads=2, kv_heads=1, d=40, causal=causal
    )
    run_and_check(p, "cpu", cfg=cfg)


# Compiled at run time: tiles that no default has. tests/option_pairs.def has the other options.
GPU_TILES = [
    fc.ForwardConfig(dtype="float16", head_dim=64, block_m=64, block_n=32, num_warps=4),
    fc.ForwardConfig(dtype="bfloat16", head_dim=64, block_m=128, block_n=64, num_warps=8),
    fc.ForwardConfig(dtype="float16", head_dim=64, block_m=128, block_n=128, q_in_registers=True),
    fc.ForwardConfig(dtype="float16", head_dim=128, block_m=128, block_n=32, num_warps=8),
    fc.ForwardConfig(dtype="bfloat16", head_dim=48, head_dim_v=256, block_m=64, block_n=64),
]


@pytest.mark.gpu
@pytest.mark.slow
@both_masks
@pytest.mark.parametrize("compiled", GPU_TILES, indirect=True, ids=lambda c: c.name)
def test_tiles_on_the_gpu(
    rng: np.random.Generator, compiled: fc.ForwardConfig, causal: bool
) -> None:
    """A tile changes the speed only. A kernel that runs out of shared memory or registers, or
    whose copies disagree with its layouts, shows here."""
    for sq, sk, d in [(300, 450, compiled.head_dim), (129, 65, 40), (1, 257, 8)]:
        p = oracle.make_problem(
            rng, compiled.dtype, seqlen_q=sq, seqlen_k=sk, heads=4, kv_heads=2, d=d, causal=causal
        )
        run_and_check(p, "cuda", cfg=compiled)


@pytest.mark.gpu
@pytest.mark.slow
@both_masks
@pytest.mark.parametrize("d", [64, 136])
def test_tf32_only_on_request(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, causal: bool, d: int
) -> None:
    """float32 is float32 (error 1e-5, which every other test asks of it); with allow_tf32 the tensor
    cores take one product in place of three, if that kernel is wanted enough to be compiled: the results differ."""
    monkeypatch.setenv("FLASHCUTE_JIT", "fastest")
    p = oracle.make_problem(
        rng, "float32", seqlen_q=150, seqlen_k=259, heads=2, kv_heads=1, d=d, causal=causal
    )
    q, k, v = (tensor(x, "float32", "cuda") for x in (p.q, p.k, p.v))
    exact = fc.flash_attention(q, k, v, causal)
    out, lse = fc.flash_attention(q, k, v, causal, allow_tf32=True, return_lse=True)
    oracle.assert_accurate(p, out, lse, tf32=True)
    assert not torch.equal(out, exact)
    assert fc.explain(q, k, v).config.math == "tf32x3"
    assert fc.explain(q, k, v, allow_tf32=True).config.math == "tensor_core"


@pytest.mark.gpu
@both_masks
@pytest.mark.parametrize("cfg", fc.configs(), ids=lambda c: c.name)
def test_ahead_of_time_configurations(
    rng: np.random.Generator, cfg: fc.ForwardConfig, causal: bool
) -> None:
    """Each kernel that the build contains is launched by name, so none of the table's lines is
    dead."""
    p = oracle.make_problem(
        rng, cfg.dtype, seqlen_q=200, seqlen_k=333, heads=2, d=cfg.head_dim - 8, causal=causal
    )
    run_and_check(p, "cuda", cfg=cfg)


# ---- random shapes, strides and layouts ----------------------------------------------------------


@st.composite
def random_calls(draw: st.DrawFn, dtypes: list[str], step: int) -> tuple[oracle.Problem, dict]:
    """A problem, and for q, k, v, out how it lies in memory: the order of its dimensions, gaps
    after each of them, an offset. `step` is what strides and offsets are multiples of."""
    heads = draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 3, 4) if heads % n == 0]))
    p = oracle.make_problem(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        draw(st.sampled_from(dtypes)),
        batch=draw(st.integers(0, 3)),
        seqlen_q=draw(st.integers(0, 200)),
        seqlen_k=draw(st.integers(0, 300)),
        heads=heads,
        kv_heads=kv_heads,
        d=step * draw(st.integers(1, 256 // step)),
        d_v=step * draw(st.integers(1, 256 // step)),
        causal=draw(st.booleans()),
        scale=draw(st.none() | st.sampled_from([0.0, 0.05, 1.0])),
    )
    memory = {
        name: {
            "order": draw(st.permutations([0, 1, 2])),
            "gaps": [step * draw(st.integers(0, 3)) for _ in range(3)],
            "offset": step * draw(st.integers(0, 2)),
        }
        for name in ("q", "k", "v", "out")
    }
    return p, {"layout": draw(st.sampled_from(["bshd", "bhsd"])), "memory": memory}


def placed(shape: tuple[int, ...], like: torch.Tensor, how: dict) -> torch.Tensor:
    """A view of this shape somewhere in memory that is NaN otherwise."""
    strides = [0, 0, 0, 1]
    extent = shape[3]
    for dimension in reversed(how["order"]):
        extent += how["gaps"][dimension]
        extent += -extent % (8 if like.is_cuda else 1)
        strides[dimension] = extent
        extent *= max(1, shape[dimension])
    buffer = torch.full(
        (how["offset"] + extent + 8,), float("nan"), dtype=like.dtype, device=like.device
    )
    return buffer.as_strided(shape, strides, how["offset"])


def check_random_call(where: str, call: tuple[oracle.Problem, dict]) -> None:
    p, how = call
    layout, memory = how["layout"], how["memory"]
    given_tensors = {}
    for name in ("q", "k", "v"):
        x = tensor(getattr(p, name), p.dtype, where, layout)
        given_tensors[name] = placed(x.shape, x, memory[name]).copy_(x)
    q = given_tensors["q"]
    out = placed((*q.shape[:3], p.v.shape[3]), q, memory["out"])
    whole = torch.as_strided(out, (out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
    result, lse = fc.flash_attention(
        **given_tensors, causal=p.causal, scale=p.scale, layout=layout, out=out, return_lse=True
    )
    assert result is out
    oracle.assert_accurate(p, bshd(out, layout), lse, tiny=True)
    written = out.numel()
    assert int((~whole.isnan()).sum()) == written, "something beside out was written"


examples = settings(
    max_examples=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@examples
@given(random_calls(CPU_DTYPES, step=1))
def test_random_calls_on_the_cpu(call: tuple[oracle.Problem, dict]) -> None:
    """Any strides, any order of dimensions, any lengths: right, and nothing beside `out` is
    written."""
    check_random_call("cpu", call)


@pytest.mark.gpu
@examples
@given(random_calls(["float16", "bfloat16"], step=8))
def test_random_calls_on_the_gpu(call: tuple[oracle.Problem, dict]) -> None:
    """The same, within what the GPU kernels take: 16-byte steps."""
    check_random_call("cuda", call)


# ---- array libraries -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_numpy(rng: np.random.Generator, dtype: str) -> None:
    """NumPy in, NumPy out, in the same dtype; bfloat16 through ml_dtypes, which DLPack cannot
    name."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    p = oracle.make_problem(rng, dtype, seqlen_q=33, seqlen_k=44, heads=2, d=24, causal=True)
    q, k, v = (x.astype(np.dtype(dtype)) for x in (p.q, p.k, p.v))
    out, lse = fc.flash_attention(q, k, v, causal=True, return_lse=True)
    assert type(out) is type(lse) is np.ndarray
    assert out.dtype == q.dtype
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    oracle.assert_accurate(p, out, lse)
    mine = np.full_like(q, np.nan)
    assert fc.flash_attention(q, k, v, causal=True, out=mine) is mine
    assert mine.tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax_on_the_cpu(rng: np.random.Generator, dtype: str) -> None:
    """JAX in, JAX out; its arrays are immutable and must not be written to."""
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    p = oracle.make_problem(rng, dtype, seqlen_q=33, seqlen_k=44, heads=2, d=24, causal=True)
    q, k, v = (
        jax.device_put(jax.numpy.asarray(x.astype(np.float32)).astype(dtype), cpu)
        for x in (p.q, p.k, p.v)
    )
    out, lse = fc.flash_attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, jax.Array)
    assert isinstance(lse, jax.Array)
    assert out.dtype == q.dtype
    oracle.assert_accurate(p, np.asarray(out.astype("float32")), np.asarray(lse))
    for mine, original in ((q, p.q), (k, p.k), (v, p.v)):
        assert np.array_equal(np.asarray(mine.astype("float32")), original)


def test_jax_out_is_refused(rng: np.random.Generator) -> None:
    """Writing into an immutable JAX array would change what XLA may have shared or folded."""
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        q = jax.numpy.ones((1, 4, 2, 8), "float32")
        out = jax.numpy.full((1, 4, 2, 8), 7.0, "float32")
    with pytest.raises(fc.ArgumentError, match=r"^out: "):
        fc.flash_attention(q, q, q, out=out)
    assert (np.asarray(out) == 7).all()


@pytest.mark.gpu
def test_jax_on_a_gpu_is_refused() -> None:
    """Not supported yet: said so, and what to use instead."""
    jax = pytest.importorskip("jax")
    gpus = [d for d in jax.devices() if d.platform in ("gpu", "cuda")]
    if not gpus:
        pytest.skip("this JAX sees no GPU")
    q = jax.device_put(np.ones((1, 4, 2, 8), np.float16), gpus[0])
    with pytest.raises(fc.UnsupportedError, match=r"jax\.nn\.dot_product_attention"):
        fc.flash_attention(q, q, q)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_cupy(rng: np.random.Generator, layout: str) -> None:
    """CuPy in, CuPy out, on the same device."""
    cupy = pytest.importorskip("cupy")
    p = oracle.make_problem(rng, "float16", seqlen_q=133, seqlen_k=244, heads=2, d=64, causal=True)
    order = (0, 2, 1, 3) if layout == "bhsd" else (0, 1, 2, 3)
    q, k, v = (
        cupy.asarray(np.ascontiguousarray(x.astype(np.float16).transpose(order)))
        for x in (p.q, p.k, p.v)
    )
    out, lse = fc.flash_attention(q, k, v, causal=True, layout=layout, return_lse=True)
    assert isinstance(out, cupy.ndarray)
    assert isinstance(lse, cupy.ndarray)
    assert out.dtype == np.float16
    assert lse.dtype == np.float32
    oracle.assert_accurate(p, cupy.asnumpy(out).transpose(order), cupy.asnumpy(lse))


def test_libraries_mix(rng: np.random.Generator) -> None:
    """The output belongs to q's library; k and v may come from others."""
    p = oracle.make_problem(rng, "float32", seqlen_q=9, seqlen_k=12, heads=2, d=16)
    q, k, v = (x.astype(np.float32) for x in (p.q, p.k, p.v))
    out = fc.flash_attention(torch.from_numpy(q), k, torch.from_numpy(v))
    assert isinstance(out, torch.Tensor)
    oracle.assert_accurate(p, out, None)
    out = fc.flash_attention(q, torch.from_numpy(k), v)
    assert isinstance(out, np.ndarray)
    oracle.assert_accurate(p, out, None)


# ---- the oracle and the helpers themselves -------------------------------------------------------


def test_the_oracle_agrees_with_torch(rng: np.random.Generator) -> None:
    """The oracle is code too: torch's own fp64 attention must agree with it."""
    p = oracle.make_problem(rng, "float64", seqlen_q=17, seqlen_k=17, heads=4, kv_heads=2, d=16)
    p = dataclasses.replace(p, causal=True)
    q, k, v = (torch.from_numpy(x).transpose(1, 2) for x in (p.q, p.k, p.v))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    out, lse = p.expected()
    oracle.assert_close(theirs.transpose(1, 2), out, 1e-13, "torch")
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3)) / 4
    scores.masked_fill_(~torch.ones(17, 17, dtype=torch.bool).tril(), float("-inf"))
    oracle.assert_close(scores.logsumexp(-1), lse, 1e-13, "torch's LSE")


def test_rounding_agrees_with_torch(rng: np.random.Generator) -> None:
    """Ties, subnormals and overflow of our own bfloat16 rounding."""
    x = np.concatenate([
        rng.standard_normal(1000),
        np.array([1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 3.4e38, np.inf, -np.inf, 0.0, -0.0]),
    ]).astype(np.float32)  # fmt: skip
    theirs = torch.from_numpy(x).bfloat16().double().numpy()
    assert np.array_equal(oracle.rounded(x, "bfloat16"), theirs)


def test_comparison_rejects_nan() -> None:
    """A harness that takes NaN for equal hides the failure it is there for."""
    nan, one = np.array([np.nan]), np.array([1.0])
    for got, expected in ((nan, one), (one, nan), (nan, nan)):
        with pytest.raises(AssertionError, match="NaN"):
            oracle.assert_close(got, expected, 1e9, "x")
    for got in (one, np.array([-np.inf])):
        with pytest.raises(AssertionError, match="infinities"):
            oracle.assert_close(got, np.array([np.inf]), 1e9, "x")
    with pytest.raises(AssertionError, match="error"):
        oracle.assert_close(one, one + 1e-3, 1e-4, "x")


def test_allocations_are_poisoned(device: str) -> None:
    """The fixture that makes unwritten outputs visible works for what torch.empty returns."""
    assert bool(torch.empty(100, device=device).isnan().all())


def test_naive_is_worse_than_its_dtype_but_not_much(rng: np.random.Generator) -> None:
    """A naive reference with a huge error would let anything pass."""
    for dtype in ("float16", "bfloat16"):
        p = oracle.make_problem(rng, dtype, seqlen_q=113, seqlen_k=203, heads=2, d=64)
        error = np.abs(oracle.naive(p.q, p.k, p.v, dtype) - p.expected()[0]).max()
        u = oracle.UNIT_ROUNDOFF[dtype]
        assert 0.1 * u < error < 4 * u


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_long_rows_of_large_scores(rng: np.random.Generator, device: str, dtype: str) -> None:
    """Hundreds of blocks whose maximum changes little: a correction factor that is 1 + a rounding
    error instead of 1, as a fused multiply-add of a rounded product gives, grows with the number of
    blocks and with the scores. LSE shows it."""
    keys = 32768
    q = torch.ones(1, 16, 1, 64, dtype=getattr(torch, dtype), device=device)
    noise = torch.from_numpy(rng.standard_normal((1, keys, 1, 64)))
    k = (30 + noise / 8).to(q.dtype).to(device)  # scores of 240, 346 in units of log(2)
    v = torch.from_numpy(rng.standard_normal((1, keys, 1, 64))).to(q.dtype).to(device)
    out, lse = fc.flash_attention(q, k, v, return_lse=True)
    expected, expected_lse = oracle.attention(*(oracle.to_numpy(x) for x in (q, k, v)))
    assert expected_lse.min() > 240
    assert np.abs(oracle.to_numpy(lse) - expected_lse).max() <= 1e-4  # some roundings of 250
    error = np.linalg.norm(oracle.to_numpy(out) - expected) / np.linalg.norm(expected)
    assert error <= 8 * oracle.UNIT_ROUNDOFF[dtype]
