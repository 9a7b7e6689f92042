"""What a call costs beside the kernel: host time when warm, seconds when first in a process."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any, TextIO

from .. import (
    _core,
    default_config,
    flash_attention,
    forward,
    scaled_dot_product_attention,
    sdpa,
)
from . import peers
from .kits import Call, Kit, choose_kit, in_layout
from .options import UsageError
from .problem import Case
from .provenance import provenance
from .recorded import append_line
from .table import format_table

CALLS_PER_BATCH = 100  # in a row without waiting: far fewer than a launch queue holds
BATCHES = 50
MOST_SECONDS = 3.0  # for each kind of call
DTYPE = "float16"  # every library has it
ACTIVATED = "sdpa under activate()"


def overhead(options: argparse.Namespace, out: TextIO | None) -> int:
    """Microseconds that the host spends in a call, on a problem too small to matter."""
    dtype = options.dtype or DTYPE
    kit = choose_kit(options.device, dtype, options.seed)
    case = Case(1, 1, 1, 1, 1, 64, False, dtype)
    q, k, v = case.random_inputs(kit)
    cfg = default_config(case.head_dim, case.dtype, kit.arch)
    calls: dict[str, Call] = {
        "forward(cfg, out=)": functools.partial(forward, cfg, q, k, v, out=kit.empty_like(q)),
        "flash_attention": functools.partial(flash_attention, q, k, v),
    }
    if kit.library == "torch":
        peer = peers.make("sdpa", kit)
        in_bhsd = in_layout(kit, (q, k, v), peer.layout)
        torchs = functools.partial(peer.call, *in_bhsd, False)
        calls["scaled_dot_product_attention"] = functools.partial(
            scaled_dot_product_attention, *in_bhsd
        )
        from ..compat.flash_attn import flash_attn_func
        from ..integrations.transformers import attention_function

        fcute = attention_function("error", frozenset())
        calls["compat.flash_attn"] = functools.partial(flash_attn_func, q, k, v)
        calls["fcute of transformers"] = functools.partial(
            fcute, None, *in_bhsd, None, is_causal=False
        )
        calls["sdpa"] = torchs
        if has_registry():
            calls[ACTIVATED] = torchs
    common = {"kind": "overhead", **provenance(kit, options.commit), "dtype": dtype}
    rows = []
    for name, call in calls.items():
        with through_registry(kit.device) if name == ACTIVATED else nullcontext():
            p10, p50, p90 = percentiles_us(kit, call)
        rows.append([name, f"{p10:.2f}", f"{p50:.2f}", f"{p90:.2f}"])
        record({**common, "call": name, "us_p10": p10, "us_p50": p50, "us_p90": p90}, options, out)
    print(f"{common['device']}; {common['library']}; {common['commit']}")
    print(format_table(("host microseconds per call", "p10", "p50", "p90"), rows))
    if kit.device == "cpu":
        print("On the CPU they include the computation, of one query and one key.")
    return 0


def has_registry() -> bool:
    """Whether torch's own call can run flashcute's kernels."""
    return hasattr(import_module("torch.nn.attention"), "restore_flash_attention_impl")


@contextmanager
def through_registry(device: str) -> Iterator[None]:
    """torch's scaled_dot_product_attention by flashcute, and by no other backend."""
    attention = import_module("torch.nn.attention")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuDNN is preferred: not here
        activation = sdpa.activate(device)
    with activation, attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        before = sum(sdpa.served().values())
        yield
        if sum(sdpa.served().values()) == before:
            raise UsageError(f"{ACTIVATED}: torch chose another kernel, so nothing was measured")


def percentiles_us(kit: Kit, call: Call) -> list[float]:
    import numpy as np

    samples: list[float] = []
    for _ in range(CALLS_PER_BATCH):  # warms up
        call()
    deadline = time.perf_counter() + MOST_SECONDS
    while len(samples) < BATCHES and (not samples or time.perf_counter() < deadline):
        kit.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS_PER_BATCH):
            call()
        samples.append((time.perf_counter() - start) / CALLS_PER_BATCH * 1e6)
    kit.synchronize()
    return [float(x) for x in np.percentile(samples, (10, 50, 90))]


# ---- first use ---------------------------------------------------------------------------------


def first_use(options: argparse.Namespace, out: TextIO | None) -> int:
    """Seconds of a first call in a new process, and of a first training step with torch.

    Compiled at run time into an empty cache, then from that cache, then ahead of time if this build
    has images. Without a GPU there is no call: what is timed is `prebuild`.
    """
    dtype = options.dtype or DTYPE
    kit = choose_kit(options.device, dtype, options.seed)
    head_dim = (options.head_dims or [128])[0]
    common = {"kind": "first_use", **provenance(kit, options.commit)}
    common.update(dtype=dtype, head_dim=head_dim, cores=len(os.sched_getaffinity(0)))
    roads = [("compiled", "force"), ("disk cache", "force")]
    if _core.build_info().image_archs:
        roads.append(("ahead of time", "off"))
    calls = ["forward"]
    if kit.device == "cpu" or "torch" in common["library"]:
        calls.append("training")
    rows = []
    for call in calls:
        with tempfile.TemporaryDirectory(prefix="flashcute-bench-") as cache:
            for road, jit in roads:
                told = in_new_process(kit.device, dtype, head_dim, call, jit=jit, cache=cache)
                rows.append(
                    [road, *(f"{told[name]:.3f}" for name in ("import_s", "call_s")), told["what"]]
                )
                record({**common, "road": road, **told}, options, out)
    print(f"{common['device']}; {common['library']}; {common['commit']}")
    print(format_table(("seconds", "import flashcute", "first call", "call"), rows))
    return 0


def in_new_process(
    device: str, dtype: str, head_dim: int, call: str, *, jit: str, cache: str
) -> dict[str, Any]:
    environment = {
        **os.environ,
        "FLASHCUTE_JIT": jit,
        "FLASHCUTE_CACHE_DIR": cache,
        "FLASHCUTE_QUIET": "1",
    }
    module = [sys.executable, "-m", "flashcute._cli.first_call"]
    command = [*module, device, dtype, str(head_dim), call]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UsageError(done.stderr.strip() or f"the new process ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def record(line: dict[str, Any], options: argparse.Namespace, out: TextIO | None) -> None:
    if options.note is not None:
        line = {**line, "note": options.note}
    if out is not None:
        append_line(out, line)
