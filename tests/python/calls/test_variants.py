"""Arguments that meet: random problems in which any of lengths, masks and sinks come together, forward and back."""

from __future__ import annotations

import flashcute as fc
import numpy as np
import pytest
import variants
from conftest import SEED
from optional_torch import needs_torch

PROBLEMS = 25  # of each test; every one takes other random numbers


def describe(p: object) -> str:
    """What failed, to be read."""
    told = {n: x for n, x in vars(p).items() if not isinstance(x, np.ndarray) and n != "documents"}
    shapes = {n: x.shape for n, x in vars(p).items() if isinstance(x, np.ndarray)}
    shapes |= {"documents": [x.shape for x in getattr(p, "documents", None) or ()]}
    return f"{told}, {shapes}, sink {getattr(p, 'sink', None)}"


packed_too = pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])


def check_many(dtype: str, where: str, first: int, packed: bool, **how: object) -> None:
    """packed: the entries of the batch as packed sequences."""
    dims = {"head_dims": how.pop("head_dims", (1, 3, 8, 16, 40, 64))}
    dims["head_dims_v"] = how.pop("head_dims_v", None)
    check = variants.check_packed if packed else variants.check
    for number in range(first, first + PROBLEMS):
        rng = np.random.default_rng([SEED, number])
        p = variants.random_problem(rng, dtype, **dims, elements=not packed)  # type: ignore[arg-type]
        try:
            check(rng, p, where, **how)  # type: ignore[arg-type]
        except Exception as error:
            raise AssertionError(f"problem {number} of {dtype}: {describe(p)}") from error


@needs_torch
@packed_too
@pytest.mark.parametrize("first", range(0, 200, PROBLEMS))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_on_the_cpu(dtype: str, first: int, packed: bool) -> None:
    """Two arguments of which one switches the other off, or a gradient of another function than the forward's."""
    check_many(dtype, "cpu", first, packed)


@needs_torch
@packed_too
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes_on_the_cpu(dtype: str, packed: bool) -> None:
    check_many(dtype, "cpu", 1000, packed)


@pytest.mark.gpu
@pytest.mark.slow
@packed_too
@pytest.mark.parametrize("first", range(0, 100, PROBLEMS))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_on_a_gpu(dtype: str, first: int, packed: bool) -> None:
    """The same of the kernels that a call takes by itself."""
    check_many(dtype, "cuda", first, packed, align=8, head_dims=(8, 40, 64))


@pytest.mark.gpu
@pytest.mark.slow
@packed_too
def test_any_alignment_on_a_gpu(packed: bool) -> None:
    """The same of tensors that are copied to shared memory by the element; each alignment has kernels to compile."""
    check_many("bfloat16", "cuda", 3000, packed, head_dims=(3,))


@pytest.mark.gpu
@pytest.mark.slow
@packed_too
@pytest.mark.parametrize("kernel", ["sm80", "sm90"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_kernels_on_a_gpu(dtype: str, kernel: str, packed: bool) -> None:
    """The same of each kind of kernel."""
    arch = fc._core.driver_info().gpus[0].arch
    if kernel == "sm90" and (arch != 90 or dtype == "float32"):
        pytest.skip("no such kernel here")
    default = fc.default_config(64, dtype, arch if kernel == "sm90" else 80)
    assert default.kernel == kernel
    # Hopper's are deterministic under full and causal masks alone.
    backward = fc.default_backward_config(
        64, dtype, arch if kernel == "sm90" else 80, deterministic=kernel == "sm80"
    )
    assert backward.kernel == kernel
    check_many(
        dtype,
        "cuda",
        2000,
        packed,
        cfg=default,
        backward_cfg=backward,
        align=8,
        head_dims=(8, 16, 40, 64),
    )


@pytest.mark.gpu
@pytest.mark.slow
@packed_too
@pytest.mark.parametrize(("d", "d_v"), [(96, 96), (192, 192), (192, 128), (96, 64)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_widths_of_hopper(dtype: str, d: int, d_v: int, packed: bool) -> None:
    """The same of the tiles whose pages, or whose numbers of pages, are others than at head dimension 64."""
    if fc._core.driver_info().gpus[0].arch != 90:
        pytest.skip("no such kernel here")
    cfg = fc.default_config(d, dtype, "sm_90", head_dim_v=d_v).replace(head_dim_v=d_v)
    # Hopper's gradients of wide heads know full and causal masks alone.
    backward = fc.default_backward_config(
        d, dtype, "sm_90" if d <= 128 else "sm_100", head_dim_v=d_v, deterministic=False
    )
    check_many(
        dtype,
        "cuda",
        4000,
        packed,
        cfg=cfg,
        backward_cfg=backward,
        align=8,
        head_dims=(d - 24, d - 8, d),
        head_dims_v=(d_v - 24, d_v - 8, d_v),
    )
