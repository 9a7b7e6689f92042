"""What a call promises beside values: each test names the failure that it guards against, seen in
other libraries. Tests with `device` run on both backends.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import struct
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import pytest
from conftest import Runner
from optional_torch import torch

NAN = float("nan")
INF = float("inf")

both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def random_tensors(
    rng: np.random.Generator, device: str, *shapes: tuple[int, ...], dtype: str = "float16"
) -> list[torch.Tensor]:
    return [
        # Not from_numpy(...).to(...): NumPy gives empty arrays strides of 0, which `to` keeps.
        torch.empty(shape, dtype=getattr(torch, dtype), device=device).copy_(
            torch.from_numpy(rng.standard_normal(shape))
        )
        for shape in shapes
    ]


def qkv(
    rng: np.random.Generator,
    device: str,
    *,
    sq: int = 100,
    sk: int = 150,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 64,
    dtype: str = "float16",
) -> list[torch.Tensor]:
    kv = (batch, sk, kv_heads, d)
    return random_tensors(rng, device, (batch, sq, heads, d), kv, kv, dtype=dtype)


def problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False
) -> oracle.Problem:
    dtype = str(q.dtype).removeprefix("torch.")
    return oracle.Problem(*(oracle.to_numpy(x) for x in (q, k, v)), dtype, causal)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit. NaN is refused: equal NaN would hide that nothing was computed."""
    assert not a.isnan().any()
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def attend(*qkv: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return fc.flash_attention(*qkv, return_lse=True, **options)


# ---- offsets beyond 32 bits ----------------------------------------------------------------------

FAR = 2**31 + 8  # elements: two steps overflow 32 bits, signed after one and unsigned after two


def far_buffer(device: str) -> torch.Tensor:
    """More than 2^32 fp16 elements, of which next to none are ever touched."""
    elements = 2 * FAR + 4096
    if device == "cuda":
        if torch.cuda.mem_get_info()[0] < 3 * elements:
            pytest.skip("needs 13 GB of GPU memory")
        return torch.empty(elements, dtype=torch.float16, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        pages = mmap.mmap(-1, 2 * elements, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for 8.6 GB that are never touched: {error}")
    return torch.from_numpy(np.frombuffer(pages, np.float16))


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "seqlen", "heads"])
@pytest.mark.parametrize("far", ["q", "k", "v", "out"])
def test_offsets_beyond_32_bits(
    rng: np.random.Generator, device: str, dimension: int, far: str
) -> None:
    """Row, head and batch offsets are 64-bit, for each tensor alone."""
    shape = (3, 3, 3, 8)
    tensors = dict(zip("qkv", random_tensors(rng, device, shape, shape, shape), strict=True))
    tensors["out"] = torch.full_like(tensors["q"], NAN)
    expected, lse_expected = attend(*(tensors[x] for x in "qkv"), causal=True)

    strides = [24, 8]  # of the other two dimensions
    strides.insert(dimension, FAR)
    view = far_buffer(device).as_strided(shape, [*strides, 1], 64)
    tensors[far] = view.copy_(tensors[far])
    result, lse = fc.flash_attention(**tensors, causal=True, return_lse=True)
    assert result is tensors["out"]
    assert same_bits(result, expected)
    assert same_bits(lse, lse_expected)


# ---- many batches and heads ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [65_535, 65_536, 65_537])
@pytest.mark.parametrize("kind", ["batch", "heads", "both"])
def test_many_batches_and_heads(
    rng: np.random.Generator, device: str, count: int, kind: str
) -> None:
    """A grid's y and z end at 65,535: beyond it others raise, or silently compute nothing."""
    heads = {"batch": 1, "heads": count, "both": 3}[kind]
    batch = {"batch": count, "heads": 1, "both": count // 3 + 1}[kind]
    q, k, v = qkv(rng, device, sq=2, sk=3, batch=batch, heads=heads, kv_heads=1, d=8)
    out = torch.full_like(q, NAN)
    _, lse = fc.flash_attention(q, k, v, causal=True, out=out, return_lse=True)
    oracle.assert_accurate(problem(q, k, v, causal=True), out, lse)


# ---- rows that see no key ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    ("sq", "sk", "causal"),
    [(5, 0, False), (5, 0, True), (300, 0, True), (20, 3, True), (600, 5, True), (700, 257, True)],
)
def test_rows_without_keys(
    rng: np.random.Generator, device: str, dtype: str, sq: int, sk: int, causal: bool
) -> None:
    """out is exactly 0 and LSE exactly -inf, also where whole tiles are empty; the other rows
    are right."""
    if device == "cuda" and dtype == "float64":
        pytest.skip("no GPU kernel")
    q, k, v = qkv(rng, device, sq=sq, sk=sk, dtype=dtype)
    out, lse = attend(q, k, v, causal=causal)
    empty = sq - sk if causal else sq
    assert (out[:, :empty] == 0).all()
    assert (lse[:, :, :empty] == -INF).all()
    assert torch.isfinite(lse[:, :, empty:]).all()
    oracle.assert_accurate(problem(q, k, v, causal), out, lse)


# ---- NaN and infinity ----------------------------------------------------------------------------


def rows_of_key(sq: int, sk: int, j: int, causal: bool) -> torch.Tensor:
    return torch.from_numpy(oracle.visible(sq, sk, causal)[:, j].copy())


@both_masks
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("row", [0, 77, 99])
def test_bad_query_poisons_its_row(
    rng: np.random.Generator, device: str, causal: bool, value: float, row: int
) -> None:
    """NaN or infinity in a query: its row, of its head, is NaN in out and LSE; every other is
    untouched."""
    q, k, v = qkv(rng, device)
    clean, clean_lse = attend(q, k, v, causal=causal)
    q[1, row, 2, 5] = value
    out, lse = attend(q, k, v, causal=causal)
    # Keys of both signs at d = 5: scores of +inf and -inf, so the maximum is +inf and inf - inf is
    # NaN.
    assert out[1, row, 2].isnan().all()
    assert not torch.isfinite(lse[1, 2, row])
    out[1, row, 2] = clean[1, row, 2]
    lse[1, 2, row] = clean_lse[1, 2, row]
    assert same_bits(out, clean)
    assert same_bits(lse, clean_lse)


@both_masks
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("j", [0, 60, 149])
def test_bad_key_poisons_the_rows_that_see_it(
    rng: np.random.Generator, device: str, causal: bool, value: float, j: int
) -> None:
    """NaN or a score of +inf: NaN in out, not finite in LSE, in exactly the rows that see the
    key."""
    q, k, v = qkv(rng, device)
    q[..., 3] = q[..., 3].abs() + 0.5  # the score of the infinite key is +inf
    clean, clean_lse = attend(q, k, v, causal=causal)
    k[1, j, 1, 3] = value  # key head 1 serves query heads 2 and 3
    out, lse = attend(q, k, v, causal=causal)
    seen = rows_of_key(100, 150, j, causal).to(device)
    bad = torch.zeros(out.shape[:3], dtype=torch.bool, device=device)
    bad[1, :, 2:] = seen[:, None]
    assert torch.equal(out.isnan().all(dim=-1), bad)
    assert torch.equal(out.isnan().any(dim=-1), bad)
    assert torch.equal(~torch.isfinite(lse), bad.transpose(1, 2))
    assert same_bits(out[~bad], clean[~bad])
    assert same_bits(lse[~bad.transpose(1, 2)], clean_lse[~bad.transpose(1, 2)])


@both_masks
def test_key_with_score_minus_infinity_counts_nothing(
    rng: np.random.Generator, device: str, causal: bool
) -> None:
    """exp(-inf) is 0: the key is as if it were not there, and nothing becomes NaN."""
    q, k, v = qkv(rng, device, sq=33, sk=34)
    q[..., 3] = q[..., 3].abs() + 0.5
    k[:, 33, :, 3] = -INF  # only the last row sees it under the causal mask
    out, lse = attend(q, k, v, causal=causal)
    without, lse_without = attend(q, k[:, :33], v[:, :33], causal=False)
    rows = slice(32, 33) if causal else slice(None)
    oracle.assert_close(out[:, rows], oracle.to_numpy(without[:, rows]), 2.0**-10, "out")
    oracle.assert_close(lse[:, :, rows], oracle.to_numpy(lse_without[:, :, rows]), 1e-5, "lse")
    assert torch.isfinite(out).all()


@both_masks
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("j", [0, 60, 149])
def test_bad_value_poisons_the_rows_that_see_it(
    rng: np.random.Generator, device: str, causal: bool, value: float, j: int
) -> None:
    """NaN or infinity in v reaches one column of exactly the rows that see it: p * inf is inf,
    and a masked 0 * NaN is never computed. LSE does not depend on v."""
    q, k, v = qkv(rng, device)
    clean, clean_lse = attend(q, k, v, causal=causal)
    v[1, j, 1, 7] = value
    out, lse = attend(q, k, v, causal=causal)
    expected = clean.clone()
    seen = rows_of_key(100, 150, j, causal).to(device)
    expected[1, :, 2:, 7] = torch.where(seen[:, None], value, expected[1, :, 2:, 7])
    bad = expected.isnan()
    assert torch.equal(out.isnan(), bad), f"{int((out.isnan() & ~bad).sum())} elements too many"
    assert same_bits(out[~bad], expected[~bad])
    assert same_bits(lse, clean_lse)


# ---- what lies beyond ----------------------------------------------------------------------------


@both_masks
@pytest.mark.parametrize("d", [8, 40, 64])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (70, 90), (64, 128), (129, 257)])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_poison_beyond_the_tensor_does_not_leak(
    rng: np.random.Generator, device: str, causal: bool, d: int, sq: int, sk: int, poison: float
) -> None:
    """Tensors are cut out of larger memory that is NaN before, between and after them, in every
    dimension: nothing of it is multiplied, not even by 0, and nothing is written there."""
    tensors = qkv(rng, device, sq=sq, sk=sk, d=d)
    clean, clean_lse = attend(*tensors, causal=causal)

    def cut_out(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b, s, h, _ = x.shape
        larger = torch.full((b + 2, s + 300, h + 2, d + 64), poison, dtype=x.dtype, device=device)
        return larger, larger[1 : b + 1, 7 : s + 7, 1 : h + 1, 24 : d + 24]

    views = [cut_out(x)[1].copy_(x) for x in tensors]
    memory, out = cut_out(tensors[0])
    out.fill_(NAN)
    _, lse = attend(*views, causal=causal, out=out)
    assert same_bits(out, clean)
    assert same_bits(lse, clean_lse)
    out.fill_(poison)
    untouched = memory.isnan() if poison != poison else memory == poison
    assert untouched.all(), "something beside out was written"


@pytest.mark.parametrize("which", ["k", "v"])
def test_poison_in_masked_keys_does_not_leak(
    rng: np.random.Generator, device: str, which: str
) -> None:
    """Row i of a causal call is right whatever keys and values from i + 1 on hold, at every
    place of the diagonal in a tile: in each run everything after one row is NaN."""
    length = 150
    q, k, v = qkv(rng, device, sq=length, sk=length)
    clean, clean_lse = attend(q, k, v, causal=True)
    for i in (0, 1, 14, 15, 16, 31, 63, 64, 127, 128, 148):
        poisoned = {"k": k.clone(), "v": v.clone()}
        poisoned[which][:, i + 1 :] = NAN
        out, lse = attend(q, poisoned["k"], poisoned["v"], causal=True)
        leaked = out[:, : i + 1].isnan().any(dim=-1).sum()
        assert leaked == 0, f"NaN after row {i} leaks into {int(leaked)} rows that do not see it"
        assert same_bits(out[:, : i + 1], clean[:, : i + 1])
        assert same_bits(lse[:, :, : i + 1], clean_lse[:, :, : i + 1])


# ---- nothing to do -------------------------------------------------------------------------------


@both_masks
@pytest.mark.parametrize(
    ("batch", "sq", "sk", "heads"),
    [(0, 4, 4, 2), (2, 0, 4, 2), (2, 4, 0, 2), (2, 0, 0, 2), (2, 4, 4, 0), (0, 0, 0, 0)],
)
@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
def test_zero_sizes(
    device: str,
    causal: bool,
    batch: int,
    sq: int,
    sk: int,
    heads: int,
    library: str,
    return_lse: bool,
) -> None:
    """No batch, no queries, no keys, no heads: legal, and the shapes are right."""
    shapes = [(batch, sq, heads, 8), (batch, sk, heads, 8), (batch, sk, heads, 8)]
    if library == "numpy":
        if device == "cuda":
            pytest.skip("NumPy is on the CPU")
        tensors = [np.ones(shape, np.float16) for shape in shapes]
    else:
        tensors = [torch.ones(shape, dtype=torch.float16, device=device) for shape in shapes]
    result = fc.flash_attention(*tensors, causal=causal, return_lse=return_lse)
    out, lse = result if return_lse else (result, None)
    assert tuple(out.shape) == shapes[0]
    assert lse is None or tuple(lse.shape) == (batch, heads, sq)
    expected = 0.0 if sk == 0 else 1.0
    assert (out == expected).all()


# ---- strides -------------------------------------------------------------------------------------


@both_masks
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3), id="permuted"
        ),
        pytest.param(lambda x: x.transpose(0, 2).contiguous().transpose(0, 2), id="transposed"),
        pytest.param(lambda x: x.repeat_interleave(2, 1)[:, ::2], id="every other row"),
        pytest.param(lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]], id="packed heads"),
        pytest.param(lambda x: torch.cat([x, x], 3)[..., x.shape[3] :], id="packed head dim"),
    ],
)
def test_strided_tensors_equal_contiguous_ones(
    rng: np.random.Generator, device: str, causal: bool, change: Callable
) -> None:
    """Each tensor alone, and out, in another order or with gaps: the same bits."""
    tensors = dict(zip("qkv", qkv(rng, device), strict=True))
    expected, lse_expected = attend(*tensors.values(), causal=causal)
    tensors["out"] = torch.full_like(tensors["q"], NAN)
    for name in tensors:
        changed = {**tensors, name: change(tensors[name])}
        assert not changed[name].is_contiguous()
        assert name == "out" or torch.equal(changed[name], tensors[name])
        out, lse = fc.flash_attention(**changed, causal=causal, return_lse=True)
        assert same_bits(out, expected), name
        assert same_bits(lse, lse_expected), name


