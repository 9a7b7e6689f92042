"""BlockMask: what is put in is what the words say and what calls compute. (test_variants.py has masks by element in
random problems.)"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable
from typing import Any

import flashcute as fc
import numpy as np
import oracle
import oracle_backward
import pytest
from flashcute import BlockMask, block_mask, reference
from optional_torch import needs_torch, torch
from tensors import every_call, same_bits, same_bits_under_any_mask

# Less than a cell, one, several with and without a remainder; more cells than a word has bits.
LENGTHS = [(1, 1), (64, 64), (63, 129), (200, 70), (130, 2300), (2100, 65), (0, 70), (70, 0)]

libraries = pytest.mark.parametrize("library", ["numpy", "torch"])
lengths = pytest.mark.parametrize(("sq", "sk"), LENGTHS)


def in_library(library: str, x: Any) -> Any:
    if library == "numpy":
        return np.asarray(x)
    array = np.asarray(x)
    made = torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)))
    return made.copy_(torch.from_numpy(np.ascontiguousarray(array)))


def elements(mask: BlockMask) -> np.ndarray:
    """What the words say, by query and, which to_dense does not read, by key."""
    dense = np.asarray(mask.to_dense())
    assert dense.dtype == bool
    assert dense.shape == mask.sizes
    np.testing.assert_array_equal(elements_by_key(mask), dense)
    return dense


def elements_by_key(mask: BlockMask) -> np.ndarray:
    """As include/flashcute/core/block_map.hpp describes the planes by key, cell by cell."""
    words = np.asarray(mask.words).view(np.uint32)
    batch, heads, sq, sk = mask.sizes
    maps, rows, columns = batch * heads, -(-sk // 64), -(-sq // 64)
    by_query = maps * columns * -(-rows // 32)
    by_key = maps * rows * -(-columns // 32)
    begin = 4 + 3 * by_query
    some, whole, first = words[begin : begin + 3 * by_key].reshape(3, maps, rows, -(-columns // 32))
    begin = -(-(begin + 3 * by_key) // 4) * 4
    bits = words[begin + (len(words) - begin) // 2 :].view(np.uint64).reshape(-1, 64)
    found = np.zeros((maps, columns * 64, rows * 64), bool)
    for m, row, word in np.ndindex(some.shape):
        number = int(first[m, row, word])
        for cell in range(min(32, columns - word * 32)):
            any_, all_ = (int(x[m, row, word]) >> cell & 1 for x in (some, whole))
            seen = np.full((64, 64), bool(all_))
            if any_ and not all_:
                seen = (bits[number][:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)) == 1
                number += 1
            at = (word * 32 + cell) * 64
            found[m, at : at + 64, row * 64 : row * 64 + 64] = seen.T
    return found[:, :sq, :sk].reshape(mask.sizes)


def cells_of(dense: np.ndarray) -> list[np.ndarray]:
    """The elements that exist of each cell, of all maps."""
    *_, sq, sk = dense.shape
    return [
        of_map[i : i + 64, j : j + 64]
        for of_map in dense.reshape(dense.shape[0] * dense.shape[1], sq, sk)
        for i in range(0, sq, 64)
        for j in range(0, sk, 64)
    ]


def mixed(rng: np.random.Generator, batch: int, heads: int, sq: int, sk: int) -> np.ndarray:
    """Cells that are whole, partial and empty."""
    chance = rng.choice([0, 0.01, 0.5, 1], (batch, heads, sq // 64 + 1, sk // 64 + 1))
    chance = chance.repeat(64, axis=2).repeat(64, axis=3)[..., :sq, :sk]
    return rng.random((batch, heads, sq, sk)) < chance


# ---- sources ---------------------------------------------------------------------------------------


@libraries
@lengths
def test_dense(rng: np.random.Generator, library: str, sq: int, sk: int) -> None:
    """A bit of another element; a cell at an edge that counts as partial, or as whole without being so."""
    dense = mixed(rng, 2, 3, sq, sk)
    mask = BlockMask.from_dense(in_library(library, dense))
    assert type(mask.words).__module__.partition(".")[0] == library
    assert mask.sizes == (2, 3, sq, sk)
    np.testing.assert_array_equal(elements(mask), dense)
    cells = cells_of(dense)
    whole, some = sum(bool(c.all()) for c in cells), sum(bool(c.any()) for c in cells)
    assert mask.counts() == (whole, some - whole, len(cells) - some)


@libraries
def test_dense_broadcasts(rng: np.random.Generator, library: str) -> None:
    """A dimension that is left out or 1, taken for the wrong one; a lone row that is stretched to all cells."""
    dense = mixed(rng, 2, 3, 70, 130)
    for shape in np.ndindex(2, 2, 2, 2):
        part = dense[tuple(slice(None) if whole else slice(0, 1) for whole in shape)]
        mask = BlockMask.from_dense(in_library(library, part), seqlen_q=70, seqlen_k=130)
        batch, heads = part.shape[:2]
        assert mask.sizes == (batch, heads, 70, 130)
        np.testing.assert_array_equal(
            elements(mask), np.broadcast_to(part, (batch, heads, 70, 130))
        )
    assert BlockMask.from_dense(in_library(library, dense[0])).sizes == (1, 3, 70, 130)
    assert BlockMask.from_dense(in_library(library, dense[0, 0])).sizes == (1, 1, 70, 130)


def test_dense_of_any_strides(rng: np.random.Generator) -> None:
    """Elements read in the order of memory; 8 at once where they do not lie side by side, or not at a multiple of 8."""
    dense = rng.random((4, 6, 200, 300)) < 0.5
    views = {
        "reversed": dense[::-1, :, ::-1, ::-1],
        "every other": dense[:, ::2, ::3, ::2],
        "transposed": dense.swapaxes(2, 3),
        "offset": dense[1:, 1:, 5:, 3:],
        "heads last": np.ascontiguousarray(dense.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "repeated": np.broadcast_to(dense[0, 0, :, :1], (2, 3, 200, 90)),
        "one row": np.broadcast_to(dense[0, 0, 7], (2, 3, 100, 300)),
        "read-only": dense.copy(),
    }
    views["read-only"].flags.writeable = False
    for name, view in views.items():
        np.testing.assert_array_equal(elements(BlockMask.from_dense(view)), view, name)


@libraries
@lengths
def test_documents(rng: np.random.Generator, library: str, sq: int, sk: int) -> None:
    """A cell that is skipped by the range of its numbers though a number meets; numbers below 0 that meet."""
    sorted_ = np.sort(rng.integers(-1, 6, (2, sq + sk)))
    for queries, keys in (
        (sorted_[:, :sq], sorted_[:, sq:]),
        (rng.integers(-2, 2, (2, sq)), rng.integers(-2, 2, (1, sk))),
        (np.full((1, sq), 2**31 - 1), rng.choice([2**31 - 1, -(2**31)], (2, sk))),
    ):
        given = [in_library(library, x.astype(np.int32)) for x in (queries, keys)]
        found = elements(BlockMask.from_documents(*given))
        expected = (queries[:, :, None] == keys[:, None, :]) & (queries[:, :, None] >= 0)
        np.testing.assert_array_equal(found, expected[:, None])


def test_documents_of_queries_are_those_of_keys_by_default(rng: np.random.Generator) -> None:
    """Documents of queries alone, and an array whose elements do not lie side by side."""
    numbers = np.sort(rng.integers(0, 4, 300)).astype(np.int32)[::-2]
    found = elements(BlockMask.from_documents(numbers))
    np.testing.assert_array_equal(found[0, 0], numbers[:, None] == numbers[None, :])


@libraries
@pytest.mark.parametrize(("sq", "sk"), [(70, 70), (50, 130), (130, 50)])
@pytest.mark.parametrize(("causal", "numbers"), [(True, 1), (True, 2), (False, 2), (False, 4)])
def test_bounds(
    rng: np.random.Generator, library: str, causal: bool, numbers: int, sq: int, sk: int
) -> None:
    """An end that is taken for a beginning, or is hidden itself; the causal part aligned to the first query."""
    bounds = rng.integers(-5, sq + 5, (2, 3, sk, numbers)).astype(np.int32)
    mask = BlockMask.from_bounds(in_library(library, bounds), seqlen_q=sq, causal=causal)
    expected = np.ones((2, 3, sq, sk), bool)
    for b, h, j in np.ndindex(2, 3, sk):
        rows = expected[b, h, :, j]
        at = [max(int(x), 0) for x in bounds[b, h, j]]
        if numbers == 1:
            rows[at[0] :] = False
        elif numbers == 2 and causal:
            rows[at[0] : at[1]] = False
        elif numbers == 2:
            rows[at[0] :] = False
            rows[: at[1]] = False
        else:
            rows[at[0] : at[1]] = False
            rows[at[2] : at[3]] = False
        if causal:
            rows[: max(0, j - (sk - sq))] = False
    np.testing.assert_array_equal(elements(mask), expected)


def test_bounds_of_published_masks() -> None:
    """The pictures in Paddle's documentation: documents that are causal, and a window beside global keys."""
    causal_documents = np.array([4, 4, 4, 4, 7, 7, 7, 10, 10, 10], np.int32)[:, None]
    found = BlockMask.from_bounds(causal_documents, seqlen_q=10, causal=True).to_dense()[0, 0]
    document = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    same = document[:, None] == document[None, :]
    np.testing.assert_array_equal(found, same & np.tri(10, dtype=bool))

    both_ways = np.array([[4, 0]] * 4 + [[7, 4]] * 3 + [[10, 7]] * 3, np.int32)
    found = BlockMask.from_bounds(both_ways, seqlen_q=10, causal=False).to_dense()[0, 0]
    np.testing.assert_array_equal(found, same)


