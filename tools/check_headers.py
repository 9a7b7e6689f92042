"""Checks the direction of includes, and that every header compiles alone.

The plain headers (shared by GPU kernels, CPU backend and tests) must compile with the host compiler
and no CUDA include folder. The kernels' headers must compile with the host compiler and CuTe, with
emulated instructions. A header may include only headers of a lower level.

usage: check_headers.py --compiler g++ --root REPOSITORY --system FOLDER...
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

# Lowest first: what a header may include is on a lower level.
LEVELS = [
    ["std", "constants"],
    ["enums", "error"],
    ["features"],
    ["kernel_id"],
    ["config"],
    ["params", "backward_config"],
    ["sequence", "instructions", "backward_params", "tiles", "api", "tensor_map"],
    ["query_tile", "kv_blocks"],
    ["mask", "tile_rounds"],
    ["block_counter", "layout", "hopper_params"],
    ["fragment", "sm90/instructions"],
    ["apply"],
    ["gemm", "softmax", "nonfinite", "sm90/layout", "sm90/schedule"],
    ["cuda_core", "tf32x3", "sm90/gemm", "sm90/loader", "sm90/store"],
    ["load_store"],
    ["backward_delta", "backward_sums"],
    ["forward", "backward", "sm90/forward"],
    ["entry", "sm90/entry"],
]
PLAIN = [
    "std",
    "constants",
    "enums",
    "features",
    "kernel_id",
    "config",
    "error",
    "params",
    "sequence",
    "query_tile",
    "kv_blocks",
    "tiles",
    "api",
    "mask",
]
PLAIN += ["block_counter", "backward_config", "backward_params", "tensor_map", "tile_rounds"]
PLAIN += ["hopper_params"]
# Above the instructions, which tests/cpp/emulation replaces. The entries need a CUDA compiler.
KERNEL = [
    "layout",
    "fragment",
    "apply",
    "gemm",
    "cuda_core",
    "tf32x3",
    "softmax",
    "nonfinite",
    "load_store",
    "backward_delta",
    "backward_sums",
    "forward",
    "backward",
    "sm90/layout",
    "sm90/schedule",
    "sm90/gemm",
    "sm90/loader",
    "sm90/store",
    "sm90/forward",
]
INCLUDE = re.compile(r'#include [<"](?:flashcute/([\w/]+)\.hpp|([^>"]+))[>"]')


def direction_problems(include: Path) -> list[str]:
    level = {header: i for i, headers in enumerate(LEVELS) for header in headers}
    problems = []
    folder = include / "flashcute"
    for path in sorted(folder.rglob("*.hpp")):
        header = str(path.relative_to(folder).with_suffix(""))
        if header not in level:
            problems.append(f"{header}.hpp: give it a level in {Path(__file__).name}")
            continue
        for ours, other in INCLUDE.findall(path.read_text()):
            if ours and level.get(ours, 99) >= level[header]:
                problems.append(f"{header}.hpp includes {ours}.hpp, which is not on a lower level")
            public = header in ("std", "error", "api")  # std.hpp's job, or host only
            if other and header in PLAIN and not public:
                problems.append(f"{header}.hpp includes <{other}>: only std.hpp may")
    return problems


def host_problems(source: Path) -> list[str]:
    """Host code includes only plain headers; the bindings only the public interface."""
    problems = []
    for path in sorted([*source.glob("src/**/*.[ch]pp"), *source.glob("python/*.[ch]pp")]):
        allowed = ["api", "error"] if path.parent.name == "python" else PLAIN
        for ours, other in INCLUDE.findall(path.read_text()):
            if ours and ours not in allowed:
                problems.append(f"{path.name} includes flashcute/{ours}.hpp")
            if other in ("cuda.h", "cuda_runtime.h", "nvrtc.h"):
                problems.append(f"{path.name} includes <{other}>")
    return problems


def compile_problems(compiler: str, root: Path, system: list[str]) -> list[str]:
    problems = []
    options = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    for header in PLAIN + KERNEL:
        folders = [f"-I{root / 'include'}"]
        if header in KERNEL:
            folders += ["-Wno-unknown-pragmas"]  # #pragma unroll is nvcc's
            folders.insert(0, f"-I{root / 'tests/cpp/emulation'}")
            folders += [f"-isystem{folder}" for folder in system]
        result = subprocess.run(
            [compiler, *options, *folders, "-x", "c++", "-"],
            input=f'#include "flashcute/{header}.hpp"\n',
            capture_output=True,
            text=True,
        )
        if result.returncode:
            problems.append(f"{header}.hpp does not compile alone:\n{result.stderr}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--root", type=Path, default=Path("."))
    parser.add_argument(
        "--system", nargs="*", default=[], help="folders of CUTLASS and CUDA headers"
    )
    arguments = parser.parse_args()
    problems = direction_problems(arguments.root / "include") + host_problems(arguments.root)
    problems += compile_problems(arguments.compiler, arguments.root, arguments.system)
    print("\n".join(problems) or "headers: direction and self-sufficiency are right")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
