"""The messages of exceptions: each is what a call says, which is made here.

All calls are of NumPy arrays or of values, so they say the same on every machine. Those of torch are not made where it
is missing: the page then keeps what it has.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flashcute
import numpy as np
from lines import table

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "errors.md"

Array = Any


class Case(NamedTuple):
    code: str  # what a reader would write
    call: Callable[[], object]


def half(*shape: int) -> Array:
    return np.zeros(shape, np.float16)


def numbers(*values: int) -> Array:
    return np.array(values, np.int32)


Q, K = half(2, 5, 4, 8), half(2, 7, 2, 8)


def attend(q: Array = Q, k: Array = K, v: Array = K, **options: Any) -> object:
    return flashcute.flash_attention(q, k, v, **options)


@contextmanager
def alone(name: str, value: str) -> Iterator[None]:
    """Where this is the only variable of flashcute's that is set."""
    before = {x: os.environ.pop(x) for x in list(os.environ) if x.startswith("FLASHCUTE_")}
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update(before)


def with_variable(name: str, value: str, call: Callable[[], object]) -> Case:
    def run() -> object:
        with alone(name, value):
            return call()

    return Case(f"{name}={value}", run)


def arrays() -> Iterator[Case]:
    yield Case("q of 3 dimensions", lambda: attend(Q[0]))
    yield Case("q of int32", lambda: attend(Q.astype(np.int32)))
    yield Case("k of float32 beside q of float16", lambda: attend(k=K.astype(np.float32)))
    yield Case("q is a list", lambda: attend([1.0]))
    yield Case("k of another head_dim", lambda: attend(k=half(2, 7, 2, 16)))
    yield Case("q, k and v of head_dim 300", lambda: attend(*(half(1, 2, 1, 300),) * 3))
    yield Case(
        "3 key heads for 4 query heads", lambda: attend(k=half(2, 7, 3, 8), v=half(2, 7, 3, 8))
    )
    yield Case("k of another batch", lambda: attend(k=K[:1]))
    yield Case("v shorter than k", lambda: attend(v=K[:, :6]))
    yield Case("q[..., ::2]", lambda: attend(half(2, 5, 4, 16)[..., ::2]))
    yield Case("out=q", lambda: attend(out=Q))
    yield Case("out of another shape", lambda: attend(out=Q[:, :4]))
    read_only = half(2, 5, 4, 8)
    read_only.setflags(write=False)
    yield Case("out is read-only", lambda: attend(out=read_only))


def options() -> Iterator[Case]:
    yield Case("scale=-0.5", lambda: attend(scale=-0.5))
    yield Case('layout="sbhd"', lambda: attend(layout="sbhd"))
    yield Case('causal="yes"', lambda: attend(causal="yes"))
    yield Case('diagonal="middle"', lambda: attend(causal=True, diagonal="middle"))
    yield Case('`diagonal="start"` without a mask', lambda: attend(diagonal="start"))
    yield Case("window=(-2, 0)", lambda: attend(window=(-2, 0)))
    yield Case("prefix=3 without causal", lambda: attend(prefix=3))
    yield Case("seqlens_k of 3 for a batch of 2", lambda: attend(seqlens_k=numbers(1, 2, 3)))
    yield Case("seqlens_k of int64", lambda: attend(seqlens_k=numbers(1, 2).astype(np.int64)))
    yield Case("sink of 2 for 4 heads", lambda: attend(sink=np.zeros(2, np.float32)))
    yield Case("cu_seqlens_k without cu_seqlens_q", lambda: attend(cu_seqlens_k=numbers(0, 7)))
    yield Case(
        "attn_mask beside cu_seqlens_q",
        lambda: attend(
            Q[0], K[0], K[0], cu_seqlens_q=numbers(0, 5), attn_mask=np.ones((5, 7), bool)
        ),
    )
    yield Case("attn_mask of uint8", lambda: attend(attn_mask=np.ones((5, 7), np.uint8)))
    yield Case("attn_mask of another shape", lambda: attend(attn_mask=np.ones((4, 7), bool)))
    mask = flashcute.BlockMask.from_dense(np.ones((64, 64), bool))
    yield Case("block_mask for other lengths", lambda: attend(block_mask=mask))
    yield Case("deterministic=1", lambda: attend(deterministic=1))
    yield Case('on_unsupported="torch"', lambda: attend(on_unsupported="torch"))
    yield Case('stream="0"', lambda: attend(stream="0"))


def features() -> Iterator[Case]:
    yield Case("attn_mask of floats", lambda: attend(attn_mask=np.zeros((5, 7), np.float16)))
    yield Case("dropout_p=0.1", lambda: attend(dropout_p=0.1))


