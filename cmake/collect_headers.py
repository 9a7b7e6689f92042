"""Copies the headers that a device translation unit can reach into one folder, for run-time compilation.

Follows ``#include`` lines from the starting headers through the given include folders, whatever the
preprocessor would decide, so the result holds at least what any compiler needs. Headers that no folder
has (the CUDA runtime's, the C++ standard library's) come from elsewhere when the code is compiled.

A root given as SUBFOLDER=FOLDER is copied below SUBFOLDER. CUTLASS spells libc++ headers
``CUDA_STD_HEADER(name)``, which is <cccl/cuda/std/name> since CUDA 13: hence ``cccl=...``.

usage: collect_headers.py --output FOLDER --depfile FILE --start HEADER... --root [SUBFOLDER=]FOLDER...
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
CUDA_STD = re.compile(r"^\s*#\s*include\s+CUDA_STD_HEADER\((\w+)\)", re.MULTILINE)


def closure(start: list[str], roots: dict[Path, str]) -> dict[str, Path]:
    """Path in the output -> file of every header that can be reached."""
    found: dict[str, Path] = {}
    waiting: list[tuple[str, Path | None]] = [(name, None) for name in start]
    while waiting:
        name, includer = waiting.pop()
        folders = [includer.parent] if includer else []  # "quoted" includes look there first
        files = [(folder / name).resolve() for folder in (*folders, *roots)]
        file = next((f for f in files if f.is_file()), None)
        root = next((r for r in roots if file and file.is_relative_to(r)), None)
        if file is None or root is None:
            continue
        target = (Path(roots[root]) / file.relative_to(root)).as_posix()
        if target in found:
            continue
        found[target] = file
        text = file.read_text(encoding="utf-8", errors="replace")
        waiting += [
            (other, file if quote == '"' else None) for quote, other in INCLUDE.findall(text)
        ]
        waiting += [(f"cuda/std/{other}", None) for other in CUDA_STD.findall(text)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--depfile", type=Path, required=True)
    parser.add_argument("--start", nargs="+", required=True)
    parser.add_argument("--root", nargs="+", required=True)
    arguments = parser.parse_args()
    roots = {
        Path(root.rpartition("=")[2]).resolve(): root.rpartition("=")[0] for root in arguments.root
    }
    headers = closure(arguments.start, roots)
    missing = [name for name in arguments.start if name not in headers]
    if missing:
        raise SystemExit(f"not found in {', '.join(map(str, roots))}: {', '.join(missing)}")

    shutil.rmtree(arguments.output, ignore_errors=True)
    for relative, file in headers.items():
        target = arguments.output / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    stamp = arguments.output.with_suffix(".stamp")
    sources = " ".join(str(file).replace(" ", "\\ ") for file in headers.values())
    arguments.depfile.write_text(f"{stamp}: {sources}\n")
    stamp.write_text(f"{len(headers)} headers\n")
    print(
        f"{len(headers)} device headers, {sum(f.stat().st_size for f in headers.values()) / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
