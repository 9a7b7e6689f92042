"""The examples run and do what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from optional_torch import needs_torch

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda x: x.stem)
def test_examples_are_tested(example: Path) -> None:
    """An example that nobody runs."""
    tests = EXAMPLES.parent.glob("tests/python/**/test_*examples.py")
    assert any(example.stem in file.read_text() for file in tests)


@needs_torch
def test_train_char(tmp_path: Path) -> None:
    """A few steps: both attentions train, end at the same loss, and say so."""
    options = ["--steps", "5", "--batch", "4", "--context", "32", "--width", "32", "--heads", "2"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_char.py", *options, "--plot", "loss.svg"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"flashcute (\S+), torch (\S+);", done.stdout)
    assert found
    mine, theirs = (float(x) for x in found.groups())
    assert mine == pytest.approx(theirs, abs=5e-5)  # gradients of 0 would make it 2e-4
    assert "5/5" in done.stderr


@needs_torch
def test_flash_attn_unchanged(tmp_path: Path) -> None:
    """A program that imports flash_attn trains: only a model whose attention has gradients learns to repeat."""
    program = [EXAMPLES / "flash_attn_unchanged.py", "--steps", "40", "--batch", "32"]
    done = subprocess.run(
        [sys.executable, "-m", "flashcute.compat", *program],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flashcute" in done.stdout.splitlines()[0]
    first, *_, last = (float(x) for x in re.findall(r"loss (\S+)", done.stdout))
    assert first > 2.5  # guessing is log(16) = 2.77
    assert last < 1.0
    assert "flashcute" not in re.sub(r'""".*?"""', "", program[0].read_text(), flags=re.DOTALL)


@needs_torch
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_finetune_transformers(tmp_path: Path) -> None:
    """A few steps: the loss falls, and kernels compute all of them: torch's attention would warn."""
    options = ["--steps", "8", "--batch", "4", "--length", "32", "--width", "32", "--device", "cpu"]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning",
            EXAMPLES / "finetune_transformers.py",
            *options,
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(x) for x in re.findall(r"step +\d+  loss (\S+)", done.stdout)]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.1
