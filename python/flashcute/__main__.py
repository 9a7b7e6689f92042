"""``python -m flashcute``: what this build contains, a demo, benchmarks, kernels ahead of time."""

from __future__ import annotations

import argparse
import os
import sys

from . import FlashcuteError, __version__
from ._cli import bench, cache, compare, compile_, demo, doctor, explain, info, io_, plot, profile_
from ._cli.options import INTERRUPTED, UsageError


def command_parser() -> argparse.ArgumentParser:
    """Of all commands; docs/reference/cli.md shows what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcute",
        description="FlashAttention on CuTe, for NVIDIA GPUs and CPUs.",
    )
    parser.add_argument("--version", action="version", version=f"flashcute {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (
        info,
        doctor,
        demo,
        bench,
        explain,
        compile_,
        cache,
        plot,
        compare,
        io_,
        profile_,
    ):
        module.add_command(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 1 if a check fails, 2 for wrong arguments, 130 after Ctrl-C."""
    options = command_parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        print(end="", flush=True)
        return code
    except (FlashcuteError, UsageError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