@both_masks
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "seqlen", "heads"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_expanded_tensors_equal_contiguous_ones(
    rng: np.random.Generator, device: str, causal: bool, dimension: int, name: str
) -> None:
    """A stride of 0 repeats: the same bits as a copy."""
    tensors = dict(zip("qkv", qkv(rng, device), strict=True))
    one = tensors[name].narrow(dimension, 0, 1)
    expanded = one.expand_as(tensors[name])
    assert expanded.stride(dimension) == 0
    out, lse = attend(*{**tensors, name: expanded}.values(), causal=causal)
    expected, lse_expected = attend(
        *{**tensors, name: expanded.contiguous()}.values(), causal=causal
    )
    assert same_bits(out, expected)
    assert same_bits(lse, lse_expected)


def test_negative_strides(rng: np.random.Generator) -> None:
    """NumPy has them: reversed views are read and written in their own order."""
    q, k, v = (rng.standard_normal((2, 9, 2, 8)).astype(np.float32) for _ in range(3))
    expected = fc.flash_attention(q[:, ::-1].copy(), k[:, :, ::-1].copy(), v[::-1].copy())
    memory = np.full_like(q, np.nan)
    fc.flash_attention(q[:, ::-1], k[:, :, ::-1], v[::-1], out=memory[::-1])
    assert memory[::-1].tobytes() == expected.tobytes()


