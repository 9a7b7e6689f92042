"""Chinese pages (docs/zh/) name the page that they translate, and the state of it:

    <!-- translation of start/install.md at 0123456789ab -->

The number is a hash of the original's text, without what is generated in it. Where the original has changed since, the
built page says so at its top.

usage: python docs/_ext/translations.py [--fresh PAGE ...]

lists the pages whose original has changed; the exit code is 1 if there are any. --fresh: these pages were brought up to
date, and get the new hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parents[1]
HEAD = re.compile(r"^<!-- translation of (\S+\.md) at ([0-9a-f]{12}) -->\n")
CHINESE, MARK = r"[\u3400-\u9fff]", r"[\u2018-\u201d\u3000-\u303f\uff00-\uffef]"
NEEDLESS_SPACE = re.compile(rf"(?<={CHINESE})\n(?={CHINESE})|(?<={MARK})\n|\n(?={MARK})")
STALE = """:::{{warning}}
[英文原文]({original})在本页翻译之后有更新，内容可能已经过时。
:::

"""


class Translation(NamedTuple):
    page: Path
    original: Path
    of: str  # the hash of the text that was translated

    @property
    def stale(self) -> bool:
        return self.of != state(self.original)


GENERATED = re.compile(r"(<!-- generated: .*? -->).*?<!-- end of generated -->", re.DOTALL)


def state(page: Path) -> str:
    text = GENERATED.sub(r"\1", page.read_text())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def translation(page: Path, docs: Path = DOCS) -> Translation:
    head = HEAD.match(page.read_text())
    if head is None:
        raise ValueError(f"{page}: expected a first line <!-- translation of PAGE.md at HASH -->")
    return Translation(page, docs / head[1], head[2])


def translations(docs: Path = DOCS) -> list[Translation]:
    return [translation(page, docs) for page in sorted((docs / "zh").glob("*.md"))]


def tell_readers(app: Any, docname: str, source: list[str]) -> None:
    if docname.startswith("zh/"):
        found = translation(DOCS / f"{docname}.md", DOCS)
        if found.stale:
            original = f"../{found.original.relative_to(DOCS)}"
            source[0] = HEAD.sub(lambda head: head[0] + STALE.format(original=original), source[0])


def join_lines(app: Any, doctree: Any) -> None:
    """A line's end in the source is a space to browsers, and Chinese has none: between two Chinese characters, and
    beside a full-width mark, which brings its own room, lines are joined."""
    if not app.env.docname.startswith("zh/"):
        return
    from docutils import nodes  # what lists stale pages does without

    for element in doctree.findall(nodes.TextElement):
        if isinstance(element, nodes.FixedTextElement | nodes.literal):
            continue
        parts = element.children
        for at, text in enumerate(parts):
            if isinstance(text, nodes.Text) and "\n" in text:  # it may be a line's end alone
                before = parts[at - 1].astext()[-1:] if at else ""
                after = parts[at + 1].astext()[:1] if at + 1 < len(parts) else ""
                joined = NEEDLESS_SPACE.sub("", f"{before}{text}{after}")
                element[at] = nodes.Text(joined[len(before) : len(joined) - len(after)])


def tell_language(
    app: Any, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """So that browsers take Chinese forms of the characters, and not the Japanese ones."""
    if page.startswith("zh/"):
        context["language"] = "zh-CN"


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", tell_readers)
    app.connect("doctree-read", join_lines)
    app.connect("html-page-context", tell_language)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fresh", nargs="+", type=Path, default=[], metavar="PAGE")
    for page in parser.parse_args().fresh:
        now = state(translation(page.resolve()).original)
        text = HEAD.sub(lambda head, now=now: head[0].replace(head[2], now), page.read_text())
        page.write_text(text)
    stale = [x for x in translations() if x.stale]
    for x in stale:
        print(f"{x.page.relative_to(DOCS)}: {x.original.relative_to(DOCS)} has changed")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
