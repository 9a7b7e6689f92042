"""flashcute.scaled_dot_product_attention against torch's definition, in fp64, and against torch's own function."""

from __future__ import annotations

import math
from typing import Any

import flashcute
import numpy as np
import pytest
from conftest import Runner
from optional_torch import needs_torch, torch

sdpa = flashcute.scaled_dot_product_attention


def tensors(device: str, *shapes: tuple[int, ...], dtype: Any = None, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or exact(device)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def exact(device: str) -> Any:
    """The widest dtype with kernels: what is left then is meaning, not rounding."""
    return torch.float64 if device == "cpu" else torch.float32


def tolerance(device: str) -> float:
    return 1e-12 if device == "cpu" else 3e-5


def definition(
    q: Any,
    k: Any,
    v: Any,
    diagonal: str | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    mask: Any = None,
) -> Any:
    """Of torch's documentation, in fp64, but that a row without keys is 0."""
    q, k, v = (x.double() for x in (q, k, v))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q @ k.transpose(-1, -2)
    rows, keys = scores.shape[-2:]
    seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
    if diagonal is not None:
        seen = seen.tril(0 if diagonal == "start" else keys - rows)
    if mask is not None:
        scores, seen = torch.broadcast_tensors(scores, seen & mask)
    scores = scores.masked_fill(~seen, -math.inf)
    empty = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return weights @ v


def drawn(rng: np.random.Generator) -> dict[str, Any]:
    """A random problem: ranks from 2 to 6, sizes from 0, dimensions of 1 to broadcast, transposed memory."""
    rows, keys = (int(x) for x in rng.choice([0, 1, 2, 3, 17, 40], 2))
    d, d_v = (int(x) for x in rng.integers(1, 20, 2))
    gqa = bool(rng.integers(2))
    heads = 6
    lead = [int(x) for x in rng.integers(1, 4, rng.integers(0, 4))]

    def shape(count: int, length: int, dim: int) -> tuple[int, ...]:
        own = [1 if rng.integers(4) == 0 else size for size in lead]
        own = own[int(rng.integers(len(own) + 1)) :] if rng.integers(4) == 0 else own
        if not gqa and rng.integers(4) == 0:
            count = 1
        bare = not gqa and not own and rng.integers(4) == 0
        return (*own, *(() if bare else (count,)), length, dim)

    fewer = int(rng.choice([1, 2, 3, 6])) if gqa else heads
    shapes = [shape(heads, rows, d), shape(fewer, keys, d), shape(fewer, keys, d_v)]
    result = np.broadcast_shapes(*(s[: -3 if gqa else -2] for s in shapes))
    whole = [*result, *([shapes[0][-3]] if gqa else []), rows, keys]
    of_mask = [1 if rng.integers(3) == 0 else size for size in whole]
    of_mask = of_mask[int(rng.integers(len(of_mask) - 1)) :] if rng.integers(2) else of_mask
    return {
        "shapes": shapes,
        "enable_gqa": gqa,
        "mask": str(rng.choice(["none", "is_causal", "upper_left", "lower_right", "bool", "bool"])),
        "shape of mask": tuple(of_mask),
        "scale": None if rng.integers(2) else float(rng.uniform(0, 2)),
        "transposed": bool(rng.integers(2)),
    }


@needs_torch
@pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")
@pytest.mark.parametrize("seed", range(80))
def test_it_is_torchs_definition(device: str, seed: int) -> None:
    """A broadcast, a fold of leading dimensions, an alignment or a gradient that is another one than torch defines; a
    problem of these that silently goes to torch's own attention."""
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    case = drawn(np.random.default_rng(seed))
    inputs = tensors(device, *case["shapes"], seed=seed)
    if case["transposed"]:  # seqlen is the outermost dimension in memory
        inputs = [x.movedim(-2, 0).contiguous().movedim(0, -2) for x in inputs]
    q, k, v = (x.requires_grad_() for x in inputs)
    lengths = q.shape[-2], k.shape[-2]
    options = {"scale": case["scale"], "enable_gqa": case["enable_gqa"]}
    mask = tensors(device, case["shape of mask"], seed=seed + 1)[0] < 0.3
    given, diagonal = {
        "bool": ({"attn_mask": mask}, None),
        "none": ({}, None),
        "is_causal": ({"is_causal": True}, "start"),
        "upper_left": ({"attn_mask": causal_upper_left(*lengths)}, "start"),
        "lower_right": ({"attn_mask": causal_lower_right(*lengths)}, "end"),
    }[case["mask"]]
    before = flashcute.sdpa.fallbacks()
    out = sdpa(q, k, v, **given, **options)
    assert flashcute.sdpa.fallbacks() == before
    expected = definition(
        q, k, v, diagonal, mask=mask if case["mask"] == "bool" else None, **options
    )
    assert out.shape == expected.shape, case
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance(device))
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    wanted = torch.autograd.grad(expected, (q, k, v), dout.double())
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=10 * tolerance(device))


