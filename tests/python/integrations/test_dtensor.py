"""DTensors: each of two ranks (processes, on gloo) computes its own part of the batch or of the heads, or all is
refused. What the ranks run is in ranks.py."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

import torch
from conftest import Runner, environment
from flashcute import flash_attention, reference

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

import ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each case, of all ranks at once: a start takes seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, ranks.__file__, folder]
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [*command, str(rank), "2"], env=environment(), stdout=file, stderr=file
                )
            )
    try:
        status = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert status == [0, 0], "\n".join(log.read_text() for log in logs)
    result: dict[str, Any] = torch.load(folder / "found.pt")
    return result


def expected_of(**options: Any) -> list[torch.Tensor]:
    """The results and gradients of a case, by the textbook formula in float64."""
    layout = options.get("layout", "bshd")
    names = ("kv_heads", "layout", "batch", "heads")
    inputs = ranks.dense(**{name: options[name] for name in names if name in options})
    q, k, v, dout, dlse = inputs
    arrays = ranks.arrays(q.shape[0], q.shape[2 if layout == "bshd" else 1])
    more = arrays if options.get("variant") else {}
    if "mask" in options:
        # What each rank computes of its part, one process computes of all.
        leaves = [x.requires_grad_() for x in (q, k, v)]
        given = ranks.masks(options["mask"], q.shape[0])
        results = flash_attention(*leaves, True, layout=layout, return_lse=True, **given)
        return [*results, *torch.autograd.grad(results, leaves, (dout, dlse))]
    out, lse = reference.naive(q, k, v, True, layout=layout, return_lse=True, **more)
    gradients = reference.naive_gradients(dout, q, k, v, True, dlse=dlse, layout=layout, **more)
    return [out, lse, *gradients]


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [*ranks.RUNS, "compiled", "compiled_variant", "compiled_mask"])
def test_each_rank_computes_its_part(found: dict[str, Any], case: str) -> None:
    """Results of other keys or heads than a rank's own; a gradient without the other ranks' summands; a part moved that
    is where it is needed."""
    compiled = {
        "compiled_variant": {"variant": True},
        "compiled_mask": {"mask": "documents of each entry"},
    }
    _, options = ranks.RUNS.get(case, ((), compiled.get(case, {})))
    came = found[case]
    assert isinstance(came, dict), came
    close(came["tensors"], expected_of(**options))
    assert came["moves"] == 0
    comes_in_otherwise = options.get("dout_letters") not in (None, "R")
    assert came["backward_moves"] == (1 if comes_in_otherwise else 0)


@pytest.mark.parametrize("case", [name for name in ranks.PACKED if name != "packed, rows"])
def test_packed_sequences(found: dict[str, Any], case: str) -> None:
    """A dimension of packed tensors that is taken for one of tensors with a batch."""
    _, _, kv_heads, _ = ranks.PACKED[case]
    q, k, v, dout = (x.flatten(0, 1) for x in ranks.dense(kv_heads)[:4])
    more = {
        "cu_seqlens_q": ranks.starts(ranks.SEQLEN_Q),
        "cu_seqlens_k": ranks.starts(ranks.SEQLEN_K),
        "sink": ranks.arrays()["sink"],
    }
    out, lse = reference.naive(q, k, v, True, return_lse=True, **more)
    *gradients, dsink = reference.naive_gradients(dout, q, k, v, True, **more)
    came = found[case]
    assert isinstance(came, dict), came
    close(came["tensors"], [out, *gradients, lse, dsink])
    assert came["moves"] == 0


def test_rows_of_packed_sequences_are_on_every_rank(found: dict[str, Any]) -> None:
    """Sequences that are cut in the middle, each part computed as if it were all."""
    assert re.match(r"UnsupportedError: q: .* the sequence", found["packed, rows"])


@pytest.mark.parametrize(
    ("case", "placements"),
    [  # of out, lse, dq, dk, dv
        ("heads", ["Shard(dim=2)", "Shard(dim=1)", *["Shard(dim=2)"] * 3]),
        ("heads bhsd", ["Shard(dim=1)"] * 5),
        ("batch", ["Shard(dim=0)"] * 5),
        ("replicated", ["Replicate()"] * 5),
        ("one key head", ["Shard(dim=2)", "Shard(dim=1)", "Shard(dim=2)", *["Partial(sum)"] * 2]),
        (
            "batch, heads",
            [f"Shard(dim=0), Shard(dim={dim})" for dim in (2, 1, 2, 2, 2)],
        ),
        ("batch, variant", [*["Shard(dim=0)"] * 5, "Partial(sum)"]),
        ("heads, variant", ["Shard(dim=2)", "Shard(dim=1)", *["Shard(dim=2)"] * 3, "Shard(dim=0)"]),
    ],
)
def test_results_lie_as_the_queries(
    found: dict[str, Any], case: str, placements: list[str]
) -> None:
    """The log-sum-exp has heads before rows in both layouts; gradients of a single key head are sums over the ranks."""
    came = [text.strip("(),") + ")" for text in found[case]["placements"]]
    assert came == [text.strip("(),") + ")" for text in placements]


def test_layouts_in_turn(found: dict[str, Any]) -> None:
    """DTensor keeps what it found of such tensors, without the layout unless it is told: a log-sum-exp of the other's
    shape, or a sequence that is taken for heads."""
    q, *_ = ranks.dense(kv_heads=4)
    expected = [
        x
        for layout in ("bshd", "bhsd")
        for x in reference.naive(q, q, q, layout=layout, return_lse=True)
    ]
    close(found["layouts_in_turn"]["tensors"], expected)
    assert "the sequence" in found["layouts_in_turn_sharded"]


def test_a_result_of_a_collective_is_waited_for(found: dict[str, Any]) -> None:
    """Keys that were still on their way; a chosen configuration does not wait behind the caller's back."""
    q, k, v, *_ = ranks.dense()
    close(found["async_collective"]["tensors"], [reference.naive(q, k, v)])
    says = "ArgumentError: k: expected a tensor whose memory a kernel can read"
    assert found["async_collective_forward"].startswith(says)


