#!/usr/bin/env python3
"""Checks the object files that are compiled for one instruction set each (src/cpu/forward_<isa>.cpp,
backward_<isa>.cpp).

A weak symbol of such a file (an inline function, a template instance) may be the copy that the linker keeps for
everybody, and then code built for AVX-512 runs on a CPU without it. So each file may export its entry point only.

    check_isa_symbols.py OBJECT...
"""

import subprocess
import sys
from pathlib import Path

WEAK = set("WVu")
HARMLESS = (
    "DW.ref."  # a pointer to the C++ runtime's exception handler: data, the same in every file
)


def problems(path: str) -> list[str]:
    entry = Path(path).name.partition("_")[0] + "_tile("
    lines = subprocess.run(
        ["nm", "-C", path], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    symbols = [line.split(maxsplit=1 if line.startswith(" ") else 2)[-2:] for line in lines]
    found = [
        f"weak symbol: {name}"
        for kind, name in symbols
        if kind in WEAK and not name.startswith(HARMLESS)
    ]
    exported = [name for kind, name in symbols if kind in "TDBRGSC"]
    found += [
        f"exported symbol other than the entry point: {name}"
        for name in exported
        if entry not in name
    ]
    if sum(entry in name for name in exported) != 1:
        found.append(f"expected one entry point '{entry}...)', exported are: {exported}")
    return found


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    found = [f"{path}: {problem}" for path in paths for problem in problems(path)]
    print("\n".join(found) or f"{len(paths)} object files export nothing but their entry point")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