@needs_torch
@pytest.mark.parametrize("gqa", [False, True])
def test_folded_dimensions_are_views(gqa: bool) -> None:
    """A copy of tensors whose leading dimensions fold by their strides."""
    from flashcute._torch.drop_in import _folded

    q, k, v = tensors("cpu", *[(2, 3, 4, 7, 8)] * 3)
    _, folded = _folded(q, k, v, gqa)
    assert [x.data_ptr() for x in folded] == [x.data_ptr() for x in (q, k, v)]
    shared = tensors("cpu", (2, 1, 7, 8))[0]
    _, (_, k, v) = _folded(tensors("cpu", (2, 4, 7, 8))[0], shared, shared, gqa)
    assert k.shape == (2, 1, 7, 8)  # one head for all: not repeated
    assert k.data_ptr() == shared.data_ptr()


@needs_torch
def test_a_mask_of_all_is_not_repeated() -> None:
    """A copy of a mask for each entry of several leading dimensions."""
    from flashcute._torch.drop_in import _folded_mask

    mask = torch.ones(1, 1, 4, 5, 7, dtype=torch.bool)
    for lead in ((2, 3, 4), (2, 3, 4)[1:]):
        folded = _folded_mask(mask[(0,) * (3 - len(lead))], lead, (5, 7))
        assert folded.shape == (1, 4, 5, 7)
        assert folded.data_ptr() == mask.data_ptr()


@needs_torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_precision(device: str, dtype: str) -> None:
    """A dtype that is computed in another one."""
    q, k, v = tensors(device, *[(2, 3, 150, 64)] * 3, dtype=getattr(torch, dtype))
    out = sdpa(q, k, v, is_causal=True)
    expected = definition(q, k, v, "start")
    error = (out.double() - expected).norm() / expected.norm()
    assert out.dtype == q.dtype
    assert error < {"float16": 6e-4, "bfloat16": 5e-3, "float32": 1e-6}[dtype]


