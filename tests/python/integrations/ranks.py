"""What the ranks of test_dtensor.py run: `python ranks.py FOLDER RANK SIZE`. Rank 0 writes to FOLDER/found.pt what came
of each case: tensors, or the words of an exception."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashcute as fc
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

HEADS, SEQLEN_Q, SEQLEN_K, DIM = 4, 5, 7, 8
R, BATCH = Replicate(), Shard(0)
PLACEMENTS = {"R": R, "B": BATCH, "P": Partial(), "1": Shard(1), "2": Shard(2), "3": Shard(3)}
CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def dense(
    kv_heads: int = 2, layout: str = "bshd", batch: int = 2, heads: int = HEADS
) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout and dlse, the same on every rank and in the tests."""
    made = torch.Generator().manual_seed(7)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=made, dtype=torch.float64)

    def one(rows: int, heads: int) -> torch.Tensor:
        return draw(batch, *((rows, heads) if layout == "bshd" else (heads, rows)), DIM)

    q, k, v = one(SEQLEN_Q, heads), one(SEQLEN_K, kv_heads), one(SEQLEN_K, kv_heads)
    return (
        q,
        k,
        v,
        torch.randn(q.shape, generator=made, dtype=q.dtype),
        draw(batch, heads, SEQLEN_Q),
    )


def arrays(batch: int = 2, heads: int = HEADS) -> dict[str, torch.Tensor]:
    """Lengths, prefixes and a sink."""
    return {
        "seqlens_q": torch.tensor([4, 5, 0][:batch], dtype=torch.int32),
        "seqlens_k": torch.tensor([7, 6, 3][:batch], dtype=torch.int32),
        "prefix": torch.tensor([2, 6, 1][:batch], dtype=torch.int32),
        "sink": torch.linspace(-1, 1, heads, dtype=torch.float64),
    }


MASKS = ("one", "of each entry", "of each head", "documents", "documents of each entry")


def masks(kind: str, batch: int = 2, heads: int = HEADS) -> dict[str, Any]:
    """Of such a kind, the same on every rank and in the tests."""
    made = torch.Generator().manual_seed(8)
    if kind.startswith("documents"):
        rows, keys = torch.tensor([0, 0, 1, 1, 2]).int(), torch.tensor([0, 0, 0, 1, 1, 2, 2]).int()
        if "each" in kind:
            rows, keys = (torch.stack([x.flip(0) - i for i in range(batch)]) for x in (rows, keys))
        return {"documents": (rows, keys)}
    shape = {"of each entry": (batch, 1), "of each head": (1, heads)}.get(kind, ())
    return {"attn_mask": torch.rand(*shape, SEQLEN_Q, SEQLEN_K, generator=made) < 0.7}


def placed(letters: str) -> list[Any]:
    return [PLACEMENTS[letter] for letter in letters]


def distribute(x: torch.Tensor, letters: str, shape: tuple[int, ...] = (2,)) -> DTensor:
    """One letter for each dimension of the mesh."""
    mesh = mesh_of(shape)
    if "P" in letters:
        return DTensor.from_local(x / 2, mesh, placed(letters))
    return distribute_tensor(x, mesh, placed(letters))


_meshes: dict[tuple[int, ...], Any] = {}


def mesh_of(shape: tuple[int, ...]) -> Any:
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape)
    return _meshes[shape]


