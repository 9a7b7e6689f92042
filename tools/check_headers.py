"""Checks the direction of includes, and that every header compiles alone.

The plain headers (shared by GPU kernels, CPU backend and tests) must compile with the host compiler
and no CUDA include folder. The kernels' headers must compile with the host compiler and CuTe, with
emulated instructions. A header may include only headers of its own folder, and of folders below.

usage: check_headers.py --compiler g++ --root REPOSITORY --system FOLDER...
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

# Which folders' headers a folder's headers may include, beside its own. The project's top folder holds the public ones.
MAY_INCLUDE = {
    "core": set(),
    "policy": {"core"},
    "device": {"core", "policy"},
    "sm80": {"core", "policy", "device"},
    "sm90": {"core", "policy", "device"},
    "": {"core"},  # api.hpp
}
# Plain C++20, of which the host code includes no other. Those of sm90/ describe a launch.
PLAIN_FOLDERS = ("", "core", "policy")
PLAIN_OF_SM90 = ("sm90/params", "sm90/rounds", "sm90/tensor_map")
NEEDS_CUDA = ("sm80/entry", "sm90/entry", "sm90/backward_entry")  # a CUDA compiler
INCLUDE = re.compile(r'#include [<"](?:flashcute/([\w/]+)\.hpp|([^>"]+))[>"]')


def headers_of(include: Path) -> dict[str, list[tuple[str, str]]]:
    """Header -> what it includes: (one of ours, another)."""
    folder = include / "flashcute"
    return {
        str(path.relative_to(folder).with_suffix("")): INCLUDE.findall(path.read_text())
        for path in sorted(folder.rglob("*.hpp"))
    }


def folder_of(header: str) -> str:
    return header.rpartition("/")[0]


def is_plain(header: str) -> bool:
    return folder_of(header) in PLAIN_FOLDERS or header in PLAIN_OF_SM90


def direction_problems(include: Path) -> list[str]:
    headers = headers_of(include)
    problems = []
    for header, includes in headers.items():
        folder = folder_of(header)
        if folder not in MAY_INCLUDE:
            problems.append(f"{header}.hpp: tell {Path(__file__).name} what {folder}/ may include")
            continue
        for ours, other in includes:
            if ours and folder_of(ours) not in {folder, *MAY_INCLUDE[folder]}:
                problems.append(f"{header}.hpp includes {ours}.hpp: {folder}/ may not")
            if ours and is_plain(header) and not is_plain(ours):
                problems.append(f"{header}.hpp is plain C++ and includes {ours}.hpp, which is not")
            public = folder == "" or header == "core/std"  # host only; std.hpp's job
            if other and is_plain(header) and not public:
                problems.append(f"{header}.hpp includes <{other}>: only std.hpp may")
    ours = {header: {x for x, _ in includes if x} for header, includes in headers.items()}
    try:
        TopologicalSorter(ours).prepare()
    except CycleError as error:
        problems.append("these headers include each other: " + ", ".join(error.args[1]))
    return problems


def host_problems(source: Path) -> list[str]:
    """Host code includes only plain headers; the bindings only the public interface."""
    problems = []
    for path in sorted([*source.glob("src/**/*.[ch]pp"), *source.glob("python/core/*.[ch]pp")]):
        for ours, other in INCLUDE.findall(path.read_text()):
            allowed = ours in ("api", "error") if "python" in path.parts else is_plain(ours)
            if ours and not allowed:
                problems.append(f"{path.name} includes flashcute/{ours}.hpp")
            if other in ("cuda.h", "cuda_runtime.h", "nvrtc.h"):
                problems.append(f"{path.name} includes <{other}>")
    return problems


def compile_problems(compiler: str, root: Path, system: list[str]) -> list[str]:
    problems = []
    options = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    for header in headers_of(root / "include"):
        if header in NEEDS_CUDA:
            continue
        folders = [f"-I{root / 'include'}"]
        if not is_plain(header):
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
