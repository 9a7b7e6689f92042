"""flashcute.backward: gradients against fp64, the contract's promises, and what a caller can get wrong. Each test
names the failure that it guards against."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import pytest
import torch
from conftest import Runner
from flashcute.reference import naive_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_backward import BackwardProblem, assert_accurate, make_problem

DTYPES = ["float16", "bfloat16", "float32", "float64"]
NAN = float("nan")

both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def as_tensor(x: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.tensor(x, dtype=getattr(torch, dtype))


def run(p: BackwardProblem, layout: str = "bshd", **options: Any) -> tuple[torch.Tensor, ...]:
    """Forward, then backward with the default configuration; gradients as bshd."""
    q, k, v, dout = (as_tensor(x, p.dtype) for x in (p.q, p.k, p.v, p.dout))
    if layout == "bhsd":
        q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
    common = {"causal": p.causal, "scale": p.scale, "layout": layout}
    out, lse = fc.flash_attention(q, k, v, return_lse=True, **common)
    dlse = None if p.dlse is None else torch.tensor(p.dlse, dtype=lse.dtype)
    cfg = fc.default_backward_config(q.shape[-1], q.dtype, head_dim_v=v.shape[-1])
    found = fc.backward(cfg, dout, q, k, v, out, lse, dlse=dlse, **common, **options)
    return tuple(x.transpose(1, 2) if layout == "bhsd" else x for x in found)


# ---- values --------------------------------------------------------------------------------------


@every_dtype
@both_masks
@pytest.mark.parametrize("d", [1, 8, 40, 64, 72, 104, 128, 256])
def test_accuracy(rng: np.random.Generator, dtype: str, causal: bool, d: int) -> None:
    """The accuracy rule; head dims that are multiples of 8 but not of 16 (T40)."""
    p = make_problem(rng, dtype, seqlen_q=150, seqlen_k=170, kv_heads=2, d=d, causal=causal)
    assert_accurate(p, run(p))


@every_dtype
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_and_layouts(
    rng: np.random.Generator, dtype: str, layout: str, kv_heads: int
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
    assert_accurate(p, run(p, layout))


@both_masks
@pytest.mark.parametrize("sq", [0, 1, 65])
@pytest.mark.parametrize("sk", [0, 1, 65, 130])
def test_lengths(rng: np.random.Generator, sq: int, sk: int, causal: bool) -> None:
    """Every combination of 0, 1 and a tile and one (T16); queries that see no key have gradient 0 (T17)."""
    p = make_problem(rng, "float32", seqlen_q=sq, seqlen_k=sk, d=16, causal=causal, with_dlse=True)
    dq, dk, dv = run(p)
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


@pytest.mark.parametrize("sq", [64, 192, 320])
def test_very_negative_scores(rng: np.random.Generator, sq: int) -> None:
    """NaN where the LSE is below -88.7, the range of exp (T10, pytorch 196678)."""
    p = make_problem(rng, "float32", seqlen_q=sq, seqlen_k=sq, d=8, scale=1.0)
    q, k = np.full_like(p.q, 1.0), np.full_like(p.k, -15.0)
    k[:, ::3] -= 0.25
    shifted = BackwardProblem(q, k, p.v, p.dout, "float32", scale=1.0)
    _, lse = oracle.attention(q, k, p.v, scale=1.0)
    assert (lse < -100).all()
    assert_accurate(shifted, run(shifted))


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
    """NaN in keys that a row does not see, and in rows that see no key, reaches no other gradient (T13)."""
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
        arrays = [jax.numpy.asarray(x) for x in arrays]
    q, k, v, dout = arrays
    out, lse = fc.flash_attention(q, k, v, return_lse=True)
    cfg = fc.default_backward_config(16, "float32")
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
    """An expanded, permuted or strided dout, read as if it were contiguous (T18)."""
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
    cfg = fc.default_backward_config(16, "float32")
    for a, b in zip(fc.backward(cfg, *arrays), fc.backward(cfg, *plain), strict=True):
        assert (a == b).all()


def test_number_of_threads_does_not_change_bits(fresh: Runner) -> None:
    """Sums whose order depends on the threads."""
    code = """
        import hashlib, torch, flashcute as fc
        torch.manual_seed(0)
        q, k, v, g = (torch.randn(2, 300, 4, 40) for _ in range(4))
        cfg = fc.default_backward_config(40, "float32")
        out, lse = fc.flash_attention(q, k, v, True, return_lse=True)
        found = fc.backward(cfg, g, q, k, v, out, lse, causal=True)
        print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in found)).hexdigest())
    """
    assert len({fresh(code, FLASHCUTE_NUM_THREADS=str(n)).stdout for n in (1, 2, 3)}) == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_do_not_change_bits(rng: np.random.Generator, deterministic: bool) -> None:
    """20 runs; the CPU is deterministic whether asked or not (T21)."""
    p = make_problem(rng, "bfloat16", seqlen_q=200, seqlen_k=200, kv_heads=1, d=64, causal=True)
    first = run(p, deterministic=deterministic)
    for _ in range(20):
        for a, b in zip(run(p, deterministic=deterministic), first, strict=True):
            assert torch.equal(a, b)


def test_batch_invariance(rng: np.random.Generator) -> None:
    """A gradient that changes with what else is in the batch (T22)."""
    p = make_problem(rng, "float32", batch=3, seqlen_q=100, seqlen_k=90, d=32, causal=True)
    one = BackwardProblem(p.q[1:2], p.k[1:2], p.v[1:2], p.dout[1:2], "float32", True)
    for all_of, alone in zip(run(p), run(one), strict=True):
        assert torch.equal(all_of[1:2], alone)


@pytest.mark.parametrize("sizes", [(65_537, 1, 1), (1, 65_537, 65_537), (2, 65_536, 1)])
def test_many_batches_and_heads(sizes: tuple[int, int, int]) -> None:
    """More batches or heads than 16 bits count (T4): each is written. With equal keys P is uniform: dv is the
    mean of dout, summed over the query heads, and the others are 0."""
    batch, heads, kv_heads = sizes
    q, dout = (torch.ones(batch, 1, heads, 2) for _ in range(2))
    k = v = torch.ones(batch, 2, kv_heads, 2)
    out, lse = fc.flash_attention(q, k, v, return_lse=True)
    cfg = fc.default_backward_config(2, "float32")
    dq, dk, dv = (torch.full_like(x, 7.0) for x in (q, k, v))
    fc.backward(cfg, dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv)
    torch.testing.assert_close(dv, torch.full_like(v, heads // kv_heads / 2), rtol=1e-3, atol=0)
    assert (dq.abs() < 1e-6).all()
    assert (dk.abs() < 1e-2).all()


# ---- what a caller can get wrong -----------------------------------------------------------------


def good() -> SimpleNamespace:
    """A call that works, with gradients full of a sentinel."""
    torch.manual_seed(0)
    q, dout, out = (torch.randn(2, 5, 4, 8) for _ in range(3))
    k, v = (torch.randn(2, 7, 2, 8) for _ in range(2))
    lse, dlse = (torch.randn(2, 4, 5) for _ in range(2))
    dq, dk, dv = (torch.full_like(x, 7.0) for x in (q, k, v))
    return SimpleNamespace(
        cfg=fc.default_backward_config(8, "float32"),
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
    *((f"{n} of another dtype", change(**{n: lambda x: x.half()}),
       [rf"^{n}: expected dtype float32 as in q, got float16"])
      for n in ("dout", "k", "v", "out", "dq", "dk", "dv")),
    *((f"{n} of fp64", change(**{n: lambda x: x.double()}), [rf"^{n}: expected dtype float32, got float64"])
      for n in ("lse", "dlse")),
    *((f"{n} of another shape", change(**{n: lambda x: x[:, :4]}),
       [rf"^{n}: expected shape \(2, 5, 4, 8\) as q", r"got \(2, 4, 4, 8\)"]) for n in ("dout", "out", "dq")),
    *((f"{n} of another shape", change(**{n: lambda x: x[:, :4]}),
       [rf"^{n}: expected shape \(2, 7, 2, 8\) as {n[1]}", r"got \(2, 4, 2, 8\)"]) for n in ("dk", "dv")),
    ("lse of bshd order", change(lse=lambda x: x.transpose(1, 2).contiguous()),
     [r"^lse: expected a contiguous tensor \(batch, heads, seqlen_q\) = \(2, 4, 5\)", r"\(2, 5, 4\)"]),
    ("lse not contiguous", change(lse=lambda x: torch.randn(2, 5, 4).transpose(1, 2)), ["^lse: expected a contiguous"]),
    ("dlse of another shape", change(dlse=lambda x: x[:, :3]), [r"^dlse: expected shape .*= \(2, 4, 5\)"]),
    ("k of another head_dim", change(k=lambda x: torch.cat([x, x], 3)), ["^k: expected head_dim 8 as in q, got 16"]),
    ("heads that do not divide", change(k=lambda x: torch.cat([x, x], 2)[:, :, :3],
                                        v=lambda x: torch.cat([x, x], 2)[:, :, :3]),
     ["^k: expected a number of heads that divides q's 4, got 3"]),
    *((f"{n} with last stride 2", change(**{n: lambda x: torch.cat([x, x], 3)[..., ::2]}),
       [rf"^{n}: expected last stride 1, got 2"]) for n in ("q", "k", "v", "out", "dq", "dk", "dv")),
    *((f"{n} expanded", change(**{n: lambda x: x[:1].expand_as(x)}),
       [rf"^{n}: expected every element at an address of its own"]) for n in ("dq", "dk", "dv")),
    *((f"{n} is {other}", alias(n, other), [rf"^{n}: expected memory of its own, got the memory of {other}"])
      for n, other in (("dq", "q"), ("dq", "dout"), ("dk", "k"), ("dv", "v"), ("dv", "dk"), ("dq", "out"))),
    *((f"{n} is a list", change(**{n: lambda x: [1.0]}), [rf"^{n}: expected an array", "got .*list"])
      for n in ("dout", "q", "out", "lse", "dlse", "dk")),
    *((f"{n} requires a gradient", change(**{n: lambda x: x.requires_grad_()}),
       [rf"^{n}: expected a tensor without requires_grad"]) for n in ("dout", "q", "lse", "dv")),
    ("scale is NaN", option(scale=NAN), ["^scale: expected a finite number >= 0, got nan"]),
    ("layout", option(layout="sbhd"), ["^layout: expected 'bshd' or 'bhsd', got 'sbhd'"]),
    ("causal", option(causal="yes"), ["^causal: expected True or False, got 'yes'"]),
    ("stream", option(stream=5), ["^stream: expected None for arrays on the CPU, got 5"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "apply", "says"), BAD, ids=[bad[0] for bad in BAD])
def test_bad_argument(name: str, apply: Callable[[SimpleNamespace], None], says: list[str]) -> None:
    """Each mistake alone, in an otherwise good call: named, and nothing is written."""
    a = good()
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


def test_the_raw_call_copies_no_dout() -> None:
    """C++ refuses a dout whose last stride is not 1; only the Python layer may copy it."""
    a = good()
    strided = a.arrays["dout"].repeat_interleave(2, -1)[..., ::2]
    rest = [a.arrays[n] for n in ("q", "k", "v", "out", "lse", "dlse", "dq", "dk", "dv")]
    with pytest.raises(fc.ArgumentError, match=r"^dout: expected last stride 1, got 2"):
        fc._core.backward(None, strided, *rest, False, None, "bshd", None)


@pytest.mark.parametrize("cfg", ["fast", None, fc.ForwardConfig()], ids=lambda x: type(x).__name__)
def test_configuration_of_the_wrong_type(cfg: object) -> None:
    """Named like every other argument."""
    a = good()
    a.cfg = cfg
    with pytest.raises(fc.ArgumentError, match=r"^cfg: expected a BackwardConfig, got"):
        call(a)


RULES = {
    "gpu": [(fc.BackwardConfig(), "sm_80"), (fc.BackwardConfig(), "sm_90")],
    "dtype": [],  # no dtype that Python can name is outside
    "head_dim": [(fc.BackwardConfig(head_dim=d), "cpu") for d in (0, -1, 257)],
    "block_m": [(fc.BackwardConfig(block_m=m), "cpu") for m in (0, -64, 24, 512)],
    "block_n": [(fc.BackwardConfig(block_n=n), "cpu") for n in (0, -64, 24, 512)],
}


@pytest.mark.parametrize(
    ("rule", "cfg", "arch"), [(r, *case) for r, cases in RULES.items() for case in cases],
    ids=lambda x: getattr(x, "name", str(x)),
)  # fmt: skip
def test_rules(rule: str, cfg: fc.BackwardConfig, arch: str) -> None:
    """check() says the rule and every value."""
    with pytest.raises(fc.ConfigError) as caught:
        cfg.check(arch)
    message = str(caught.value)
    assert message.startswith("cfg: ")
    assert rule in message or (rule == "gpu" and "no GPU kernel" in message)
    for name in ("dtype", "head_dim", "head_dim_v", "block_m", "block_n", "deterministic"):
        assert f"{name}=" in message


def test_configuration_is_a_value() -> None:
    """Hashable, comparable, named; head_dim_v follows head_dim; deterministic shows in the name."""
    cfg = fc.default_backward_config(64, torch.float32)
    cfg.check("cpu")
    assert cfg == eval(repr(cfg), {"BackwardConfig": fc.BackwardConfig})
    assert len({cfg, cfg.replace(), cfg.replace(block_m=32)}) == 2
    assert cfg.replace(head_dim=72).head_dim_v == 72
    assert cfg.name == "bwd_f32_d64_m64_n64"
    assert cfg.replace(deterministic=True).name == "bwd_f32_d64_m64_n64_deterministic"
    with pytest.raises(fc.ArgumentError, match=r"^BackwardConfig: expected options among dtype"):
        cfg.replace(num_warps=4)
    with pytest.raises(fc.ConfigError, match="no GPU kernel"):
        fc.default_backward_config(64, "float16", "sm_80")


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (fc.default_backward_config(8, "float64"), "^cfg: dtype float64 does not fit .* float32"),
        (fc.default_backward_config(4, "float32"), "^cfg: head_dim 4 is smaller than the tensors' 8"),
        (fc.default_backward_config(8, "float32", head_dim_v=4), "^cfg: head_dim_v 4 is smaller"),
    ],
)  # fmt: skip
def test_configuration_that_does_not_fit(cfg: fc.BackwardConfig, says: str) -> None:
    """A configuration is for one dtype and a width."""
    a = good()
    a.cfg = cfg
    with pytest.raises(fc.ConfigError, match=says):
        call(a)


@pytest.mark.gpu
def test_gpu_tensors_are_refused() -> None:
    """There is no kernel yet: by name, with what to use instead."""
    a = good()
    a.arrays = {name: x.cuda() for name, x in a.arrays.items()}
    with pytest.raises(fc.UnsupportedError, match=r"^q: .*scaled_dot_product_attention"):
        call(a)


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
    cfg = fc.default_backward_config(8, "float32")
    expected = fc.backward(cfg, dout, q, k, v, out, lse)
    dq, dk, dv = (np.empty_like(x) for x in (q, k, v))
    foreign = [OnlyDlpack(x) for x in (q, k, v)]
    with pytest.raises(fc.ArgumentError, match=r"^dk: expected an array to write to.*OnlyDlpack"):
        fc.backward(cfg, dout, *foreign, out, lse, dq=dq)
    fc.backward(cfg, dout, *foreign, out, lse, dq=dq, dk=dk, dv=dv)
    for found, wanted in zip((dq, dk, dv), expected, strict=True):
        assert found.tobytes() == wanted.tobytes()
