"""What a call would do, and what it did."""

from __future__ import annotations

from typing import Any

from . import _core
from ._arrays import Array, Torch, library_of, stream_number
from ._call import (
    Options,
    checked_fallback,
    checked_options,
    missing_feature,
    replaced,
    require_torch_to_record,
    require_unrecorded,
    rows_of_heads,
    same_bits,
    unsupported,
    with_copies,
)
from ._checks import require_arrays, require_memory, require_mutable
from ._core import ArgumentError, Explanation, ForwardConfig, UnsupportedError
from ._masks import Documents, arrays_of, with_masks
from .block_mask import BlockMask, room_for, words_size
from .variant import Variant, options_of, with_masks_of


def explain(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    cfg: ForwardConfig | None = None,
    gradients: bool = False,
    diagonal: str | int = "end",
    scale: float | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Array | None = None,
    stream: object = None,
    allow_tf32: bool = False,
    deterministic: bool | None = None,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Array | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: object = None,
    max_seqlen_k: object = None,
    documents: Documents | None = None,
    block_mask: BlockMask | None = None,
    sink: Array | None = None,
    variant: Variant | None = None,
    on_unsupported: str | None = None,
) -> Explanation:
    """What `flash_attention` (or `forward` with `cfg`) would run for these arguments, and why. Launches nothing.

    cfg, variant: what `forward` would be given; without cfg no variant.
    gradients: also tell how `backward` with the default configuration computes gradients. Where torch records them
        (requires_grad=True), it is told anyway.

    The other arguments are those of `flash_attention`.

    Returns an Explanation: the backend, the configuration, the kernel and where its image comes from; `reasons`, why
    these were chosen; `rejected`, for every other backend and ahead-of-time configuration the reason why it was not
    taken; and `notes`, what else the call will do or cost. print() shows it, with what was not taken grouped by reason.
    `gradients` is None, or a BackwardExplanation: the same of the gradients, with the size of their workspace, and
    whether all runs give the same bits.

    If no backend can run the call, `backend` is '' and `rejected` says why. If torch's own attention would be called,
    `backend` is 'torch', and `notes` says how much memory it needs. Raises ArgumentError only for arguments that cannot
    be described at all: no DLPack, a dtype that no kernel could have, an option that is wrong for any tensors.
    """
    options = checked_options(
        causal, diagonal, scale, layout, stream, allow_tf32, deterministic, window,
        prefix, seqlens_q, seqlens_k, sink, cu_seqlens_q, cu_seqlens_k, block_mask,
    )  # fmt: skip
    if variant is not None:
        parts = (
            window, prefix, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k, attn_mask, documents, block_mask, sink,
        )  # fmt: skip
        if causal is not False or diagonal != "end" or any(part is not None for part in parts):
            raise ArgumentError(
                "variant: expected None beside causal, diagonal, window, prefix, seqlens_q, seqlens_k, cu_seqlens_q, "
                "cu_seqlens_k, attn_mask, documents, block_mask and sink, which are its parts"
            )
        options = _options_of_variant(variant, cfg, options)
        attn_mask, documents = variant.attn_mask, variant.documents
    options = options._replace(gradients_follow=bool(gradients))
    missing = missing_feature(attn_mask, dropout_p, options, documents)
    if cfg is not None and missing:
        raise ArgumentError(f"cfg: expected None, as only flash_attention takes it: {missing}")
    given = options.arrays | arrays_of(attn_mask, documents)
    require_memory(q=q, k=k, v=v, **given)
    library = library_of(type(q))
    fallback = checked_fallback(on_unsupported, library)
    if isinstance(library, Torch) and cfg is None:
        from . import _torch

        problem = _torch.Problem(q, k, v, options, attn_mask, dropout_p, documents)
        return _torch.explained(problem, out, return_lse, fallback)
    arrays = {"q": q, "k": k, "v": v, **given}
    if out is not None:
        arrays["out"] = out
    require_arrays(arrays)
    address = stream_number(stream)
    options = options._replace(stream=None, deterministic=same_bits(deterministic))
    found = _core.explain(cfg, q, k, v, out, options)
    try:
        if not missing and (attn_mask is not None or documents is not None):
            found = explained_with_masks(
                q, k, v, out, options, cfg=cfg, attn_mask=attn_mask, documents=documents
            )
        if cfg is None:
            require_torch_to_record(**arrays)
        else:
            require_unrecorded(**arrays)
        if missing:
            raise UnsupportedError(missing)
        if out is not None:
            require_mutable("out", out)
        if address is not None:
            library.require_stream(address, list(arrays.values()))
    except (ArgumentError, UnsupportedError) as error:
        return unsupported(found, str(error))
    return with_copies(found, q, v)