def test_strides_of_dimensions_of_size_one_do_not_matter(
    rng: np.random.Generator, device: str
) -> None:
    """A dimension that is never stepped over may have any stride, odd ones included."""
    q, k, v = qkv(rng, device, batch=1, heads=1, kv_heads=1, sq=1, sk=40)
    expected, _ = attend(q, k, v)
    odd = q.as_strided(q.shape, (3, 5, 7, 1))
    out, _ = attend(odd, k.as_strided(k.shape, (1, 64, 13, 1)), v)
    assert same_bits(out, expected)


def test_negated_views_are_not_misread() -> None:
    """torch keeps "negated" as a flag beside the data: it is honoured or refused, never
    overlooked."""
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    negated = torch._neg_view(q)
    expected = fc.flash_attention(-q, k, v)
    try:
        out = fc.flash_attention(negated, k, v)
    except fc.FlashcuteError as error:
        assert str(error).startswith("q: ")  # noqa: PT017
    else:
        assert same_bits(out, expected)


class EarlierNumPy(np.ndarray):
    """Exports itself as NumPy before 2.1 does, whose DLPack cannot say that an array is read-only."""

    def __dlpack__(self, *, stream: None = None) -> object:
        if not self.flags.writeable:
            raise BufferError(
                "Cannot export readonly array since signalling readonly is unsupported by DLPack."
            )
        return super().__dlpack__(stream=stream)


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.view()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("kind", [np.ndarray, EarlierNumPy])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_read_only_numpy_arrays(rng: np.random.Generator, kind: type, dtype: str) -> None:
    """np.load(mmap_mode="r"), frombuffer and broadcast_to give read-only arrays: refused with NumPy before 2.1."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k, v = (rng.standard_normal((2, 9, 2, 8)).astype(dtype).view(kind) for _ in range(3))
    k[1] = k[0]
    expected = fc.flash_attention(q, k[:, ::-1], v)
    out = np.empty_like(q)
    k_once = np.broadcast_to(k[:1], k.shape, subok=True)
    fc.flash_attention(read_only(q), k_once[:, ::-1], read_only(v), out=out)
    assert out.tobytes() == expected.tobytes()
    with pytest.raises(
        fc.ArgumentError, match=r"^out: expected a writable tensor, got a read-only"
    ):
        fc.flash_attention(q, k, v, out=read_only(out))
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.astype(">f4"), "byte order"),
        (lambda x: x.astype(np.longdouble), "expected dtype"),
        (lambda x: np.repeat(x, 2, -1)[..., ::2], "last stride|last dimension"),
        (
            lambda x: np.lib.stride_tricks.as_strided(x, x.shape, (*x.strides[:-1], 6)),
            "strides that are multiples|strides must be|multiple of itemsize",
        ),
    ],
    ids=["big-endian", "longdouble", "every other element", "strides of bytes"],
)
@pytest.mark.parametrize("kind", [np.ndarray, EarlierNumPy])
def test_read_only_numpy_arrays_that_no_kernel_takes(
    rng: np.random.Generator, kind: type, change: Callable, says: str
) -> None:
    """Taken at face value on the way round DLPack, which knows what it cannot describe."""
    q = rng.standard_normal((2, 9, 2, 8)).astype(np.float32).view(kind)
    with pytest.raises(fc.ArgumentError, match=f"^k: .*({says})"):
        fc.forward(fc.default_config(8, "float32", "cpu"), q, read_only(change(q)), q)


def test_types_of_arrays_are_not_kept_alive() -> None:
    """What is remembered of an array's type held the type for ever."""
    kind = type("Array", (np.ndarray,), {})
    q = np.ones((1, 2, 1, 8), np.float32)
    fc._core.check_problem(q.view(kind), q, q, fc._call.Options())
    gone = weakref.ref(kind)
    del kind
    gc.collect()
    assert gone() is None


