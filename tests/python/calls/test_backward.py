"""flashcute.backward: gradients against fp64, what README.md and docstrings promise of them, and what a caller can get
wrong. Each test names the failure that it guards against."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import pytest
from conftest import Runner, backward_configurations_of_first_use
from flashcute._cli.options import config_options
from flashcute.reference import naive_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from optional_torch import torch
from oracle_backward import BackwardProblem, assert_accurate, make_problem

pytestmark = pytest.mark.compiles(backward_configurations_of_first_use())
DTYPES = ["float16", "bfloat16", "float32", "float64"]
GPU_DTYPES = ["float16", "bfloat16", "float32"]
# A GPU has two ways: one pass that adds to dq by atomics, or two that give the same bits in every run.
GPU_BACKENDS = ["cuda", "cuda_deterministic"]
NAN = float("nan")


def on_gpu(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.gpu)


both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
every_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *(("cpu", dtype) for dtype in DTYPES),
        *(on_gpu(backend, dtype) for backend in GPU_BACKENDS for dtype in GPU_DTYPES),
    ],
)
every_backend = pytest.mark.parametrize(
    "backend", ["cpu", *map(on_gpu, [*GPU_BACKENDS, "cuda_float32"])]
)


def device_of(backend: str) -> str:
    return backend.partition("_")[0]


def arch_of(device: str) -> str | int:
    return "cpu" if device == "cpu" else fc._core.driver_info().gpus[0].arch


def dtype_on(backend: str, gpu_dtype: str = "float16") -> str:
    return gpu_dtype if backend in GPU_BACKENDS else "float32"


def as_tensor(x: np.ndarray, dtype: str, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(x, dtype=getattr(torch, dtype), device=device)


def default_config(q: torch.Tensor, v: torch.Tensor, backend: str) -> fc.BackwardConfig:
    return fc.default_backward_config(
        q.shape[-1],
        q.dtype,
        arch_of(device_of(backend)),
        head_dim_v=v.shape[-1],
        deterministic=backend == "cuda_deterministic",
    )


def run(
    p: BackwardProblem, layout: str = "bshd", backend: str = "cpu", **changes: Any
) -> tuple[torch.Tensor, ...]:
    """Forward, then backward with the default configuration, or with changes to it; gradients as bshd."""
    device = device_of(backend)
    q, k, v, dout = (as_tensor(x, p.dtype, device) for x in (p.q, p.k, p.v, p.dout))
    if layout == "bhsd":
        q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
    common = {"causal": p.causal, "scale": p.scale, "layout": layout}
    out, lse = fc.flash_attention(q, k, v, return_lse=True, **common)
    dlse = None if p.dlse is None else torch.tensor(p.dlse, dtype=lse.dtype, device=device)
    cfg = default_config(q, v, backend).replace(**changes)
    found = fc.backward(cfg, dout, q, k, v, out, lse, dlse=dlse, **common)
    return tuple(x.transpose(1, 2) if layout == "bhsd" else x for x in found)


# ---- values --------------------------------------------------------------------------------------


CPU_HEAD_DIMS = [1, 8, 40, 64, 72, 104, 128, 256]
GPU_HEAD_DIMS = [8, 16, 24, 32, 40, 56, 64, 72, 88, 96, 104, 112, 120, 128, 136, 192, 256]


@both_masks
@pytest.mark.parametrize(
    ("backend", "dtype", "d"),
    [
        *(("cpu", dtype, d) for dtype in DTYPES for d in CPU_HEAD_DIMS),
        *(on_gpu(b, t, d) for b in GPU_BACKENDS for t in GPU_DTYPES for d in GPU_HEAD_DIMS),
    ],
)
def test_accuracy(rng: np.random.Generator, backend: str, dtype: str, causal: bool, d: int) -> None:
    """The accuracy rule; head dims that are multiples of 8 but not of 16."""
    p = make_problem(rng, dtype, seqlen_q=150, seqlen_k=170, kv_heads=2, d=d, causal=causal)
    assert_accurate(p, run(p, backend=backend))


@every_dtype
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_and_layouts(
    rng: np.random.Generator, backend: str, dtype: str, layout: str, kv_heads: int
) -> None:
    """dk and dv of the wrong heads, or of one query head of a group instead of their sum; d_v taken for d."""
    p = make_problem(
        rng,
        dtype,
        seqlen_q=70,
        seqlen_k=90,
        kv_heads=kv_heads,
        d=24,
        d_v=40,
        causal=True,
        with_dlse=True,
    )
    assert_accurate(p, run(p, layout, backend))


TILES_AND_ODD_ENDS = [(113, 203), (128, 217), (1, 64), (64, 1), (129, 128), (1023, 1024)]


@every_backend
@both_masks
@pytest.mark.parametrize(
    ("sq", "sk"), [*((a, b) for a in (0, 1, 65) for b in (0, 1, 65, 130)), *TILES_AND_ODD_ENDS]
)
def test_lengths(rng: np.random.Generator, sq: int, sk: int, causal: bool, backend: str) -> None:
    """Every combination of 0, 1 and a tile and one; queries that see no key have gradient 0."""
    p = make_problem(
        rng,
        dtype_on(backend, "bfloat16"),
        batch=1,
        seqlen_q=sq,
        seqlen_k=sk,
        kv_heads=2,
        d=64 if sq > 1000 else 16,
        causal=causal,
        with_dlse=True,
    )
    dq, dk, dv = run(p, backend=backend)
    assert_accurate(p, (dq, dk, dv))
    unseen = max(0, sq - sk) if causal else sq * (sk == 0)
    assert (dq[:, :unseen] == 0).all()
    if sq == 0:
        assert (dk == 0).all()
        assert (dv == 0).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Whatever combination of sizes nobody thought of."""
    draw = data.draw
    kv_heads = draw(st.integers(1, 3), "kv_heads")
    p = make_problem(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed")),
        draw(st.sampled_from(DTYPES), "dtype"),
        batch=draw(st.integers(0, 3), "batch"),
        seqlen_q=draw(st.integers(0, 150), "seqlen_q"),
        seqlen_k=draw(st.integers(1, 150), "seqlen_k"),
        heads=kv_heads * draw(st.integers(1, 3), "group"),
        kv_heads=kv_heads,
        d=draw(st.integers(1, 256), "d"),
        d_v=draw(st.integers(1, 256), "d_v"),
        causal=draw(st.booleans(), "causal"),
        with_dlse=draw(st.booleans(), "dlse"),
    )
    assert_accurate(p, run(p, draw(st.sampled_from(["bshd", "bhsd"]), "layout")))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_shape_on_a_gpu(backend: str, data: st.DataObject) -> None:
    """The same with head dims that are multiples of 8, as most are."""
    draw = data.draw
    kv_heads = draw(st.integers(1, 3), "kv_heads")
    p = make_problem(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed")),
        draw(st.sampled_from(GPU_DTYPES), "dtype"),
        batch=draw(st.integers(0, 3), "batch"),
        seqlen_q=draw(st.integers(0, 400), "seqlen_q"),
        seqlen_k=draw(st.integers(1, 400), "seqlen_k"),
        heads=kv_heads * draw(st.integers(1, 3), "group"),
        kv_heads=kv_heads,
        d=8 * draw(st.integers(1, 32), "d / 8"),
        d_v=8 * draw(st.integers(1, 32), "d_v / 8"),
        causal=draw(st.booleans(), "causal"),
        with_dlse=draw(st.booleans(), "dlse"),
    )
    assert_accurate(p, run(p, draw(st.sampled_from(["bshd", "bhsd"]), "layout"), backend))


