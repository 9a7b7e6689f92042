"""Packed sequences: cu_seqlens_q and cu_seqlens_k in every call. (test_variants.py has them in random problems.)"""

from __future__ import annotations

import re
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from flashcute import reference
from optional_torch import needs_torch, torch
from tensors import every_call, same_bits

LENGTHS = (90, 0, 1, 33, 64, 130)


def starts_of(lengths: Any, first: int = 0) -> list[int]:
    return [int(x) for x in np.cumsum([first, *lengths])]


def int32(numbers: Any, where: str) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=where)


def rows_of(x: torch.Tensor, lengths: Any) -> list[torch.Tensor]:
    return list(x.split(list(lengths)))


# ---- a sequence and its neighbours -----------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_does_not_depend_on_its_neighbours(device: str, causal: bool) -> None:
    """Sequences in another order, alone, and beside others that hold NaN have the same bits; so have their
    gradients."""
    parts = [[torch.randn(n, h, 64) for h in (4, 2, 2, 4)] for n in LENGTHS]
    sink = torch.randn(4, device=device)

    def run(order: list[int], poison: int | None = None) -> dict[int, list[torch.Tensor]]:
        chosen = [[x * torch.nan if i == poison else x for x in parts[i]] for i in order]
        q, k, v, dout = (
            torch.cat([c[j] for c in chosen]).to(device, torch.bfloat16) for j in range(4)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        lengths = [LENGTHS[i] for i in order]
        out, lse = fc.flash_attention(
            *leaves, causal, window=(60, 20), cu_seqlens_q=int32(starts_of(lengths), device), sink=sink,
            return_lse=True, deterministic=True,
        )  # fmt: skip
        found = [out, lse.T, *torch.autograd.grad(out, leaves, dout)]
        return {
            i: [x.detach() for x in each]
            for i, each in zip(
                order, zip(*(rows_of(x, lengths) for x in found), strict=True), strict=True
            )
        }

    together = run([0, 1, 2, 3, 4, 5])
    for order, poison in (([5, 3, 1, 0, 4, 2], None), ([3], None), ([2, 0, 5], 0)):
        for i, found in run(order, poison).items():
            if i != poison:
                for a, b in zip(found, together[i], strict=True):
                    assert same_bits(a, b), f"sequence {i} in the order {order}"


@needs_torch
def test_equal_lengths_are_a_batch(device: str) -> None:
    """The same bits as of the batch that the rows are."""
    q, k, v = (torch.randn(3, 130, h, 64, device=device).bfloat16() for h in (4, 2, 2))
    starts = int32([0, 130, 260, 390], device)
    sink = torch.randn(4, device=device)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    found, lse = fc.flash_attention(*packed, True, cu_seqlens_q=starts, sink=sink, return_lse=True)
    expected, lse_of_batch = fc.flash_attention(q, k, v, True, sink=sink, return_lse=True)
    assert same_bits(found.view_as(q), expected)
    assert same_bits(lse.view(4, 3, 130).transpose(0, 1), lse_of_batch)


# ---- numbers ---------------------------------------------------------------------------------------


@needs_torch
def test_max_seqlen_has_no_effect(device: str) -> None:
    """A result, or a fault, that depends on what the caller says of lengths on the host."""
    q = torch.randn(100, 2, 64, device=device).bfloat16()
    starts = int32([0, 7, 100], device)
    expected = fc.flash_attention(q, q, q, True, cu_seqlens_q=starts)
    for absurd in (0, 1, -5, 2**40, "nine", None):
        found = fc.flash_attention(
            q, q, q, True, cu_seqlens_q=starts, max_seqlen_q=absurd, max_seqlen_k=absurd
        )
        assert same_bits(found, expected)


@needs_torch
@pytest.mark.parametrize("starts", [[0, 0, 5, 5], [5, 5], [0], [2, 4], [0, 5]], ids=str)
def test_rows_of_no_sequence(device: str, starts: list[int]) -> None:
    """Rows that nobody writes: before the first sequence, after the last, where there is none."""
    q, k, v, dout = (torch.randn(5, 2, 64, device=device).bfloat16() for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sink = torch.zeros(2, device=device, requires_grad=True)
    out, lse = fc.flash_attention(
        *leaves, cu_seqlens_q=int32(starts, device), sink=sink, return_lse=True
    )
    found = torch.autograd.grad(out, [*leaves, sink], dout)
    assert found[3].isfinite().all()
    inside = torch.zeros(5, dtype=torch.bool, device=device)
    inside[starts[0] : starts[-1]] = True
    for x in (out, *found[:3]):
        assert not x[~inside].any()
    assert (lse[:, ~inside] == -torch.inf).all()
    assert lse[:, inside].isfinite().all()


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("sink", [np.inf, np.nan])
def test_a_sink_that_is_no_number_beside_rows_without_a_key(
    rng: np.random.Generator, packed: bool, sink: float
) -> None:
    """A gradient of 0 that is NaN: such rows are told from others by their terms that are NaN."""
    q, k, v, dout = (rng.standard_normal((30, 2, 8)) for _ in range(4))
    options: dict[str, Any] = {"sink": np.full(2, sink)}
    if packed:
        options |= {"cu_seqlens_q": np.int32([0, 10, 30]), "cu_seqlens_k": np.int32([0, 0, 0])}
    else:
        q, k, v, dout = (x[None] for x in (q, k, v, dout))
        options["seqlens_k"] = np.int32([0])
    variant = fc.Variant(**options)
    results = fc.forward(
        fc.default_config(8, "float64", "cpu"), q, k, v, variant=variant, return_lse=True
    )
    cfg = fc.default_backward_config(8, "float64", "cpu")
    found = fc.backward(cfg, dout, q, k, v, *results, variant=variant)
    assert np.isnan(found[3]).all()


def test_results_of_rows_of_no_sequence_are_not_read(rng: np.random.Generator) -> None:
    """A gradient of the sink of rows that do not exist, where a caller merges results of several calls."""
    q, k, v, dout = (rng.standard_normal((30, 2, 8)) for _ in range(4))
    variant = fc.Variant(
        cu_seqlens_q=np.int32([5, 10, 20]), seqlens_q=np.int32([5, 7]), sink=np.zeros(2)
    )
    out, lse = fc.forward(
        fc.default_config(8, "float64", "cpu"), q, k, v, variant=variant, return_lse=True
    )
    cfg = fc.default_backward_config(8, "float64", "cpu")
    expected = fc.backward(cfg, dout, q, k, v, out, lse, variant=variant)
    for rows in (slice(0, 5), slice(17, 30)):
        out[rows], lse[:, rows] = 1, 0
    for a, b in zip(
        fc.backward(cfg, dout, q, k, v, out, lse, variant=variant), expected, strict=True
    ):
        np.testing.assert_array_equal(a, b)


@needs_torch
def test_no_rows_at_all(device: str) -> None:
    """A launch of nothing, and keys whose gradients nobody writes."""
    q, k = (torch.randn(n, 2, 64, device=device).bfloat16().requires_grad_() for n in (0, 7))
    starts_q, starts_k = int32([0, 0, 0], device), int32([0, 3, 7], device)
    out, lse = fc.flash_attention(
        q, k, k, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, return_lse=True
    )
    assert out.shape == (0, 2, 64)
    assert lse.shape == (2, 0)
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert dq.shape == q.shape
    assert not dk.any()
    out = fc.flash_attention(k, q, q, cu_seqlens_q=starts_k, cu_seqlens_k=starts_q)
    assert not out.any()


@needs_torch
@pytest.mark.parametrize(
    "starts", [[0, 300], [-7, 50], [50, 20, 80], [100, 0], [2**31 - 1, -(2**31)], [0, 90, 30, 100]]
)
def test_odd_numbers_touch_no_other_memory(device: str, starts: list[int]) -> None:
    """A fault, or results written elsewhere, where the numbers do not ascend from 0 to the number of rows."""
    memory = torch.full((300, 2, 64), 7.0, device=device).bfloat16()
    q, out = torch.randn(100, 2, 64, device=device).bfloat16(), memory[100:200]
    fc.flash_attention(q, q, q, True, cu_seqlens_q=int32(starts, device), out=out)
    assert (memory[:100] == 7).all()
    assert (memory[200:] == 7).all()
    leaf = q.clone().requires_grad_()
    fc.flash_attention(leaf, leaf, leaf, cu_seqlens_q=int32(starts, device)).sum().backward()


# ---- calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", list(every_call(None)))
def test_packed_sequences_reach_every_call(call: str) -> None:
    """Taken by each, and refused by name where they do not fit."""
    q = np.ones((4, 2, 8), np.float32)
    each = every_call(q, np.zeros((2, 4), np.float32))[call]
    each(cu_seqlens_q=np.int32([0, 1, 4]))
    each(cu_seqlens_q=np.int32([0, 4]), cu_seqlens_k=np.int32([0, 4]))
    wrong = {
        r"q: expected 3 dimensions": (every_call(q[None])[call], {"cu_seqlens_q": np.int32([0, 4])}),
        r"cu_seqlens_k: expected .*without cu_seqlens_q": (each, {"cu_seqlens_k": np.int32([0, 4])}),
    }  # fmt: skip
    if call not in ("naive", "chunked", "naive_gradients"):  # which take any integers
        wrong |= {
            r"cu_seqlens_q: expected dtype int32": (each, {"cu_seqlens_q": np.int64([0, 4])}),
            r"cu_seqlens_q: expected shape \(sequences \+ 1,\)": (each, {"cu_seqlens_q": np.int32([])}),
            r"cu_seqlens_k: expected .*\(sequences \+ 1,\) = \(3\)": (
                each, {"cu_seqlens_q": np.int32([0, 1, 4]), "cu_seqlens_k": np.int32([0, 4])}
            ),
            r"seqlens_k: expected .*\(sequences,\) = \(1\)": (
                each, {"cu_seqlens_q": np.int32([0, 4]), "seqlens_k": np.int32([1, 4])}
            ),
        }  # fmt: skip
    for says, (refuse, options) in wrong.items():
        if call == "explain" and not ("without" in says or "int32" in says):
            told: Any = refuse(**options)
            assert any(re.match(says, why) for _, why in told.rejected), told
            continue
        if call in ("naive", "chunked", "naive_gradients") and says.startswith("q:"):
            continue  # of shapes that fit nothing the array library says so
        with pytest.raises(fc.ArgumentError, match=f"^{says}"):
            refuse(**options)


def test_a_mask_of_elements_is_refused() -> None:
    """A mask whose queries and keys are those of no sequence."""
    q = np.ones((4, 2, 8), np.float32)
    with pytest.raises(fc.ArgumentError, match=r"^attn_mask: .*cu_seqlens_q"):
        fc.flash_attention(q, q, q, cu_seqlens_q=np.int32([0, 4]), attn_mask=np.ones((4, 4), bool))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_reference(rng: np.random.Generator, layout: str) -> None:
    """The plain array code means the same."""
    lengths, keys = (9, 0, 1, 33), (5, 4, 0, 40)
    starts = {
        "cu_seqlens_q": np.int32(starts_of(lengths, 2)),
        "cu_seqlens_k": np.int32(starts_of(keys, 1)),
    }

    def array(rows: int, heads: int) -> np.ndarray:
        x = rng.standard_normal((rows, heads, 8))
        return x if layout == "bshd" else np.ascontiguousarray(x.swapaxes(0, 1))

    q, k, v, dout = array(47, 4), array(52, 2), array(52, 2), array(47, 4)
    options: dict[str, Any] = {
        "window": (7, 3), "layout": layout, "sink": rng.standard_normal(4), "prefix": np.int32([0, 1, 2, 3]),
        "seqlens_k": np.int32([5, 2, 0, 39]), **starts,
    }  # fmt: skip
    found = fc.flash_attention(q, k, v, True, return_lse=True, **options)
    for call, blocks in (
        (reference.naive, {}),
        (reference.chunked, {"block_m": 8, "block_n": 16}),
    ):
        for a, b in zip(
            found, call(q, k, v, True, return_lse=True, **options, **blocks), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-12)
    dlse = rng.standard_normal(found[1].shape)
    said = {name: x for name, x in options.items() if name != "layout"}
    gradients = fc.backward(
        fc.default_backward_config(8, "float64", "cpu"), dout, q, k, v, *found, dlse=dlse,
        variant=fc.Variant(causal=True, **said), layout=layout,
    )  # fmt: skip
    expected = reference.naive_gradients(dout, q, k, v, True, dlse=dlse, **options)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


@needs_torch
def test_blocks_are_those_of_the_sequences(device: str) -> None:
    """Blocks of other sequences that are visited, and tiles that are counted elsewhere."""
    arch = "cpu" if device == "cpu" else fc._core.driver_info().gpus[0].arch
    cfg = fc.default_config(64, "bfloat16", arch)
    tile = cfg.block_m * cfg.cluster
    q = torch.randn(sum(LENGTHS) + 5, 2, 64, device=device).bfloat16()
    starts = starts_of(LENGTHS, 3)
    variant = fc.Variant(causal=True, cu_seqlens_q=int32(starts, device))
    counts = fc.count_blocks(cfg, q, q, q, variant=variant).cpu()
    assert counts.shape == (2, len(q) // tile + len(LENGTHS) + 2, 3)
    expected = torch.zeros_like(counts)
    for i, (start, n) in enumerate(zip(starts, LENGTHS, strict=False)):
        first = start // tile + i + 1
        if n > 0:
            x = torch.randn(1, n, 2, 64, device=device).bfloat16()
            alone = fc.count_blocks(cfg, x, x, x, variant=fc.Variant(causal=True)).cpu()
            expected[:, first : first + alone.shape[2]] = alone[0]
    assert torch.equal(counts, expected)


def test_the_workspace_grows_with_the_number_of_sequences() -> None:
    """A workspace that is too small for the tiles of many short sequences: the call itself refuses it."""
    q = np.ones((4, 2, 8), np.float32)
    cfg = fc.default_backward_config(8, "float32", "cpu")
    variant = fc.Variant(cu_seqlens_q=np.int32([0, 1, 4]))
    assert fc.backward_workspace_size(cfg, q, q, variant=variant) == 0
    with pytest.raises(fc.ArgumentError, match=r"^q: expected 3 dimensions"):
        fc.backward_workspace_size(cfg, q[None], q[None], variant=variant)


# ---- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_sequences_change_between_replays() -> None:
    """Starts that are read on the host, or baked into a graph."""
    total = 300
    q, k, v, dout = (torch.randn(total, h, 64, device="cuda").bfloat16() for h in (4, 2, 2, 4))
    starts = int32([0, 100, 100, 290], "cuda")
    sink = torch.randn(4, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]

    def step() -> list[torch.Tensor]:
        out, lse = fc.flash_attention(
            q, k, v, True, window=(80, 0), cu_seqlens_q=starts, sink=sink, return_lse=True
        )
        return [out, lse, *torch.autograd.grad(out, leaves, dout)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for numbers in ([0, 1, 2, 300], [5, 5, 299, 300], [0, 0, 0, 0], [0, 150, 290, 300]):
        starts.copy_(torch.tensor(numbers, dtype=torch.int32))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_a_pack_whose_keys_do_not_fit_the_cache(rng: np.random.Generator, causal: bool) -> None:
    """Hopper's thread blocks take other tiles then, pairs of one sequence: a tile that is lost, or taken twice."""
    lengths = [int(x) for x in rng.integers(0, 1500, 14)] + [0, 1, 128, 129, 5000]
    rng.shuffle(lengths)
    q, k, v = (torch.randn(sum(lengths), 16, 128, device="cuda").bfloat16() for _ in "qkv")
    starts = int32(starts_of(lengths), "cuda")
    out, lse = fc.flash_attention(q, k, v, causal, cu_seqlens_q=starts, return_lse=True)
    parts = (rows_of(x, lengths) for x in (q, k, v, out, lse.T))
    for own_q, own_k, own_v, own_out, own_lse in zip(*parts, strict=True):
        alone = int32([0, len(own_q)], "cuda")
        found, of_rows = fc.flash_attention(
            own_q, own_k, own_v, causal, cu_seqlens_q=alone, return_lse=True
        )
        assert same_bits(found, own_out), len(own_q)
        assert same_bits(of_rows.T, own_lse), len(own_q)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ten_thousand_packs(rng: np.random.Generator, head_dim: int) -> None:
    """A ring that waits for a tile that nobody loads, or a tile that is lost: of many packs, most of them with empty
    and short sequences. Each kernel is compared with the other; both give bits that do not depend on the pack."""
    arch = fc._core.driver_info().gpus[0].arch
    kernels = [fc.default_config(head_dim, "bfloat16", a) for a in {80, arch}]
    rows = 700
    q, k, v = (torch.randn(rows, h, head_dim, device="cuda").bfloat16() for h in (2, 1, 1))
    worst = torch.zeros((), device="cuda")
    for _ in range(10_000 // len(kernels)):
        n = int(rng.integers(1, 60))
        cuts = [np.sort(rng.integers(0, rows + 1, n + 1)) for _ in range(2)]
        if rng.random() < 0.5:
            cuts[1] = cuts[0]
        starts_q, starts_k = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in cuts)
        variant = fc.Variant(causal=True, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
        outs = [fc.forward(cfg, q, k, v, variant=variant) for cfg in kernels]
        for out in outs[1:]:
            worst = torch.maximum(worst, (out.float() - outs[0].float()).abs().max())
    assert worst.item() < 0.05
