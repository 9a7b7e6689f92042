"""Models of transformers with ``attn_implementation="fcute"`` beside the same with ``"eager"``."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import flashcute as fc
import optional_torch
import pytest
from optional_torch import torch

if not optional_torch.available:
    pytest.skip(optional_torch.REASON, allow_module_level=True)
if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

import tiny_models
from flashcute.integrations import transformers as integration
from tiny_models import BATCH, LENGTH, WINDOW, WORDS, Inputs, inputs, model, noise, tokens

integration.register(on_unsupported="silent")

ARRANGEMENTS = ("whole", "left", "right", "packed")
SERVED = [
    *((name, how) for name in ("llama", "mistral", "qwen3") for how in ARRANGEMENTS),
    *((name, how) for name in ("bert", "whisper") for how in ARRANGEMENTS[:3]),
    ("t5", "whole"),
    ("t5", "left"),
    ("vit", "whole"),
]
DECODERS = ("llama", "mistral", "qwen3")


@pytest.fixture(autouse=True)
def _heard_again() -> Iterator[None]:
    integration._warned.clear()
    yield


def with_attention(name: str, implementation: str) -> Any:
    found = model(name)
    found.set_attn_implementation(implementation)
    return found


# ---- logits and gradients ------------------------------------------------------------------------


def logits_and_gradients(subject: Any, given: Inputs) -> dict[str, Any]:
    """The logits where they count, and the gradients of a random weighting of them."""
    subject.zero_grad(set_to_none=True)
    logits = subject(**given.arguments).logits
    if given.real is not None:
        logits = logits[given.real.to(logits.device).bool()]
    (logits * noise(*logits.shape).to(logits)).sum().backward()
    gradients = {n: p.grad for n, p in subject.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    return {"logits": logits.detach(), **{n: g.clone() for n, g in gradients.items()}}


def error(found: Any, exact: Any) -> float:
    return float((found.double().cpu() - exact).abs().max())


def require_exact(
    mine: dict[str, Any], eager: dict[str, Any], exact: dict[str, Any], dtype: Any
) -> None:
    """Of each result at most twice the error of eager attention in the same dtype, plus what rounding the largest number
    a few times makes."""
    assert mine.keys() == eager.keys() == exact.keys()
    for name, truth in exact.items():
        rounding = 16 * torch.finfo(dtype).eps * float(truth.abs().max())
        allowed = 2 * error(eager[name], truth) + rounding
        if __import__("os").environ.get("SHOW"):
            print(f"{error(mine[name], truth)/allowed:.2f}", f"{error(mine[name], truth)/max(error(eager[name], truth),1e-30):.2f}", name)
        assert error(mine[name], truth) <= allowed, name


@pytest.mark.parametrize(("name", "how"), SERVED)
def test_logits_and_gradients_are_as_exact_as_eager(name: str, how: str) -> None:
    """A mask that is dropped, doubled or shifted; heads that are mixed up; a scale that is forgotten."""
    given = inputs(name, how)
    exact = logits_and_gradients(
        tiny_models.exact(name),
        given._replace(arguments=tiny_models.cast(given.arguments, "cpu", torch.float64)),
    )
    eager = logits_and_gradients(with_attention(name, "eager"), given)
    mine = logits_and_gradients(with_attention(name, "fcute"), given)
    require_exact(mine, eager, exact, torch.float32)
