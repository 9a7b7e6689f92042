"""``info``: what this build contains and what it finds on this machine."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata

from .. import __version__, _core
from .options import Commands
from .table import format_bytes, format_table

LIBRARIES = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "cupy": ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x"),
    "jax": ("jax",),
    "ml_dtypes": ("ml_dtypes",),
}


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "info",
        help="what this build contains, and the GPUs, libraries and settings it finds",
        description="Prints what this build contains and what it finds on this machine.",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="also what each environment variable means, and where the run-time compiler was looked for",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    variables = _core.environment_variables()
    problems = {name: problem for name, _, _, problem in variables if problem}
    with without(problems):
        build, driver = _core.build_info(), _core.driver_info()
    print(f"flashcute {__version__}, Python {platform.python_version()}, {platform.machine()}")

    if build.image_archs:
        images = f"{build.image_archs} ({build.image_compiler})"
    else:
        images = "none: each GPU kernel is compiled at its first use"
    jit = told(build.jit_compiler or build.jit_problem, options.verbose)
    print(f"images     {images}")
    print(f"compiler   {jit}")
    print(f"cache      {build.cache_folder}, at most {format_bytes(build.cache_limit)}")
    print(f"CPU        {build.cpu_isa}, {build.cpu_threads} threads")
    if driver.available:
        print(f"driver     CUDA {cuda_version(driver.cuda_version)}")
        for gpu in driver.gpus:
            print(f"GPU {gpu.index}      {gpu.name}, sm_{gpu.arch}")
        if not driver.gpus:
            print(f"GPU        none: {driver.problem or 'the driver reports no device'}")
    else:
        print(f"driver     {driver.problem}")
    found = {library: installed_version(library) for library in LIBRARIES}
    print(
        "libraries  " + ", ".join(f"{name} {v}" if v else f"no {name}" for name, v in found.items())
    )

    listed = [v for v in variables if options.verbose or v[0] in os.environ]
    others = [v[0] for v in variables if v[0] not in os.environ]
    print("\nenvironment")
    if listed:
        rows = [
            (f"  {name}", os.environ.get(name, "(not set)"), default)
            for name, default, _, _ in listed
        ]
        settings = format_table(("  variable", "value", "default"), rows, left=3).splitlines()
        print(settings[0])
        for line, (_, _, meaning, problem) in zip(settings[1:], listed, strict=True):
            print(f"{line}\n      {meaning}")
            if problem:
                print(f"      error: {told(problem, options.verbose)}")
    if others and not options.verbose:
        print(f"  not set (--verbose explains them): {', '.join(others)}")
    if problems:
        print(
            f"\nThe facts above hold without {', '.join(problems)}; calls that read a wrong value raise its error."
        )
    return 1 if problems else 0


@contextmanager
def without(names: Iterable[str]) -> Iterator[None]:
    """Where these environment variables are not set."""
    values = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(values)


def told(text: str, verbose: bool) -> str:
    """A message, with what was tried only where that was asked for."""
    return (text if verbose else text.partition(" Tried:")[0]).rstrip()


def cuda_version(number: int) -> str:
    """Like "13.0", of the driver's 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def installed_version(library: str) -> str | None:
    """From the package's metadata: nothing is imported."""
    for distribution in LIBRARIES[library]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            pass
    return None
