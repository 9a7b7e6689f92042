"""The attention of a model, from the file that describes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .. import explain
from .._core import Explanation
from .kits import Kit
from .options import DTYPES, UsageError

# What a size is called, from file to file.
HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model", "dim")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")
HEAD_DIM = ("head_dim", "d_kv", "kv_channels")

# A member that is there, and neither 0 nor false, asks for what no kernel covers yet.
NO_KERNEL = {
    "attn_logit_softcapping": "capped scores",
    "alibi": "ALiBi: biases of the scores",
}
# Kinds of models with learned sinks: their files do not say so.
WITH_SINKS = ("flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash")


class Model(NamedTuple):
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    window: int | None  # keys up to its own that a query of a local layer sees
    sinks: bool  # one learned logit a head
    not_served: list[str]

    def __str__(self) -> str:
        heads = f"{self.heads} heads" + (
            "" if self.kv_heads == self.heads else f", {self.kv_heads} of keys"
        )
        window = "" if self.window is None else f", window {self.window} (layers that have one)"
        sinks = ", learned sinks" if self.sinks else ""
        return f"{self.kind}: {heads}, head dimension {self.head_dim}{window}{sinks}"


def read(path: Path) -> Model:
    """From config.json, or the folder that holds it."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as problem:
        raise UsageError(
            f"--model: expected a model's config.json, got {file}: {problem}"
        ) from None
    if not isinstance(config, dict):
        raise UsageError(f"--model: expected an object in {file}, got {type(config).__name__}")
    inner = config.get("text_config")  # of models that take images too
    config = {**config, **inner} if isinstance(inner, dict) else config

    def size(names: tuple[str, ...], default: int | None = None) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), default)
        if type(found) is not int or found < 1:
            raise UsageError(
                f"--model: expected {names[0]} in {file}, a positive integer, got {found!r}"
            )
        return found

    heads = size(HEADS)
    head_dim = size(
        HEAD_DIM, None if any(n in config for n in HEAD_DIM) else size(HIDDEN_SIZE) // heads
    )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return Model(
        kind=str(config.get("model_type", "model")),
        heads=heads,
        kv_heads=size(KV_HEADS, heads),
        head_dim=head_dim,
        dtype=dtype if dtype in DTYPES else "bfloat16",
        window=window_of(config),
        sinks=config.get("model_type") in WITH_SINKS,
        not_served=features_without_kernel(config),
    )


def window_of(config: dict[str, Any]) -> int | None:
    window = config.get("sliding_window")
    used = config.get("use_sliding_window") is not False
    return window if type(window) is int and window > 0 and used else None


def features_without_kernel(config: dict[str, Any]) -> list[str]:
    found = [what for name, what in NO_KERNEL.items() if config.get(name)]
    if config.get("attention_dropout"):
        found.append(f"dropout of {config['attention_dropout']} while training")
    return found


def calls(model: Model, kit: Kit, seqlen: int, dtype: str) -> Iterator[tuple[str, str]]:
    """(what a model does, what would run)."""

    window = None if model.window is None else (model.window - 1, 0)

    def told(rows: int, *, gradients: bool) -> Explanation:
        q = kit.empty((1, rows, model.heads, model.head_dim), dtype)
        k = kit.empty((1, seqlen, model.kv_heads, model.head_dim), dtype)
        v = kit.empty((1, seqlen, model.kv_heads, model.head_dim), dtype)
        sink = kit.empty((model.heads,), dtype) if model.sinks else None
        return explain(q, k, v, causal=True, window=window, sink=sink, gradients=gradients)

    yield "prefill", in_a_line(told(seqlen, gradients=False))
    yield "decode", in_a_line(told(1, gradients=False))
    training = told(seqlen, gradients=True)
    line = in_a_line(training)
    if training.backend and training.gradients is not None:
        line += f"; gradients by {training.gradients.backend or 'no kernel'}"
    yield "training", line


def in_a_line(explanation: Explanation) -> str:
    if not explanation.backend:
        return "refused: " + "; ".join(reason for _, reason in explanation.rejected[:1])
    return f"{explanation.backend}, {explanation.kernel}, {explanation.image}"