@every_backend
@pytest.mark.parametrize("sq", [64, 192, 320])
def test_very_negative_scores(rng: np.random.Generator, sq: int, backend: str) -> None:
    """NaN where the LSE is below -88.7, the range of exp (pytorch 196678)."""
    dtype = dtype_on(backend)
    p = make_problem(rng, dtype, seqlen_q=sq, seqlen_k=sq, d=8, scale=1.0)
    q, k = np.full_like(p.q, 1.0), np.full_like(p.k, -15.0)
    k[:, ::3] -= 0.25
    shifted = BackwardProblem(q, k, p.v, p.dout, dtype, scale=1.0)
    _, lse = oracle.attention(q, k, p.v, scale=1.0)
    assert (lse < -100).all()
    assert_accurate(shifted, run(shifted, backend=backend))


@every_backend
def test_nan_reaches_only_who_sees_it(rng: np.random.Generator, backend: str) -> None:
    """A key and value of NaN: queries before it do not see it, and 0 * NaN would give it to them."""
    p = make_problem(rng, dtype_on(backend), seqlen_q=150, seqlen_k=150, d=16, causal=True)
    before = [x[:, :97] for x in (p.q, p.k, p.v, p.dout)]
    expected = BackwardProblem(*before, p.dtype, True).gradients()[0]
    p.k[:, 97] = p.v[:, 97] = NAN
    dq, _, _ = run(p, backend=backend)
    tolerance = oracle.RELATIVE.get(p.dtype, 20 * oracle.UNIT_ROUNDOFF[p.dtype])
    oracle.assert_close(dq[:, :97], expected, tolerance, "dq")
    assert dq[:, 97:].isnan().all()


@every_backend
def test_queries_that_see_nothing_may_be_nan(rng: np.random.Generator, backend: str) -> None:
    """They have gradient 0, and give none."""
    dtype = dtype_on(backend)
    p = make_problem(rng, dtype, seqlen_q=150, seqlen_k=90, d=16, causal=True)
    clean = BackwardProblem(p.q.copy(), p.k, p.v, p.dout.copy(), dtype, True)
    p.q[:, :60] = p.dout[:, :60] = NAN
    clean.q[:, :60] = clean.dout[:, :60] = 0
    assert_accurate(clean, run(p, backend=backend))


@both_masks
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_reference(rng: np.random.Generator, library: str, layout: str, causal: bool) -> None:
    """reference.naive_gradients against the tests' own oracle."""
    p = make_problem(
        rng,
        "float64",
        seqlen_q=9,
        seqlen_k=7,
        kv_heads=2,
        d=5,
        d_v=3,
        causal=causal,
        with_dlse=True,
    )
    arrays = [p.dout, p.q, p.k, p.v]
    if layout == "bhsd":
        arrays = [x.swapaxes(1, 2) for x in arrays]
    dlse = p.dlse
    if library == "torch":
        arrays, dlse = [torch.tensor(x) for x in arrays], torch.tensor(dlse)
    found = naive_gradients(*arrays, causal, dlse=dlse, layout=layout)
    if layout == "bhsd":
        found = tuple(x.swapaxes(1, 2) for x in found)
    assert_accurate(p, found)


