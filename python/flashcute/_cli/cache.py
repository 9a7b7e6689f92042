"""``cache``: the kernels that were compiled at run time and are kept on disk."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable

from .. import _core
from .options import Commands
from .table import format_bytes, format_table


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "cache",
        help="list, check or remove the kernels that were compiled at run time",
        description="Looks after the disk cache of kernels that were compiled at run time. "
        "FLASHCUTE_CACHE_DIR names its folder, FLASHCUTE_CACHE_SIZE limits its size. Ends with 1 if check "
        "finds a damaged image, or if clear leaves one.",
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "check", "clear"),
        default="list",
        help="list (the default): all images, the most recently used first; check: verify them, and remove "
        "damaged ones; clear: remove all but those that another process is compiling",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    return {"list": show, "check": check, "clear": clear}[options.action]()


def show() -> int:
    images = _core.cached_images()
    if images:
        rows = [
            (
                image.kernel,
                image.target or "-",
                image.compiler or "-",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(image.last_used)),
                format_bytes(image.size),
            )
            for image in images
        ]
        print(format_table(("kernel", "target", "compiler", "last used", "size"), rows, left=4))
        print()
    print(
        f"{total(images)} in {folder()}; the limit is {format_bytes(_core.build_info().cache_limit)}"
    )
    return 0


def check() -> int:
    outcomes = _core.check_cached_images()
    damaged = [(image, outcome) for image, outcome in outcomes if outcome != "whole"]
    sentences = {
        "removed": "damaged, removed",
        "in use": "damaged; another process is working on it: not touched",
        "failed": "damaged, and cannot be removed",
    }
    for image, outcome in damaged:
        print(f"{described(image)}: {sentences[outcome]}")
    removed = [image for image, outcome in damaged if outcome == "removed"]
    print(
        f"checked {total(image for image, _ in outcomes)} in {folder()}: {len(damaged)} damaged, {len(removed)} removed"
    )
    return 1 if damaged else 0


def clear() -> int:
    outcomes = _core.clear_cached_images()
    sentences = {
        "in use": "another process is working on it: not removed",
        "failed": "cannot be removed",
    }
    left = [(image, outcome) for image, outcome in outcomes if outcome != "removed"]
    for image, outcome in left:
        print(f"{described(image)}: {sentences[outcome]}")
    removed = total(image for image, outcome in outcomes if outcome == "removed")
    print(f"removed {removed} from {folder()}" + (f"; {len(left)} left" if left else ""))
    return 1 if left else 0


def described(image: _core.CachedImage) -> str:
    return " for ".join(filter(None, (image.kernel, image.target)))


def total(images: Iterable[_core.CachedImage]) -> str:
    """ "3 images, 2.1 MiB"."""
    sizes = [image.size for image in images]
    return f"{len(sizes)} image{'' if len(sizes) == 1 else 's'}, {format_bytes(sum(sizes))}"


def folder() -> str:
    return _core.build_info().cache_folder or "no folder (there is no home folder)"