def configurations() -> Iterator[Case]:
    cfg = flashcute.default_config(64, "bfloat16", "sm_80")
    yield Case("ForwardConfig(blok_m=64)", lambda: flashcute.ForwardConfig(blok_m=64))
    yield Case(
        "cfg.replace(block_m=48).check('sm_80')", lambda: cfg.replace(block_m=48).check("sm_80")
    )
    yield Case("cfg.replace(stages=9).check('sm_80')", lambda: cfg.replace(stages=9).check("sm_80"))
    large = flashcute.ForwardConfig(head_dim=256, block_m=128, num_warps=8, stages=2)
    yield Case("more shared memory than there is: .check('sm_86')", lambda: large.check("sm_86"))
    hopper = flashcute.default_config(64, "bfloat16", "sm_90")
    yield Case("Hopper's cfg .check('sm_80')", lambda: hopper.check("sm_80"))
    yield Case("cfg.check('ampere')", lambda: cfg.check("ampere"))
    yield Case("cfg.check('sm_70')", lambda: cfg.check("sm_70"))
    yield Case("forward(cfg, ...) of float16", lambda: flashcute.forward(cfg, Q, K, K))
    narrow = flashcute.default_config(8, "float16", "cpu").replace(head_dim=8)
    yield Case(
        "forward(cfg, ...) of a wider head_dim",
        lambda: flashcute.forward(narrow, *(half(1, 2, 1, 64),) * 3),
    )
    yield Case("forward(q, q, k, v)", lambda: flashcute.forward(Q, Q, K, K))
    yield Case("prebuild('all')", lambda: flashcute.prebuild("all", arch="sm_80"))


def settings() -> Iterator[Case]:
    yield with_variable("FLASHCUTE_NUM_THREADS", "0", attend)
    yield with_variable("FLASHCUTE_CPU_ISA", "sse", attend)
    cfg = flashcute.default_config(64, "bfloat16", "sm_80").replace(block_m=64, num_warps=2)
    yield with_variable("FLASHCUTE_JIT", "maybe", lambda: flashcute.prebuild(cfg, arch="sm_80"))
    yield with_variable(
        "FLASHCUTE_CACHE_DIR", "cache", lambda: flashcute.prebuild(cfg, arch="sm_80")
    )
    yield with_variable("FLASHCUTE_CACHE_SIZE", "1X", lambda: flashcute.prebuild(cfg, arch="sm_80"))
    yield with_variable("FLASHCUTE_JIT", "off", lambda: flashcute.prebuild(cfg, arch="sm_80"))


def torch() -> Iterator[Case]:
    import torch

    q = torch.zeros(1, 5, 2, 8)
    leaf = q.clone().requires_grad_()
    cfg = flashcute.default_config(8, "float32", "cpu")
    yield Case(
        "forward(cfg, q, ...), q requires a gradient", lambda: flashcute.forward(cfg, leaf, q, q)
    )
    yield Case(
        "out= where gradients are recorded",
        lambda: flashcute.flash_attention(leaf, q, q, out=torch.empty_like(q)),
    )
    yield Case(
        "k of NumPy, q requires a gradient", lambda: flashcute.flash_attention(leaf, q.numpy(), q)
    )
    yield Case("a tensor on the meta device", lambda: flashcute.flash_attention(q.to("meta"), q, q))
    yield Case("a sparse tensor", lambda: flashcute.flash_attention(q.to_sparse(), q, q))
    yield Case(
        "`dropout_p=0.1, on_unsupported='error'`",
        lambda: flashcute.flash_attention(q, q, q, dropout_p=0.1, on_unsupported="error"),
    )
    yield Case(
        "dropout_p=0.1 beside a sink",
        lambda: flashcute.flash_attention(q, q, q, dropout_p=0.1, sink=torch.zeros(2)),
    )

    def twice() -> None:
        out = flashcute.flash_attention(leaf, q, q)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        first.sum().backward()

    yield Case("a second derivative", twice)
    yield Case("torch.func.grad", lambda: torch.func.grad(lambda x: attend(x, q, q).sum())(q))


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    x.__name__: x for x in (arrays, options, features, configurations, settings, torch)
}


def messages(group: str) -> str:
    """A table of the group's calls, the exceptions that they raise and what these say."""
    if group == "torch" and importlib.util.find_spec("torch") is None:
        return as_it_is(group)
    rows = []
    for case in GROUPS[group]():
        error = raised(case)
        code = f"`{case.code}`" if is_code(case.code) else case.code
        rows.append([code, f"{type(error).__name__}: {cell(str(error))}"])
    return table(["call", "raises"], rows)


def raised(case: Case) -> Exception:
    try:
        case.call()
    except flashcute.FlashcuteError as error:
        return error
    raise ValueError(f"{case.code}: raised nothing")


def is_code(text: str) -> bool:
    return bool(re.fullmatch(r"\w+=\S*|[\w.]+\(.*\)|\w+\[.*\]|window=.*", text))


def cell(message: str) -> str:
    """A message as code within a table of Markdown."""
    marks = "``" if "`" in message else "`"
    return f"{marks}{message.replace('|', chr(92) + '|')}{marks}".replace("\n", " ")


def as_it_is(group: str) -> str:
    """What the page has in this block now."""
    begin = f"<!-- generated: errors.messages {group} -->"
    return PAGE.read_text().partition(begin)[2].partition("<!-- end of generated -->")[0].strip()
