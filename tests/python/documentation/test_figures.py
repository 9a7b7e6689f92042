"""The pictures of recorded lines in docs/images."""

from __future__ import annotations

import re
from pathlib import Path

import figures
import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("figure", figures.FIGURES, ids=lambda figure: figure.name)
def test_pictures_show_the_recorded_lines(figure: figures.Figure) -> None:
    """A picture of older lines, or one that was changed by hand. Each says what it shows by a digest of the data, which
    no version of matplotlib changes. `python tools/docs/figures.py` draws them all."""
    assert figure.path.exists(), f"python tools/docs/figures.py {figure.name}"
    found = re.findall(r"flashcute plot (\w+), data ([0-9a-f]{16})", figure.path.read_text())
    chart = figure.chart()
    assert found == [(chart.kind, chart.digest)], f"python tools/docs/figures.py {figure.name}"


def test_every_picture_is_drawn() -> None:
    """A picture that no script draws, so that nothing tells when it is stale."""
    names = {path.stem for path in figures.FOLDER.glob("*.svg")}
    results = {name for name in names if not name.startswith("drawing_")}
    assert results == {figure.name for figure in figures.FIGURES}


def test_pictures_on_pages_exist() -> None:
    """An image that a page shows and nobody drew."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = [
        (page, page.parent / target)
        for page in pages
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+\.svg)\)", page.read_text())
    ]
    assert shown
    assert [str(page) for page, target in shown if not target.exists()] == []
