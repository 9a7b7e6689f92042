"""The benchmark that times builds by turns."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import flashcute
import optional_torch
import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "python" / "compare_builds.py"
INSTALLED = Path(flashcute.__file__).parents[1]
SMALL = ("--tokens=64", "--seqlens=32", "--hidden=64", "--head-dims=32", "--rounds=3")

pytestmark = pytest.mark.skipif(not optional_torch.available, reason="needs torch")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *SMALL, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_two_builds_take_turns(tmp_path: Path) -> None:
    """A case that is timed of one build alone, and the same build told as another one."""
    done = run(tmp_path, f"before={INSTALLED}", f"after={INSTALLED}", "--out=lines.jsonl")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [(x["what"], x["causal"]) for x in lines] == [
        ("forward", False), ("forward", True), ("gradients", False), ("gradients", True),
    ]  # fmt: skip
    for line in lines:
        assert set(line["ms"]) == {"before", "after"}
        assert line["over_first"]["after"] > 0
        assert line["device"]
    assert "OTHER RESULTS" not in done.stdout


def test_every_mask(tmp_path: Path) -> None:
    """A mask that a worker cannot make, forward or backward, or that its line does not name."""
    masks = "full,causal,window-5,packed,packed-full,packed-uneven,documents"
    done = run(tmp_path, f"a={INSTALLED}", f"--masks={masks}", "--out=lines.jsonl", "--rounds=1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [x["mask"] for x in lines] == 2 * masks.split(",")
    assert {x["mask"] for x in lines if not x["causal"]} == {"full", "packed-full"}
    assert "no such mask" in run(tmp_path, f"a={INSTALLED}", "--masks=window-0").stderr


def test_other_results_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A build that is fast because it is wrong. Rounding in sums of any order is none of that."""
    spec = importlib.util.spec_from_file_location("compare_builds", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = script.parsed(["a=x", "b=y", "--rounds=1"])
    for norm, told in ((1.0001, False), (1.1, True), (float("nan"), True)):
        script.tell(
            options, {}, [("forward", 64, "causal", 32)], {"a": [[1.0]], "b": [[norm]]}, {"a": [[2.0]], "b": [[1.0]]}
        )  # fmt: skip
        out = capsys.readouterr().out
        assert ("OTHER RESULTS" in out) == told
        assert "b 2.000" in out


def test_a_build_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    """Times of one build, told as those of two."""
    broken = tmp_path / "broken" / "flashcute"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken')\n")
    done = run(tmp_path, f"before={INSTALLED}", f"after={broken.parent}")
    assert done.returncode != 0
    assert "after: ended with exit code 1" in done.stderr
    assert "ms" not in done.stdout


def test_a_build_is_a_name_and_a_folder(tmp_path: Path) -> None:
    assert "a build is NAME=FOLDER" in run(tmp_path, str(INSTALLED)).stderr