# ---- what goes to torch ----------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize(
    ("reason", "shapes", "options"),
    [
        ("attn_mask", [(2, 3, 5, 8)] * 3, {"attn_mask": "float"}),
        ("attn_mask", [(2, 1, 5, 8), (3, 5, 8), (3, 5, 8)], {"attn_mask": "float"}),
        ("dropout", [(2, 3, 5, 8)] * 3, {"dropout_p": 0.5, "attn_mask": "bool"}),
        ("dropout", [(2, 3, 5, 8)] * 3, {"dropout_p": 0.5}),
        ("scale", [(2, 3, 5, 8)] * 3, {"scale": -0.5}),
        ("head dimension", [(1, 2, 5, 264)] * 3, {}),
        ("head dimension", [(1, 2, 5, 0)] * 3, {}),
        ("numbers of heads", [(1, 4, 5, 8), (1, 2, 5, 8), (1, 4, 5, 8)], {"enable_gqa": True}),
    ],
)
def test_the_rest_is_torchs_own(
    device: str, reason: str, shapes: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    """An argument that is lost on the way to torch, or a call that goes there uncounted."""
    q, k, v = tensors(device, *shapes, dtype=torch.float32)
    masks = {
        "bool": torch.ones(5, 5, dtype=torch.bool, device=device).tril(1),
        "float": tensors(device, (5, 5), dtype=torch.float32, seed=1)[0],
    }
    if "attn_mask" in options:
        options = {**options, "attn_mask": masks[options["attn_mask"]]}
    before = sum(n for text, n in flashcute.sdpa.fallbacks().items() if reason in text)
    torch.manual_seed(7)
    out = sdpa(q, k, v, **options)
    torch.manual_seed(7)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    assert torch.equal(out, expected)
    assert sum(n for text, n in flashcute.sdpa.fallbacks().items() if reason in text) == before + 1


@needs_torch
def test_true_keeps_and_empty_rows_are_zero(device: str) -> None:
    """A mask that is read the other way round; NaN where a row sees nothing."""
    q, k, v = tensors(device, *[(1, 2, 4, 8)] * 3)
    mask = torch.zeros(4, 4, dtype=torch.bool, device=device)
    mask[1, 2] = True
    out = sdpa(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out[:, :, 1], v[:, :, 2])
    assert not out[:, :, [0, 2, 3]].any()
    no_keys = sdpa(q, k[:, :, :0], v[:, :, :0])
    assert no_keys.shape == q.shape
    assert not no_keys.any()


@needs_torch
def test_derivatives_of_torch_func(device: str) -> None:
    """A drop-in that raises where torch's function has a derivative."""
    (x,) = tensors(device, (2, 3, 5, 8))
    reference = torch.func.grad(lambda x: definition(x, x, x).sum().to(x.dtype))(x)
    found = torch.func.grad(lambda x: sdpa(x, x, x).sum())(x)
    torch.testing.assert_close(found, reference, rtol=0, atol=10 * tolerance(device))
    batched = torch.vmap(lambda x: sdpa(x, x, x, is_causal=True))(x[None].expand(4, 2, 3, 5, 8))
    torch.testing.assert_close(batched[3], sdpa(x, x, x, is_causal=True))


@needs_torch
def test_nested_tensors_are_torchs() -> None:
    """An error of DLPack where torch's function takes the tensor."""
    values = [torch.randn(n, 16) for n in (3, 5)]
    nested = torch.nested.nested_tensor(values, layout=torch.jagged)
    x = nested.unflatten(-1, (2, 8)).transpose(1, 2)
    out = sdpa(x, x, x)
    expected = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert torch.equal(out.transpose(1, 2).values(), expected.transpose(1, 2).values())


@needs_torch
@pytest.mark.parametrize("masked", [False, True])
def test_compiled(device: str, masked: bool) -> None:
    """A graph break, or another result, under torch.compile; a count or a log of a fallback that breaks the graph."""
    mask = torch.ones(9, 9, dtype=torch.bool, device=device).tril() if masked else None
    q, k = tensors(device, (2, 2, 4, 9, 8), (2, 2, 2, 9, 8))

    def attention(q: Any, k: Any) -> Any:
        return sdpa(q, k, k, mask, is_causal=not masked, enable_gqa=True)

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k), attention(q, k))
    q.requires_grad_()
    (found,) = torch.autograd.grad(compiled(q, k).sum(), q)
    (expected,) = torch.autograd.grad(attention(q, k).sum(), q)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(device))