def explained_with_masks(
    q: Array,
    k: Array,
    v: Array,
    out: Array | None,
    options: Options,
    *,
    cfg: ForwardConfig | None = None,
    attn_mask: Array | None,
    documents: Documents | None,
) -> Explanation:
    """What a call with masks by element runs, of which none is made."""
    asked = with_masks(options, q, k, v, attn_mask, documents, build=False)
    found = _core.explain(cfg, q, k, v, out, asked)
    if not found.backend:
        return found
    given = options.block_mask
    first = None if given is None else (given.shape[0], options.block_mask_sizes)
    sizes = asked.block_mask_sizes
    room = room_for(
        sizes, attn_mask=attn_mask is not None, documents=documents is not None, first=first
    )
    size = 4 * words_size(sizes, room)
    names = " and ".join(
        name for name, x in (("attn_mask", attn_mask), ("documents", documents)) if x is not None
    )
    note = f"A block mask of up to {size} bytes is made of {names} in each call."
    return replaced(found, notes=[*found.notes, note])


def _options_of_variant(variant: Variant, cfg: ForwardConfig | None, options: Options) -> Options:
    """`options` with what `variant` says."""
    if cfg is None:
        raise ArgumentError(
            "variant: expected None without cfg: flash_attention takes its parts as arguments"
        )
    given = options_of(variant, False, options.scale, options.layout, options.stream)
    return given._replace(allow_tf32=options.allow_tf32, deterministic=options.deterministic)


def count_blocks(
    cfg: ForwardConfig,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    variant: Variant | None = None,
    layout: str = "bshd",
) -> Any:
    """Debug mode of `forward`: what each tile of query rows did with the K/V blocks of its sequence.

    Runs the kernel of `cfg` in a variant that counts (on a GPU NVRTC compiles it at the first call).

    causal, variant, layout: those of `forward`.

    Returns an int32 array (batch, heads, tiles, 3) of q's library and device. Its last dimension counts the blocks of
    cfg.block_n keys that were (0) visited with all elements visible, (1) visited with a test of each element,
    (2) skipped. A tile is cfg.block_m * cfg.cluster query rows. If one is incomplete, it is the last, on a GPU
    with kernel='sm90' the first. Packed sequences: (heads, slots, 3), with total_q // tile + n + 2 slots for tiles;
    sequence i has those from cu_seqlens_q[i] // tile + i + 1 on, and slots without rows are 0.
    """
    if not isinstance(cfg, ForwardConfig):
        raise ArgumentError(f"cfg: expected a ForwardConfig, got {type(cfg).__qualname__}")
    require_arrays({"q": q, "k": k, "v": v})
    require_memory(q=q, k=k, v=v)
    options = options_of(variant, causal, None, layout)
    require_arrays(options.arrays)
    require_memory(**options.arrays)
    _core.check_problem(q, k, v, options)
    options = with_masks_of(variant, options, q, k, v)
    library = library_of(type(q))
    *heads, rows = rows_of_heads(q, layout)
    on_cpu = q.__dlpack_device__()[0] == 1  # kDLCPU, where clusters are no option
    tile = max(cfg.block_m if on_cpu else cfg.block_m * cfg.cluster, 1)
    tiles = -(-rows // tile)
    starts: Any = options.cu_seqlens_q
    if starts is not None:
        tiles = rows // tile + starts.shape[0] + 1 if rows > 0 else 0
    out = library.empty((*q.shape[:-1], v.shape[-1]), q)
    counts = library.empty((*heads, tiles, 3), q, "int32")
    if starts is not None:
        counts[...] = 0  # where no tile is, nobody writes
    _core.forward(cfg, q, k, v, out, None, counts, options)
    return library.finish(counts, q)