def full(x: torch.Tensor) -> torch.Tensor:
    """All of it. The copy waits for the collective."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def attend(
    q_letters: str,
    k_letters: str | None = None,
    *,
    kv_heads: int = 2,
    layout: str = "bshd",
    batch: int = 2,
    heads: int = HEADS,
    shape: tuple[int, ...] = (2,),
    dout_letters: str | None = None,
    variant: bool = False,
    lengths_letters: str | None = None,
    sink_letters: str | None = None,
    mask: str | None = None,
    mask_letters: str = "R",
    function: Callable[..., Any] = fc.flash_attention,
) -> dict[str, Any]:
    """Forward and backward of DTensors. dout_letters: the placements of the gradients; None: those of the results.
    variant: with lengths, prefixes and a sink, which lie as q does, or with placements of their own. mask: one of
    MASKS."""
    q, k, v, dout, dlse = dense(kv_heads, layout, batch, heads)
    q = distribute(q, q_letters, shape).requires_grad_()
    k, v = (distribute(x, k_letters or q_letters, shape).requires_grad_() for x in (k, v))
    more = {}
    if variant:
        heads_letter = "2" if layout == "bshd" else "1"
        of_batch = lengths_letters or "".join("B" if x == "B" else "R" for x in q_letters)
        of_heads = sink_letters or "".join("B" if x == heads_letter else "R" for x in q_letters)
        for name, x in arrays(batch, heads).items():
            more[name] = distribute(x, of_heads if name == "sink" else of_batch, shape)
        more["sink"].requires_grad_()
    if mask is not None:
        for name, x in masks(mask, batch, heads).items():
            pair = isinstance(x, tuple)
            parts = [distribute(part, mask_letters, shape) for part in (x if pair else (x,))]
            more[name] = tuple(parts) if pair else parts[0]
    with CommDebugMode() as moved:
        out, lse = function(q, k, v, causal=True, layout=layout, return_lse=True, **more)
    forward_moves = moved.get_total_counts()
    if dout_letters is None:
        dout = distribute_tensor(dout, out.device_mesh, out.placements)
        dlse = distribute_tensor(dlse, lse.device_mesh, lse.placements)
    else:
        dout = distribute(dout, dout_letters, shape)
        dlse = distribute(dlse, "R" * len(shape), shape)
    with CommDebugMode() as moved:
        inputs = (q, k, v, more["sink"]) if variant else (q, k, v)
        gradients = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    results = (out, lse, *gradients)
    return {
        "tensors": list(map(full, results)),
        "placements": [str(tuple(x.placements)) for x in results],
        "moves": forward_moves,
        "backward_moves": moved.get_total_counts(),
    }


# ---- what runs -------------------------------------------------------------------------------------

RUNS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "replicated": (("R",), {}),
    "replicated bhsd": (("R",), {"layout": "bhsd"}),
    "batch": (("B",), {}),
    "batch of 3": (("B",), {"batch": 3}),
    "heads": (("2",), {}),
    "heads bhsd": (("1",), {"layout": "bhsd"}),
    "as many key heads": (("2",), {"kv_heads": 4}),
    "one key head": (("2", "R"), {"kv_heads": 1}),
    "one key head bhsd": (("1", "R"), {"kv_heads": 1, "layout": "bhsd"}),
    "batch, heads": (("B2",), {"shape": (1, 2)}),
    "heads, batch": (("2B",), {"shape": (1, 2)}),
    "replicated, heads": (("R2",), {"shape": (1, 2)}),
    # Gradients that come in otherwise.
    "summands come in": (("R",), {"dout_letters": "P"}),
    "whole gradients come in": (("2",), {"dout_letters": "R"}),
    "parts of the sequence come in": (("2",), {"dout_letters": "1"}),
    "parts of heads come in": (("R",), {"dout_letters": "2"}),
    "parts of heads, replicated heads": (("R2",), {"shape": (2, 1), "dout_letters": "22"}),
}
VARIANTS = (
    "replicated",
    "batch",
    "batch of 3",
    "heads",
    "heads bhsd",
    "one key head",
    "batch, heads",
)
for _name in VARIANTS:
    _letters, _options = RUNS[_name]
    RUNS[f"{_name}, variant"] = (_letters, {**_options, "variant": True})
# Each rank has all of a mask.
for _name, _mask in (
    *(("replicated", kind) for kind in MASKS),
    *(("batch", kind) for kind in ("one", "of each head", "documents")),
    *(("heads", kind) for kind in MASKS if kind != "of each head"),
    ("one key head bhsd", "of each entry"),
    ("batch, heads", "one"),
):
    _letters, _options = RUNS[_name]
    _of_mask = {"mask": _mask, "mask_letters": "R" * len(_letters[0])}
    RUNS[f"{_name}, mask {_mask}"] = (_letters, {**_options, **_of_mask})
for _name, (_letters, _options) in RUNS.items():
    CASES[_name] = lambda a=_letters, o=_options: attend(*a, **o)


# Packed: (rows, heads, d), the entries of the batch one after the other.
PACKED: dict[str, tuple[str, str, int, str]] = {  # of q, of k and v, key heads, layout
    "packed, replicated": ("R", "R", 2, "bshd"),
    "packed, heads": ("1", "1", 2, "bshd"),
    "packed, heads bhsd": ("B", "B", 2, "bhsd"),
    "packed, one key head": ("1", "R", 1, "bshd"),
    "packed, rows": ("B", "B", 2, "bshd"),
}


def starts(rows: int) -> torch.Tensor:
    return torch.tensor([0, rows, rows, 2 * rows], dtype=torch.int32)


def attend_packed(q_letters: str, k_letters: str, kv_heads: int, layout: str) -> dict[str, Any]:
    dense_ones = [x.flatten(0, 1) for x in dense(kv_heads)[:4]]
    placed_ones = []
    for x, letters in zip(dense_ones, (q_letters, k_letters, k_letters, q_letters), strict=True):
        ordered = x.transpose(0, 1).contiguous() if layout == "bhsd" else x
        placed_ones.append(distribute(ordered, letters))
    *leaves, dout = placed_ones
    leaves = [x.requires_grad_() for x in leaves]
    sink = arrays()["sink"]
    sink = distribute(sink, "R" if q_letters == "R" else "B").requires_grad_()
    more = {
        "cu_seqlens_q": distribute(starts(SEQLEN_Q), "R"),
        "cu_seqlens_k": distribute(starts(SEQLEN_K), "R"),
        "sink": sink,
    }
    with CommDebugMode() as moved:
        out, lse = fc.flash_attention(*leaves, causal=True, layout=layout, return_lse=True, **more)
        gradients = torch.autograd.grad(out, [*leaves, sink], dout)
    results = [out, *gradients[:3]]
    if layout == "bhsd":
        results = [x.transpose(0, 1) for x in results]
    return {
        "tensors": list(map(full, [*results, lse, gradients[3]])),
        "moves": moved.get_total_counts(),
    }


for _name, _how in PACKED.items():
    CASES[_name] = lambda how=_how: attend_packed(*how)


@case
def compiled_variant() -> Any:
    attend_compiled = torch.compile(fc.flash_attention, backend="aot_eager")
    return attend("2", function=attend_compiled, variant=True)


@case
def compiled_mask() -> Any:
    attend_compiled = torch.compile(fc.flash_attention, backend="aot_eager")
    return attend("2", function=attend_compiled, mask="documents of each entry")


@case
def compiled() -> Any:
    return attend("2", function=torch.compile(fc.flash_attention, backend="aot_eager"))


@case
def layouts_in_turn() -> Any:
    """The same tensors, read first as one layout, then as the other, by the operator."""
    q, *_ = dense(kv_heads=4)
    made = [distribute(x, "R") for x in (q, q, q)]
    forward = torch.ops.flashcute.flash_attention_forward
    found = []
    for layout in ("bshd", "bhsd"):
        out, lse = forward(*made, False, None, layout, False)
        found += [full(out), full(lse)]
    return {"tensors": found}


@case
def layouts_in_turn_sharded() -> Any:
    q, *_ = dense(kv_heads=4)
    made = [distribute(x, "2") for x in (q, q, q)]
    forward = torch.ops.flashcute.flash_attention_forward
    forward(*made, False, None, "bshd", False)
    return forward(*made, False, None, "bhsd", False)


@case
def async_collective() -> Any:
    """What a collective will have sent: waited for, by the operator."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

    q, k, v, *_ = dense()
    waiting = all_reduce(k / 2, "sum", mesh_of((2,)))
    assert isinstance(waiting, AsyncCollectiveTensor)
    return {"tensors": [fc.flash_attention(q, waiting, v)]}


