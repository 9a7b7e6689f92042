"""How the operators compute of DTensors: each rank its own part of the batch or of the heads, without communication."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from .._core import UnsupportedError
from .framework import torch


class Sharding(NamedTuple):
    """How the tensors of a call lie over the ranks of one dimension of the mesh."""

    rows: Any  # q, out and their gradients
    keys: Any  # k and v
    dkeys: Any  # their gradients
    lse: Any
    lengths: Any  # seqlens_q, seqlens_k, prefixes
    sink: Any
    dsink: Any
    mask: Any  # words of a block mask, of which each rank reads all


def shardings_of(q: Any, k: Any, v: Any, layout: str) -> list[Sharding]:
    """For each dimension of the mesh, from the specs that DTensor has of q, k and v. Raises UnsupportedError for
    placements of which no rank could compute its part alone."""
    shard, replicate, partial = _placements()
    heads, row = (-2, -3) if layout == "bshd" else (-3, -2)
    heads, row = heads + q.ndim, row + q.ndim
    packed = q.ndim == 3  # without a batch
    every = replicate()
    all_of_it = every, every, every, every  # lengths, sink and its gradient, masks
    whole = Sharding(replicate(), replicate(), replicate(), replicate(), *all_of_it)
    # Each rank needs all of the sink for its part of the batch, and has a part of the sum that is its gradient.
    of_entries = shard(0), every, partial(), every
    of_batch = Sharding(shard(0), shard(0), shard(0), shard(0), *of_entries)
    its_heads = every, shard(0), shard(0), every
    lse = shard(0 if packed else 1)
    of_heads = Sharding(shard(heads), shard(heads), shard(heads), lse, *its_heads)
    # With a single key head each rank needs all of k and v, and has a part of the sum that is their gradient.
    of_queries = Sharding(shard(heads), replicate(), partial(), lse, *its_heads)
    multi_query = k.shape[heads] == 1

    found = []
    for dim, placement in enumerate(q.placements):
        known = {(replicate, None): whole, (shard, heads): of_queries if multi_query else of_heads}
        if not packed:
            known[shard, 0] = of_batch
        sharding = known.get((type(placement), getattr(placement, "dim", None)))
        if sharding is None:
            raise UnsupportedError(_misplaced("q", placement, row, packed))
        found.append(sharding)
        for name, spec in (("k", k), ("v", v)):
            expected, got = sharding.keys, spec.placements[dim]
            if got.is_partial() or got == shard(row):
                raise UnsupportedError(_misplaced(name, got, row, packed))
            if got != expected:
                why = " and a single key head" if multi_query else ""
                raise UnsupportedError(
                    f"{name}: expected the placement {expected!r} beside q's {placement!r}{why}, got {got!r} "
                    f"(dimension {dim} of the mesh): {name}.redistribute(placements=...) moves it"
                )
    _require_parts(q.shape[0], [q.mesh.size(i) for i, s in enumerate(found) if s is of_batch])
    by_heads = [q.mesh.size(i) for i, s in enumerate(found) if s in (of_heads, of_queries)]
    _require_heads(q.shape[heads] if multi_query else k.shape[heads], by_heads, multi_query)
    return found


def _placements() -> tuple[Any, Any, Any]:
    tensor = import_module("torch.distributed.tensor")
    return tensor.Shard, tensor.Replicate, tensor.Partial


def _misplaced(name: str, placement: Any, row: int, packed: bool) -> str:
    dim = getattr(placement, "dim", None)
    over = "the heads" if packed else "the batch or the heads"
    allowed = f"expected a DTensor that is replicated, or sharded over {over}, got {placement!r}"
    if placement.is_partial():
        return f"{name}: {allowed}, of which each rank has a summand. Sum it: {name}.redistribute(placements=...)"
    if dim == row:
        return (
            f"{name}: {allowed}, the sequence. That needs context parallelism, which is not supported yet: gather the "
            f"sequence first, {name}.redistribute(placements=...)"
        )
    return f"{name}: {allowed}. Pass {name}.redistribute(placements=...)"


def _require_parts(batch: Any, ranks: list[int]) -> None:
    if batch < math.prod(ranks):
        raise UnsupportedError(
            f"q, k, v: expected a batch of at least one for each of the {math.prod(ranks)} ranks over which it is "
            f"sharded, got {batch}"
        )


def _require_heads(heads: Any, ranks: list[int], multi_query: bool) -> None:
    if heads % math.prod(ranks):
        whose = "query" if multi_query else "key"
        raise UnsupportedError(
            f"q, k, v: expected a number of {whose} heads that is a multiple of the {math.prod(ranks)} ranks over "
            f"which heads are sharded, got {heads}. Replicate them, q.redistribute(placements=...)"
        )


# What DTensor asks: outputs and inputs of one dimension of the mesh. It combines them for all dimensions, and takes the
# first of those that move least. Only the shardings that q, k and v have are offered, and replicated ones first, so
# that this is the combination that they have.


def _offered(found: list[Sharding]) -> list[Sharding]:
    shard, _, _ = _placements()
    return sorted(dict.fromkeys(found), key=lambda sharding: isinstance(sharding.rows, shard))


def _forward_sharding(
    q: Any, k: Any, v: Any, causal: bool, scale: Any, layout: str, *others: Any
) -> Any:
    found = shardings_of(q, k, v, layout)
    lengths, sink = _arrays_of(others[5:])
    _require_placed(found, lengths, sink, others[13:])
    return [
        ([s.rows, s.lse], [s.rows, s.keys, s.keys, *_of_arrays(s, lengths, sink)])
        for s in _offered(found)
    ]


def _backward_sharding(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any,
    causal: bool, scale: Any, layout: str, *others: Any,
) -> Any:  # fmt: skip
    found, inputs = _backward_inputs(dout, q, k, v, out, lse, dlse, layout)
    lengths = _arrays_of_backward(others[4:])
    _require_placed(found, lengths, None, others[11:])
    return [
        ([s.rows, s.dkeys, s.dkeys], [*inputs(s), *_of_arrays(s, lengths, None)])
        for s in _offered(found)
    ]


def _backward_with_sink_sharding(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, sink: Any,
    causal: bool, scale: Any, layout: str, *others: Any,
) -> Any:  # fmt: skip
    found, inputs = _backward_inputs(dout, q, k, v, out, lse, dlse, layout)
    lengths = _arrays_of_backward(others[4:])
    _require_placed(found, lengths, sink, others[11:])
    return [
        (
            [s.rows, s.dkeys, s.dkeys, s.dsink],
            [*inputs(s), s.sink, *_of_arrays(s, lengths, None)],
        )
        for s in _offered(found)
    ]


def _backward_inputs(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, layout: str
) -> tuple[list[Sharding], Callable[[Sharding], list[Any]]]:
    """The shardings, and the placements of these tensors in one of them."""
    found = shardings_of(q, k, v, layout)
    for name, x in (("dout", dout), ("out", out), ("lse", lse), ("dlse", dlse)):
        expected = tuple(s.lse if name in ("lse", "dlse") else s.rows for s in found)
        if x is not None and tuple(x.placements) != expected:
            raise UnsupportedError(
                f"{name}: expected the placements {expected}, as of the forward call, got {tuple(x.placements)}"
            )
    return found, lambda s: [
        dout and s.rows, s.rows, s.keys, s.keys, s.rows, s.lse, dlse and s.lse
    ]  # fmt: skip


def _arrays_of(others: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """Of the forward operator's last arguments, from seqlens_q on: the arrays that are given, in their order, but for
    the sink; and the sink."""
    names = (
        "seqlens_q", "seqlens_k", "", "prefix", "sink", "cu_seqlens_q", "cu_seqlens_k", "block_mask",
    )  # fmt: skip
    given = dict(zip(names, others, strict=False))
    sink = given.pop("sink", None)
    return {name: x for name, x in given.items() if name and x is not None}, sink


def _arrays_of_backward(others: tuple[Any, ...]) -> dict[str, Any]:
    """The same of a backward operator, whose sink is elsewhere."""
    return _arrays_of((*others[:4], None, *others[4:]))[0]


def _placement(s: Sharding, name: str) -> Any:
    return {"sink": s.sink, "block_mask": s.mask}.get(name, s.lengths)


def _of_arrays(s: Sharding, arrays: dict[str, Any], sink: Any) -> list[Any]:
    """Placements in one sharding, as many as there are arrays, in the order of the forward operator's arguments."""
    behind = [name for name in arrays if name.startswith("cu_") or name == "block_mask"]
    of_sink = [] if sink is None else [s.sink]
    before = [s.lengths] * (len(arrays) - len(behind))
    return [*before, *of_sink, *(_placement(s, name) for name in behind)]


