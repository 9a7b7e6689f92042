"""Activation checkpointing: what is computed again in the backward pass, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flashcute as fc
import pytest
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

import torch
from conftest import backward_configurations_of_first_use
from flashcute import _core
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

pytestmark = pytest.mark.compiles(backward_configurations_of_first_use())

OPERATOR = torch.ops.flashcute.flash_attention_forward.default


class Calls:
    """How often the library computed."""

    def __init__(self) -> None:
        self.forward = self.backward = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted, forward, backward = Calls(), _core.forward, _core.backward

    def count_forward(*arguments: Any) -> None:
        counted.forward += 1
        forward(*arguments)

    def count_backward(*arguments: Any) -> None:
        counted.backward += 1
        backward(*arguments)

    monkeypatch.setattr(_core, "forward", count_forward)
    monkeypatch.setattr(_core, "backward", count_backward)
    return counted


class Block(torch.nn.Module):
    """Attention between two linear layers."""

    def __init__(self, device: str) -> None:
        super().__init__()
        dtype = torch.float64 if device == "cpu" else torch.bfloat16
        self.before = torch.nn.Linear(128, 3 * 128, device=device, dtype=dtype)
        self.after = torch.nn.Linear(128, 128, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.before(x).unflatten(-1, (3, 2, 64)).unbind(-3)
        return self.after(fc.flash_attention(q, k, v, causal=True).flatten(-2))


def saving(*operators: Any) -> Callable[[], Any]:
    """The contexts of a policy that keeps the results of some operators."""
    return partial(create_selective_checkpoint_contexts, list(operators))


def by_policy() -> Any:
    """The same by a function, as training frameworks write it."""

    def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operator is OPERATOR
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def step(block: Block, run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of one training step."""
    weight = block.before.weight
    x = torch.randn(2, 9, 128, dtype=weight.dtype, generator=torch.Generator().manual_seed(1)).to(
        weight.device
    )
    x.requires_grad_()
    out = run(block, x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


WAYS: dict[str, tuple[dict[str, Any], int]] = {
    # Arguments of checkpoint, and how often the forward runs in a step.
    "saved": ({"context_fn": saving(OPERATOR)}, 1),
    "saved by a policy": ({"context_fn": by_policy}, 1),
    "not saved": ({"context_fn": saving(torch.ops.aten.mm.default)}, 2),
    "all again": ({}, 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_how_often_the_forward_runs(device: str, calls: Calls, way: str) -> None:
    """An eager call that no policy saw, so that attention ran twice though it was to be kept; another result the second
    time."""
    torch.manual_seed(0)
    block = Block(device)
    expected = step(block, lambda f, x: f(x))
    assert (calls.forward, calls.backward) == (1, 1)
    options, times = WAYS[way]
    calls.forward = calls.backward = 0
    found = step(block, lambda f, x: checkpoint(f, x, use_reentrant=False, **options))
    assert (calls.forward, calls.backward) == (times, 1)
    same(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_how_often_a_compiled_forward_runs(calls: Calls, way: str) -> None:
    """The compiler reads the policy: two calls of the forward in its graph, or one."""
    torch.manual_seed(0)
    block = Block("cpu")
    expected = step(block, lambda f, x: f(x))
    options, times = WAYS[way]
    calls.forward = calls.backward = 0
    torch._dynamo.reset()
    attend = torch.compile(
        lambda f, x: checkpoint(f, x, use_reentrant=False, **options),
        backend="aot_eager_decomp_partition",
    )
    for x, y in zip(step(block, attend), expected, strict=True):
        torch.testing.assert_close(x, y)
    assert (calls.forward, calls.backward) == (times, 1)


def test_reentrant(calls: Calls) -> None:
    """The older way: first without gradients, then again with them."""
    torch.manual_seed(0)
    block = Block("cpu")

    def run(f: Block, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(f, x, use_reentrant=True)

    x = torch.randn(2, 9, 128, dtype=torch.float64, requires_grad=True)
    run(block, x).sum().backward()
    assert (calls.forward, calls.backward) == (2, 1)
    found, x.grad = x.grad, None
    block(x).sum().backward()
    assert torch.equal(found, x.grad)


def test_the_log_sum_exp_is_kept_too(calls: Calls) -> None:
    """Both results of the operator are saved: a gradient that comes through the second."""
    q, k, v = (torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = fc.flash_attention(q * 2, k, v, return_lse=True)
        return out.sum() + lse.square().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    calls.forward = 0
    kept = checkpoint(loss, q, k, v, use_reentrant=False, context_fn=saving(OPERATOR))
    same(list(torch.autograd.grad(kept, (q, k, v))), list(expected))
    assert calls.forward == 1
