"""The tool that checks the direction of includes must see every header."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"

ProblemsOf = Callable[[str, str], list[str]]


@pytest.fixture
def problems_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProblemsOf:
    """What the tool says of a tree that holds one header with one include."""
    monkeypatch.syspath_prepend(TOOLS)
    tool = importlib.import_module("check_headers")

    def problems(header: str, included: str) -> list[str]:
        path = tmp_path / "flashcute" / f"{header}.hpp"
        path.parent.mkdir(parents=True)
        path.write_text(f'#pragma once\n#include "flashcute/{included}.hpp"\n')
        found: list[str] = tool.direction_problems(tmp_path)
        return found

    return problems


@pytest.mark.parametrize(
    ("header", "included"),
    [
        ("mask", "softmax"),
        ("mask", "sm90/layout"),
        ("sm90/layout", "sm90/forward"),
        ("sm90/instructions", "forward"),
    ],
)
def test_an_include_of_a_higher_level_is_reported(
    problems_of: ProblemsOf, header: str, included: str
) -> None:
    """Guards against a folder that the tool passes over: it did not look into sm90/, nor at includes from there."""
    (problem,) = problems_of(header, included)
    assert f"{header}.hpp includes {included}.hpp" in problem


def test_a_header_without_a_level_is_reported(problems_of: ProblemsOf) -> None:
    (problem,) = problems_of("sm90/something_new", "std")
    assert "sm90/something_new.hpp" in problem


def test_an_include_of_a_lower_level_is_right(problems_of: ProblemsOf) -> None:
    assert problems_of("sm90/loader", "sm90/layout") == []