@pytest.mark.parametrize(
    ("sq", "sk", "tables"),
    [
        (5, 2, {"causal": "00 00 00 10 11", "inv_causal": "11 01 00 00 00", "bi_causal": "00 00 00 00 00"}),
        (2, 5, {"causal": "11110 11111", "inv_causal": "11111 01111", "bi_causal": "11110 01111"}),
        (
            3,
            3,
            {"full": "111 111 111", "causal": "100 110 111", "inv_causal": "111 011 001", "bi_causal": "100 010 001"},
        ),
    ],
)  # fmt: skip
def test_slices_are_magi_attentions(sq: int, sk: int, tables: dict[str, str]) -> None:
    """A type that is aligned to the other corner. The tables are those of MagiAttention's documentation."""
    for kind, table in tables.items():
        expected = [[x == "1" for x in row] for row in table.split()]
        for told in (kind, ("full", "causal", "inv_causal", "bi_causal").index(kind)):
            # Inside of larger ranges, and twice: what is seen twice is seen.
            where = ((7, 7 + sq), (66, 66 + sk), told)
            mask = BlockMask.from_slices([where, where], seqlen_q=90, seqlen_k=80)
            found = elements(mask)[0, 0]
            np.testing.assert_array_equal(found[7 : 7 + sq, 66 : 66 + sk], expected)
            assert found.sum() == np.sum(expected)