def _require_placed(
    found: list[Sharding], arrays: dict[str, Any], sink: Any, block_mask_sizes: tuple[Any, ...]
) -> None:
    """Raises UnsupportedError for arrays that do not lie as q, k and v do. block_mask_sizes: of one argument, or none
    where it was left out."""
    every = {**arrays, "sink": sink} if sink is not None else arrays
    for name, x in every.items():
        expected = tuple(_placement(s, name) for s in found)
        if tuple(x.placements) != expected:
            raise UnsupportedError(
                f"{name}: expected the placements {expected} beside q, k and v, got {tuple(x.placements)}: "
                f"{name}.redistribute(placements=...) moves it"
            )
    if "block_mask" not in arrays:
        return
    batch, heads, *_ = block_mask_sizes[0]
    for own, what, split in (
        (batch, "batch entries", any(s.lengths.is_shard() for s in found)),
        (heads, "heads", any(s.sink.is_shard() for s in found)),
    ):
        if split and own != 1:
            raise UnsupportedError(
                f"attn_mask, documents, block_mask: expected one mask for all {what}, over which q is sharded, got "
                f"{own}: every rank would need a part of the mask's words"
            )


def _block_mask_sharding(*arguments: Any) -> Any:
    """Replicated, as the attention operators take the words."""
    _, replicate, _ = _placements()
    names = "attn_mask", "documents", "documents", "block_mask"
    given = [(name, x) for name, x in zip(names, arguments, strict=False) if x is not None]
    for name, x in given:
        if not all(placement.is_replicate() for placement in x.placements):
            raise UnsupportedError(
                f"{name}: expected a replicated DTensor, got the placements {tuple(x.placements)}: "
                f"{name}.redistribute(placements=...) gathers it"
            )
    return [([replicate()], [replicate()] * len(given))]


def register_shardings() -> None:
    """Tells DTensor how the operators may lie over the ranks."""
    register = import_module("torch.distributed.tensor.experimental").register_sharding
    operators = torch.ops.flashcute
    rules = [
        (operators.flash_attention_forward.default, _forward_sharding, 3),
        (operators.flash_attention_backward.default, _backward_sharding, 7),
        (operators.flash_attention_backward_with_sink.default, _backward_with_sink_sharding, 8),
        (operators.block_mask.default, _block_mask_sharding, 4),
    ]
    # DTensor keeps what it found by the tensors, and by the arguments after the first integer alone: of two layouts it
    # would take the first one's. The rest of the arguments counts as well.
    schema = import_module("torch.distributed.tensor._op_schema")
    propagator = import_module(
        "torch.distributed.tensor"
    ).DTensor._op_dispatcher.sharding_propagator
    for operator, rule, tensors in rules:
        register(operator)(rule)
        info = schema.RuntimeSchemaInfo(static_argnum=tensors, needs_pytree=True)
        propagator.op_to_schema_info[operator] = info
