"""Docstrings are plain text: paragraphs, and lines like ``q: (batch, seqlen_q, heads, d)`` for arguments. This turns
them into what Sphinx typesets:

- arguments become a list: their names as code, their text beside it. Several may share a line, two spaces apart:
  ``k: (batch, seqlen_k, kv_heads, d).  v: (batch, seqlen_k, kv_heads, d_v).``;
- `names` between single backticks become code, with a link where one of the names is documented; so do values as
  Python spells them, "end" or causal=True, without a link;
- indented blocks, which are formulas or code, keep their lines.

Signatures of the extension's functions and classes get the form of all others: names and defaults.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

import flashcute
from sphinx.application import Sphinx

NAMES = r"[a-z_]\w*(?:(?:, | and )[a-z_]\w*)*"
ARGUMENT = re.compile(rf"^({NAMES}): (\S.*)$")
NEXT_ARGUMENT = re.compile(rf"  +(?={NAMES}: \S)")  # on the same line
TEXT = r"\"[\w.+-]*\"|'[\w.+-]*'"
CODE = re.compile(
    r"(?P<code>``.+?``)"
    r"|(?<![`:\w])`(?P<name>[^`\s][^`]*)`(?![`_])"
    rf"|(?<![\w`'\"=])(?P<value>[a-z_]\w*=(?:{TEXT}|\(.*?\)|True|False|None|\d+(?:\.\d+)?\b)|{TEXT})(?![\w`'\"])"
)
INDENT = 4


def typeset(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = list(_blocks(lines))


def _marked(line: str) -> str:
    """A line of text, in which names and values are code."""

    def code(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        if match["name"] and re.fullmatch(r"[\w.]+", match["name"]):
            return f":py:obj:`{match['name']}`"
        return f"``{match['name'] or match['value']}``"

    return CODE.sub(code, line)


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
            yield f"{' ' * INDENT}{_marked(match[2])}"
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
            yield _marked(line)
        elif inside == "argument":
            begins = line.lstrip().startswith("- ")
            # A list begins, or the argument's text goes on after it.
            if (begins and not in_list) or (in_list and not begins and indent == INDENT):
                yield ""
            in_list = begins or (in_list and indent > INDENT)
            yield _marked(line)
        elif inside == "block" or line.lstrip().startswith(">>>"):
            inside = "block"
            yield line
        else:
            is_code = line.lstrip().startswith(("from ", "import "))
            yield f".. code-block:: {'python' if is_code else 'text'}"
            yield ""
            yield line
            inside = "block"
        before = line.strip()


def _one_argument_each(line: str) -> list[str]:
    return NEXT_ARGUMENT.split(line) if ARGUMENT.match(line) else [line]


def give_signatures(app: Sphinx) -> None:
    """nanobind has signatures as text, with types: ``def check(self, arch: str | int) -> None``. Autodoc reads those of
    methods, and shows them in the form of C++; of classes it wants them where `inspect` looks."""
    for cls in vars(flashcute).values():
        known = getattr(getattr(cls, "__init__", None), "__nb_signature__", None)
        if known and "\\" not in known[0][0]:  # which stands for a default that is not in the text
            cls.__signature__ = _signature(known[0][0])


def sign(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str, None] | None:
    known = getattr(obj, "__nb_signature__", None)
    return (str(_signature(known[0][0])), None) if known and signature else None


def _signature(text: str) -> inspect.Signature:
    """Of Python source: names and defaults, without self and types."""
    made = ast.parse(f"{text}: ...").body[0]
    assert isinstance(made, ast.FunctionDef)
    for node in ast.walk(made):
        if isinstance(node, ast.arg):
            node.annotation = None
    made.returns = None
    names: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(ast.Module([made], [])), "", "exec"), names)
    found = inspect.signature(names[made.name]).parameters
    told = [x.replace(default=_Other()) if x.default is ... else x for x in found.values()]
    return inspect.Signature([x for x in told if x.name != "self"])


class _Other:
    """A default that depends on other arguments."""

    def __repr__(self) -> str:
        return "..."


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", give_signatures)
    app.connect("autodoc-process-docstring", typeset)
    app.connect("autodoc-process-signature", sign)
    return {"parallel_read_safe": True, "version": "3"}