def test_slices_unite() -> None:
    """The last slice alone, or the intersection."""
    slices = [((0, 50), (0, 20), "full"), ((30, 100), (10, 80), 1), ((5, 5), (0, 80), 0)]
    found = elements(BlockMask.from_slices(slices, seqlen_q=100, seqlen_k=80))[0, 0]
    i, j = np.arange(100)[:, None], np.arange(80)[None, :]
    causal = (i >= 30) & (j >= 10) & (j - 80 <= i - 100)
    np.testing.assert_array_equal(found, (i < 50) & (j < 20) | causal)
    assert not BlockMask.from_slices([], seqlen_q=100, seqlen_k=80).to_dense().any()


@needs_torch
def test_slices_of_a_library() -> None:
    """Words that no call beside tensors of the GPU could take."""
    mask = BlockMask.from_slices([], seqlen_q=1, seqlen_k=1, like=torch.zeros(1))
    assert isinstance(mask.words, torch.Tensor)


@libraries
@pytest.mark.parametrize("cell", [64, 128, (16, 100), (1, 7)])
def test_cells(rng: np.random.Generator, library: str, cell: Any) -> None:
    """Cells of another size that are read as ours; the last ones, which reach beyond the lengths."""
    m, n = cell if isinstance(cell, tuple) else (cell, cell)
    whole = rng.random((2, 1, -(-150 // m), -(-330 // n))) < 0.4
    partial = rng.random((1, 3, 150, 1)) < 0.3
    sizes = {"seqlen_q": 150, "seqlen_k": 330, "cell": cell}
    given = in_library(library, whole)
    expected = np.array(
        [[[whole[b, 0, i // m, j // n] for j in range(330)] for i in range(150)] for b in range(2)]
    )[:, None]
    np.testing.assert_array_equal(elements(BlockMask.from_cells(given, **sizes)), expected)
    both = BlockMask.from_cells(given, in_library(library, partial), **sizes)
    np.testing.assert_array_equal(elements(both), expected | partial)


def flex() -> Any:
    return pytest.importorskip("torch.nn.attention.flex_attention")


def rules() -> dict[str, Callable[..., Any]]:
    numbers = torch.arange(400) // 37
    return {
        "causal": lambda b, h, i, j: i >= j,
        "window of a head": lambda b, h, i, j: (i - j).abs() <= 10 + 30 * h,
        "captured": lambda b, h, i, j: numbers[i] == numbers[j],
        "of an entry": lambda b, h, i, j: (i + j) % (b + 2) == 0,
        "nothing": lambda b, h, i, j: i < 0,
        "everything": lambda b, h, i, j: i >= 0,
    }


@needs_torch
@pytest.mark.parametrize(("sq", "sk"), [(256, 256), (200, 330), (330, 130), (1, 400)])
@pytest.mark.parametrize("blocks", [128, (64, 32), (16, 256)])
@pytest.mark.parametrize("separate", [True, False])
def test_flex(sq: int, sk: int, blocks: Any, separate: bool) -> None:
    """A list that is read beyond its end; a rule of all elements where lengths are no multiples of blocks."""
    create = flex().create_block_mask
    more = {"separate_full_blocks": separate}
    if "separate_full_blocks" not in inspect.signature(create).parameters:  # torch before 2.12
        if not separate:
            pytest.skip("this torch always keeps lists of full blocks")
        more = {}
    for name, rule in rules().items():
        made = create(rule, 2, 3, sq, sk, "cpu", BLOCK_SIZE=blocks, **more)
        for numbers, indices in (
            (made.kv_num_blocks, made.kv_indices),
            (made.full_kv_num_blocks, made.full_kv_indices),
        ):
            if indices is not None:  # what is behind the end of a list has no meaning
                behind = torch.arange(indices.shape[-1]) >= numbers[..., None]
                indices[behind] = 2**30
        expected = flex().create_mask(rule, 2, 3, sq, sk, "cpu").numpy()
        found = elements(BlockMask.from_flex(made))
        np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape), name)


@needs_torch
def test_blocks_of_flex_count_whatever_the_rule(rng: np.random.Generator) -> None:
    """A map that is ignored because its rule hides nothing (pytorch 188322): partial blocks that are not listed are
    not visible. Indexed masks have a rule that raises: where no block is partial, nobody asks it."""
    cells = torch.from_numpy(rng.random((1, 1, 4, 6)) < 0.5)
    numbers = cells.sum(-1, dtype=torch.int32)
    order = (~cells).int().argsort(dim=-1, stable=True).int()
    expected = cells.repeat_interleave(128, 2).repeat_interleave(128, 3)[..., :500, :750]
    none = torch.zeros_like(numbers), torch.zeros_like(order)
    sizes = {"BLOCK_SIZE": 128, "seq_lengths": (500, 750)}
    of_lists = flex().BlockMask.from_kv_blocks
    for made in (
        of_lists(numbers, order, **sizes),
        of_lists(*none, numbers, order, **sizes),
        of_lists(*none, numbers, order, **sizes)[:, 0],
    ):
        np.testing.assert_array_equal(elements(BlockMask.from_flex(made)), expected.numpy())
    with pytest.raises(fc.ArgumentError, match=r"^mask: expected 4 rows of blocks of 128 queries"):
        BlockMask.from_flex(of_lists(*none, numbers, order, **sizes)[:, :, 1:2])


# ---- combinations ----------------------------------------------------------------------------------


@libraries
@lengths
def test_combinations(rng: np.random.Generator, library: str, sq: int, sk: int) -> None:
    """& that is |; elements of another cell where only one of the two is partial; ~ that shows what does not exist."""
    a, b = mixed(rng, 2, 1, sq, sk), mixed(rng, 1, 3, sq, sk)
    one, other = (BlockMask.from_dense(in_library(library, x)) for x in (a, b))
    np.testing.assert_array_equal(elements(one & other), a & b)
    np.testing.assert_array_equal(elements(other | one), a | b)
    np.testing.assert_array_equal(elements(~one), ~a)
    np.testing.assert_array_equal(elements(~(one | ~other)), ~a & b)


def test_a_mask_says_what_it_is_for() -> None:
    """A page of words where an interpreter shows a mask."""
    assert repr(BlockMask.from_dense(np.ones((2, 1, 70, 90), bool))) == (
        f"BlockMask(batch=2, heads=1, seqlen_q=70, seqlen_k=90, {4 * (4 + 6 * 4 + 2 * 128 * 8)} bytes of numpy)"
    )


# ---- memory ----------------------------------------------------------------------------------------


def test_large_masks_have_room_for_what_they_hold(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of many cells that takes the memory of the worst case, or that has no room for all partial cells."""
    dense = mixed(rng, 2, 3, 300, 500)
    numbers = rng.integers(0, 2, (2, 300)).astype(np.int32)
    monkeypatch.setattr(block_mask, "ROOM", 4)
    mask = BlockMask.from_dense(dense)
    np.testing.assert_array_equal(elements(mask), dense)
    # By query and by key different cells may be partial only where lengths end; here they are the same.
    assert len(mask.words) == fc._core.block_mask_size(mask.sizes, mask.counts()[1])
    np.testing.assert_array_equal(elements(~mask), ~dense)
    assert len((mask & ~mask).words) == fc._core.block_mask_size(mask.sizes, 0)
    found = elements(BlockMask.from_documents(numbers))
    np.testing.assert_array_equal(found[:, 0], numbers[:, :, None] == numbers[:, None, :])


def test_documents_in_calls_have_bounded_room(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that reads a count on the host, or that computes with a map that lacks cells: where there is no room,
    all is NaN."""
    monkeypatch.setattr(block_mask, "ROOM", 4)
    q = rng.standard_normal((1, 300, 2, 8))
    packed = np.repeat(np.arange(3, dtype=np.int32), 100)[None]  # 12 of 25 cells are partial
    alternating = np.tile(np.arange(2, dtype=np.int32), 150)[None]
    size = fc._core.block_mask_size((1, 1, 300, 300), 4)
    for numbers in (packed, alternating):
        mask = block_mask.make(q, documents=(numbers, numbers))
        assert len(mask.words) == size
        assert mask.words[0] > 4
        variant = fc.Variant(block_mask=mask)
        cfg = fc.default_config(8, "float64", "cpu")
        out, lse = fc.forward(cfg, q, q, q, variant=variant, return_lse=True)
        assert np.isnan(out).all()
        assert np.isnan(lse).all()
        cfg = fc.default_backward_config(8, "float64", "cpu")
        for gradient in fc.backward(cfg, q, q, q, q, q, np.zeros_like(lse), variant=variant):
            assert np.isnan(gradient).all()
        with pytest.raises(fc.ArgumentError, match=r"^block_mask: expected words with room for"):
            mask.to_dense()
        exact = BlockMask.from_documents(numbers)
        assert np.isfinite(fc.flash_attention(q, q, q, block_mask=exact)).all()
    dense = rng.random((300, 300)) < 0.5
    both = block_mask.make(q, attn_mask=dense, documents=(packed, packed))
    np.testing.assert_array_equal(elements(both)[0, 0], dense & (packed[0][:, None] == packed))
    one = block_mask.make(q, documents=(packed * 0, packed * 0), block_mask=both)
    np.testing.assert_array_equal(elements(one), elements(both))


def test_long_documents() -> None:
    """Memory of the worst case (65,536 squared: 1 GiB of partial cells), or time by the square of the cells' square."""

    def made(length: int) -> tuple[BlockMask, float]:
        numbers = np.arange(length, dtype=np.int32) // 1000
        begin = time.perf_counter()
        mask = BlockMask.from_documents(numbers)
        return mask, time.perf_counter() - begin

    _, short = min((made(8192) for _ in range(3)), key=lambda x: x[1])
    mask, long = min((made(65536) for _ in range(2)), key=lambda x: x[1])
    assert 4 * len(mask.words) < 8 << 20
    # 64 times as many cells, made twice: 128 times. Of the square it would be 4096 times.
    assert long < 1000 * short, (long, short)
    whole, partial, empty = mask.counts()
    assert whole + partial + empty == 1024**2
    assert partial < 5 * 1024
    assert whole > 10 * 1024


# ---- calls -----------------------------------------------------------------------------------------


def tensors_of(
    rng: np.random.Generator, device: str, sq: int, sk: int, dtype: str = "bfloat16"
) -> list[torch.Tensor]:
    """q, k, v and dout: 2 entries, 4 heads of queries, 2 of keys, head dimension 64."""
    shapes = ((sq, 4), (sk, 2), (sk, 2), (sq, 4))
    made = [torch.from_numpy(rng.standard_normal((2, n, heads, 64))) for n, heads in shapes]
    return [x.to(device, getattr(torch, dtype)) for x in made]


def arch_of(device: str) -> str | int:
    arch: int = 0 if device == "cpu" else fc._core.driver_info().gpus[0].arch
    return arch or "cpu"


def forward_and_back(
    cfgs: tuple[Any, Any], q: Any, k: Any, v: Any, dout: Any, variant: fc.Variant | None
) -> list[Any]:
    out, lse = fc.forward(cfgs[0], q, k, v, variant=variant, return_lse=True)
    return [out, lse, *fc.backward(cfgs[1], dout, q, k, v, out, lse, variant=variant)]


@needs_torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("sq", "sk"), [(128, 256), (100, 150), (1, 70), (300, 129)])
def test_a_mask_that_shows_all_changes_no_bit(
    rng: np.random.Generator, device: str, dtype: str, sq: int, sk: int
) -> None:
    """Blocks in another order, a block that is visited twice, and keys beyond the last that a whole cell shows."""
    tensors = tensors_of(rng, device, sq, sk, dtype)
    everything = torch.ones(sq, sk, dtype=torch.bool, device=device)
    arch = arch_of(device)
    # The same configuration: a default one may differ by the mask.
    cfgs = (
        fc.default_config(64, dtype, arch),
        same_bits_under_any_mask(64, dtype, arch),
    )
    found = forward_and_back(
        cfgs, *tensors, fc.Variant(block_mask=BlockMask.from_dense(everything))
    )
    # On a GPU kernels that may have a sink round the log-sum-exp otherwise than those without: beside one of them.
    lengths = torch.tensor([sk], dtype=torch.int32, device=device).expand(len(tensors[0]))
    plain = None if device == "cpu" else fc.Variant(seqlens_k=lengths.contiguous())
    for a, b in zip(found, forward_and_back(cfgs, *tensors, plain), strict=True):
        assert same_bits(a, b)


@needs_torch
@pytest.mark.parametrize("with_sink", [False, True])
def test_a_mask_that_shows_nothing(rng: np.random.Generator, device: str, with_sink: bool) -> None:
    """0 / 0, or the mean of all values; results that nobody writes because no block is visited. Keys and values are
    NaN, which nobody sees."""
    q, k, v, dout = tensors_of(rng, device, 130, 200)
    sink = torch.randn(4, device=device) if with_sink else None
    nothing = BlockMask.from_dense(torch.zeros(130, 200, dtype=torch.bool, device=device))
    leaves = [q, k.fill_(torch.nan), v.fill_(torch.nan), *([sink] if with_sink else [])]
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = fc.flash_attention(*leaves[:3], block_mask=nothing, sink=sink, return_lse=True)
    assert (out == 0).all()
    expected = sink[:, None].expand_as(lse) if with_sink else torch.full_like(lse, -torch.inf)
    assert torch.equal(lse, expected)
    for gradient in torch.autograd.grad(out, leaves, dout):
        assert (gradient == 0).all()


@needs_torch
def test_a_document_does_not_depend_on_others(rng: np.random.Generator, device: str) -> None:
    """Keys of a neighbour in a shared cell that reach a query, NaN included, forward or back."""
    q, k, v, dout = tensors_of(rng, device, 300, 300)
    numbers = torch.zeros(300, dtype=torch.int32, device=device)
    numbers[90:170], numbers[170:] = 1, 2
    mask = BlockMask.from_documents(numbers)

    def run(change: float) -> list[torch.Tensor]:
        parts = [x.clone() for x in (q, k, v, dout)]
        for x in parts:
            x[:, 90:170] = change
        leaves = [x.requires_grad_() for x in parts[:3]]
        out, lse = fc.flash_attention(*leaves, block_mask=mask, return_lse=True, deterministic=True)
        found = [out, lse.transpose(1, 2), *torch.autograd.grad(out, leaves, parts[3])]
        return [torch.cat([x[:, :90], x[:, 170:]], 1).detach() for x in found]

    for a, b in zip(run(0.5), run(torch.nan), strict=True):
        assert same_bits(a, b)


@needs_torch
@pytest.mark.parametrize(("sq", "sk"), [(256, 320), (200, 330), (64, 2500), (1, 100)])
def test_blocks_that_are_visited(rng: np.random.Generator, device: str, sq: int, sk: int) -> None:
    """A cell that is computed though no query sees it, or tested by element though all do."""
    q, k, v, _ = tensors_of(rng, device, sq, sk, "float16")
    dense = mixed(rng, 2, 4, sq, sk)
    mask = BlockMask.from_dense(torch.from_numpy(dense).to(device))
    cfg = fc.default_config(64, "float16", "cpu" if device == "cpu" else 80)
    cfg = cfg.replace(block_m=64, block_n=64)
    counts = fc.count_blocks(cfg, q, k, v, variant=fc.Variant(block_mask=mask)).cpu().numpy()
    for b, h, tile in np.ndindex(*counts.shape[:3]):
        rows = dense[b, h, tile * 64 : tile * 64 + 64]
        blocks = [rows[:, j : j + 64] for j in range(0, sk, 64)]
        # An incomplete block is tested by element wherever it lies.
        whole = sum(bool(x.all()) and x.shape[1] == 64 for x in blocks)
        some = sum(bool(x.any()) for x in blocks)
        assert counts[b, h, tile].tolist() == [whole, some - whole, len(blocks) - some]
    if sk % 64 == 0:
        assert tuple(counts.sum((0, 1, 2))) == mask.counts()


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_output(rng: np.random.Generator, causal: bool) -> None:
    """A gradient of an element that is hidden, or none of one that is seen, by finite differences."""
    q, dout = rng.standard_normal((2, 2, 70, 4, 8))
    k, v = rng.standard_normal((2, 2, 130, 2, 8))
    dlse = rng.standard_normal((2, 4, 70))
    mask = BlockMask.from_dense(mixed(rng, 2, 4, 70, 130))
    empty = ~np.asarray(mask.to_dense())
    if causal:
        empty |= np.triu(np.ones((70, 130), bool), 61)
    dlse[empty.all(3)] = 0  # their log-sum-exp is -inf whatever is moved
    variant = fc.Variant(causal=causal, block_mask=mask)
    cfg = fc.default_config(8, "float64", "cpu")
    gradients_cfg = fc.default_backward_config(8, "float64", "cpu")

    def loss(*qkv: np.ndarray) -> float:
        out, lse = fc.forward(cfg, *qkv, variant=variant, return_lse=True)
        return float((out * dout).sum() + np.where(dlse == 0, 0, lse * dlse).sum())

    with np.errstate(invalid="ignore"):
        out, lse = fc.forward(cfg, q, k, v, variant=variant, return_lse=True)
        found = fc.backward(gradients_cfg, dout, q, k, v, out, lse, dlse=dlse, variant=variant)
        for i, gradient in enumerate(found):
            for _ in range(3):
                step = rng.standard_normal(gradient.shape)
                ahead, behind = (
                    [x + (1e-5 * sign * step if j == i else 0) for j, x in enumerate((q, k, v))]
                    for sign in (1, -1)
                )
                slope = (loss(*ahead) - loss(*behind)) / 2e-5
                # Differences err by about 1e-10 times third derivatives, and 1e-16 / 1e-5 of the loss.
                assert abs(slope - (gradient * step).sum()) < 1e-6 * np.abs(gradient * step).sum()


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("call", list(every_call(None)))
def test_masks_of_other_sizes_are_refused(call: str) -> None:
    """Words read beyond their end, or as those of other cells."""
    q = np.ones((1, 4, 2, 8), np.float32)
    calls: dict[str, Callable[..., Any]] = {
        "forward": lambda m: fc.forward(
            fc.default_config(8, "float32", "cpu"), q, q, q, variant=fc.Variant(block_mask=m)
        ),
        "backward": lambda m: fc.backward(
            fc.default_backward_config(8, "float32", "cpu"), q, q, q, q, q, np.zeros((1, 2, 4), np.float32),
            variant=fc.Variant(block_mask=m),
        ),
        "count_blocks": lambda m: fc.count_blocks(
            fc.default_config(8, "float32", "cpu"), q, q, q, variant=fc.Variant(block_mask=m)
        ),
    }  # fmt: skip
    given = every_call(q)[call]
    each = calls.get(call, lambda m: given(block_mask=m))
    each(BlockMask.from_dense(np.ones((4, 4), bool)))
    lengths_ = (
        "expected one built for seqlen_q 4, seqlen_k 4, got one built for seqlen_q 5, seqlen_k 300"
    )
    for shape, says in (
        ((5, 300), f"block_mask: {re.escape(lengths_)}"),
        ((3, 1, 4, 4), "block_mask: expected (batch size 1|shape)"),
        ((1, 3, 4, 4), "block_mask: expected (number of heads 1|shape)"),
    ):
        mask = BlockMask.from_dense(np.ones(shape, bool))
        if call == "explain":
            told = each(mask)
            assert told.backend == ""
            assert any(re.match(says, why) for _, why in told.rejected), told
            continue
        with pytest.raises(fc.ArgumentError, match=f"^{says}"):
            each(mask)


def test_words_of_other_kinds_are_refused() -> None:
    """Memory that is read as what it is not."""
    q = np.ones((1, 4, 2, 8), np.float32)
    good = BlockMask.from_dense(np.ones((4, 4), bool))
    for words, says in (
        (good.words.astype(np.int64), "expected dtype int32, got int64"),
        (good.words[:3], "expected words of one dimension, at least "),
        (good.words.reshape(2, -1), "expected words of one dimension, at least "),
    ):
        with pytest.raises(fc.ArgumentError, match=f"^block_mask: {says}"):
            fc.flash_attention(q, q, q, block_mask=BlockMask(words, *good.sizes))
    with pytest.raises(fc.ArgumentError, match=r"^block_mask: expected a flashcute\.BlockMask"):
        fc.flash_attention(q, q, q, block_mask=np.ones((4, 4), bool))  # type: ignore[arg-type]
    starts = np.int32([0, 2, 4])
    with pytest.raises(fc.ArgumentError, match=r"^block_mask: expected none beside cu_seqlens_q"):
        fc.flash_attention(q[0], q[0], q[0], cu_seqlens_q=starts, block_mask=good)


@pytest.mark.gpu
def test_masks_of_another_device_are_refused() -> None:
    """Addresses of the other memory."""
    q = torch.ones(1, 4, 2, 8, dtype=torch.float16)
    mask = BlockMask.from_dense(torch.ones(4, 4, dtype=torch.bool))
    for tensor, words in ((q.cuda(), mask.words), (q, mask.words.cuda())):
        with pytest.raises(fc.ArgumentError, match=r"^block_mask: "):
            fc.flash_attention(tensor, tensor, tensor, block_mask=BlockMask(words, *mask.sizes))


TRUE = np.ones((4, 4), bool)
INTS = np.zeros((1, 4), np.int32)
BOUNDS = np.zeros((1, 1, 4, 1), np.int32)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BlockMask.from_dense([[True]]), "attn_mask: expected an array"),
        (lambda: BlockMask.from_dense(TRUE.astype(np.int8)), "attn_mask: expected dtype bool, got int8"),
        (lambda: BlockMask.from_dense(TRUE.astype(np.float32)), "attn_mask: expected dtype bool, got float32"),
        (lambda: BlockMask.from_dense(TRUE[0]), "attn_mask: expected 2 to 4 dimensions"),
        (lambda: BlockMask.from_dense(TRUE, seqlen_q=5), r"attn_mask: expected .* got shape \(1, 1, 4, 4\)"),
        (lambda: BlockMask.from_documents([1]), "documents: expected an array"),
        (lambda: BlockMask.from_documents(INTS.astype(np.int64)), "documents: expected dtype int32, got int64"),
        (lambda: BlockMask.from_documents(INTS[None]), "documents: expected 1 to 2 dimensions"),
        (lambda: BlockMask.from_documents(INTS.repeat(2, 0), INTS.repeat(3, 0)), "documents_k: expected "),
        (lambda: BlockMask.from_bounds([1], seqlen_q=4, causal=True), "bounds: expected an array"),
        (lambda: BlockMask.from_bounds(BOUNDS, seqlen_q=4, causal=False), "bounds: expected a last dimension of 2 or"),
        (lambda: BlockMask.from_bounds(BOUNDS.repeat(4, 3), seqlen_q=4, causal=True), "bounds: .* of 1 or 2"),
        (lambda: BlockMask.from_bounds(BOUNDS * 1.0, seqlen_q=4, causal=True), "bounds: expected integers"),
        (lambda: BlockMask.from_bounds(BOUNDS[0, 0, 0], seqlen_q=4, causal=True), "bounds: expected 2 to 4 dim"),
        (lambda: BlockMask.from_bounds(BOUNDS, seqlen_q=-1, causal=True), "seqlen_q: expected an integer >= 0, got -1"),
        (lambda: slices(((0, 5), (0, 4), 0)), r"slices: expected ranges within .* got \(\(0, 5\), \(0, 4\)\)"),
        (lambda: slices(((3, 2), (0, 4), 0)), "slices: expected ranges within"),
        (lambda: slices(((0, 4), (-1, 4), 0)), "slices: expected ranges within"),
        (lambda: slices(((0, 4), (0, 4), "diagonal")), "slices: expected a type of full, causal, .* got 'diagonal'"),
        (lambda: slices(((0, 4), (0, 4), 4)), "slices: expected a type of"),
        (lambda: slices((0, 4, 0)), "slices: expected .* got .0, 4, 0."),
        (lambda: BlockMask.from_cells(TRUE, seqlen_q=4, seqlen_k=4), "whole: expected 1 x 1 cells of 64 x 64"),
        (lambda: BlockMask.from_cells(INTS, seqlen_q=4, seqlen_k=4), "whole: expected dtype bool, got int32"),
        (lambda: BlockMask.from_cells(TRUE, seqlen_q=4, seqlen_k=4, cell=0), "cell: expected an integer >= 1"),
        (lambda: BlockMask.from_cells(TRUE, seqlen_q=4, seqlen_k=4, cell=(1,)), "cell: expected an integer >= 1"),
        (
            lambda: BlockMask.from_cells(TRUE, TRUE[:, :3], seqlen_q=4, seqlen_k=4, cell=1),
            "partial: expected elements for seqlen_q 4, seqlen_k 4",
        ),
        (lambda: BlockMask.from_flex(TRUE), "mask: expected a BlockMask of torch"),
        (lambda: BlockMask.from_dense(TRUE) & TRUE, "block_mask: expected a BlockMask to combine with, got ndarray"),
        (
            lambda: BlockMask.from_dense(TRUE) | BlockMask.from_dense(TRUE[:, :3]),
            "block_mask: expected a mask for seqlen_q 4, seqlen_k 4 to combine with, got one for .*seqlen_k 3",
        ),
        (
            lambda: BlockMask.from_dense(TRUE[None].repeat(2, 0)) & BlockMask.from_dense(TRUE[None].repeat(3, 0)),
            "block_mask: expected heads 1 or 2 to combine with, got 3",
        ),
    ],
)  # fmt: skip
def test_bad_sources(make: Callable[[], object], says: str) -> None:
    """A mask of something else than what was meant, or an error of NumPy's."""
    with pytest.raises(fc.ArgumentError, match=f"^{says}"):
        make()


def slices(*told: Any) -> BlockMask:
    return BlockMask.from_slices(told, seqlen_q=4, seqlen_k=4)


# ---- the reference functions -------------------------------------------------------------------------


@libraries
@pytest.mark.parametrize(
    "kinds", ["attn_mask", "documents", "block_mask", "attn_mask documents block_mask"]
)
def test_reference_functions(rng: np.random.Generator, library: str, kinds: str) -> None:
    """A reference that computes another mask than the calls; rows that see no key; blocks that are not visited."""
    p = oracle_backward.make_problem(
        rng, "float64", batch=2, seqlen_q=70, seqlen_k=90, heads=4, kv_heads=2, d=8, causal=True, with_dlse=True
    )  # fmt: skip
    dense, other = rng.random((2, 4, 70, 1)) < 0.8, rng.random((1, 1, 70, 90)) < 0.3
    numbers = tuple(np.sort(rng.integers(-1, 3, (2, n))).astype(np.int32) for n in (70, 90))
    of_oracle = {"attn_mask": dense, "documents": numbers, "block_mask": other}
    given = {
        "attn_mask": in_library(library, dense),
        "documents": tuple(in_library(library, x) for x in numbers),
        "block_mask": BlockMask.from_dense(other),  # of NumPy, whatever the others are
    }
    told = {"causal": True, "seqlens_k": in_library(library, np.int32([90, 33])), "window": (60, 9)}
    masks = {kind: given[kind] for kind in kinds.split()}
    mask = oracle.Mask(
        True, None, (60, 9), seqlens_k=(90, 33), **{kind: of_oracle[kind] for kind in kinds.split()}
    )
    problem = oracle_backward.BackwardProblem(
        p.q, p.k, p.v, p.dout, "float64", dlse=p.dlse, **{n: getattr(mask, n) for n in vars(mask)}
    )
    q, k, v, dout, dlse = (in_library(library, x) for x in (p.q, p.k, p.v, p.dout, p.dlse))
    for function in (
        reference.naive,
        reference.chunked,
        lambda *x, **o: reference.chunked(*x, block_m=16, block_n=24, **o),
    ):
        out, lse = function(q, k, v, return_lse=True, **told, **masks)
        oracle.assert_accurate(problem.forward, out, lse)
    found = reference.naive_gradients(dout, q, k, v, dlse=dlse, **told, **masks)
    oracle_backward.assert_accurate(problem, found)


@pytest.mark.parametrize("name", ["naive", "chunked", "naive_gradients"])
def test_reference_functions_refuse(name: str) -> None:
    """A bias that is taken for a mask, a mask that is stretched or dropped."""
    q = np.ones((2, 5, 2, 8))
    arrays = (q, q, q, q) if name == "naive_gradients" else (q, q, q)
    call = getattr(reference, name)
    dense = np.ones((5, 5), bool)
    for options, says in (
        ({"attn_mask": dense * 1.0}, "attn_mask: expected dtype bool, got float64"),
        ({"attn_mask": dense[:3]}, "attn_mask: expected shape"),
        ({"attn_mask": dense[0]}, "attn_mask: expected 2 to 4 dimensions"),
        ({"documents": np.zeros(4, np.int32)}, "documents: expected those of 5 queries and 5 keys, got 4 and 4"),
        ({"documents": np.zeros((3, 5), np.int32)}, "documents: expected shape"),
        ({"block_mask": dense}, "block_mask: expected a flashcute.BlockMask"),
    ):  # fmt: skip
        with pytest.raises(fc.ArgumentError, match=f"^{says}"):
            call(*arrays, **options)
    for mask in (
        {"attn_mask": dense},
        {"documents": np.zeros(5, np.int32)},
        {"block_mask": BlockMask.from_dense(dense)},
    ):
        with pytest.raises(fc.ArgumentError, match=f"^{next(iter(mask))}: expected None beside cu"):
            call(*(x[0] for x in arrays), cu_seqlens_q=np.int32([0, 5]), **mask)