def test_reference_without_leaks(rng: np.random.Generator) -> None:
    """NaN in keys that a row does not see, and in rows that see no key, reaches no other gradient."""
    p = make_problem(rng, "float64", seqlen_q=9, seqlen_k=6, d=5, causal=True)
    clean = naive_gradients(p.dout, p.q, p.k, p.v, True)
    p.q[:, :3] = p.dout[:, :3] = NAN  # these see nothing
    dirty = naive_gradients(p.dout, p.q, p.k, p.v, True)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)  # sums in another order


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_libraries(rng: np.random.Generator, library: str) -> None:
    """Each library gets its own kind back; given arrays are written and returned."""
    p = make_problem(rng, "float32", seqlen_q=20, seqlen_k=30, d=16)
    arrays: list[Any] = [x.astype(np.float32) for x in (p.q, p.k, p.v, p.dout)]
    if library == "torch":
        arrays = [torch.from_numpy(x) for x in arrays]
    if library == "jax":
        jax = pytest.importorskip("jax")
        cpu = jax.devices("cpu")[0]
        arrays = [jax.device_put(x, cpu) for x in arrays]
    q, k, v, dout = arrays
    out, lse = fc.flash_attention(q, k, v, return_lse=True)
    cfg = fc.default_backward_config(16, "float32", "cpu")
    found = fc.backward(cfg, dout, q, k, v, out, lse)
    assert all(type(x) is type(out) for x in found)
    assert_accurate(p, found)
    if library == "jax":
        with pytest.raises(fc.ArgumentError, match=r"^dk: expected a writable array"):
            fc.backward(cfg, dout, q, k, v, out, lse, dk=found[1])
        return
    given = [x + 1 for x in found]
    again = fc.backward(cfg, dout, q, k, v, out, lse, dq=given[0], dk=given[1], dv=given[2])
    for a, b, c in zip(again, given, found, strict=True):
        assert a is b
        assert (a == c).all()


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("kind", ["expanded", "last stride 0", "last stride 2", "permuted"])
def test_strides_of_dout(rng: np.random.Generator, library: str, kind: str) -> None:
    """An expanded, permuted or strided dout, read as if it were contiguous."""
    p = make_problem(rng, "float32", seqlen_q=20, seqlen_k=30, d=16)
    q, k, v = (x.astype(np.float32) for x in (p.q, p.k, p.v))
    dout = p.dout.astype(np.float32)
    strange = {
        "expanded": lambda x: np.broadcast_to(x[:1, :1, :1], x.shape),
        "last stride 0": lambda x: np.broadcast_to(x[..., :1], x.shape),
        "last stride 2": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        "permuted": lambda x: np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3),
    }[kind](dout)
    arrays: list[Any] = [strange, q, k, v, *fc.flash_attention(q, k, v, return_lse=True)]
    plain: list[Any] = [np.ascontiguousarray(strange), *arrays[1:]]
    if library == "torch":
        plain = [torch.from_numpy(x) for x in plain]
        make = {
            "expanded": lambda x: x[:1, :1, :1].expand(x.shape),
            "last stride 0": lambda x: x[..., :1].expand(x.shape),
            "last stride 2": lambda x: x.repeat_interleave(2, -1)[..., ::2],
            "permuted": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        }[kind]
        arrays = [make(torch.from_numpy(dout)), *plain[1:]]
    cfg = fc.default_backward_config(16, "float32", "cpu")
    for a, b in zip(fc.backward(cfg, *arrays), fc.backward(cfg, *plain), strict=True):
        assert (a == b).all()


