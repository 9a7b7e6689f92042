"""Links from pages to files outside of docs/, for example to a header, lead to a page that shows the file.

A link is written as on any host of repositories, relative to the page: ``[text](../../include/.../forward.hpp)``.
A folder's page lists what lies in it. So the pages need no network, and show the code that they were written for.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
FOLDER = "repository"  # in the built pages
# Of a file that is shown; of a larger one the beginning. (Recorded lines take long to highlight.)
MOST_BYTES = {".jsonl": 20_000, ".json": 20_000}
MOST_BYTES_OF_OTHERS = 200_000
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(?:#[^)\s]*)?\)")


def link_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Before a page is parsed: targets outside of docs/ become those of the files' pages."""
    page = Path("docs", f"{docname}.md")

    def replaced(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / match[1]))
        known = (ROOT / target).exists() and target.suffix not in (".svg", ".png")
        if not known or (target.parts[0] == "docs" and target.suffix == ".md"):
            return match[0]
        if target == Path("README.md"):  # the first page says what it says
            return f"]({os.path.relpath('docs/index.md', page.parent)})"
        files(app).add(target)
        return f"](repository:{'../' * docname.count('/')}{FOLDER}/{target}.html)"

    source[0] = LINK.sub(replaced, source[0])


def files(app: Sphinx) -> set[Path]:
    found: set[Path] = app.env.__dict__.setdefault("repository_files", set())
    return found


def merge(app: Sphinx, env: Any, docnames: set[str], other: Any) -> None:
    files(app).update(getattr(other, "repository_files", ()))


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    waiting, done = sorted(files(app)), set()
    while waiting:
        target = waiting.pop()
        if target in done:
            continue
        done.add(target)
        if (ROOT / target).is_dir():
            below = [Path(x).relative_to(target) for x in tracked if Path(x).is_relative_to(target)]
            entries = sorted({Path(x.parts[0]) for x in below})
            waiting += [target / x for x in entries]
            body = list_of(target, entries)
        else:
            body = code_of(app, target)
        title = html.escape(str(target))
        yield (
            f"{FOLDER}/{target}",
            {"title": title, "body": f"<h1>{title.replace('/', '/<wbr>')}</h1>{body}"},
            "page.html",
        )


def list_of(folder: Path, entries: list[Path]) -> str:
    items = "".join(f'<li><a href="{folder.name}/{x}.html">{x}</a></li>' for x in entries)
    return f"<ul>{items}</ul>"


def code_of(app: Sphinx, file: Path) -> str:
    text = (ROOT / file).read_text(errors="replace")
    most = MOST_BYTES.get(file.suffix, MOST_BYTES_OF_OTHERS)
    shown = text if len(text) <= most else text[: text.rfind("\n", 0, most)]
    cut = "" if shown == text else f"<p>The first {len(shown)} of {len(text)} bytes.</p>"
    try:
        language = get_lexer_for_filename(file.name).aliases[0]
    except ClassNotFound:
        language = "json" if file.suffix == ".jsonl" else "text"
    code = app.builder.highlighter.highlight_block(shown, language, linenos="inline")  # type: ignore[attr-defined]
    return f"{cut}{code}"


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", link_files)
    app.connect("env-merge-info", merge)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