def test_types_of_arrays_that_are_gone_are_forgotten() -> None:
    """An entry that stayed for every class of arrays until another class got its address."""
    q = np.ones((1, 2, 1, 8), np.float32)

    def dead_references_after(count: int) -> int:
        kinds = [type("Array", (np.ndarray,), {}) for _ in range(count)]
        for kind in kinds:
            fc._core.check_problem(q.view(kind), q, q, fc._call.Options())
        del kind, kinds
        gc.collect()
        another = type("Array", (np.ndarray,), {})
        fc._core.check_problem(q.view(another), q, q, fc._call.Options())
        return sum(type(x) is weakref.ref and x() is None for x in gc.get_objects())

    before = dead_references_after(1)
    assert dead_references_after(100) < before + 50


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def arrays_of_library(stream: int) -> type:
    """A class of arrays on a GPU that there need not be, with DLPack's exchange table; `stream` is their current one.
    https://dmlc.github.io/dlpack/latest/c_api.html"""

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
    def describe(array: Any, to: Any) -> int:
        array.memory = (ctypes.c_int64 * len(array.shape))(*array.shape)
        code = {"int32": 0, "float16": 2, "float32": 2}[array.dtype]
        shape = ctypes.cast(array.memory, ctypes.POINTER(ctypes.c_int64))
        bits = int(array.dtype[-2:])
        to[0] = DLTensor(1 << 20, 2, 0, len(array.shape), code, bits, 1, shape, None, 0)
        return 0

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
    def current_stream(device_type: int, device_index: int, to: Any) -> int:
        to[0] = stream
        return 0

    functions = (ctypes.cast(f, ctypes.c_void_p).value for f in (describe, current_stream))
    table = (ctypes.c_uint64 * 7)(1 | 3 << 32, 0, 0, 0, 0, *functions)  # version 1.3
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
    capsule = new_capsule(ctypes.addressof(table), b"dlpack_exchange_api", None)

    class Array:
        __dlpack_c_exchange_api__ = capsule
        alive = describe, current_stream, table

        def __init__(self, dtype: str, *shape: int) -> None:
            self.dtype, self.shape = dtype, shape

    return Array


