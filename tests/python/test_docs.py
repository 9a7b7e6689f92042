"""The documentation against the code that it describes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import flashcute as fc
import pytest
from conftest import backward_configurations_of_first_use

ROOT = Path(__file__).parents[2]


def test_every_environment_variable_is_documented() -> None:
    """A variable that is read and not documented, or documented and not read."""
    text = (ROOT / "docs" / "environment.md").read_text()
    run_time = text[: text.index("When building")]
    documented = dict(re.findall(r"^\| `(FLASHCUTE_\w+)` \| (.*?) \|", run_time, re.MULTILINE))
    assert documented == {name: default for name, default, _ in fc._core.environment_variables()}


def test_links_lead_somewhere() -> None:
    """A file that was renamed and is still linked to."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    assert len(pages) > 5
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_architecture_names_files_that_exist() -> None:
    """The map's entries: a path in backticks with a slash or a suffix is a file or folder."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    paths = re.findall(r"`((?:[\w.]+/)+[\w.]*|[\w.]+\.(?:hpp|cpp|py|def|json))`", text)
    assert len(paths) > 15
    folders = ("", "include/flashcute", "src", "python", "python/flashcute")
    for path in paths:
        assert any((ROOT / folder / path).exists() for folder in folders), path


@pytest.mark.parametrize(
    ("device", "page"),
    [
        ("cpu", "gradient_error.md"),
        pytest.param(
            "cuda",
            "gradient_error_gpu.md",
            marks=[
                pytest.mark.gpu,
                pytest.mark.slow,
                pytest.mark.compiles(backward_configurations_of_first_use()),
            ],
        ),
    ],
)
@pytest.mark.usefixtures("prebuilt")
def test_gradient_error_is_what_the_tool_writes(tmp_path: Path, device: str, page: str) -> None:
    """A table of an older tool, or of other head dims: same lines and columns, and errors of the same size."""
    file = tmp_path / page
    tool = [sys.executable, ROOT / "tools" / "gradient_error.py", "--device", device]
    subprocess.run([*tool, "--shapes", "1", "--out", file], check=True, capture_output=True)

    def cells(path: Path) -> list[list[str]]:
        lines = path.read_text().splitlines()
        return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]

    written, kept = cells(file), cells(ROOT / "docs" / page)
    assert [line[:3] for line in written] == [line[:3] for line in kept]
    assert written[0] == kept[0]
    for new, old in zip(written[1:], kept[1:], strict=True):
        for column in (4, 6, 8):  # maxima
            assert float(new[column]) < 3 * float(old[column]), (old[:3], written[0][column])
