"""Docstrings are plain text: paragraphs, and lines like ``q: (batch, seqlen_q, heads, d)`` for arguments. This turns
them into what Sphinx typesets:

- arguments become a list: their names as code, their text beside it. Several may share a line, two spaces apart:
  ``k: (batch, seqlen_k, kv_heads, d).  v: (batch, seqlen_k, kv_heads, d_v).``;
- `names` between single backticks become code, with a link where one of the names is documented;
- indented blocks, which are formulas or code, keep their lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

NAMES = r"[a-z_]\w*(?:(?:, | and )[a-z_]\w*)*"
ARGUMENT = re.compile(rf"^({NAMES}): (\S.*)$")
NEXT_ARGUMENT = re.compile(rf"  +(?={NAMES}: \S)")  # on the same line
NAME = re.compile(r"(?<![`:\w])`([^`\s][^`]*)`(?![`_])")
INDENT = 4


def typeset(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = list(_blocks([NAME.sub(_linked, line) for line in lines]))


def _linked(match: re.Match[str]) -> str:
    text = match[1]
    return f":py:obj:`{text}`" if re.fullmatch(r"[\w.]+", text) else f"``{text}``"


def _blocks(lines: list[str]) -> Iterator[str]:
    """The lines with the marks of reStructuredText around arguments, lists and indented blocks."""
    inside = ""  # "argument", "block": what an indented line belongs to
    in_list = False
    before = ""
    for line in (part for x in lines for part in _one_argument_each(x)):
        indent = len(line) - len(line.lstrip())
        match = ARGUMENT.match(line)
        if match:
            if inside != "argument" and before:
                yield ""
            yield ", ".join(f"``{x}``" for x in re.split(", | and ", match[1]))
            yield f"{' ' * INDENT}{match[2]}"
            inside, in_list = "argument", False
        elif not line.strip():
            in_list = False
            yield ""
        elif indent < INDENT:
            if inside and before:
                yield ""
            inside = ""
            begins = line.startswith("- ")
            if begins and not in_list and before:
                yield ""
            in_list = in_list or begins
            yield line
        elif inside == "argument":
            begins = line.lstrip().startswith("- ")
            # A list begins, or the argument's text goes on after it.
            if (begins and not in_list) or (in_list and not begins and indent == INDENT):
                yield ""
            in_list = begins or (in_list and indent > INDENT)
            yield line
        else:
            if inside != "block" and not before and not line.lstrip().startswith(("- ", ">>>")):
                yield "::"
                yield ""
                inside = "block"
            yield line
        before = line.strip()


def _one_argument_each(line: str) -> list[str]:
    return NEXT_ARGUMENT.split(line) if ARGUMENT.match(line) else [line]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", typeset)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "2"}
