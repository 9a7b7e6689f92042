"""The tables and sentences that tools/docs/generate.py writes into README.md and docs/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import generate
import lines
import pytest
from tables import performance

ROOT = Path(__file__).parents[3]


def test_pages_are_what_the_generator_writes() -> None:
    """A figure that was edited by hand, or that stayed when the measurement was repeated."""
    command = [sys.executable, ROOT / "tools" / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_begin_has_its_end() -> None:
    """A comment that was lost: the block's figures would stay what they are for ever."""
    found = 0
    for page in generate.pages():
        text = page.read_text()
        begun = text.count("<!-- generated: ")
        assert begun == text.count("<!-- end of generated -->") == len(generate.BLOCK.findall(text))
        found += begun
    assert found > 5


def test_a_stale_page_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that passes whatever the page says; and the file is then written once and for all."""
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    for name in ("README.md", "docs/index.md"):
        (tmp_path / name).write_text("no block")
    before = "a\n<!-- generated: performance.windows -->\n\n| 1 |\n\n<!-- end of generated -->\nb\n"
    page.write_text(before)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    assert page.read_text() == before
    monkeypatch.setattr(sys, "argv", ["generate.py", "--no-figures"])
    assert generate.main() == 0
    assert "| head dimension |" in page.read_text()
    assert page.read_text().startswith("a\n")
    assert page.read_text().endswith("\nb\n")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 0


def test_links_of_a_block_are_relative_to_its_page() -> None:
    found = generate.generated(
        "performance.speed_up_rows forward_mma", ROOT / "docs" / "a" / "b.md"
    )
    assert "](../../benchmarks/results/gpu_forward.jsonl)" in found


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1.234, "1.23"),
        (0.996, "0.996"),
        (0.9996, "0.9996"),
        (1.0, "1.00"),
        (1.004, "1.00"),
        (None, "-"),
    ],
)
def test_rounding_hides_no_ratio_below_one(number: float | None, text: str) -> None:
    assert lines.rounded(number) == text


def test_speed_up_is_their_time_over_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way round, or of a run's last line in place of the median."""
    cell = {"batch": 1, "heads": 2, "kv_heads": 2, "seqlen_q": 64, "head_dim": 64, "causal": True}
    times = {"flashcute": (2.0, 1.0, 4.0), "fa3": (3.0, 3.0, 9.0)}
    text = "\n".join(
        json.dumps({**cell, "impl": impl, "ms_p50": ms})
        for impl, all_ms in times.items()
        for ms in all_ms
    )
    (tmp_path / lines.RESULTS).mkdir(parents=True)
    (tmp_path / lines.RESULTS / "a.jsonl").write_text(
        text + '\n{"impl": "fa3", "status": "skipped"}\n'
    )
    monkeypatch.setattr(lines, "ROOT", tmp_path)
    lines.lines.cache_clear()
    assert lines.speed_ups("a", "fa3") == {(1, 2, 2, 64, 64, True): 1.5}
    lines.lines.cache_clear()


def test_the_lowest_and_the_highest_are_of_what_a_row_shows() -> None:
    """And not of a head dimension that has no column."""
    found = {(1, 2, 2, 64, d, True): ratio for d, ratio in ((192, 0.5), (256, 1.25))}
    assert performance.summary(performance.of_columns(found)) == ["-", "-", "1.25", "1.25", "1.25"]


def test_a_group_that_is_none_is_an_error() -> None:
    """A block with a spelling mistake, which would become an empty table."""
    with pytest.raises(ValueError, match="no group of rows 'forwards'"):
        performance.speed_up_rows("forwards")
