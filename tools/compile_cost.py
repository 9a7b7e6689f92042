"""A gate for what kernels cost to compile: one kernel of each ahead-of-time family by nvcc, and some that are compiled
at first use by NVRTC.

The yardstick is an empty kernel that includes cute/tensor.hpp, compiled by nvcc in the same run: so a slow machine does
not fail, and leaner headers of CuTe do not hide a slow kernel. Limits are in user seconds over the yardstick's, in
seconds, and in megabytes of memory. A shared machine's speed changes from minute to minute: what is over a limit is
compiled again with the yardstick beside it, up to three times, and the least ratio counts.

usage: python tools/compile_cost.py --build build/make [--families REGEX] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# The goals, and what a shared machine adds: it compiled one kernel in 3.3 to over 3.5 times the yardstick's time.
GOAL = {"sm80": 2.5, "sm90": 2.7}
MARGIN = 1.2
MEGABYTES = {"sm80": 700, "sm90": 900}
SECONDS = 8.0
EMPTY = '#include <cute/tensor.hpp>\nextern "C" __global__ void empty() {}\n'
# What is compiled at first use: (what, Python expression of its configuration).
FIRST_USE = [
    ("narrow copies", "ForwardConfig(head_dim=64, copy_bytes=2, async_copy=False)"),
    ("CUDA cores", "ForwardConfig(dtype='float32', head_dim=64, block_n=32, math='cuda_core')"),
    ("deterministic d 64", "default_backward_config(64, 'bfloat16', 'sm_90', deterministic=True)"),
    (
        "deterministic d 256",
        "default_backward_config(256, 'bfloat16', 'sm_90', deterministic=True)",
    ),
    ("gradients of float32", "default_backward_config(128, 'float32', 'sm_90')"),
    ("Hopper d 128", "default_config(128, 'bfloat16', 'sm_90')"),
]


@dataclass
class Cost:
    what: str
    compiler: str
    kernel: str  # sm80 or sm90
    seconds: float  # of user time, a kernel
    megabytes: float
    ratio: float = 0.0

    def beside(self, yardstick: Cost) -> Cost:
        self.ratio = self.seconds / yardstick.seconds
        return self

    def over(self) -> Iterator[str]:
        """The limits that it breaks."""
        allowed = MARGIN * GOAL[self.kernel]
        if self.ratio > allowed:
            yield f"{self.what}: {self.ratio:.2f} times the empty kernel's time, {allowed:.2f} allowed"
        if self.seconds > SECONDS:
            yield f"{self.what}: {self.seconds:.1f} s, {SECONDS:.0f} allowed"
        if self.megabytes > MEGABYTES[self.kernel]:
            yield f"{self.what}: {self.megabytes:.0f} MB, {MEGABYTES[self.kernel]} allowed"


def measured(command: list[str], env: dict[str, str] | None = None) -> tuple[float, float, str]:
    """User seconds and megabytes of a command, and what it printed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{text}")
    return usage.ru_utime, usage.ru_maxrss / 1024, text


class Nvcc:
    def __init__(self, build: Path, folder: Path) -> None:
        cache = (build / "CMakeCache.txt").read_text()
        found = re.search(r"^FLASHCUTE_NVCC:\w+=(.*)$", cache, re.MULTILINE)
        cutlass = re.search(r"^flashcute_cutlass_found:\w+=(.*)$", cache, re.MULTILINE)
        if not found or not cutlass:
            sys.exit(f"{build} is no build folder with images")
        self.nvcc, self.cutlass, self.folder = found[1], cutlass[1], folder

    def cost(self, what: str, text: str) -> Cost:
        kernel = "sm90" if "sm90/" in text else "sm80"
        target = (
            "arch=compute_90a,code=sm_90a" if kernel == "sm90" else "arch=compute_80,code=sm_90"
        )
        unit = self.folder / "unit.cu"
        unit.write_text(text)
        command = [self.nvcc, "-cubin", "-std=c++20", "-O3", "-DNDEBUG", f"-gencode={target}"]
        include = Path(__file__).parent.parent / "include"
        command += [
            f"-I{include}",
            f"-I{self.cutlass}",
            "-o",
            str(unit.with_suffix(".cubin")),
            str(unit),
        ]
        seconds, megabytes, _ = measured(command)
        return Cost(what, "nvcc", kernel, seconds, megabytes)


def costliest_kernel(unit: Path) -> str:
    """A family's translation unit with one kernel of it: causal, and of a backward the gradients'.
    The unit itself if it is of no attention."""
    text = unit.read_text()
    head, _, body = text.partition("\n\n")
    entries = re.findall(r"^FLASHCUTE_\w+_ENTRY\(.*?\}\)\n", body, re.DOTALL | re.MULTILINE)
    wanted = [e for e in entries if "_causal," in e.partition("\n")[0]]
    return f"{head}\n\n{wanted[0]}" if entries else text


def first_use(what: str, configuration: str) -> Cost:
    """The mean of the kernels of a configuration, compiled by NVRTC."""
    code = (
        "from flashcute import *; import flashcute as fc; "
        "default_config, default_backward_config = fc.default_config, fc.default_backward_config; "
        f"print(len(fc.prebuild({configuration}, 'sm_90')))"
    )
    with tempfile.TemporaryDirectory() as cache:
        env = {
            **os.environ,
            "FLASHCUTE_CACHE_DIR": cache,
            "FLASHCUTE_JIT": "force",
            "FLASHCUTE_QUIET": "1",
        }
        seconds, megabytes, text = measured([sys.executable, "-c", code], env)
    kernel = "sm90" if what.startswith("Hopper") else "sm80"
    return Cost(what, "NVRTC", kernel, seconds / int(text.split()[-1]), megabytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build", type=Path, required=True, help="build folder with images")
    parser.add_argument("--families", default="", help="only those that match")
    parser.add_argument("--json", type=Path, help="write the measurements there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        nvcc = Nvcc(arguments.build, Path(folder))
        compilations: dict[str, Callable[[], Cost]] = {
            unit.stem: partial(nvcc.cost, unit.stem, costliest_kernel(unit))
            for unit in sorted((arguments.build / "images").glob("*.cu"))
        }
        compilations |= {x[0]: partial(first_use, *x) for x in FIRST_USE}

        empty = partial(nvcc.cost, "empty kernel", EMPTY)
        empty()  # reads the headers from the disk
        yardstick = empty()
        costs = [yardstick]
        problems: list[str] = []
        for what, compile_it in compilations.items():
            if not re.search(arguments.families, what):
                continue
            cost = compile_it().beside(yardstick)
            for _ in range(3):
                if any(cost.over()):
                    yardstick = empty()
                    cost = min(cost, compile_it().beside(yardstick), key=lambda c: c.ratio)
            problems += cost.over()
            costs.append(cost)
            figures = f"{cost.seconds:5.1f} s  {cost.ratio:4.1f} x  {cost.megabytes:5.0f} MB"
            print(f"{what:24} {cost.compiler:6} {figures}", flush=True)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(asdict(c)) + "\n" for c in costs))
    print("\n".join(problems) or f"{len(costs)} compilations pass")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