def test_number_of_threads_does_not_change_bits(fresh: Runner) -> None:
    """Sums whose order depends on the threads."""
    code = """
        import hashlib, torch, flashcute as fc
        torch.manual_seed(0)
        q, k, v, g = (torch.randn(2, 300, 4, 40) for _ in range(4))
        cfg = fc.default_backward_config(40, "float32", "cpu")
        out, lse = fc.flash_attention(q, k, v, True, return_lse=True)
        found = fc.backward(cfg, g, q, k, v, out, lse, causal=True)
        print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in found)).hexdigest())
    """
    assert len({fresh(code, FLASHCUTE_NUM_THREADS=str(n)).stdout for n in (1, 2, 3)}) == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_do_not_change_bits(rng: np.random.Generator, deterministic: bool) -> None:
    """20 runs; the CPU is deterministic whether asked or not."""
    p = make_problem(rng, "bfloat16", seqlen_q=200, seqlen_k=200, kv_heads=1, d=64, causal=True)
    first = run(p, deterministic=deterministic)
    for _ in range(20):
        for a, b in zip(run(p, deterministic=deterministic), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@both_masks
@pytest.mark.parametrize("d", [64, 128])
def test_runs_on_a_gpu_do_not_change_bits(rng: np.random.Generator, d: int, causal: bool) -> None:
    """100 runs of the deterministic passes, with enough thread blocks to finish in any order; dk and dv of the other
    way are sums of one thread block, too."""
    p = make_problem(
        rng, "bfloat16", seqlen_q=1000, seqlen_k=1100, heads=8, kv_heads=2, d=d, causal=causal
    )
    q, k, v, dout = (as_tensor(x, p.dtype, "cuda") for x in (p.q, p.k, p.v, p.dout))
    out, lse = fc.flash_attention(q, k, v, causal, return_lse=True)
    for backend, fixed in (("cuda_deterministic", slice(None)), ("cuda", slice(1, None))):
        cfg = default_config(q, v, backend)
        first = fc.backward(cfg, dout, q, k, v, out, lse, causal=causal)[fixed]
        for _ in range(100):
            again = fc.backward(cfg, dout, q, k, v, out, lse, causal=causal)[fixed]
            for a, b in zip(again, first, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", on_gpu("cuda_deterministic")])
def test_batch_invariance(rng: np.random.Generator, backend: str) -> None:
    """A gradient that changes with what else is in the batch."""
    dtype = dtype_on(backend)
    p = make_problem(rng, dtype, batch=3, seqlen_q=100, seqlen_k=90, d=32, causal=True)
    one = BackwardProblem(p.q[1:2], p.k[1:2], p.v[1:2], p.dout[1:2], dtype, True)
    for all_of, alone in zip(run(p, backend=backend), run(one, backend=backend), strict=True):
        assert torch.equal(all_of[1:2], alone)


def inside(x: torch.Tensor, poison: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor as a view into a larger one that is full of poison elsewhere; and that one."""
    b, s, h, d = x.shape
    larger = torch.full((b + 2, s + 70, h + 1, d + 16), poison, dtype=x.dtype, device=x.device)
    view = larger[1 : b + 1, 1 : s + 1, :h, 8 : d + 8]
    view.copy_(x)
    return view, larger


@every_backend
@both_masks
def test_views_into_larger_tensors(rng: np.random.Generator, causal: bool, backend: str) -> None:
    """Strides that are taken for contiguous ones; reads beyond the last row, which would find NaN; writes there, which
    would change it; elements that are not written."""
    dtype, device = dtype_on(backend), device_of(backend)
    p = make_problem(
        rng, dtype, seqlen_q=113, seqlen_k=203, kv_heads=2, d=40, d_v=72, causal=causal, with_dlse=True
    )  # fmt: skip
    tensors = [as_tensor(x, dtype, device) for x in (p.q, p.k, p.v, p.dout)]
    out, lse = fc.flash_attention(*tensors[:3], causal, return_lse=True)
    q, k, v, dout, out = (inside(x, NAN)[0] for x in (*tensors, out))
    dlse = torch.full((2, 4, 113, 3), NAN, device=device)
    dlse[..., 1] = torch.tensor(p.dlse)
    found, larger = zip(*(inside(torch.full_like(x, NAN), 7) for x in (q, k, v)), strict=True)
    cfg = default_config(q, v, backend)
    size = fc.backward_workspace_size(cfg, q, v)
    assert (size > 0) == (backend != "cpu")
    workspace = torch.full((size + 1000,), NAN, device=device) if size else None
    named = dict(zip(("dq", "dk", "dv"), found, strict=True))
    returned = fc.backward(
        cfg, dout, q, k, v, out, lse, dlse=dlse[..., 1], causal=causal, workspace=workspace, **named
    )
    assert all(a is b for a, b in zip(returned, found, strict=True))
    assert_accurate(p, found)
    if workspace is not None:
        assert workspace[size:].isnan().all()
    for view, around in zip(found, larger, strict=True):
        view.fill_(7)
        assert (around == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[:1, :1, :1].expand(x.shape),
        lambda x: x[:, :, :, :1].expand(x.shape),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
    ],
    ids=["all expanded", "last expanded", "every second"],
)
def test_strides_of_dout_on_a_gpu(
    rng: np.random.Generator, make: Callable[[torch.Tensor], torch.Tensor], backend: str
) -> None:
    """Strides of 0 are multiples of 16 bytes; of the last dimension they are copied away."""
    p = make_problem(rng, "float16", seqlen_q=150, seqlen_k=170, d=64)
    q, k, v, dout = (as_tensor(x, "float16", "cuda") for x in (p.q, p.k, p.v, p.dout))
    out, lse = fc.flash_attention(q, k, v, return_lse=True)
    dout = make(dout)
    found = fc.backward(default_config(q, v, backend), dout, q, k, v, out, lse)
    assert_accurate(BackwardProblem(p.q, p.k, p.v, oracle.to_numpy(dout), "float16"), found)


@every_backend
@pytest.mark.parametrize("sizes", [(65_537, 1, 1), (1, 65_537, 65_537), (2, 65_536, 1)])
def test_many_batches_and_heads(sizes: tuple[int, int, int], backend: str) -> None:
    """More batches or heads than 16 bits count: each is written. With equal keys P is uniform: dv is the
    mean of dout, summed over the query heads, and the others are 0."""
    batch, heads, kv_heads = sizes
    options = {"dtype": getattr(torch, dtype_on(backend)), "device": device_of(backend)}
    q, dout = (torch.ones(batch, 1, heads, 8, **options) for _ in range(2))
    k = v = torch.ones(batch, 2, kv_heads, 8, **options)
    out, lse = fc.flash_attention(q, k, v, return_lse=True)
    cfg = default_config(q, v, backend)
    dq, dk, dv = (torch.full_like(x, 7.0) for x in (q, k, v))
    fc.backward(cfg, dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv)
    torch.testing.assert_close(dv, torch.full_like(v, heads // kv_heads / 2), rtol=1e-3, atol=0)
    assert (dq.abs() < 1e-6).all()
    assert (dk.abs() < 1e-2).all()


# ---- what a caller can get wrong -----------------------------------------------------------------


def good(device: str = "cpu") -> SimpleNamespace:
    """A call that works, with gradients full of a sentinel."""
    torch.manual_seed(0)
    q, dout, out = (torch.randn(2, 5, 4, 8).half().to(device) for _ in range(3))
    k, v = (torch.randn(2, 7, 2, 8).half().to(device) for _ in range(2))
    lse, dlse = (torch.randn(2, 4, 5).to(device) for _ in range(2))
    dq, dk, dv = (torch.full_like(x, 7.0) for x in (q, k, v))
    return SimpleNamespace(
        cfg=fc.default_backward_config(8, "float16", arch_of(device), deterministic=False),
        positional=["dout", "q", "k", "v", "out", "lse"],
        arrays={"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": dlse,
                "dq": dq, "dk": dk, "dv": dv},
        options={},
    )  # fmt: skip


def call(a: SimpleNamespace) -> object:
    named = {name: x for name, x in a.arrays.items() if name not in a.positional}
    return fc.backward(a.cfg, *(a.arrays[name] for name in a.positional), **named, **a.options)


def change(**functions: Callable[[Any], Any]) -> Callable[[SimpleNamespace], None]:
    def apply(a: SimpleNamespace) -> None:
        for name, function in functions.items():
            a.arrays[name] = function(a.arrays[name])

    return apply


def alias(name: str, other: str) -> Callable[[SimpleNamespace], None]:
    def apply(a: SimpleNamespace) -> None:
        a.arrays[name] = a.arrays[other]

    return apply


def option(**options: Any) -> Callable[[SimpleNamespace], None]:
    return lambda a: a.options.update(options)


BAD = [
    *((f"{n} of rank 3", change(**{n: lambda x: x[0]}), [rf"^{n}: expected 4 dimensions", "got 3"])
      for n in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")),
    *((f"{n} of rank 2", change(**{n: lambda x: x[0]}),
       [rf"^{n}: expected 3 dimensions \(batch, heads, seqlen_q\)", "got 2"]) for n in ("lse", "dlse")),
    *((f"{n} of another dtype", change(**{n: lambda x: x.float()}),
       [rf"^{n}: expected dtype float16 as in q, got float32"])
      for n in ("dout", "k", "v", "out", "dq", "dk", "dv")),
    *((f"{n} of fp64", change(**{n: lambda x: x.double()}), [rf"^{n}: expected dtype float32, got float64"])
      for n in ("lse", "dlse")),
    *((f"{n} of another shape", change(**{n: lambda x: x[:, :4]}),
       [rf"^{n}: expected shape \(2, 5, 4, 8\) as q", r"got \(2, 4, 4, 8\)"]) for n in ("dout", "out", "dq")),
    *((f"{n} of another shape", change(**{n: lambda x: x[:, :4]}),
       [rf"^{n}: expected shape \(2, 7, 2, 8\) as {n[1]}", r"got \(2, 4, 2, 8\)"]) for n in ("dk", "dv")),
    ("lse of bshd order", change(lse=lambda x: x.transpose(1, 2).contiguous()),
     [r"^lse: expected a contiguous tensor \(batch, heads, seqlen_q\) = \(2, 4, 5\)", r"\(2, 5, 4\)"]),
    ("lse not contiguous", change(lse=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
     ["^lse: expected a contiguous"]),
    ("dlse of another shape", change(dlse=lambda x: x[:, :3]), [r"^dlse: expected shape .*= \(2, 4, 5\)"]),
    ("k of another head_dim", change(k=lambda x: torch.cat([x, x], 3)), ["^k: expected head_dim 8 as in q, got 16"]),
    ("heads that do not divide", change(k=lambda x: torch.cat([x, x], 2)[:, :, :3],
                                        v=lambda x: torch.cat([x, x], 2)[:, :, :3]),
     ["^k: expected a number of heads that divides q's 4, got 3"]),
    *((f"{n} with last stride 2", change(**{n: lambda x: torch.cat([x, x], 3)[..., ::2]}),
       [rf"^{n}: expected last stride 1, got 2"]) for n in ("q", "k", "v", "out", "dq", "dk", "dv")),
    *((f"{n} expanded", change(**{n: lambda x: x[:1].expand_as(x)}),
       [rf"^{n}: expected every element at an address of its own"]) for n in ("dq", "dk", "dv")),
    *((f"{n} is {other}", alias(n, other), [rf"^{n}: expected memory of its own, got memory that {other} uses too"])
      for n, other in (("dq", "q"), ("dq", "dout"), ("dk", "k"), ("dv", "v"), ("dv", "dk"), ("dq", "out"))),
    *((f"{n} is a list", change(**{n: lambda x: [1.0]}), [rf"^{n}: expected an array", "got .*list"])
      for n in ("dout", "q", "out", "lse", "dlse", "dk")),
    *((f"{n} requires a gradient", change(**{n: lambda x: x.requires_grad_()}),
       [rf"^{n}: expected a tensor without requires_grad"]) for n in ("dout", "q", "lse", "dv")),
    ("scale is NaN", option(scale=NAN), ["^scale: expected a finite number >= 0, got nan"]),
    ("layout", option(layout="sbhd"), ["^layout: expected 'bshd' or 'bhsd', got 'sbhd'"]),
    ("causal", option(causal="yes"), ["^causal: expected True or False, got 'yes'"]),
    ("stream", option(stream="none"), ["^stream: expected None, a CUstream address"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "apply", "says"), BAD, ids=[bad[0] for bad in BAD])
def test_bad_argument(
    device: str, name: str, apply: Callable[[SimpleNamespace], None], says: list[str]
) -> None:
    """Each mistake alone, in an otherwise good call: named, and nothing is written."""
    a = good(device)
    call(a)
    for gradient in ("dq", "dk", "dv"):
        assert not (a.arrays[gradient] == 7).any(), "the good call did not write everything"
        a.arrays[gradient].fill_(7)
    apply(a)
    before = {n: x.clone() for n, x in a.arrays.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(fc.ArgumentError) as caught:
        call(a)
    for pattern in says:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in {caught.value}"
    for n, x in before.items():
        assert torch.equal(a.arrays[n], x), f"{n} was written before the error was raised"


def test_stream_on_the_cpu() -> None:
    """There is none."""
    a = good()
    a.options["stream"] = 5
    with pytest.raises(fc.ArgumentError, match=r"^stream: expected None for arrays on the CPU"):
        call(a)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:-1],
        lambda x: x.double(),
        lambda x: x.cpu(),
        lambda x: x.repeat_interleave(2)[::2],
        lambda x: torch.cat([x, x])[1 : 1 + len(x)],
        lambda x: x[:1].expand(len(x)),
    ],
    ids=["too small", "float64", "on the CPU", "stride 2", "misaligned", "expanded"],
)
def test_bad_workspace(change: Callable[[torch.Tensor], Any], deterministic: bool) -> None:
    """Memory that a kernel would write beyond, or misread."""
    a = good("cuda")
    a.cfg = fc.default_backward_config(8, "float16", arch_of("cuda"), deterministic=deterministic)
    size = fc.backward_workspace_size(a.cfg, a.arrays["q"], a.arrays["v"])
    a.options["workspace"] = torch.empty(size, device="cuda")
    call(a)
    a.options["workspace"] = change(a.options["workspace"])
    for name in ("dq", "dk", "dv"):
        a.arrays[name].fill_(7)
    with pytest.raises(fc.ArgumentError, match=r"^workspace: expected"):
        call(a)
    for name in ("dq", "dk", "dv"):
        assert (a.arrays[name] == 7).all()


def test_workspace_size() -> None:
    """None on the CPU; what is asked about is checked."""
    a = good()
    q, v = a.arrays["q"], a.arrays["v"]
    assert fc.backward_workspace_size(a.cfg, q, v) == 0
    with pytest.raises(fc.ArgumentError, match=r"^cfg: expected a BackwardConfig, got"):
        fc.backward_workspace_size(fc.ForwardConfig(), q, v)  # type: ignore[arg-type]
    with pytest.raises(fc.ArgumentError, match=r"^v: expected an array"):
        fc.backward_workspace_size(a.cfg, q, [1.0])
    with pytest.raises(fc.ArgumentError, match=r"^layout: expected"):
        fc.backward_workspace_size(a.cfg, q, v, layout="sbhd")


def test_the_raw_call_copies_no_dout() -> None:
    """C++ refuses a dout whose last stride is not 1; only the Python layer may copy it."""
    a = good()
    strided = a.arrays["dout"].repeat_interleave(2, -1)[..., ::2]
    rest = [a.arrays[n] for n in ("q", "k", "v", "out", "lse", "dlse", "dq", "dk", "dv")]
    with pytest.raises(fc.ArgumentError, match=r"^dout: expected last stride 1, got 2"):
        fc._core.backward(None, strided, *rest, None, None, fc._call.Options())


@pytest.mark.parametrize("cfg", ["fast", None, fc.ForwardConfig()], ids=lambda x: type(x).__name__)
def test_configuration_of_the_wrong_type(cfg: object) -> None:
    """Named like every other argument."""
    a = good()
    a.cfg = cfg
    with pytest.raises(fc.ArgumentError, match=r"^cfg: expected a BackwardConfig, got"):
        call(a)


GPU = fc.BackwardConfig()
HOPPER = fc.default_backward_config(64, arch="sm_90")
RULES = {
    "compute capability 8.0": [(GPU, "sm_75")],
    "^cfg: dtype must be float16, bfloat16 or float32 on a GPU": [
        (GPU.replace(dtype="float64"), "sm_90")
    ],
    "multiples of 16 between 16 and 256 on a GPU": [
        (GPU.replace(head_dim=d), "sm_80") for d in (8, 40)
    ],
    "head_dim and head_dim_v must be between 1 and 256": [
        *((fc.BackwardConfig(head_dim=d), "cpu") for d in (0, -1, 257)),
        (fc.BackwardConfig(head_dim_v=0), "cpu"),
    ],
    "num_warps must be": [(GPU.replace(num_warps=n), "sm_80") for n in (0, 3)],
    "another kernel reads must have its default": [
        (GPU.replace(dout_stages=3), "sm_90"), (GPU.replace(late_dq=False), "sm_80"),
        (HOPPER.replace(column_warps=2), "sm_90"), (HOPPER.replace(copy_bytes=8), "sm_90"),
    ],
    "kernel = sm90 needs a GPU of compute capability 9.0": [(HOPPER, "sm_80"), (HOPPER, "sm_100")],
    "kernel = sm90 needs dtype": [(HOPPER.replace(dtype="float32"), "sm_90")],
    "kernel = sm90 needs 8 warps, and block_m x block_n": [
        (HOPPER.replace(**change), "sm_90")
        for change in ({"block_n": 64}, {"num_warps": 4}, {"block_m": 64}, {"head_dim": 128})
    ],
    "kernel = sm90 needs head_dim_v = head_dim": [(HOPPER.replace(head_dim_v=32), "sm_90")],
    "kernel = sm90 needs stages and dout_stages": [
        (HOPPER.replace(stages=0), "sm_90"), (HOPPER.replace(dout_stages=5), "sm_90"),
    ],
    "block_m must be": [
        *((fc.BackwardConfig(block_m=m), arch) for m in (0, -64, 24, 512) for arch in ("cpu", "sm_80")),
    ],
    "block_n must be": [
        *((fc.BackwardConfig(block_n=n), arch) for n in (0, -64, 24, 512) for arch in ("cpu", "sm_80")),
    ],
    "column_warps must be": [(GPU.replace(column_warps=n), "sm_80") for n in (0, 3, 4)],
    "multiples of 16 times the warps that share them": [
        (GPU.replace(**shares), "sm_80")
        for shares in (
            {"block_n": 32}, {"num_warps": 8}, {"block_m": 48, "copy_bytes": 8}, {"head_dim": 48},
            {"block_m": 32, "deterministic": True}, {"head_dim_v": 48, "column_warps": 2},
        )
    ],
    "blocks_per_sm must be": [(GPU.replace(blocks_per_sm=n), "sm_80") for n in (0, 17)],
    "math must be tensor_core": [
        (GPU.replace(math="cuda_core"), "sm_80"), (GPU.replace(math="tf32x3"), "sm_80"),
        (GPU.replace(dtype="float32"), "sm_80"),
    ],
    "stages must be": [(GPU.replace(stages=3), "sm_80")],
    "copy_bytes must be": [
        (GPU.replace(copy_bytes=3), "sm_80"),
        (GPU.replace(dtype="float32", math="tf32x3", copy_bytes=2), "sm_80"),
    ],
    "async_copy needs": [(GPU.replace(copy_bytes=2), "sm_80")],
    "k_tiles_per_load must be": [
        (GPU.replace(k_tiles_per_load=3), "sm_80"),
        (GPU.replace(k_tiles_per_load=2, head_dim=80), "sm_80"),
        (GPU.replace(dtype="float32", math="tf32x3", k_tiles_per_load=1), "sm_80"),
    ],
    "need more shared memory": [
        (GPU.replace(head_dim=256, block_n=256), "sm_80"), (HOPPER.replace(stages=4), "sm_90"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "cfg", "arch"), [(r, *case) for r, cases in RULES.items() for case in cases],
    ids=lambda x: getattr(x, "name", str(x)),
)  # fmt: skip
def test_rules(rule: str, cfg: fc.BackwardConfig, arch: str) -> None:
    """check() tells the rule, the values that it names, and on a GPU those that are not the default."""
    with pytest.raises(fc.ConfigError, match=rule) as caught:
        cfg.check(arch)
    message = str(caught.value)
    assert message.startswith("cfg: ")
    sentence = message.partition(" (got ")[0]
    for name in config_options(fc.BackwardConfig):
        changed = name != "head_dim_v" and getattr(cfg, name) != getattr(fc.BackwardConfig(), name)
        if name in sentence or (changed and arch != "cpu"):
            assert f"{name}={getattr(cfg, name)!r}" in message
    for name in ("dtype", "head_dim", "block_m", "block_n"):
        assert f"{name}={getattr(cfg, name)!r}" in message
    if "the warps that share them" in sentence:
        assert f"{cfg.column_warps} of {cfg.num_warps} warps share columns" in message


def test_configuration_is_a_value() -> None:
    """Hashable, comparable, named; head_dim_v follows head_dim; what differs from the default shows in the name."""
    cfg = fc.default_backward_config(64, torch.float32, "cpu", deterministic=False)
    cfg.check("cpu")
    assert cfg == eval(repr(cfg), {"BackwardConfig": fc.BackwardConfig})
    assert len({cfg, cfg.replace(), cfg.replace(block_m=32)}) == 2
    assert cfg.replace(head_dim=72).head_dim_v == 72
    assert cfg.name == "bwd_f32_d64_m64_n64_w4"
    assert cfg.replace(deterministic=True).name == "bwd_f32_d64_m64_n64_w4_deterministic"
    others = ("name", "smem_bytes", "dtype", "kernel", "math")  # no numbers, or no options
    for name, member in vars(fc.BackwardConfig).items():
        if isinstance(member, property) and name not in others:
            value = getattr(cfg, name)
            changed = cfg.replace(**{name: not value if isinstance(value, bool) else value + 1})
            assert len({cfg, changed}) == len({cfg.name, changed.name}) == 2, name
    with pytest.raises(fc.ArgumentError, match=r"^BackwardConfig: expected options among dtype"):
        cfg.replace(q_in_registers=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("d", [1, 64, 65, 128, 129, 192, 256])
def test_default_configurations(d: int, dtype: str, deterministic: bool, arch: str) -> None:
    """They keep the rules of every architecture, and are what was asked for. float32 has none for wide heads where
    shared memory is scarce."""
    for d_v in (d, 256):
        options = {"head_dim_v": d_v, "deterministic": deterministic}
        widest = max(d, d_v)
        if dtype == "float32" and widest > 128 and arch in ("sm_86", "sm_120"):
            with pytest.raises(
                fc.UnsupportedError, match=rf"float32 with head_dim {widest} need more shared"
            ):
                fc.default_backward_config(d, dtype, arch, **options)
            continue
        cfg = fc.default_backward_config(d, dtype, arch, **options)
        cfg.check(arch)
        always = cfg.kernel == "sm90" and widest > 128  # it has two passes
        assert (cfg.dtype, cfg.deterministic) == (dtype, deterministic or always)
        assert cfg.head_dim >= d
        assert cfg.head_dim_v >= d_v


def test_default_configuration_that_no_gpu_has() -> None:
    """Told by name."""
    with pytest.raises(fc.UnsupportedError, match="float64 has no GPU kernel"):
        fc.default_backward_config(64, "float64", "sm_80")


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (fc.default_backward_config(8, "float64", "cpu"), "^cfg: dtype float64 does not fit .* float16"),
        (fc.default_backward_config(4, "float16", "cpu"), "^cfg: head_dim 4 is smaller than the tensors' 8"),
        (fc.default_backward_config(8, "float16", "cpu", head_dim_v=4), "^cfg: head_dim_v 4 is smaller"),
    ],
)  # fmt: skip
def test_configuration_that_does_not_fit(cfg: fc.BackwardConfig, says: str) -> None:
    """A configuration is for one dtype and a width."""
    a = good()
    a.cfg = cfg
    with pytest.raises(fc.ConfigError, match=says):
        call(a)


@pytest.mark.gpu
def test_dtype_that_no_gpu_kernel_has() -> None:
    """By name, before anything is written."""
    a = good("cuda")
    for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv", "lse", "dlse"):
        a.arrays[name] = a.arrays[name].double()
    a.cfg = a.cfg.replace(dtype="float64")
    with pytest.raises(fc.UnsupportedError, match=r"^q: dtype float64 has no GPU kernel"):
        call(a)
    assert (a.arrays["dq"] == 7).all()


@pytest.mark.gpu
def test_cupy(rng: np.random.Generator) -> None:
    """Another library's memory, current stream and copies."""
    cupy = pytest.importorskip("cupy")
    p = make_problem(rng, "float16", seqlen_q=50, seqlen_k=60, d=64)
    q, k, v, dout = (cupy.asarray(x.astype(np.float16)) for x in (p.q, p.k, p.v, p.dout))
    cfg = fc.default_backward_config(64, "float16", arch_of("cuda"), deterministic=False)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out, lse = fc.flash_attention(q, k, v, return_lse=True)
        for strange in (dout, cupy.repeat(dout, 2, axis=-1)[..., ::2]):
            found = fc.backward(cfg, strange, q, k, v, out, lse)
            stream.synchronize()
            assert all(type(x) is type(q) for x in found)
            assert_accurate(p, found)


def test_arrays_of_an_unknown_library() -> None:
    """Gradients cannot be made for an array that is DLPack and nothing more: the one that is missing
    is named."""

    class OnlyDlpack:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array
            self.shape, self.dtype = array.shape, array.dtype

        def __dlpack__(self, **options: object) -> object:
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.array.__dlpack_device__()

    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 4, 2, 8)).astype(np.float32) for _ in range(4))
    out, lse = fc.flash_attention(q, k, v, return_lse=True)
    cfg = fc.default_backward_config(8, "float32", "cpu")
    expected = fc.backward(cfg, dout, q, k, v, out, lse)
    dq, dk, dv = (np.empty_like(x) for x in (q, k, v))
    foreign = [OnlyDlpack(x) for x in (q, k, v)]
    with pytest.raises(fc.ArgumentError, match=r"^dk: expected an array to write to.*OnlyDlpack"):
        fc.backward(cfg, dout, *foreign, out, lse, dq=dq)
    fc.backward(cfg, dout, *foreign, out, lse, dq=dq, dk=dk, dv=dv)
    for found, wanted in zip((dq, dk, dv), expected, strict=True):
        assert found.tobytes() == wanted.tobytes()