@case
def async_collective_forward() -> Any:
    from torch.distributed._functional_collectives import all_reduce

    q, k, v, *_ = dense()
    cfg = fc.default_config(DIM, "float64", "cpu")
    return fc.forward(cfg, q, all_reduce(k / 2, "sum", mesh_of((2,))), v)


# ---- what is refused -------------------------------------------------------------------------------

REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "sequence": (("1",), {}),
    "sequence bhsd": (("2",), {"layout": "bhsd"}),
    "sequence of the keys": (("R", "1"), {}),
    "head dimension": (("3",), {}),
    "summands": (("P",), {}),
    "keys as summands": (("R", "P"), {}),
    "replicated keys": (("2", "R"), {}),
    "replicated queries": (("R", "2"), {}),
    "one key head, sharded": (("2",), {"kv_heads": 1}),
    "3 key heads": (("2",), {"kv_heads": 3, "heads": 6}),
    "3 heads of one key head": (("2", "R"), {"kv_heads": 1, "heads": 3}),
    "batch of 1": (("B",), {"batch": 1}),
    "whole lengths": (("B",), {"variant": True, "lengths_letters": "R"}),
    "parts of lengths": (("2",), {"variant": True, "lengths_letters": "B"}),
    "whole sink": (("2",), {"variant": True, "sink_letters": "R"}),
    "parts of a sink": (("B",), {"variant": True, "sink_letters": "B"}),
    "masks of entries": (("B",), {"mask": "of each entry"}),
    "documents of entries": (("B",), {"mask": "documents of each entry"}),
    "masks of heads": (("2",), {"mask": "of each head"}),
    "parts of a mask": (("B",), {"mask": "of each entry", "mask_letters": "B"}),
}
for _name, (_letters, _options) in REFUSED.items():
    CASES[_name] = lambda a=_letters, o=_options: attend(*a, **o)


