"""``info``: what this build contains and what it finds on this machine."""

from __future__ import annotations

import argparse
import os
import platform
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
    build, driver = _core.build_info(), _core.driver_info()
    print(f"flashcute {__version__}, Python {platform.python_version()}, {platform.machine()}")

    if build.image_archs:
        images = f"{build.image_archs} ({build.image_compiler})"
    else:
        images = "built without images: each GPU kernel is compiled at its first use" + (
            "" if build.jit_compiler else ', which needs pip install "flashcute[jit]"'
        )
    jit = build.jit_compiler or build.jit_problem
    if not options.verbose:
        jit = jit.partition(" Tried:")[0]
    print(f"images     {images}")
    print(f"compiler   {jit.rstrip()}")
    print(f"cache      {build.cache_folder}, at most {format_bytes(build.cache_limit)}")
    print(f"CPU        {build.cpu_isa}, {build.cpu_threads} threads")
    if driver.available:
        version = f"{driver.cuda_version // 1000}.{driver.cuda_version % 1000 // 10}"
        print(f"driver     CUDA {version}")
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

    variables = _core.environment_variables()
    listed = [v for v in variables if options.verbose or v[0] in os.environ]
    others = [name for name, _, _ in variables if name not in os.environ]
    print("\nenvironment")
    if listed:
        rows = [
            (f"  {name}", os.environ.get(name, "(not set)"), default) for name, default, _ in listed
        ]
        settings = format_table(("  variable", "value", "default"), rows, left=3).splitlines()
        print(settings[0])
        for line, (_, _, meaning) in zip(settings[1:], listed, strict=True):
            print(f"{line}\n      {meaning}")
    if others and not options.verbose:
        print(f"  not set (--verbose explains them): {', '.join(others)}")
    return 0


def installed_version(library: str) -> str | None:
    """From the package's metadata: nothing is imported."""
    for distribution in LIBRARIES[library]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            pass
    return None
