"""The documentation against the code that it describes."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import flashcute as fc
import pytest
from conftest import backward_configurations_of_first_use
from optional_torch import needs_torch

ROOT = Path(__file__).parents[3]


def test_every_environment_variable_is_documented() -> None:
    """A variable that is read and not documented, or documented and not read."""
    text = (ROOT / "docs" / "reference" / "environment.md").read_text()
    run_time = text[: text.index("When building")]
    documented = dict(re.findall(r"^\| `(FLASHCUTE_\w+)` \| (.*?) \|", run_time, re.MULTILINE))
    assert documented == {name: default for name, default, *_ in fc._core.environment_variables()}


def test_links_lead_somewhere() -> None:
    """A file that was renamed and is still linked to."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    assert len(pages) > 5
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@needs_torch
def test_code_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing that a stranger tries."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert "not taken" in capsys.readouterr().out  # of explain
    for name, q in (("q", names["q"]), ("k", names["k"]), ("v", names["v"])):
        assert q.grad.shape == (2, 1000, 8, 64), name


@needs_torch
def test_code_in_the_page_of_masks_runs() -> None:
    """With gradients of the shapes that it tells."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "guides" / "masks.md").read_text(), re.DOTALL
    )
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert names["sink"].grad.shape == names["dsink"].shape == (8,)


def test_architecture_names_files_that_exist() -> None:
    """The map's entries: a path in backticks with a slash or a suffix is a file or folder."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    paths = re.findall(r"`((?:[\w.]+/)+[\w.]*|[\w.]+\.(?:hpp|cpp|py|def|json))`", text)
    assert len(paths) > 15
    folders = ("", "include/flashcute", "src", "python", "python/flashcute")
    for path in paths:
        assert any((ROOT / folder / path).exists() for folder in folders), path


def test_the_map_of_the_architecture_names_files_that_exist() -> None:
    """A header or source that was renamed or removed and is still on the map."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^    (  )?(\S.*?)(?:  .*)?$", text[text.index("## Map") :], re.MULTILINE)
    folder, found = Path(), 0
    for inside, names in rows[: rows.index(("", "cmake/ third_party/"))]:
        if not inside:
            folder = ROOT / names
        for name in names.split() if inside else []:
            assert any(
                (folder / f"{name}{suffix}").exists() for suffix in ("", ".hpp", ".cpp", ".py")
            ), name
            found += 1
    assert found > 50


def test_tables_are_introduced_by_the_tools_that_write_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Words that were changed in the page alone: the next run of the tool takes them back."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    text = importlib.import_module("gradient_error").TEXT
    for device, page, whose in (
        ("cpu", "gradient_error.md", "the CPU backend (avx512)"),
        (
            "cuda",
            "gradient_error_gpu.md",
            "the kernels on one NVIDIA H200 (those that add to dq by atomics)",
        ),
    ):
        introduction = text.format(whose=whose, device=device, shapes=20, seed=0)
        assert (
            (ROOT / "docs" / "performance" / page).read_text().startswith(introduction + "| dtype")
        )

    kernels = importlib.import_module("option_table").KERNELS
    pages = {name: f"options_{name}.md" for name in ("sm80", "sm90", "sm90_gradients")}
    assert kernels.keys() == pages.keys()
    for kernel, page in pages.items():
        introduction = kernels[kernel].introduction.format(arch="sm_90", times="Speed in TFLOP/s.")
        assert (
            (ROOT / "docs" / "reference" / page)
            .read_text()
            .startswith(introduction + "\n## Head dimension")
        )


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

    written, kept = cells(file), cells(ROOT / "docs" / "performance" / page)
    assert [line[:3] for line in written] == [line[:3] for line in kept]
    assert written[0] == kept[0]
    for new, old in zip(written[1:], kept[1:], strict=True):
        for column in (4, 6, 8):  # maxima
            assert float(new[column]) < 3 * float(old[column]), (old[:3], written[0][column])