REFUSALS = {
    "sequence": "UnsupportedError: q: .*the sequence.*context parallelism, which is not supported",
    "sequence bhsd": "UnsupportedError: q: .*the sequence.*context parallelism",
    "sequence of the keys": "UnsupportedError: k: .*the sequence.*context parallelism",
    "head dimension": r"UnsupportedError: q: .*got Shard\(dim=3\)",
    "summands": r"UnsupportedError: q: .*Partial\(sum\).*Sum it",
    "keys as summands": r"UnsupportedError: k: .*Partial\(sum\).*Sum it",
    "replicated keys": r"UnsupportedError: k: .*Shard\(dim=2\) beside .*got Replicate\(\)",
    "replicated queries": r"UnsupportedError: k: .*Replicate\(\) beside .*got Shard\(dim=2\)",
    "one key head, sharded": "UnsupportedError: k: .*a single key head",
    "3 key heads": "UnsupportedError: q, k, v: .*key heads .*2 ranks.*got 3",
    "3 heads of one key head": "UnsupportedError: q, k, v: .*query heads .*2 ranks.*got 3",
    "whole lengths": r"UnsupportedError: seqlens_q: .*Shard\(dim=0\),\) beside q, k and v, got \(Replicate",
    "parts of lengths": r"UnsupportedError: seqlens_q: .*Replicate\(\),\) beside q, k and v, got \(Shard",
    "whole sink": r"UnsupportedError: sink: .*Shard\(dim=0\),\) beside q, k and v, got \(Replicate",
    "parts of a sink": r"UnsupportedError: sink: .*Replicate\(\),\) beside q, k and v, got \(Shard",
    "masks of entries": r"UnsupportedError: attn_mask, documents, block_mask: .*batch entries.*got 2",
    "documents of entries": r"UnsupportedError: attn_mask, documents, block_mask: .*batch entries.*got 2",
    "masks of heads": r"UnsupportedError: attn_mask, documents, block_mask: .*heads.*got 4",
    "parts of a mask": r"UnsupportedError: attn_mask: expected a replicated DTensor, got .*Shard\(dim=0\)",
    "beside_plain_lengths": "ArgumentError: seqlens_q: expected a DTensor as q, got a Tensor",
    "batch of 1": "UnsupportedError: q, k, v: .*batch .*2 ranks.*got 1",
    "beside_a_plain_tensor": "ArgumentError: k: expected a DTensor as q, got a Tensor",
    "on_another_mesh": "ArgumentError: k: expected a DTensor on the mesh of q",
    "without_a_kernel": "UnsupportedError: q, k, v: .*dropout_p=0.5 is not supported",
    "with_a_configuration": r"ArgumentError: q: .*class DTensor.*to_local\(\)",
    "three_dimensions": "ArgumentError: q: expected 4 dimensions",
    "backward_operator_with_other_placements": "UnsupportedError: dout: expected the placements",
}


def test_each_refusal_is_expected() -> None:
    """A case without a sentence of its own."""
    assert ranks.REFUSED.keys() <= REFUSALS.keys()


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(found: dict[str, Any], case: str) -> None:
    """Gathered behind the caller's back, computed of a part alone, or an error of torch's that names no argument."""
    came = found[case]
    assert isinstance(came, str), "not refused"
    assert re.match(REFUSALS[case], came, re.DOTALL), came
    assert "Sharding propagation failed" not in came


@pytest.mark.parametrize("case", ["tensor_parallel", "tensor_parallel_local", "fully_sharded"])
def test_modules_over_ranks(found: dict[str, Any], case: str) -> None:
    """One step of an attention layer: its output and the gradients of all weights, beside the same step of one
    process."""
    came = found[case]
    assert isinstance(came, dict), came
    assert len(came["expected"]) == 5
    close(came["tensors"], came["expected"])


def test_plain_users_do_not_pay(fresh: Runner) -> None:
    """Importing torch.distributed.tensor takes half a second."""
    fresh("""
        import sys
        import flashcute, torch
        flashcute.flash_attention(*[torch.zeros(1, 2, 1, 8)] * 3)
        assert "torch.distributed.tensor" not in sys.modules
    """)


@pytest.mark.parametrize(
    "imports",
    [
        "import torch.distributed.tensor, flashcute",
        "import flashcute, torch.distributed.tensor",
        "import flashcute, torch, importlib, torch.distributed.tensor; importlib.reload(flashcute)",
    ],
)
def test_imports_in_any_order(fresh: Runner, device: str, imports: str) -> None:
    """Of a single rank, which NCCL has too: results are those of plain tensors bit for bit."""
    fresh(f"""
        import os
        {imports}
        import torch
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        backend = {"'gloo'" if device == "cpu" else "'nccl'"}
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh({device!r}, (1,))
        dtype = torch.float32 if {device!r} == "cpu" else torch.float16
        plain = [torch.randn(2, 6, 4, 64, device={device!r}, dtype=dtype) for _ in range(3)]
        made = [distribute_tensor(x, mesh, [Shard(2)]) for x in plain]
        out, lse = flashcute.flash_attention(*made, causal=True, return_lse=True)
        assert out.placements == (Shard(2),) and lse.placements == (Shard(1),)
        expected = flashcute.flash_attention(*plain, causal=True, return_lse=True)
        assert torch.equal(out.to_local(), expected[0])
        assert torch.equal(lse.to_local(), expected[1])
        torch.distributed.destroy_process_group()
    """)