@pytest.mark.parametrize("name", ["k", "v", "out", "lse", "block_counts"])
def test_arrays_whose_library_works_on_another_stream_are_refused(name: str) -> None:
    """Nothing orders that library's work on the array before the kernel; lse and block_counts were not
    looked at."""
    here, there = arrays_of_library(5), arrays_of_library(7)
    shapes = {
        "q": ("float16", 1, 2, 1, 8),
        "k": ("float16", 1, 2, 1, 8),
        "v": ("float16", 1, 2, 1, 8),
        "out": ("float16", 1, 2, 1, 8),
        "lse": ("float32", 1, 1, 2),
        "block_counts": ("int32", 1, 1, 1, 3),
    }
    arrays = [(there if n == name else here)(*shape) for n, shape in shapes.items()]
    with pytest.raises(fc.ArgumentError, match=f"^{name}: .*works on q's stream"):
        fc._core.forward(None, *arrays, fc._call.Options())


# ---- alignment -----------------------------------------------------------------------------------


def off_by_one(x: torch.Tensor) -> torch.Tensor:
    memory = torch.full((x.numel() + 16,), NAN, dtype=x.dtype, device=x.device)
    return memory[1 : 1 + x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_misaligned_base_on_the_cpu(rng: np.random.Generator, dtype: str) -> None:
    """One element past an aligned address: right, without a copy."""
    q, k, v = qkv(rng, "cpu", dtype=dtype)
    expected, lse_expected = attend(q, k, v, causal=True)
    out, lse = attend(*map(off_by_one, (q, k, v)), causal=True, out=off_by_one(q).fill_(NAN))
    assert same_bits(out, expected)
    assert same_bits(lse, lse_expected)


def narrow_configurations() -> list[fc.ForwardConfig]:
    """What flash_attention takes on a GPU for a few rows whose head dim is no multiple of 8."""
    found = []
    for head_dim in sorted({cfg.head_dim for cfg in fc.configs()}):
        of_bucket = [
            c for c in fc.configs()
            if c.dtype == "float16" and c.head_dim == head_dim and c.math == "tensor_core"
        ]  # fmt: skip
        smallest = min(of_bucket, key=lambda cfg: cfg.block_m)
        found += [smallest.replace(copy_bytes=n, async_copy=n >= 4) for n in (8, 4, 2)]
    return found


def mma_sync_config(q: torch.Tensor) -> fc.ForwardConfig:
    """The default for GPUs like this one without Hopper's kernel, whose bits are others."""
    arch = fc._core.driver_info().gpus[0].arch
    return fc.default_config(q.shape[-1], q.dtype, 100 if arch == 90 else arch)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.compiles(narrow_configurations())
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize("kind", ["base", "stride"])
def test_misalignment_on_the_gpu(
    rng: np.random.Generator, prebuilt: None, name: str, kind: str
) -> None:
    """A 16-byte load from elsewhere is a fault that kills the context. A configuration that makes
    such loads is refused before anything is launched; flash_attention takes one that does not,
    says so, and gives the same bits."""
    tensors = dict(zip("qkv", qkv(rng, "cuda"), strict=True))
    aligned = mma_sync_config(tensors["q"])
    expected = fc.forward(aligned, **tensors, causal=True)
    tensors["out"] = torch.full_like(tensors["q"], 7)
    x = tensors[name]
    if kind == "base":
        tensors[name] = off_by_one(x)
        what, copy_bytes = "address is 2 bytes past a multiple of 16", 2
    else:
        wider = torch.full((*x.shape[:3], x.shape[3] + 4), 7, dtype=x.dtype, device="cuda")
        tensors[name] = wider[..., : x.shape[3]].copy_(x)
        what, copy_bytes = "stride .* is not a multiple of 8 elements", 8
    q, k, v = (tensors[n] for n in "qkv")
    usual = fc.default_config(q.shape[-1], "float16", fc._core.driver_info().gpus[0].arch)
    for cfg in (aligned, usual):
        with pytest.raises(
            fc.ConfigError,
            match=rf"^cfg: copy_bytes 16 .*{name}'s .*{what}.*copy_bytes={copy_bytes}",
        ):
            fc.forward(cfg, q, k, v, out=tensors["out"])
    torch.cuda.synchronize()
    assert (tensors["out"] == 7).all()
    assert same_bits(fc.flash_attention(**tensors, causal=True), expected)
    if name != "out":
        told = fc.explain(q, k, v, causal=True)
        assert told.config.copy_bytes == copy_bytes
        assert name + "'s" in dict(told.rejected)["copy_bytes=16"]


# ---- the same row, the same bits -----------------------------------------------------------------


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


# ---- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.gpu
def test_graph_replay_with_changed_inputs(rng: np.random.Generator) -> None:
    """A captured call does its work again on what the tensors hold then; outputs come from the
    graph's pool."""
    q, k, v = qkv(rng, "cuda", sq=200, sk=300)
    attend(q, k, v, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(q, k, v, causal=True)
    for _ in range(3):
        for x, new in zip((q, k, v), qkv(rng, "cuda", sq=200, sk=300), strict=True):
            x.copy_(new)
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        oracle.assert_accurate(problem(q, k, v, causal=True), out, lse)


@pytest.mark.gpu
def test_first_call_inside_a_capture(fresh: Runner) -> None:
    """Loading a kernel synchronises, which a capture forbids: it must be done aside. In a
    fresh process, where no kernel has been loaded, and in the strictest capture mode."""
    fresh("""
        import torch, flashcute as fc
        q, k, v = (torch.randn(2, 200, 4, 64, dtype=torch.float16, device="cuda") for _ in range(3))
        out = torch.full_like(q, float("nan"))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            fc.flash_attention(q, k, v, causal=True, out=out)
        assert out.isnan().all(), "it ran instead of being captured"
        for _ in range(2):
            q.copy_(torch.randn_like(q))
            graph.replay()
            captured = out.clone()
            out.fill_(float("nan"))
            assert torch.equal(captured, fc.flash_attention(q, k, v, causal=True))
    """)


# ---- streams -------------------------------------------------------------------------------------

SPIN = 200_000_000  # clock cycles: about a tenth of a second


class BusyStream:
    """A side stream that computes for a while before it fills q, k, v, which hold 0 until then."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.final = qkv(rng, "cuda", sq=200, sk=300)
        self.now = [torch.zeros_like(x) for x in self.final]
        self.expected, self.lse = attend(
            *self.final, causal=True
        )  # the kernel is loaded from here on
        self.stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(SPIN)
            for x, final in zip(self.now, self.final, strict=True):
                x.copy_(final)

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        assert not self.stream.query(), "the call waited for the GPU, or the spin was too short"
        self.stream.synchronize()
        assert same_bits(out, self.expected)
        assert same_bits(lse, self.lse)


@pytest.mark.gpu
def test_current_stream_is_used(rng: np.random.Generator) -> None:
    """The inputs are produced on the current side stream: the kernel waits for them, the host
    does not."""
    busy = BusyStream(rng)
    with torch.cuda.stream(busy.stream):
        out, lse = attend(*busy.now, causal=True)
    busy.check(out, lse)


class WithProtocol:
    """A stream of some other library."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spelled",
    [
        pytest.param(lambda s: s, id="torch Stream"),
        pytest.param(lambda s: torch.cuda.ExternalStream(s.cuda_stream), id="ExternalStream"),
        pytest.param(lambda s: s.cuda_stream, id="address"),
        pytest.param(WithProtocol, id="__cuda_stream__"),
    ],
)
def test_stream_argument(rng: np.random.Generator, spelled: Callable) -> None:
    """stream= is where the kernel runs, though another stream is current."""
    busy = BusyStream(rng)
    out, lse = attend(*busy.now, causal=True, stream=spelled(busy.stream))
    busy.check(out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [0, "default"])
def test_default_stream_by_name(rng: np.random.Generator, stream: object) -> None:
    """The default stream's address is 0, which is not "none given"."""
    q, k, v = qkv(rng, "cuda")
    expected, _ = attend(q, k, v)
    if stream == "default":
        stream = torch.cuda.default_stream()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN)
        out, _ = attend(q, k, v, stream=stream)
    torch.cuda.default_stream().synchronize()
    assert not side.query(), "it ran behind the spin, on the side stream"
    assert same_bits(out, expected)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_memory_in_use_on_another_stream_is_not_given_away(rng: np.random.Generator) -> None:
    """Inputs that are freed right after the call must not be reused while the kernel still waits
    for its stream: torch is told that the stream uses them."""
    q, k, v = qkv(rng, "cuda", sq=1000, sk=1000)
    expected, _ = attend(q, k, v)
    shapes = [q.shape, k.shape, v.shape]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN)
    out = fc.flash_attention(q, k, v, stream=side)
    del q, k, v
    garbage = [torch.full(s, NAN, dtype=torch.float16, device="cuda") for s in 4 * shapes]
    torch.cuda.default_stream().synchronize()
    assert not side.query(), "the spin was too short"
    side.synchronize()
    assert same_bits(out, expected)
    del garbage