@needs_torch
def test_autocast(device: str) -> None:
    """Dtypes that torch's function would cast are refused, or not cast."""
    q, k, v = tensors(device, *[(2, 3, 33, 16)] * 3, dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        out = sdpa(q, k.bfloat16(), v)
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype
    torch.testing.assert_close(out.double(), definition(q, k, v), rtol=0, atol=3e-2)


# ---- errors ----------------------------------------------------------------------------------------

FOUR = (2, 4, 5, 8)


@needs_torch
@pytest.mark.parametrize(
    ("names", "shapes", "options"),
    [
        (["attn_mask", "is_causal"], [FOUR] * 3, {"attn_mask": True, "is_causal": True}),
        (["is_causal"], [FOUR] * 3, {"is_causal": 1}),
        (["dropout_p", "1.5"], [FOUR] * 3, {"dropout_p": 1.5}),
        (["dropout_p", "-0.1"], [FOUR] * 3, {"dropout_p": -0.1}),
        (["enable_gqa=True"], [FOUR, (2, 2, 5, 8), (2, 2, 5, 8)], {}),
        (["key", "divides", "3"], [FOUR, (2, 3, 5, 8), (2, 3, 5, 8)], {"enable_gqa": True}),
        (["query", "3 dimensions"], [(5, 8)] * 3, {"enable_gqa": True}),
        (["query", "2 dimensions"], [(8,)] * 3, {}),
        (["key", "head dimension 8"], [FOUR, (2, 4, 5, 7), FOUR], {}),
        (["value", "seqlen 5"], [FOUR, FOUR, (2, 4, 6, 8)], {}),
        (["broadcast"], [FOUR, (3, 4, 5, 8), (3, 4, 5, 8)], {}),
        (["value", "float16"], [FOUR] * 3, {"dtype": "float16"}),
        (["attn_mask", "(2, 4, 5, 5)", "(5, 4)"], [FOUR] * 3, {"mask": (5, 4)}),
        (["attn_mask", "(3, 1, 5, 5)"], [FOUR] * 3, {"mask": (3, 1, 5, 5)}),
        (["attn_mask", "(1, 1, 1, 5, 5)"], [FOUR] * 3, {"mask": (1, 1, 1, 5, 5)}),
        (
            ["attn_mask", "(2, 3, 4, 5, 5)", "(3, 1, 4, 5, 5)"],
            [(2, 3, 4, 5, 8)] * 3,
            {"mask": (3, 1, 4, 5, 5)},
        ),
    ],
)
def test_errors_name_the_argument(
    names: list[str], shapes: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    """An error in the words of flash_attention, whose tensors the caller has not seen, or torch's own."""
    q, k, v = tensors("cpu", *shapes)
    if options.get("attn_mask"):
        options = {**options, "attn_mask": torch.ones(5, 5, dtype=torch.bool)}
    if "mask" in options:
        options = {"attn_mask": torch.ones(options["mask"], dtype=torch.bool)}
    if "dtype" in options:
        v, options = v.half(), {}
    with pytest.raises(flashcute.ArgumentError) as error:
        sdpa(q, k, v, **options)
    for name in names:
        assert name in str(error.value)


@needs_torch
def test_a_causal_bias_of_other_lengths() -> None:
    from torch.nn.attention.bias import causal_upper_left

    q, k, v = tensors("cpu", *[FOUR] * 3)
    with pytest.raises(flashcute.ArgumentError, match=r"attn_mask.*\(5, 5\).*\(4, 5\)"):
        sdpa(q, k, v, attn_mask=causal_upper_left(4, 5))


def test_other_arrays_are_told_what_to_call() -> None:
    x = np.ones((1, 1, 2, 8), np.float32)
    with pytest.raises(
        flashcute.ArgumentError, match=r"query: expected a torch tensor.*flash_attention"
    ):
        sdpa(x, x, x)


@needs_torch
def test_the_signature_is_torchs() -> None:
    """A call with torch's names or positions that fails, or means something else."""
    q, k, v = tensors("cpu", *[FOUR] * 3)
    torchs = torch.nn.functional.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None,
        dropout_p=0.0, is_causal=True, scale=0.3, enable_gqa=False)  # fmt: skip
    named = sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=True, scale=0.3,
        enable_gqa=False)  # fmt: skip
    torch.testing.assert_close(named, torchs, rtol=0, atol=1e-12)
    assert torch.equal(sdpa(q, k, v, None, 0.0, True, scale=0.3), named)
    with pytest.raises(TypeError):
        sdpa(q, k, v, None, 0.0, True, 0.3)


def test_import_costs_no_torch(fresh: Runner) -> None:
    """A public name that makes `import flashcute` import torch."""
    fresh("""
        import sys, flashcute  # and nothing else
        flashcute.scaled_dot_product_attention
        assert "torch" not in sys.modules and "flashcute.sdpa" not in sys.modules
    """)
