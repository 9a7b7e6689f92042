"""Docstrings are plain text: paragraphs, and lines like ``q: (batch, seqlen_q, heads, d)`` for arguments. This turns
such lines into the fields that Sphinx typesets as a list of parameters."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

ARGUMENT = re.compile(r"^((?:[a-z_]\w*(?:, | and )?)+): (\S.*)$")


def typeset(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    found: list[str] = []
    inside = False  # of an argument's text
    for line in lines:
        match = ARGUMENT.match(line)
        if match:
            if not inside and found and found[-1]:
                found.append("")
            found.append(f":param {match[1].replace(' and ', ', ')}: {match[2]}")
            inside = True
        elif inside and line.startswith("    "):
            found.append(line)
        else:
            if inside and line:
                found.append("")
            inside = inside and not line
            found.append(line)
    lines[:] = found


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", typeset)
    return {"parallel_read_safe": True, "version": "1"}
