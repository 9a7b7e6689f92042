"""The Chinese pages: each names its original, and one whose original has changed is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import translations  # noqa: E402


def test_every_page_names_an_original_that_exists() -> None:
    """A page that could never be found stale."""
    pages = translations.translations()
    assert len(pages) >= 8
    assert [x.page for x in pages if not x.original.is_file()] == []


def test_a_changed_original_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the list, and to the reader of the page; and no longer when the page was brought up to date."""
    original, page = tmp_path / "start" / "a.md", tmp_path / "zh" / "a.md"
    for file in (original, page):
        file.parent.mkdir()
    original.write_text("# A\n")
    page.write_text(f"<!-- translation of start/a.md at {translations.state(original)} -->\n# 甲\n")
    monkeypatch.setattr(translations, "DOCS", tmp_path)

    def as_read() -> str:
        source = [page.read_text()]
        translations.tell_readers(None, "zh/a", source)
        return source[0]

    assert not translations.translation(page, tmp_path).stale
    assert as_read() == page.read_text()
    # What is generated may change: it is the same in the translation.
    original.write_text("# A\n<!-- generated: a.b -->\n| 1 |\n<!-- end of generated -->\n")
    page.write_text(f"<!-- translation of start/a.md at {translations.state(original)} -->\n# 甲\n")
    original.write_text(original.read_text().replace("1", "2"))
    assert not translations.translation(page, tmp_path).stale
    original.write_text("# A, and more\n")
    assert translations.translation(page, tmp_path).stale
    assert "[英文原文](../start/a.md)" in as_read()

    head, _, rest = page.read_text().partition("\n")
    page.write_text(f"{head.replace('at ', 'at')}\n{rest}")
    with pytest.raises(ValueError, match="expected a first line"):
        translations.translation(page, tmp_path)