def _beside(make: Callable[[torch.Tensor], Any], **options: Any) -> Any:
    q, k, v, *_ = dense()
    return fc.flash_attention(distribute(q, "R"), make(k), distribute(v, "R"), **options)


@case
def beside_a_plain_tensor() -> Any:
    return _beside(lambda k: k)


@case
def on_another_mesh() -> Any:
    return _beside(lambda k: distribute(k, "RR", (1, 2)))


@case
def without_a_kernel() -> Any:
    return _beside(lambda k: distribute(k, "R"), dropout_p=0.5, on_unsupported="silent")


@case
def beside_plain_lengths() -> Any:
    made = [distribute(x, "R") for x in dense()[:3]]
    return fc.flash_attention(*made, seqlens_q=arrays()["seqlens_q"])


@case
def with_a_configuration() -> Any:
    made = [distribute(x, "R") for x in dense()[:3]]
    return fc.forward(fc.default_config(DIM, "float64", "cpu"), *made)


@case
def three_dimensions() -> Any:
    return fc.flash_attention(*[distribute(x[0], "R") for x in dense()[:3]])


@case
def backward_operator_with_other_placements() -> Any:
    q, k, v, dout, _ = dense()
    made = [distribute(x, "2") for x in (q, k, v)]
    out, lse = fc.flash_attention(*made, return_lse=True)
    backward = torch.ops.flashcute.flash_attention_backward
    return backward(distribute(dout, "R"), *made, out, lse, None, False, None, "bshd")


# ---- modules ---------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """With 4 query heads, 2 key heads, head dimension 8."""

    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(3)
        for name, width in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            linear = torch.nn.Linear(32, width, bias=False, dtype=torch.float64)
            with torch.no_grad():
                linear.weight.copy_(torch.randn(width, 32, generator=made) / 32**0.5)
            setattr(self, name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (getattr(self, name)(x).unflatten(-1, (-1, DIM)) for name in "qkv")
        return self.o(fc.flash_attention(q, k, v, causal=True).flatten(-2))


def step(module: torch.nn.Module, parts: int = 1) -> list[torch.Tensor]:
    """The output and all gradients of one step. parts: each rank has its own part of the batch."""
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = x.chunk(parts)[dist.get_rank() % parts] if parts > 1 else x
    out = module(x)
    (out.square().sum() * parts).backward()  # FSDP averages over the ranks
    return [out, *(p.grad for p in module.parameters())]


def _tensor_parallel(local: bool) -> Any:
    plan = {name: ColwiseParallel(use_local_output=local) for name in "qkv"}
    module = parallelize_module(Attention(), mesh_of((2,)), {**plan, "o": RowwiseParallel()})
    return {
        "tensors": list(map(full, step(module))),
        "expected": list(map(full, step(Attention()))),
    }


@case
def tensor_parallel() -> Any:
    """Of DTensors: a linear layer's output has its heads over the ranks."""
    return _tensor_parallel(local=False)


@case
def tensor_parallel_local() -> Any:
    """Of plain tensors, each rank's own heads: what these layers give by default."""
    return _tensor_parallel(local=True)


@case
def fully_sharded() -> Any:
    module = fully_shard(Attention(), mesh=mesh_of((2,)))
    found, expected = step(module, parts=2), step(Attention())
    expected[0] = expected[0].chunk(2)[dist.get_rank()]
    return {"tensors": list(map(full, found)), "expected": list(map(full, expected))}


def main(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    for name, run in CASES.items():
        try:
            found[name] = run()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            if os.environ.get("FLASHCUTE_TEST_TRACE"):
                traceback.print_exc()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
