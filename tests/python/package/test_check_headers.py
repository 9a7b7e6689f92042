"""The tool that checks the direction of includes must see every header."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[3] / "tools"

ProblemsOf = Callable[[str, str], list[str]]


@pytest.fixture
def problems_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProblemsOf:
    """What the tool says of a tree that holds one header with one include."""
    monkeypatch.syspath_prepend(TOOLS)
    tool = importlib.import_module("check_headers")

    def problems(header: str, included: str) -> list[str]:
        path = tmp_path / "flashcute" / f"{header}.hpp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#pragma once\n#include "flashcute/{included}.hpp"\n')
        found: list[str] = tool.direction_problems(tmp_path)
        return found

    return problems


@pytest.mark.parametrize(
    ("header", "included"),
    [
        ("core/features", "policy/mask"),
        ("policy/mask", "device/softmax"),
        ("device/softmax", "sm80/layout"),
        ("sm80/gemm", "sm90/gemm"),
        ("sm90/instructions", "sm80/forward"),
        ("api", "policy/mask"),
    ],
)
def test_an_include_of_a_higher_folder_is_reported(
    problems_of: ProblemsOf, header: str, included: str
) -> None:
    """Guards against a folder that the tool passes over: it did not look into sm90/, nor at includes from there."""
    problems = problems_of(header, included)
    assert f"{header}.hpp includes {included}.hpp: {header.rpartition('/')[0]}/ may not" in problems


def test_a_plain_header_of_a_kernels_folder_stays_plain(problems_of: ProblemsOf) -> None:
    """The host includes it, and has no CuTe."""
    (problem,) = problems_of("sm90/params", "sm90/layout")
    assert problem.startswith("sm90/params.hpp is plain C++ and includes sm90/layout.hpp")


def test_headers_that_include_each_other_are_reported(
    problems_of: ProblemsOf, tmp_path: Path
) -> None:
    """`#pragma once` hides it, until someone includes them in the other order."""
    second = tmp_path / "flashcute" / "sm80" / "gemm.hpp"
    second.parent.mkdir(parents=True)
    second.write_text('#include "flashcute/sm80/layout.hpp"\n')
    (problem,) = problems_of("sm80/layout", "sm80/gemm")
    assert "include each other" in problem


def test_a_folder_without_a_rule_is_reported(problems_of: ProblemsOf) -> None:
    (problem,) = problems_of("sm100/something_new", "core/std")
    assert "what sm100/ may include" in problem


def test_an_include_of_a_lower_folder_is_right(problems_of: ProblemsOf) -> None:
    assert problems_of("sm90/loader", "sm90/layout") == []
    assert problems_of("sm80/loader", "policy/mask") == []
