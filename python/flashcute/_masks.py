"""attn_mask and documents, which say by element what a query sees, as the block mask that kernels read.

Here their shapes are checked against those of a call, in which dimensions of size 1 stand for all; what is checked is
also what the operators of torch are given.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

from . import _core
from ._arrays import CPU, CUDA, CUDA_HOST, CUDA_MANAGED, Array, Library, library_of, stream_number
from ._call import Options, require_grid, rows_of_heads
from ._checks import require_arrays, require_memory
from ._core import ArgumentError
from .block_mask import BlockMask, Sizes, make

# (batch, seqlen) of queries and keys, or one of both.
Documents = Any


class Rules(NamedTuple):
    """What the block mask of a call is made from."""

    attn_mask: Array | None  # 4 dimensions: those of the call, or 1
    documents: tuple[Array, Array] | None  # (batch or 1, seqlen_q), (batch or 1, seqlen_k)
    block_mask: BlockMask | None
    sizes: Sizes  # of the result: 1 in place of the batch or the heads where all have the same mask


def arrays_of(attn_mask: Array | None, documents: Documents | None) -> dict[str, Array]:
    """The arrays that are given, by what a caller would call them."""
    found = {} if attn_mask is None else {"attn_mask": attn_mask}
    if documents is not None:
        pair = isinstance(documents, tuple | list)
        found |= (
            {f"documents[{i}]": x for i, x in enumerate(documents)}
            if pair
            else {"documents": documents}
        )
    return found


def with_masks(
    options: Options,
    q: Array,
    k: Array,
    v: Array,
    attn_mask: Array | None = None,
    documents: Documents | None = None,
    *,
    build: bool = True,
) -> Options:
    """The options of a call with a block mask that shows what attn_mask, documents and their own block mask all show.
    It is made on the call's stream; without `build`, for who only asks, nothing is launched and no mask is in it.

    Raises ArgumentError for what does not fit q and k; the rest of them is checked in the call.
    """
    if attn_mask is None and documents is None:
        return options
    require_grid(options, attn_mask, documents)
    given = arrays_of(attn_mask, documents)
    arrays = {"q": q, "k": k, "v": v, **given}
    require_arrays(arrays)
    require_memory(**arrays)
    if not len(q.shape) == len(k.shape) == 4:
        _core.check_problem(q, k, v, options)  # raises
    row = 1 if options.layout == "bshd" else 2
    rules = checked_rules(
        attn_mask, documents, options, (*rows_of_heads(q, options.layout), k.shape[row])
    )
    place = _device(q)
    for name, x in given.items():
        if _device(x) != place:
            raise ArgumentError(
                f"{name}: expected an array on q's device {_said(place)}, got one on {_said(_device(x))}"
            )
    library = library_of(type(q))
    if type(library) is Library:
        raise ArgumentError(
            f"{next(iter(given))}: expected None beside arrays of {type(q).__module__}, of which flashcute cannot make "
            "new ones, got an array. Pass block_mask=, made from arrays of another library"
        )
    if not build:
        words = library.empty((_core.block_mask_size(rules.sizes, 0),), q, "int32")
        return options._replace(block_mask=words, block_mask_sizes=rules.sizes)
    address = None if options.stream is None else stream_number(options.stream)
    used = [q, *given.values(), *([] if options.block_mask is None else [options.block_mask])]
    with nullcontext() if address is None else library.use_stream(address, used):
        made = make(
            q,
            attn_mask=rules.attn_mask,
            documents=rules.documents,
            block_mask=rules.block_mask,
            seqlen_q=rules.sizes[2],
            seqlen_k=rules.sizes[3],
            stream=address,
        )
    return options._replace(block_mask=made.words, block_mask_sizes=made.sizes)


def _device(array: Array) -> tuple[int, int]:
    """Where kernels find the array: (kind, number)."""
    kind, number = array.__dlpack_device__()
    same = {CUDA_HOST: CPU, CUDA_MANAGED: CUDA}
    kind = same.get(int(kind), int(kind))
    return (kind, 0) if kind == CPU else (kind, int(number))


def _said(device: tuple[int, int]) -> str:
    kind, number = device
    return {CPU: "cpu", CUDA: f"cuda:{number}"}.get(kind, f"{number} of DLPack's kind {kind}")


# ---- shapes ----------------------------------------------------------------------------------------
#
# Sizes may be symbols of torch.compile. Not `have in (1, want)`: Dynamo traces it as False where want is a symbol,
# whatever that stands for.


def checked_rules(
    attn_mask: Array | None, documents: Documents | None, options: Options, whole: Sizes
) -> Rules:
    """What is given, with dimensions for all that it may depend on. whole: the sizes of the call."""
    batch, heads, rows, keys = whole
    dense = None if attn_mask is None else checked_dense(attn_mask, whole)
    pair = None if documents is None else checked_documents(documents, whole)
    mask = checked_block_mask_sizes(options, whole)
    own: list[tuple[int, int]] = []  # the batch and heads of each
    if dense is not None:
        own.append((dense.shape[0], dense.shape[1]))
    if pair is not None:
        own += [(x.shape[0], 1) for x in pair]
    if mask is not None:
        own.append((mask.batch, mask.heads))
    sizes = (
        batch if any(one[0] != 1 for one in own) else 1,
        heads if any(one[1] != 1 for one in own) else 1,
        rows,
        keys,
    )
    return Rules(dense, pair, mask, sizes)


def checked_dense(attn_mask: Array, whole: Sizes) -> Array:
    """With 4 dimensions."""
    missing = 4 - len(attn_mask.shape)
    fits = missing >= 0 and all(
        have == 1 or have == want
        for have, want in zip(attn_mask.shape, whole[missing:], strict=True)
    )
    if not fits:
        raise ArgumentError(
            f"attn_mask: expected a shape that broadcasts to (batch, heads, seqlen_q, seqlen_k) = {tuple(whole)}, got "
            f"{tuple(attn_mask.shape)}"
        )
    return attn_mask[(None,) * missing] if missing else attn_mask


def checked_documents(documents: Documents, whole: Sizes) -> tuple[Array, Array]:
    """Those of queries and those of keys, with 2 dimensions, the last stride 1."""
    batch, _, rows, keys = whole
    pair = isinstance(documents, tuple | list)
    if pair and len(documents) != 2:
        raise ArgumentError(
            f"documents: expected an array, or a pair (of queries, of keys), got {len(documents)} arrays"
        )
    if not pair and rows != keys:
        raise ArgumentError(
            f"documents: expected a pair (of queries, of keys) where seqlen_q {rows} and seqlen_k {keys} differ, got "
            "one array"
        )
    queries, of_keys = documents if pair else (documents, documents)
    first, second = ("documents[0]", "documents[1]") if pair else ("documents", "documents")
    return (
        _checked_numbers(first, queries, batch, rows, "seqlen_q"),
        _checked_numbers(second, of_keys, batch, keys, "seqlen_k"),
    )


def _checked_numbers(name: str, numbers: Array, batch: int, length: int, what: str) -> Array:
    shape = tuple(numbers.shape)
    fits = 1 <= len(shape) <= 2 and shape[-1] == length
    if fits and len(shape) == 2:
        fits = shape[0] == 1 or shape[0] == batch
    dtype = str(numbers.dtype).rpartition(".")[2]
    if not fits or dtype != "int32":
        raise ArgumentError(
            f"{name}: expected int32 (batch, {what}) = ({batch}, {length}) or ({length},), got {dtype} {shape}"
        )
    if len(shape) == 1:
        numbers = numbers[None]
    return library_of(type(numbers)).with_unit_stride(numbers)


def checked_block_mask_sizes(options: Options, whole: Sizes) -> BlockMask | None:
    """The block mask of the options."""
    if options.block_mask is None or options.block_mask_sizes is None:
        return None
    mask = BlockMask(options.block_mask, *options.block_mask_sizes)
    batch, heads, rows, keys = whole
    if mask.seqlen_q != rows or mask.seqlen_k != keys:
        raise ArgumentError(
            f"block_mask: expected one built for seqlen_q {rows}, seqlen_k {keys}, got one built for seqlen_q "
            f"{mask.seqlen_q}, seqlen_k {mask.seqlen_k}. Build it for these sizes"
        )
    for what, own, of_all in (
        ("batch size", mask.batch, batch),
        ("number of heads", mask.heads, heads),
    ):
        if own != 1 and own != of_all:
            raise ArgumentError(f"block_mask: expected {what} 1 or q's {of_all}, got {own}")
    return mask
