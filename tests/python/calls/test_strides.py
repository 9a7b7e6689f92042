"""Tensors as they lie in memory: any strides, any alignment that a kernel takes, read-only and foreign arrays."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from conftest import narrow_configurations
from optional_torch import torch
from tensors import attend, both_masks, qkv, same_bits

NAN = float("nan")
INF = float("inf")

# ---- strides --------------------------------------------------------------------------------------


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


# ---- alignment ------------------------------------------------------------------------------------


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