@pytest.mark.gpu
def test_cupy_streams(rng: np.random.Generator) -> None:
    """CuPy's current stream is used; another one is refused, because CuPy cannot be told of it
    ."""
    cupy = pytest.importorskip("cupy")
    q, k, v = (cupy.asarray(x.cpu().numpy()) for x in qkv(rng, "cuda", sq=200, sk=300))
    expected = fc.flash_attention(q, k, v)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    sentinel = cupy.full_like(q, 7)
    with pytest.raises(fc.ArgumentError, match=r"^stream: expected the current stream .*, got \d+"):
        fc.flash_attention(q, k, v, out=sentinel, stream=stream)
    cupy.cuda.Device().synchronize()
    assert bool((sentinel == 7).all())
    with stream:
        mine = fc.flash_attention(q, k, v)
        named = fc.flash_attention(q, k, v, stream=stream)
    stream.synchronize()
    for out in (mine, named):
        assert not bool(cupy.isnan(out).any())
        assert out.tobytes() == expected.tobytes()


# ---- devices -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k", "v", "out"])
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_mixed_devices_raise(rng: np.random.Generator, name: str, first: str) -> None:
    """A tensor elsewhere is named, with both devices, before anything runs."""
    other = {"cpu": "cuda", "cuda": "cpu"}[first]
    tensors = dict(zip("qkv", qkv(rng, first), strict=True))
    tensors["out"] = torch.full_like(tensors["q"], 7)
    tensors[name] = tensors[name].to(other)
    spelled = {"cpu": "cpu", "cuda": "cuda:0"}
    message = rf"^{name}: expected device {spelled[first]} as in q, got {spelled[other]}"
    with pytest.raises(fc.ArgumentError, match=message):
        fc.flash_attention(**tensors)
    torch.cuda.synchronize()
    assert (tensors["out"] == 7).all()


