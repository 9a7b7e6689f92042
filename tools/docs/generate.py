"""Writes the tables and figures of README.md and docs/ that come from recorded lines (benchmarks/results/).

usage: python tools/docs/generate.py [--check] [--only TEXT] [--no-figures] [--all]

A page holds a table, or a sentence with figures, between two comments, which stay:

    <!-- generated: performance.speed_ups README -->
    ...
    <!-- end of generated -->

`performance.speed_ups` is the function of that name in tools/docs/tables/performance.py, called with the words that
follow. It returns Markdown, in which paths are relative to the root of the repository: links are made relative to
the page. --check changes nothing, and fails where a page is not what would be written. --all also writes the pages that
other tools make as a whole, which takes minutes: they compile kernels (with nvcc), and measure errors.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

BLOCK = re.compile(
    r"(?P<begin><!-- generated: (?P<what>.+?) -->\n)(?P<text>.*?)(?P<end><!-- end of generated -->)",
    re.DOTALL,
)

RESULTS = "benchmarks/results"
# Pages that a tool makes as a whole, and its command, which prints the page if it is not told where to write it.
WHOLE_PAGES = {
    "docs/reference/options_sm80.md": "tools/option_table.py --arch sm_90 --head-dims 64,128 "
    f"--times {RESULTS}/gpu_options.jsonl",
    "docs/reference/options_sm90.md": "tools/option_table.py --kernel sm90 --head-dims 64,128,256 "
    f"--times {RESULTS}/gpu_hopper_options.jsonl",
    "docs/reference/options_sm90_gradients.md": "tools/option_table.py --kernel sm90_gradients",
    "docs/performance/gradient_error.md": "tools/gradient_error.py --out {page}",
}


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def generated(what: str, page: Path) -> str:
    name, *words = shlex.split(what)
    module, _, function = name.rpartition(".")
    text = getattr(importlib.import_module(f"tables.{module}"), function)(*words).strip()

    def relative(match: re.Match[str]) -> str:
        return f"]({os.path.relpath(ROOT / match[1], page.parent)})"

    return re.sub(r"\]\((?!https?:)([^)#\s]+)\)", relative, text)


def renewed(page: Path) -> str:
    """The page as it should be."""

    def block(match: re.Match[str]) -> str:
        return f"{match['begin']}\n{generated(match['what'], page)}\n\n{match['end']}"

    return BLOCK.sub(block, page.read_text())


def write_whole_pages(only: str) -> None:
    for page, words in WHOLE_PAGES.items():
        if only not in page:
            continue
        command = [sys.executable, *words.format(page=page).split()]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        if "{page}" not in words:
            (ROOT / page).write_text(done.stdout.rstrip() + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only tell what is out of date")
    parser.add_argument("--only", default="", metavar="TEXT", help="pages whose path contains this")
    parser.add_argument("--no-figures", action="store_true", help="tables only")
    parser.add_argument("--all", action="store_true", help="and pages that other tools write")
    options = parser.parse_args()
    stale = []
    for page in pages():
        if options.only not in str(page.relative_to(ROOT)):
            continue
        text = renewed(page)
        if text != page.read_text():
            stale.append(str(page.relative_to(ROOT)))
            if not options.check:
                page.write_text(text)
    if options.all and not options.check:
        write_whole_pages(options.only)
    if not (options.check or options.no_figures):
        importlib.import_module("figures").draw_all(options.only)
    if stale:
        print("\n".join(stale))
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
