"""The Python cells of the pages of docs/start, docs/learn, docs/guides and docs/reference.

A cell is a block fenced as python. All cells of a page run in order in one new interpreter without a GPU. A page
says about a cell what differs from this:

    <!-- not run: why -->      on the line above a cell, leaves it out
    <!-- output -->            between a cell and a block fenced as text: the cell prints this
"""

from __future__ import annotations

import importlib.util
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import optional_torch
import pytest
from conftest import Runner

ROOT = Path(__file__).parents[3]
FOLDERS = ("start", "learn", "guides", "reference")

# Pages whose cells another test runs, and why this one does not.
ELSEWHERE = {
    "docs/start/train.md": "needs the environment of torchrun: integrations/test_training_page.py",
    "docs/start/sdpa.md": "its calls are counted: integrations/test_sdpa_examples.py",
}

PAGES = [
    name
    for folder in FOLDERS
    for page in sorted((ROOT / "docs" / folder).rglob("*.md"))
    if (name := str(page.relative_to(ROOT))) not in ELSEWHERE and "```python\n" in page.read_text()
]

# What a page's cells may import, and an installation may lack.
OPTIONAL = ("torch", "transformers", "matplotlib", "rich", "jax", "cupy")

RUNNER = """
def _run_cells(page, cells):
    import contextlib, io, json, linecache, sys
    printed = []
    for line, code in cells:
        name = f"{page}, cell in line {line}"
        linecache.cache[name] = len(code), None, code.splitlines(True), name  # for tracebacks
        shown = io.StringIO()
        try:
            with contextlib.redirect_stdout(shown):
                exec(compile(code, name, "exec"), globals())
        except BaseException:
            sys.stdout.write(shown.getvalue())
            raise
        printed.append(shown.getvalue())
    print(json.dumps(printed))
"""


@dataclass
class Cell:
    line: int  # of its first line of code in the page
    code: str
    output: str | None  # what the page says that it prints
    runs: bool


def cells_of(text: str) -> list[Cell]:
    """The cells of a page, in order. Raises ValueError for a remark that belongs to no cell."""
    found: list[Cell] = []
    fence, language, begin, remark = "", "", 0, ""
    after_cell = False  # only blank lines since a cell
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if fence:
            if stripped != fence:
                inside.append(line)
                continue
            block = textwrap.dedent("\n".join(inside))
            after_cell = language == "python"
            if language == "python":
                if remark.startswith("output"):
                    raise ValueError(f"line {begin}: 'output' stands above a cell, not below it")
                found.append(Cell(begin, block, None, runs=not remark))
            elif remark.startswith("output") and language == "text":
                found[-1].output = block
            elif remark:
                raise ValueError(
                    f"line {begin}: <!-- {remark} --> is above a block of {language!r}"
                )
            fence, remark = "", ""
            continue
        if opened := re.fullmatch(r"(`{3,}|~{3,}|:{3,})(.*)", stripped):
            fence, language, begin, inside = opened[1], opened[2].strip(), number + 1, []
        elif marked := re.fullmatch(r"<!-- *(not run.*?|output.*?) *-->", stripped):
            remark = marked[1]
            if remark.startswith("not run") and not re.fullmatch(r"not run: \S.*", remark):
                raise ValueError(f"line {number}: expected <!-- not run: why -->")
            if remark.startswith("output") and (remark != "output" or not after_cell):
                raise ValueError(f"line {number}: expected <!-- output --> directly below a cell")
        elif stripped:
            if remark:
                raise ValueError(f"line {number}: <!-- {remark} --> is not followed by a block")
            after_cell = False
    if fence or remark:
        raise ValueError(f"the page ends within {fence or remark!r}")
    return found


def imports(code: str, module: str) -> bool:
    return re.search(rf"^\s*(import|from)\b[^#;]*\b{module}\b", code, re.MULTILINE) is not None


def is_there(module: str) -> bool:
    if module in ("torch", "transformers") and not optional_torch.available:  # or left aside
        return False
    return importlib.util.find_spec(module) is not None


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_cells_of_a_page_run(fresh: Runner, page: str) -> None:
    """A cell that fails where a reader runs it, or that prints something else than the page says."""
    cells = [cell for cell in cells_of((ROOT / page).read_text()) if cell.runs]
    code = "\n".join(cell.code for cell in cells)
    for module in OPTIONAL:
        if imports(code, module) and not is_there(module):
            pytest.skip(f"needs {module}")
    told = json.dumps([(cell.line, cell.code) for cell in cells])
    script = f"{RUNNER}\nimport json\n_run_cells({page!r}, json.loads({told!r}))"
    done = fresh(script, timeout=300, CUDA_VISIBLE_DEVICES="")
    printed = json.loads(done.stdout.splitlines()[-1])
    assert len(printed) == len(cells)
    for cell, shown in zip(cells, printed, strict=True):
        if cell.output is not None:
            assert lines_of(shown) == lines_of(cell.output), f"{page}, cell in line {cell.line}"


def test_cells_are_found_as_a_reader_sees_them() -> None:
    """A cell that is passed over, or an output that is compared with nothing."""
    page = textwrap.dedent("""\
        ```python
        print(1)
        ```
        <!-- output -->
        ```text
        1
        ```

        <!-- not run: needs a GPU -->
        ```python
        launch()
        ```

        - in a list

          ```python
          a = 1
          ```

        ````md
        ```python
        an example of a cell
        ```
        ````
        """)
    assert cells_of(page) == [
        Cell(2, "print(1)", "1", runs=True),
        Cell(11, "launch()", None, runs=False),
        Cell(17, "a = 1", None, runs=True),
    ]


@pytest.mark.parametrize(
    "page",
    [
        "<!-- not run -->\n```python\n```\n",
        "<!-- not run: needs a GPU -->\n\nwords\n",
        "<!-- output -->\n```text\n1\n```\n",
        "```python\n1\n```\n<!-- output: -->\n```text\n1\n```\n",
        "```python\n1\n```\n<!-- output -->\n```sh\n1\n```\n",
        "```python\nprint(1)\n",
    ],
)
def test_misplaced_remarks_are_refused(page: str) -> None:
    """A remark with a typing error, which would switch a comparison off."""
    with pytest.raises(ValueError, match=r"line|ends"):
        cells_of(page)


def test_pages_with_tests_of_their_own_exist() -> None:
    """A page that was renamed and is left out under its old name."""
    assert all((ROOT / page).exists() for page in ELSEWHERE)
