"""docs/guides/faq.md: the messages that it quotes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "guides" / "faq.md"

# A message: a block of text with the comment above. "…" stands for what differs.
MESSAGE = re.compile(r"<!-- message -->\n *```text\n(.*?)\n *```", re.DOTALL)
# Neighbouring literals are one text; so are literals on both sides of a line break in a macro or in CMake.
BETWEEN_LITERALS = re.compile(r'"\s*\\?\n\s*[fR]{0,2}"')


def sources() -> str:
    """What programs can print, as far as it stands in literals."""
    folders = ("src", "include", "python", "cmake")
    suffixes = {".cpp", ".hpp", ".py", ".cmake"}
    files = (x for folder in folders for x in sorted((ROOT / folder).rglob("*")))
    return "\n".join(
        BETWEEN_LITERALS.sub("", file.read_text()) for file in files if file.suffix in suffixes
    )


def quoted(page: str) -> list[str]:
    """Messages, and what stands in `code` with a part left out."""
    inline = re.findall(r"`([^`\n]*…[^`\n]*)`", MESSAGE.sub("", page).replace("```", ""))
    return [*MESSAGE.findall(page), *(x for x in inline if x != "…")]


def missing_parts(message: str, text: str) -> list[str]:
    parts = [part.strip(" \n") for part in re.split(r"…|\n", message)]
    return [part for part in parts if len(part) > 1 and part not in text]


def test_quoted_messages_are_those_of_the_sources() -> None:
    """A message that was reworded: whoever searches the page for what they see would find nothing."""
    text = sources()
    messages = quoted(PAGE.read_text())
    assert len(messages) > 15
    unknown = {message: missing_parts(message, text) for message in messages}
    assert not {message: parts for message, parts in unknown.items() if parts}


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("no CUDA driver: libcuda.so.1 could not be opened (…", True),
        ("no CUDA driver: libcuda.so.2 could not be opened (…", False),
        ("… has no GPU kernel. Cast to float32", True),
        ("… has no GPU kernel. Cast to float64", False),
    ],
)
def test_a_reworded_message_is_noticed(message: str, found: bool) -> None:
    """A check that finds everything, or that does not know that a literal may be continued on the next line."""
    assert (not missing_parts(message, sources())) is found


def test_headings_are_linked_from_elsewhere_as_they_are() -> None:
    """Links within the page to a heading that was renamed."""
    page = PAGE.read_text()
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) <= anchors