@pytest.mark.gpu
def test_tensors_on_another_gpu_than_the_current_one(rng: np.random.Generator) -> None:
    """cuda:0 is current, the tensors are on cuda:1: it runs there, and cuda:0 stays current
    ."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here = qkv(rng, "cuda:0")
    there = [x.to("cuda:1") for x in here]
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.device(0):
        expected, _ = attend(*here)
        out, lse = attend(*there)
        assert torch.cuda.current_device() == 0
        with pytest.raises(
            fc.ArgumentError, match=r"^k: expected device cuda:0 as in q, got cuda:1"
        ):
            fc.flash_attention(here[0], there[1], here[2])
    assert out.device == lse.device == torch.device("cuda:1")
    torch.cuda.synchronize("cuda:1")
    assert same_bits(out.to("cuda:0"), expected)


# ---- threads -------------------------------------------------------------------------------------


def test_threads_on_the_cpu_start_together(fresh: Runner) -> None:
    """Eight threads make the first calls of a process at once, on several configurations."""
    fresh("""
        import threading, numpy as np, flashcute as fc
        rng = np.random.default_rng(0)
        jobs = []
        for n in range(8):
            dtype = ["float16", "float32", "float64"][n % 3]
            q, k, v = (rng.standard_normal((2, 300, 4, 8 + n)).astype(dtype) for _ in range(3))
            jobs.append((q, k, v, dict(causal=n % 2 == 0, return_lse=True)))
        results = [[] for _ in jobs]
        barrier = threading.Barrier(len(jobs))

        def work(n):
            *qkv, options = jobs[n]
            barrier.wait()
            for _ in range(20):
                results[n].append(fc.flash_attention(*qkv, **options))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
        for t in threads: t.start()
        for t in threads: t.join()
        for (*qkv, options), found in zip(jobs, results):
            out, lse = fc.flash_attention(*qkv, **options)
            assert np.isfinite(out).all()
            assert len(found) == 20
            for o, l in found:
                assert o.tobytes() == out.tobytes() and l.tobytes() == lse.tobytes()
    """)


@pytest.mark.gpu
def test_threads_on_the_gpu_start_together(fresh: Runner) -> None:
    """Eight threads launch four kernels for the first time at once, each on a stream of its own
    ."""
    fresh("""
        import threading, torch, flashcute as fc
        torch.manual_seed(0)
        jobs = []
        for n in range(8):
            dtype = [torch.float16, torch.bfloat16][n % 2]
            d = [64, 128][n // 2 % 2]
            q, k, v = (torch.randn(2, 500, 4, d, dtype=dtype, device="cuda") for _ in range(3))
            jobs.append((q, k, v, n // 4 == 0))
        torch.cuda.synchronize()
        results = [[] for _ in jobs]
        barrier = threading.Barrier(len(jobs))

        def work(n):
            q, k, v, causal = jobs[n]
            stream = torch.cuda.Stream()
            barrier.wait()
            with torch.cuda.stream(stream):
                for _ in range(20):
                    results[n].append(fc.flash_attention(q, k, v, causal))
            stream.synchronize()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
        for t in threads: t.start()
        for t in threads: t.join()
        for (q, k, v, causal), found in zip(jobs, results):
            expected = fc.flash_attention(q, k, v, causal)
            assert torch.isfinite(expected).all()
            assert len(found) == 20
            for out in found:
                assert torch.equal(out, expected)
    """)


def test_the_gil_is_released(rng: np.random.Generator) -> None:
    """Other Python threads run during a long call; none of them waits for its end."""
    q, k, v = qkv(rng, "cpu", sq=2000, sk=2000, dtype="float32")
    running = threading.Event()
    done = threading.Event()

    def call() -> None:
        running.set()
        fc.flash_attention(q, k, v)
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    running.wait()
    turns = 0
    while not done.is_set():
        turns += 1
        done.wait(0.001)
    thread.join()
    assert turns > 3, "this thread had no turn while the other one computed"


# ---- import and fork -----------------------------------------------------------------------------


def test_import_opens_no_cuda_library_and_survives_fork(fresh: Runner) -> None:
    """Import maps neither libcuda nor NVRTC; the thread pool works before a fork, after it in
    both processes, and in a grandchild."""
    fresh("""
        import os, signal, numpy as np
        import flashcute as fc

        def mapped():
            return [l for l in open("/proc/self/maps") if "libcuda" in l or "nvrtc" in l]

        def use():
            q = np.random.default_rng(0).standard_normal((2, 600, 4, 16)).astype(np.float32)
            return fc.flash_attention(q, q, q, causal=True).tobytes()

        assert not mapped(), mapped()
        before = use()
        assert not mapped(), "the CPU backend needs no CUDA library"

        def child(depth):
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)  # a child that hangs dies
                ok = use() == before and (depth == 0 or child(depth - 1) == 0)
                os._exit(0 if ok else 1)
            return os.waitpid(pid, 0)[1]

        for _ in range(3):
            assert child(1) == 0
        assert use() == before
    """)


@pytest.mark.gpu
def test_fork_after_import_then_cuda_in_both(fresh: Runner) -> None:
    """CUDA cannot be used in a child if it was initialised before the fork: import does not
    ."""
    fresh("""
        import os, signal, numpy as np, torch
        import flashcute as fc
        x = np.ones((1, 300, 2, 16), np.float32)
        fc.flash_attention(x, x, x)
        fc.default_config(64, arch="sm_90"), fc.configs()

        def use():
            q = torch.ones(1, 200, 2, 64, dtype=torch.float16, device="cuda")
            assert bool((fc.flash_attention(q, q, q) == 1).all())

        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            use()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        use()
    """)


# ---- no silent road to S x S memory --------------------------------------------------------------


def test_memory_on_the_cpu_grows_with_the_length_only(fresh: Runner) -> None:
    """The score matrix of this call would have 268 million elements; the process grows by far
    less."""
    fresh("""
        import resource, numpy as np, flashcute as fc
        S = 16384
        q, k, v = (np.ones((1, S, 1, 8), np.float16) for _ in range(3))
        fc.flash_attention(q[:, :300], k[:, :300], v[:, :300], return_lse=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out, lse = fc.flash_attention(q, k, v, return_lse=True)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert (out == 1).all()
        assert grown < S * S // 16, f"{grown / 1e6} MB"
    """)


@pytest.mark.gpu
def test_memory_on_the_gpu_is_that_of_the_results() -> None:
    """torch's allocator gives memory for out and LSE, and nobody takes any beside it."""
    length = 32768
    q, k, v = (torch.ones(1, length, 1, 64, dtype=torch.float16, device="cuda") for _ in range(3))
    attend(q, k, v, causal=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    out, lse = attend(q, k, v, causal=True)
    torch.cuda.synchronize()
    results = out.numel() * 2 + lse.numel() * 4
    assert torch.cuda.max_memory_allocated() - before <= results + 4096
    assert free - torch.cuda.mem_get_info()[0] < length * length // 16


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
        assert told.kernel == f"flashcute_{told.backend}_{told.config.name}_causal"
        assert told.image.startswith(("ahead of time", "run-time compilation"))
    others = {c.name for c in fc.configs()} - {told.config.name}
    assert others <= dict(told.rejected).keys()
    assert all(reason for _, reason in told.rejected)
    # The explained configuration is the one that runs: the same bits.
    assert same_bits(attend(q, k, v)[0], fc.forward(told.config, q, k, v))


@pytest.mark.gpu
def test_what_no_gpu_kernel_covers_raises() -> None:
    """No silent fallback, no silent no-op: it raises and says what to use, and explain agrees
    ."""
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


# ---- debug mode ----------------------------------------------------------------------------------


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


def expected_block_counts(
    cfg: fc.ForwardConfig, sq: int, sk: int, causal: bool, diagonal: int | None = None
) -> torch.Tensor:
    """By brute force: (tiles, 3)."""
    seen = oracle.visible(sq, sk, causal, diagonal)
    expected = []
    rows = cfg.block_m * cfg.cluster
    first = -(-sq // rows) * rows - sq if cfg.kernel == "sm90" else 0  # rows that the first lacks
    for row in range(-first, sq, rows):
        blocks = [
            seen[max(row, 0) : row + rows, key : key + cfg.block_n]
            for key in range(0, sk, cfg.block_n)
        ]
        whole = sum(bool(b.all()) and b.shape[1] == cfg.block_n for b in blocks)
        partial = sum(bool(b.any()) for b in blocks) - whole
        expected.append([whole, partial, len(blocks) - whole - partial])
    return torch.tensor(expected, dtype=torch.int32).reshape(-1, 3)


# ---- what the extension is linked to -------------------------------------------------------------


def needed_libraries(path: str) -> list[str]:
    """DT_NEEDED of a 64-bit little-endian ELF file."""
    data = Path(path).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * size) for i in range(count)]
    dynamic = next(h for h in headers if h[1] == 6)
    strings = headers[dynamic[6]][4]
    names = []
    for at in range(dynamic[4], dynamic[4] + dynamic[5], 16):
        tag, value = struct.unpack_from("<QQ", data, at)
        if tag == 1:
            start = strings + value
            names.append(data[start : data.index(b"\0", start)].decode())
    return names


def test_the_extension_links_neither_torch_nor_cuda() -> None:
    """It is opened where none of them is installed, and with any version of torch."""
    names = needed_libraries(fc._core.__file__)
    assert any(name.startswith("libc.so") for name in names), names
    allowed = (
        "libc.",
        "libm.",
        "libstdc++.",
        "libgcc_s.",
        "libpthread.",
        "libdl.",
        "librt.",
        "ld-linux",
    )
    assert [name for name in names if not name.startswith(allowed)] == []
    ctypes.CDLL(fc._core.__file__, mode=ctypes.RTLD_LOCAL | 2)  # RTLD_NOW: every symbol resolves


# ---- a launch that fails -------------------------------------------------------------------------


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
