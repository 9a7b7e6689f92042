"""The drawings of tools/docs/drawings.py: the files are those that it draws, and what it computes is true."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="draws with matplotlib, of the extra `bench`")

import drawings
import numpy as np
from flashcute.block_mask import BlockMask
from sketches import fragments, masks, sm80_pipeline, sm90_timeline, swizzle
from sketches.masks import Panel
from sketches.timeline import Bar

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"


def test_pages_use_all_drawings_and_no_others() -> None:
    """A drawing that was renamed in the script alone, or that no page shows any more."""
    used: set[str] = set()
    for page in DOCS.rglob("*.md"):
        used.update(re.findall(r"images/drawing_(\w+)\.svg\)", page.read_text()))
    stored = {file.stem.removeprefix("drawing_") for file in DOCS.glob("images/drawing_*.svg")}
    assert used == stored == drawings.DRAWINGS.keys()


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_files_are_what_the_script_draws(name: str) -> None:
    """A file of an older script, or of older rules. `python tools/docs/drawings.py` draws them all."""
    expected = f"flashcute drawing {name}, {drawings.digest_of(drawings.drawn(name))}"
    assert expected in drawings.file_of(name).read_text(), f"python tools/docs/drawings.py {name}"


def test_the_script_draws_the_same_bytes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A date or a random identifier in a file, which would then change with every run."""
    drawn = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        monkeypatch.setattr(drawings, "FOLDER", folder)
        drawings.draw_all("sm80")
        drawn.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert drawn[0] == drawn[1]
    assert drawn[0].keys() == {"drawing_sm80_pipeline.svg"}


PANELS = masks.panels()


@pytest.mark.parametrize("panel", PANELS, ids=[panel.title for panel in PANELS])
def test_blocks_of_masks_are_those_that_the_kernel_visits(panel: Panel) -> None:
    """A mask that is drawn by another definition than the one that is computed."""
    whole, partial, skipped = panel.counts()
    counted = panel.counted()
    assert (whole, partial) == counted[:2]
    # Blocks beyond the keys of a sequence are none of it.
    assert skipped == counted[2] + (80 if "seqlens_k" in panel.options else 0)


@pytest.mark.parametrize("title", ["documents, causal", "any mask by element"])
def test_blocks_of_masks_that_are_data_are_the_cells_of_a_block_mask(title: str) -> None:
    (panel,) = (panel for panel in PANELS if panel.title == title)
    assert panel.counts() == BlockMask.from_dense(panel.shown[None, None]).counts()


@pytest.mark.parametrize("unit", range(swizzle.UNITS))
def test_bank_conflicts(unit: int) -> None:
    """A swizzle that helps the unit of the drawing and not the others."""
    phase = [(row, unit) for row in range(8)]
    assert set(swizzle.rows_of_banks(phase, swizzled=True)) == {1}
    assert sorted(swizzle.rows_of_banks(phase, swizzled=False))[-5:] == [0, 8, 8, 8, 8]


def test_a_swizzled_row_has_all_its_units() -> None:
    for row in range(16):
        places = {swizzle.place_of(row, unit, True) for unit in range(swizzle.UNITS)}
        assert places == set(range(swizzle.UNITS))


def test_fragments_cover_a_tile_once() -> None:
    """Two lanes that hold the same element, or an operand in other places than the accumulators."""
    held = np.zeros((16, 16), int)
    for lane, register in itertools.product(range(32), range(8)):
        held[fragments.operand_place(lane, register)] += 1
        row, column = fragments.accumulator_place(lane, register % 4)
        assert fragments.operand_place(lane, register) == (row, column + 8 * (register // 4))
    assert (held == 1).all()


def lanes_of(bars: list[Bar]) -> dict[str, list[Bar]]:
    found: dict[str, list[Bar]] = {}
    for bar in sorted(bars, key=lambda bar: bar.begin):
        found.setdefault(bar.lane, []).append(bar)
    return found


def bar_of(bars: list[Bar], lane: str, text: str) -> Bar:
    (found,) = (bar for bar in bars if (bar.lane, bar.text) == (lane, text))
    return found


@pytest.mark.parametrize("bars", [
    sm80_pipeline.schedule(1, 4)[0],
    sm80_pipeline.schedule(2, 4)[0],
    sm90_timeline.schedule(4, 2),
], ids=["one stage", "two stages", "Hopper"])  # fmt: skip
def test_bars_of_a_lane_follow_each_other(bars: list[Bar]) -> None:
    """Two things at once on one unit."""
    for lane, found in lanes_of(bars).items():
        for before, after in itertools.pairwise(found):
            assert before.end <= after.begin + 1e-9, (lane, before, after)


def test_barriers_and_copies_of_the_sm80_loop() -> None:
    """A copy into a place that is still read, or barriers that the loader does not have."""
    for stages, blocks in itertools.product((1, 2), (2, 5)):
        bars, barriers = sm80_pipeline.schedule(stages, blocks)
        assert len(barriers) == blocks * (3 - stages)
        for n in range(blocks - stages):
            copy, product = (
                bar_of(bars, "copies", f"K({n})"),
                bar_of(bars, "warps", f"S({n + stages})"),
            )
            assert copy.begin >= product.end
            assert copy.end <= bar_of(bars, "warps", f"S({n})").begin


@pytest.mark.parametrize("stages", [2, 3])
def test_turns_and_places_of_hopper(stages: int) -> None:
    """Warpgroups that do not alternate, or a copy into a place from which a warpgroup still multiplies."""
    blocks = 5
    bars = sm90_timeline.schedule(blocks, stages)
    products = [bar.text for bar in lanes_of(bars)["tensor cores"]]
    scores = [text for text in products if ": S" in text]
    assert [text[0] for text in scores] == ["1", "2"] * (blocks + 1)
    for n in range(blocks - stages):
        for w in ("1", "2"):
            for copied, product in (("K", "S"), ("V", "P V")):
                copy = bar_of(bars, "copies (TMA)", f"{copied}({n})")
                last = bar_of(bars, "tensor cores", f"{w}: {product}({n + stages})")
                assert copy.begin >= last.end
                assert copy.end <= bar_of(bars, "tensor cores", f"{w}: {product}({n})").begin
