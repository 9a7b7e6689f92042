"""Runs a program that was written for flash-attn 2, unchanged: python -m flashcute.compat program.py ..."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from . import install

USAGE = "usage: python -m flashcute.compat [--metadata] program.py [arguments of the program]"


def main() -> None:
    arguments = sys.argv[1:]
    metadata = arguments[:1] == ["--metadata"]
    arguments = arguments[metadata:]
    if not arguments or arguments[0].startswith("-"):
        sys.exit(USAGE)
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)  # as python program.py does
    with install(metadata=metadata):
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
