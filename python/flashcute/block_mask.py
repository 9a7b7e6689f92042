"""Masks as data: which queries see which keys, cell by cell."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import _core
from ._arrays import Array, library_of, stream_number
from ._checks import require_arrays, require_memory
from ._core import ArgumentError

Sizes = tuple[int, int, int, int]

CELL = 64  # queries, and keys, of a cell
CELLS_OF_WORD = 32
WORDS_OF_CELL = 128  # of the elements of a partial cell, in each direction
HEADER = 4  # words before the planes
# Partial cells for which there is always room, as far as a mask has so many cells: 64 MiB.
ROOM = 1 << 16

SLICE_TYPES = ("full", "causal", "inv_causal", "bi_causal")  # MagiAttention numbers them so


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Any mask for given lengths, as data that kernels read: which queries see which keys.

    The grid of queries and keys is cut into cells of 64 x 64. Of each cell two bits are kept: whether some of its
    elements are visible, and whether all are; and of the cells between, which are partial, a bit of every element. So
    the mask is exact, and cells that it hides are not computed. All of it is there twice, by query and by key: three
    quarters of a byte for each cell, and 1 KB for each partial one.

    Masks are made by the functions `from_...`, and combined by &, | and ~. They may be used by any number of calls,
    forward and backward, with tensors on the device of the arrays that they were made from. A mask of at most
    65,536 cells (16,384 x 16,384 elements) is made in one pass, with room for all cells. Larger ones are made twice:
    first without elements, to count the partial cells, then with room for those. The number is read on the host, so on
    a GPU the call waits for it.

    words: the data, int32, of the library of the arrays that it was made from (of JAX: NumPy). The first two elements
        are the numbers of partial cells, counted along the queries and along the keys.
    batch, heads: those of the calls (heads of queries), or 1: one mask for all.
    seqlen_q, seqlen_k: the lengths that the mask is for.
    """

    words: Array
    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int

    @property
    def sizes(self) -> Sizes:
        return self.batch, self.heads, self.seqlen_q, self.seqlen_k

    def __repr__(self) -> str:
        names = ("batch", "heads", "seqlen_q", "seqlen_k")
        told = ", ".join(f"{name}={size}" for name, size in zip(names, self.sizes, strict=True))
        library = type(self.words).__module__.partition(".")[0]
        return f"BlockMask({told}, {4 * self.words.shape[0]} bytes of {library})"

    # ---- sources -----------------------------------------------------------------------------------

    @staticmethod
    def from_dense(
        attn_mask: Array, *, seqlen_q: int | None = None, seqlen_k: int | None = None
    ) -> BlockMask:
        """Of a boolean array: True where the query sees the key.

        attn_mask: (seqlen_q, seqlen_k), or with (heads,) or (batch, heads) before them; any dimension may be 1, which
            stands for all. Any strides.
        seqlen_q, seqlen_k: the lengths, where the array has 1 in their place.
        """
        return make(
            attn_mask, attn_mask=attn_mask, seqlen_q=seqlen_q, seqlen_k=seqlen_k, exact=True
        )

    @staticmethod
    def from_documents(documents_q: Array, documents_k: Array | None = None) -> BlockMask:
        """Of numbers of documents: a query sees the keys of its own document.

        documents_q: (batch, seqlen_q) or (seqlen_q,), int32. One below 0 sees nothing, and is seen by none.
        documents_k: the same of the keys; default documents_q.
        """
        documents = documents_q, documents_q if documents_k is None else documents_k
        return make(documents_q, documents=documents, exact=True)

    @staticmethod
    def from_bounds(bounds: Array, *, seqlen_q: int, causal: bool) -> BlockMask:
        """Of the rows that each key is hidden from: the startend_row_indices of Paddle's flashmask_attention.

        bounds: (batch, heads, seqlen_k, 1, 2 or 4), integers; batch and heads may be 1 or left out. Heads are those of
            queries: where there is one number for each head of keys, repeat it for the queries of its group. The last
            dimension holds rows r1, r2, ... of a key, which is hidden from queries i
            - with causal=True and 1 number: from r1 on;
            - with causal=True and 2 numbers: with r1 <= i < r2;
            - with causal=False and 2 numbers: from r1 on, and before r2;
            - with causal=False and 4 numbers: with r1 <= i < r2, and with r3 <= i < r4.
        causal: whether keys after i + seqlen_k - seqlen_q are hidden as well. The mask includes that.

        A boolean array of all elements is made on the way.
        """
        require_arrays({"bounds": bounds})
        allowed = (1, 2) if causal else (2, 4)
        numbers = bounds.shape[-1] if len(bounds.shape) else 0
        if numbers not in allowed:
            raise ArgumentError(
                f"bounds: expected a last dimension of {allowed[0]} or {allowed[1]} with causal={bool(causal)}, "
                f"got shape {tuple(bounds.shape)}"
            )
        if "int" not in str(bounds.dtype):
            raise ArgumentError(f"bounds: expected integers, got {bounds.dtype}")
        bounds = with_rank(bounds, 4, "bounds", "(batch, heads, seqlen_k, numbers)")
        _require_lengths(seqlen_q=seqlen_q)
        keys = bounds.shape[2]
        query = _positions(seqlen_q, bounds)[:, None]  # (seqlen_q, 1)
        first, *others = (
            bounds[..., None, :, n] for n in range(numbers)
        )  # (batch, heads, 1, seqlen_k)
        if numbers == 4:
            second, third, fourth = others
            hidden = ((query >= first) & (query < second)) | ((query >= third) & (query < fourth))
        elif numbers == 1:
            hidden = query >= first
        elif causal:
            hidden = (query >= first) & (query < others[0])
        else:
            hidden = (query >= first) | (query < others[0])
        if causal:
            hidden = hidden | (_positions(keys, bounds) > query + (keys - seqlen_q))
        return _of_elements(~hidden, seqlen_q, keys)

    @staticmethod
    def from_slices(
        slices: Iterable[tuple[Any, Any, Any]],
        *,
        seqlen_q: int,
        seqlen_k: int,
        like: Array | None = None,
    ) -> BlockMask:
        """Of rectangles: what MagiAttention is told as q_ranges, k_ranges and attn_type_map.

        slices: ((q_begin, q_end), (k_begin, k_end), type) of each. Its queries, q_begin up to q_end without that, see
            its keys, by type:
            - "full" or 0: all of them;
            - "causal" or 1: key j if j - k_end <= i - q_end: the last query sees all, the one before it one less;
            - "inv_causal" or 2: key j if j - k_begin >= i - q_begin: the first query sees all, the next one less;
            - "bi_causal" or 3: what both of these show.
            A query sees a key if some slice says so; several are as good as one.
        like: an array of the library and on the device of the mask; default NumPy.

        A boolean array of all elements is made on the way.
        """
        if like is None:
            like = importlib.import_module("numpy").zeros(0)
        _require_lengths(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        shown = _empty((seqlen_q, seqlen_k), like)
        shown[...] = False
        for i, i_end, j, j_end, kind in map(_slice_of, slices):
            if not (0 <= i <= i_end <= seqlen_q and 0 <= j <= j_end <= seqlen_k):
                raise ArgumentError(
                    f"slices: expected ranges within seqlen_q {seqlen_q}, seqlen_k {seqlen_k}, "
                    f"got {((i, i_end), (j, j_end))}"
                )
            row = _positions(i_end - i, shown)[:, None]
            column = _positions(j_end - j, shown)[None, :]
            within = shown[i:i_end, j:j_end]
            if kind == "full":
                within[...] = True
            else:
                seen = (row >= 0) & (column >= 0)
                if kind != "inv_causal":
                    seen &= column - (j_end - j) <= row - (i_end - i)
                if kind != "causal":
                    seen &= column >= row
                within |= seen
        return _of_elements(shown, seqlen_q, seqlen_k)

    @staticmethod
    def from_cells(
        whole: Array,
        partial: Array | None = None,
        *,
        seqlen_q: int,
        seqlen_k: int,
        cell: int | tuple[int, int] = CELL,
    ) -> BlockMask:
        """Of cells of any size that are seen whole or not at all: block-sparse attention.

        whole: boolean, (rows of cells, columns of cells), or with (heads,) or (batch, heads) before them, which may be
            1: whether the queries of a cell see its keys. The last cells may reach beyond the lengths.
        partial: boolean, elements as `from_dense` takes them: what is visible beside the whole cells.
        cell: the queries and the keys of a cell, one number for both or two.

        A boolean array of all elements is made on the way.
        """
        require_arrays({"whole": whole})
        _require_lengths(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        rows, columns = _cell_of(cell)
        _require_booleans("whole", whole)
        whole = with_rank(whole, 4, "whole", "(batch, heads, rows of cells, columns of cells)")
        expected = -(-seqlen_q // rows), -(-seqlen_k // columns)
        if tuple(whole.shape[2:]) != expected:
            raise ArgumentError(
                f"whole: expected {expected[0]} x {expected[1]} cells of {rows} x {columns} for seqlen_q {seqlen_q}, "
                f"seqlen_k {seqlen_k}, got {whole.shape[2]} x {whole.shape[3]}"
            )
        shown = _elements_of_cells(whole, seqlen_q, seqlen_k, rows, columns)
        if partial is not None:
            require_arrays({"partial": partial})
            _require_booleans("partial", partial)
            partial = with_rank(partial, 4, "partial", "(batch, heads, seqlen_q, seqlen_k)")
            for own, length in zip(partial.shape[2:], (seqlen_q, seqlen_k), strict=True):
                if own not in (1, length):
                    raise ArgumentError(
                        f"partial: expected elements for seqlen_q {seqlen_q}, seqlen_k {seqlen_k}, "
                        f"got shape {tuple(partial.shape)}"
                    )
            shown = shown | partial
        return _of_elements(shown, seqlen_q, seqlen_k)

    @staticmethod
    def from_flex(mask: Any) -> BlockMask:
        """Of a BlockMask of torch.nn.attention.flex_attention.

        Its full blocks are seen whole, of its partial ones what its mask_mod shows, and no others, whatever mask_mod
        says of them. Lengths need not be multiples of its blocks. mask_mod is asked for as many batch entries and heads
        as the mask has blocks for: where it has one for all, for the first.

        A boolean array of all elements is made on the way. The number of partial blocks is read on the host.
        """
        if not (hasattr(mask, "kv_num_blocks") and hasattr(mask, "mask_mod")):
            raise ArgumentError(
                "mask: expected a BlockMask of torch.nn.attention.flex_attention, got "
                f"{type(mask).__module__}.{type(mask).__qualname__}"
            )
        seqlen_q, seqlen_k = mask.seq_lengths
        rows, columns = mask.BLOCK_SIZE
        lengths = seqlen_q, seqlen_k, rows, columns
        partial = _cells_of_flex(mask.kv_num_blocks, mask.kv_indices, *lengths)
        whole = partial & False
        if mask.full_kv_num_blocks is not None:
            whole = _cells_of_flex(mask.full_kv_num_blocks, mask.full_kv_indices, *lengths)
        shown = _elements_of_cells(whole, *lengths)
        # Not asked in vain: the rule of a mask that was indexed raises.
        if bool(partial.any()):
            flex = importlib.import_module("torch.nn.attention.flex_attention")
            batch, heads = partial.shape[:2]
            rule = flex.create_mask(mask.mask_mod, batch, heads, seqlen_q, seqlen_k, partial.device)
            shown = shown | (_elements_of_cells(partial, *lengths) & (rule != 0))
        return _of_elements(shown, seqlen_q, seqlen_k)

    # ---- combinations ------------------------------------------------------------------------------

    def __and__(self, other: BlockMask) -> BlockMask:
        """What both show."""
        return combined(self, other, "both")

    def __or__(self, other: BlockMask) -> BlockMask:
        """What one of them shows."""
        return combined(self, other, "either")

    def __invert__(self) -> BlockMask:
        """What it hides."""
        everything = _built(self.words, self.sizes, room=0)  # no cell of it is partial
        return combined(everything, self, "first_only")

    # ---- what a mask shows ---------------------------------------------------------------------------

    def to_dense(self) -> Array:
        """Boolean, (batch, heads, seqlen_q, seqlen_k), of the library and on the device of the words: True where the
        query sees the key. For tests and pictures: it takes several times the memory of its result, and reads two
        numbers on the host."""
        rows, columns = -(-self.seqlen_q // CELL), -(-self.seqlen_k // CELL)
        some, whole, first = self._planes()
        partial = _bits(some & ~whole)
        number = first[..., None] + partial.cumsum(-1) - 1  # of those that are partial
        partial, number, whole_ = (
            x.reshape((x.shape[0], rows, x.shape[2] * CELLS_OF_WORD))[..., :columns]
            for x in (partial, number, _bits(whole))
        )
        cells = _empty((*partial.shape, CELL, CELL), self.words)
        cells[...] = whole_[..., None, None]
        capacity, wanted = self._capacity, int(self.words[0])
        if wanted > capacity:
            raise ArgumentError(
                f"block_mask: expected words with room for its {wanted} partial cells, got room for {capacity}"
            )
        begin = self.words.shape[0] - 2 * capacity * WORDS_OF_CELL
        elements = self.words[begin : begin + capacity * WORDS_OF_CELL]
        if wanted:
            elements = elements.reshape((capacity, CELL, 2))[number[partial]]
            cells[partial] = _bits(elements).reshape((-1, CELL, CELL))
        shape = self.batch, self.heads, rows * CELL, columns * CELL
        return cells.swapaxes(2, 3).reshape(shape)[..., : self.seqlen_q, : self.seqlen_k]

    def counts(self) -> tuple[int, int, int]:
        """How many cells of 64 x 64, of all batch entries and heads that the mask tells apart, are visible as a whole,
        in part, and not at all. The numbers are read on the host: on a GPU the call waits for them."""
        some, whole, _ = self._planes()
        all_, any_ = (
            sum(int(((plane >> n) & 1).sum()) for n in range(CELLS_OF_WORD))
            for plane in (whole, some)
        )
        return all_, any_ - all_, _count_cells(self.sizes) - any_

    def _planes(self) -> tuple[Array, Array, Array]:
        """By query, (maps, rows of cells, words): bits of cells of which some and all elements are visible, and the
        number of the first partial cell of each word. As BlockMapLayout in core/block_map.hpp."""
        maps = self.batch * self.heads
        rows = -(-self.seqlen_q // CELL)
        words = -(-self.seqlen_k // (CELL * CELLS_OF_WORD))
        size = maps * rows * words
        some, whole, first = (
            self.words[begin : begin + size].reshape((maps, rows, words))
            for begin in (HEADER, HEADER + size, HEADER + 2 * size)
        )
        return some, whole, first

    @property
    def _capacity(self) -> int:
        """How many partial cells there is room for."""
        return int(capacity_of(self.words.shape[0], self.sizes))


def combined(a: BlockMask, b: BlockMask, operation: str) -> BlockMask:
    if not isinstance(b, BlockMask):
        raise ArgumentError(
            f"block_mask: expected a BlockMask to combine with, got {type(b).__qualname__}"
        )
    for what, x, y in (("batch", a.batch, b.batch), ("heads", a.heads, b.heads)):
        if x != y and 1 not in (x, y):
            raise ArgumentError(f"block_mask: expected {what} 1 or {x} to combine with, got {y}")
    if a.sizes[2:] != b.sizes[2:]:
        raise ArgumentError(
            f"block_mask: expected a mask for seqlen_q {a.seqlen_q}, seqlen_k {a.seqlen_k} to combine with, "
            f"got one for seqlen_q {b.seqlen_q}, seqlen_k {b.seqlen_k}"
        )
    sizes = _common(a.batch, b.batch), _common(a.heads, b.heads), a.seqlen_q, a.seqlen_k
    first, second = (a.words, a.sizes), (b.words, b.sizes)
    return _built(a.words, sizes, exact=True, first=first, second=second, operation=operation)


def make(
    like: Array,
    *,
    attn_mask: Array | None = None,
    documents: tuple[Array, Array] | None = None,
    block_mask: BlockMask | None = None,
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
    stream: object = None,
    exact: bool = False,
) -> BlockMask:
    """The mask that shows what all that is given shows.

    like: an array of the library and on the device of the mask's words.
    seqlen_q, seqlen_k: the lengths; default those of the arrays.
    exact: whether there is room for as many partial cells as there are, which are counted on the host if the mask is
        large. Otherwise nothing is read on the host: with `attn_mask` there is room for all cells, and for documents
        alone for 65,536 (64 MiB) or 2 % of the cells, if that is more. Documents whose numbers alternate may have more
        partial cells: then the results of all calls with the mask are NaN. With exact=True they fit.
    """
    shapes: list[tuple[int, ...]] = []
    parts: dict[str, Any] = {}
    if attn_mask is not None:
        require_arrays({"attn_mask": attn_mask})
        dense = with_rank(attn_mask, 4, "attn_mask", "(batch, heads, seqlen_q, seqlen_k)")
        _require_booleans("attn_mask", dense)
        shapes.append(tuple(dense.shape))
        parts["dense"] = dense
    if documents is not None:
        require_arrays({"documents": documents[0]})
        require_arrays({"documents": documents[1]})
        queries, keys = (
            library_of(type(x)).with_unit_stride(with_rank(x, 2, "documents", "(batch, seqlen)"))
            for x in documents
        )
        batch = _common(queries.shape[0], keys.shape[0])
        shapes.append((batch, 1, queries.shape[1], keys.shape[1]))
        parts["documents_q"], parts["documents_k"] = queries, keys
    if block_mask is not None:
        shapes.append(block_mask.sizes)
        parts["first"] = block_mask.words, block_mask.sizes
    batch, heads, rows, keys_ = (
        next((shape[i] for shape in shapes if shape[i] != 1), 1) for i in range(4)
    )
    sizes = (
        batch,
        heads,
        rows if seqlen_q is None else seqlen_q,
        keys_ if seqlen_k is None else seqlen_k,
    )
    first = parts.get("first")
    room = (
        None
        if exact
        else room_for(
            sizes,
            attn_mask="dense" in parts,
            documents="documents_q" in parts,
            first=None if first is None else (first[0].shape[0], first[1]),
        )
    )
    return _built(like, sizes, room=room, exact=exact, stream=stream, **parts)


def with_rank(array: Array, rank: int, name: str, dimensions: str) -> Array:
    """The array with dimensions of size 1 before its own: `attn_mask` and documents may leave out the first ones."""
    missing, fewest = rank - len(array.shape), rank // 2
    if not 0 <= missing <= fewest:
        raise ArgumentError(
            f"{name}: expected {fewest} to {rank} dimensions, the last of {dimensions}, got {len(array.shape)}"
        )
    return array[(None,) * missing] if missing else array


# ---- the size of the words -------------------------------------------------------------------------
#
# As `_core.block_mask_size` has it, of numbers that may be symbols: a trace has to know how many words an operator
# returns.


def words_size(sizes: Any, partial_cells: Any) -> Any:
    """With room for so many partial cells."""
    batch, heads, seqlen_q, seqlen_k = sizes
    rows, columns = _ceil_div(seqlen_q, CELL), _ceil_div(seqlen_k, CELL)
    of_rows = rows * _ceil_div(columns, CELLS_OF_WORD)
    of_columns = columns * _ceil_div(rows, CELLS_OF_WORD)
    planes = 3 * batch * heads * (of_rows + of_columns)
    return 4 + 4 * _ceil_div(planes, 4) + 2 * WORDS_OF_CELL * partial_cells


def room_for(
    sizes: Any,
    *,
    attn_mask: bool,
    documents: bool,
    first: tuple[Any, Any] | None = None,
    smaller: Callable[[Any, Any], Any] = min,
    larger: Callable[[Any, Any], Any] = max,
) -> Any:
    """For how many partial cells the words have room: all that there can be. Of documents, which are partial along the
    diagonal alone, many cells cannot be, unless their numbers alternate. first: how many words a block mask has, and
    its sizes: a cell is partial only if it is so by the documents or by that mask."""
    cells = _count_cells(sizes)
    if attn_mask:
        return cells
    room = larger(ROOM, cells // 50) if documents else 0
    if first is not None:
        words, own = first
        # It may serve several entries and heads.
        room = room + capacity_of(words, own) * _ceil_div(cells, larger(_count_cells(own), 1))
    return smaller(room, cells)


def capacity_of(words: Any, sizes: Any) -> Any:
    """For how many partial cells so many words have room."""
    return (words - words_size(sizes, 0)) // (2 * WORDS_OF_CELL)


def _count_cells(sizes: Any) -> Any:
    batch, heads, seqlen_q, seqlen_k = sizes
    return batch * heads * _ceil_div(seqlen_q, CELL) * _ceil_div(seqlen_k, CELL)


def _ceil_div(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


# ---- words -------------------------------------------------------------------------------------------


def _built(
    like: Array,
    sizes: Sizes,
    *,
    room: int | None = None,
    exact: bool = False,
    stream: object = None,
    **parts: Any,
) -> BlockMask:
    """The mask of some parts, as _core.build_block_mask takes them.

    room: for how many partial cells; default all.
    exact: if room for all would take more than 64 MiB, count them and make room for as many as there are.
    """
    arrays = {"block_mask": like, **{k: x for k, x in parts.items() if hasattr(x, "__dlpack__")}}
    require_memory(**arrays)
    library = library_of(type(like))
    address = None if stream is None else stream_number(stream)

    def build(room: int | None) -> Array:
        words = library.empty((_core.block_mask_size(sizes, room),), like, "int32")
        _core.build_block_mask(words, sizes, stream=address, **parts)
        return words

    if exact and _count_cells(sizes) > ROOM:
        room = int(build(0)[:2].max())
    return BlockMask(build(room), *sizes)


def _common(a: int, b: int) -> int:
    """A dimension of two arrays, 1 standing for all."""
    return b if a == 1 else a


# ---- elements ----------------------------------------------------------------------------------------


def _of_elements(shown: Array, seqlen_q: int, seqlen_k: int) -> BlockMask:
    """Of a boolean array that was computed from the caller's."""
    return BlockMask.from_dense(shown, seqlen_q=seqlen_q, seqlen_k=seqlen_k)


def _empty(shape: tuple[int, ...], like: Array) -> Array:
    """A boolean array to fill."""
    return library_of(type(like)).empty(shape, like, "bool")


def _positions(n: int, like: Array) -> Array:
    """0, 1, ... n - 1, of the library and on the device of `like`."""
    ones = library_of(type(like)).empty((n,), like, "int32")
    ones[...] = 1
    return ones.cumsum(0) - 1


def _bits(words: Array) -> Array:
    """Of integers of 32 bits, from the lowest bit on: (..., 32), boolean."""
    return (words[..., None] >> _positions(CELLS_OF_WORD, words)) & 1 == 1


def _elements_of_cells(
    cells: Array, seqlen_q: int, seqlen_k: int, rows: int, columns: int
) -> Array:
    """Boolean cells of rows x columns elements as elements."""
    of_queries, of_keys = (
        _positions(n, cells) // size for n, size in ((seqlen_q, rows), (seqlen_k, columns))
    )
    return cells[..., of_queries, :][..., of_keys]


def _cells_of_flex(
    num_blocks: Any, indices: Any, seqlen_q: int, seqlen_k: int, rows: int, columns: int
) -> Any:
    """Which blocks lists of torch's BlockMask name: boolean, (batch, heads, rows of blocks, columns of blocks). What
    lies behind the end of a list has no meaning."""
    while len(indices.shape) < 4:
        num_blocks, indices = num_blocks[None], indices[None]
    height, width = -(-seqlen_q // rows), -(-seqlen_k // columns)
    if indices.shape[2] != height:
        raise ArgumentError(
            f"mask: expected {height} rows of blocks of {rows} queries for seqlen_q {seqlen_q}, got "
            f"{indices.shape[2]}. If it was indexed along the queries, take the rows from the result of the whole mask"
        )
    listed = _positions(indices.shape[3], indices) < num_blocks[..., None]
    cells = _empty((*indices.shape[:3], width + 1), indices)
    cells[...] = False
    # All that is not listed goes to a column that is cut off.
    at = indices.long().masked_fill(~listed, width)
    return cells.scatter(-1, at, True)[..., :width]


def _require_booleans(name: str, array: Array) -> None:
    if not str(array.dtype).endswith("bool"):
        raise ArgumentError(
            f"{name}: expected dtype bool, got {str(array.dtype).rpartition('.')[2]}"
        )


def _require_lengths(**lengths: object) -> None:
    for name, length in lengths.items():
        if not hasattr(length, "__index__") or length.__index__() < 0:
            raise ArgumentError(f"{name}: expected an integer >= 0, got {length!r}")


def _cell_of(cell: object) -> tuple[int, int]:
    """The queries and the keys of a cell."""
    sizes = (cell, cell) if isinstance(cell, int) else cell
    if not (
        isinstance(sizes, tuple)
        and len(sizes) == 2
        and all(isinstance(n, int) and n >= 1 for n in sizes)
    ):
        raise ArgumentError(f"cell: expected an integer >= 1 or two of them, got {cell!r}")
    return sizes


def _slice_of(told: object) -> tuple[int, int, int, int, str]:
    """The ranges of its queries and of its keys, and its type."""
    given: Any = told
    try:
        queries, keys, kind = given
        i, i_end = map(int, queries)
        j, j_end = map(int, keys)
    except (TypeError, ValueError):
        raise ArgumentError(
            f"slices: expected ((q_begin, q_end), (k_begin, k_end), type) of each, got {told!r}"
        ) from None
    kind = getattr(kind, "value", kind)  # of MagiAttention's enum
    if not isinstance(kind, str) and kind in range(len(SLICE_TYPES)):
        kind = SLICE_TYPES[int(kind)]
    if kind not in SLICE_TYPES:
        raise ArgumentError(
            f"slices: expected a type of {', '.join(SLICE_TYPES)} or 0 to {len(SLICE_TYPES) - 1}, got {kind!r}"
        )
    return i, i_end, j, j_end, kind
