"""Times builds of flashcute by turns: each in a process of its own, all alive at once, a call each in a random order.

A build is a folder from which `import flashcute` takes it, as `pip install --target` makes one. Told is the time of the
first build over the time of each other, as the median over the rounds, with its quartiles; below 1 the other is slower.
Norms of the results are compared too.

usage: python benchmarks/python/compare_builds.py before=FOLDER after=FOLDER [--what forward,gradients]
           [--head-dims 64,128] [--seqlens 1024,4096] [--masks full,causal] [--kv-ratio N] [--deterministic]
           [--kernel sm80] [--tokens N] [--hidden N] [--rounds N] [--cache-dir FOLDER] [--out LINES.jsonl]

Masks: full; causal; window-N, the causal mask and the last N keys; packed and packed-full, the sequences of causal and
full packed into one; documents, of log-normal lengths in one row, and causal; packed-uneven, such documents as packed
sequences, as many rows in all.

On a GPU calls are CUDA graphs; without one they run on the CPU. Kernels that have no image are compiled first, into the
folder of each build below --cache-dir.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CASE = ("what", "head_dim", "mask", "seqlen")
WITHOUT_CAUSAL = ("full", "packed-full")
REPEATS = 3  # calls that are timed together


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("builds", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument(
        "--what", type=lambda text: text.split(","), default=["forward", "gradients"]
    )
    parser.add_argument("--head-dims", type=numbers, default=[64, 128])
    parser.add_argument("--seqlens", type=numbers, default=[1024, 4096, 16384])
    parser.add_argument("--masks", type=lambda text: text.split(","), default=["full", "causal"])
    parser.add_argument("--kv-ratio", type=int, default=1)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument(
        "--kernel", choices=("sm80", "sm90"), help="default: what a call would take"
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.what) - {"forward", "gradients"}:
        parser.error(f"--what {','.join(unknown)}: forward and gradients are known")
    for mask in options.masks:
        if not re.fullmatch(r"full|causal|window-[1-9]\d*|packed(-full|-uneven)?|documents", mask):
            parser.error(f"--masks {mask}: no such mask")
    if wrong := [x for x in options.builds if "=" not in x]:
        parser.error(f"{wrong[0]}: a build is NAME=FOLDER")
    names = [x.split("=", 1)[0] for x in options.builds]
    if len(set(names)) < len(names):
        parser.error("two builds have the same name")
    return options


def cases_of(options: argparse.Namespace) -> list[tuple[str, int, str, int]]:
    return [
        (what, head_dim, mask, seqlen)
        for what in options.what
        for head_dim in options.head_dims
        for mask in options.masks
        for seqlen in options.seqlens
    ]


# ---- a worker: one build -----------------------------------------------------------------------------


def arguments_of(mask: str, batch: int, seqlen: int, kit: Any) -> dict[str, Any]:
    """Of `explain` and `Variant`."""
    import flashcute
    from block_masks import documents  # beside this script

    told: dict[str, Any] = {"causal": mask not in WITHOUT_CAUSAL}
    if mask.startswith("window-"):
        told["window"] = (int(mask.removeprefix("window-")) - 1, 0)
    elif mask.startswith("packed"):
        starts = np.arange(0, (batch + 1) * seqlen, seqlen, np.int32)
        if mask == "packed-uneven":
            starts = np.concatenate(([0], np.cumsum(documents(batch * seqlen)))).astype(np.int32)
        told["cu_seqlens_q"] = told["cu_seqlens_k"] = kit.array(starts, "int32")
    elif mask == "documents":
        lengths = documents(seqlen)
        numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        told["block_mask"] = flashcute.BlockMask.from_documents(kit.array(numbers[None], "int32"))
    return told


def configs_of(
    options: argparse.Namespace, told: Any, head_dim: int, causal: bool, kit: Any
) -> tuple[Any, Any]:
    """Of the forward and of the gradients."""
    from flashcute._cli.options import changed_backward_config, changed_config

    if options.kernel is None:
        return told.config, told.gradients.config
    changes, dtype, arch = {"kernel": options.kernel}, told.config.dtype, kit.arch
    return (
        changed_config(head_dim, dtype, arch, changes),
        changed_backward_config(
            head_dim,
            dtype,
            arch,
            {**changes, "deterministic": options.deterministic},
            causal=causal,
        ),
    )


def work(options: argparse.Namespace) -> None:
    """Prints where it runs, then norms of each case's results, then milliseconds of each case whose number it reads."""
    import flashcute
    import torch
    from flashcute._cli.kits import TorchCpuKit, TorchCudaKit
    from flashcute._cli.provenance import provenance

    on_gpu = torch.cuda.is_available()
    kit, dtype = (TorchCudaKit(7), "bfloat16") if on_gpu else (TorchCpuKit(7), "float32")
    print(json.dumps(provenance(kit, "of a build")), flush=True)
    calls = []
    for what, head_dim, mask, seqlen in cases_of(options):
        heads, batch = max(1, options.hidden // head_dim), max(1, options.tokens // seqlen)
        rows = (batch * seqlen,) if mask.startswith("packed") else (batch, seqlen)
        q, dout, k, v = (
            kit.normal((*rows, count, head_dim), dtype)
            for count in (heads, heads, *2 * (heads // options.kv_ratio,))
        )
        arguments = arguments_of(mask, batch, seqlen, kit)
        variant = flashcute.Variant(**arguments)
        told = flashcute.explain(
            q, k, v, gradients=True, deterministic=options.deterministic, **arguments
        )
        config, of_gradients = configs_of(options, told, head_dim, mask not in WITHOUT_CAUSAL, kit)
        forward = functools.partial(flashcute.forward, config, q, k, v, variant=variant)
        out, lse = forward(return_lse=True)
        if what == "forward":
            results = [kit.empty_like(q)]
            call = functools.partial(forward, out=results[0])
        else:
            results = [kit.empty_like(x) for x in (q, k, v)]
            size = flashcute.backward_workspace_size(of_gradients, q, v, variant=variant)
            call = functools.partial(
                flashcute.backward, of_gradients, dout, q, k, v, out, lse, variant=variant,
                **dict(zip(("dq", "dk", "dv"), results, strict=True)), workspace=kit.empty((size,), "float32"),
            )  # fmt: skip
        calls.append(kit.repeatable(call)[0])
        kit.synchronize()
        print(json.dumps([float(kit.double(x).norm()) for x in results]), flush=True)
    for line in sys.stdin:
        call = calls[int(line)]
        call()  # what came before, another build's call, has left other data in the caches
        print(kit.samples_ms(call, 1, REPEATS)[0], flush=True)


# ---- the caller of all -------------------------------------------------------------------------------


class Build:
    def __init__(self, name: str, folder: str, caches: Path, arguments: Sequence[str]) -> None:
        self.name = name
        path = os.pathsep.join(x for x in (folder, os.environ.get("PYTHONPATH")) if x)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "FLASHCUTE_CACHE_DIR": str(caches / name),
                "FLASHCUTE_JIT": "fastest",  # a kernel that is compiled later would be another one at first
            },
        )

    def ask(self, case: int | None = None) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        if case is not None:
            self.process.stdin.write(f"{case}\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with exit code {self.process.wait()}")
        return json.loads(line)


def main() -> None:
    options = parsed()
    if options.worker:
        return work(options)
    cases = cases_of(options)
    with tempfile.TemporaryDirectory() as temporary:
        caches = options.cache_dir or Path(temporary)
        builds = [Build(*x.split("=", 1), caches, sys.argv[1:]) for x in options.builds]
        try:
            origins = [build.ask() for build in builds]
            norms = {build.name: [build.ask() for _ in cases] for build in builds}
            times: dict[str, list[list[float]]] = {
                build.name: [[] for _ in cases] for build in builds
            }
            for _ in range(options.rounds):
                for case in random.sample(range(len(cases)), len(cases)):
                    for build in random.sample(builds, len(builds)):
                        times[build.name][case].append(build.ask(case))
        finally:
            for build in builds:
                build.process.kill()
                build.process.wait()
    tell(options, origins[0], cases, norms, times)


def alike(norms: Sequence[float], others: Sequence[float]) -> bool:
    """As far as rounding goes, in sums of any order."""
    return all(math.isclose(x, y, rel_tol=1e-3) for x, y in zip(norms, others, strict=True))


def tell(
    options: argparse.Namespace,
    origin: dict[str, Any],
    cases: list[tuple[str, int, str, int]],
    norms: dict[str, list[list[float]]],
    times: dict[str, list[list[float]]],
) -> None:
    """`origin`: of the first build's process. `norms` and `times` of each build, by its name, case by case."""
    first, *others = times
    origin = {name: x for name, x in origin.items() if name not in ("commit", "flashcute")}
    for number, case in enumerate(cases):
        what, head_dim, mask, seqlen = case
        base = times[first][number]
        text = f"{what:9} d {head_dim:3} {mask:11} {seqlen:6}  "
        text += f"{first} {statistics.median(base):.4f} ms"
        line: dict[str, Any] = {
            "kind": "compared_builds",
            **origin,
            **dict(zip(CASE, case, strict=True)),
            "causal": mask not in WITHOUT_CAUSAL,
            "kv_ratio": options.kv_ratio,
            **({"kernel": options.kernel} if options.kernel else {}),
            "deterministic": options.deterministic,
            "rounds": options.rounds,
            "ms": {name: statistics.median(of[number]) for name, of in times.items()},
        }
        for name in others:
            ratios = [x / y for x, y in zip(base, times[name][number], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
            other = "" if alike(norms[first][number], norms[name][number]) else ", OTHER RESULTS"
            text += f"   {name} {middle:.3f} ({low:.3f} to {high:.3f}{other})"
            line.setdefault("over_first", {})[name] = middle
        print(text)
        if options.out:
            with options.out.open("a") as out:
                out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
