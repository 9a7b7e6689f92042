"""Long names in code, such as ``torch.nn.functional.scaled_dot_product_attention``, may be broken after a dot, an
underline or a bracket. Otherwise one of them sets the width of a table's column, and the other columns get a word a
line. What a reader copies is the name as it was.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

NAME = re.compile(r'(<span class="pre">)([^<]{31,})(</span>)')  # as Sphinx writes a word of code
# After this many characters and one of these signs, if as many follow (an entity, &lt;, counts as its letters).
BREAK = re.compile(r"[^<]{12,}?[._/,=(|](?=[^<]{8})")


def let_break(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if "body" in context:
        context["body"] = NAME.sub(
            lambda match: match[1] + BREAK.sub(r"\g<0><wbr>", match[2]) + match[3], context["body"]
        )


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", let_break)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
