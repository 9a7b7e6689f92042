"""The benchmarks that run a Llama with each attention."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optional_torch
import pytest

SCRIPTS = Path(__file__).parents[3] / "benchmarks" / "python"
pytestmark = pytest.mark.skipif(
    not optional_torch.available or importlib.util.find_spec("transformers") is None,
    reason="needs torch and transformers",
)


def lines_of(script: str, options: str, folder: Path) -> list[dict[str, Any]]:
    """What the script records of a tiny model on the CPU."""
    done = subprocess.run(
        [
            sys.executable,
            SCRIPTS / script,
            *f"--device cpu --tiny --out lines.jsonl {options}".split(),
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]


def test_all_attentions_train_alike(tmp_path: Path) -> None:
    """A benchmark that nobody can run; runs that begin with other weights, or that see other data."""
    lines = lines_of("train_llama.py", "--steps 3", tmp_path)
    assert [line["impl"] for line in lines] == ["fcute", "sdpa", "flash2"]
    for line in lines:
        assert line["losses"] == pytest.approx(lines[0]["losses"], abs=0.01)
        assert line["losses"][-1] < line["losses"][0]
        assert line["tokens_per_s"] == pytest.approx(2 * 64 * 1e3 / line["ms_p50"])


@pytest.mark.parametrize("head_dim", ["64", "128"])
def test_all_attentions_have_the_same_gradients(tmp_path: Path, head_dim: str) -> None:
    """A benchmark that nobody can run; attentions of which one leaves something out, and is the faster for it."""
    lines = lines_of("llama_step.py", f"--rounds 1 --head-dim {head_dim}", tmp_path)
    assert [line["impl"] for line in lines] == ["fcute", "fcute_sm80", "cudnn", "flash2"]
    for line in lines:
        assert line["apart"] < 1e-4
        assert line["ms_p50"] > 0
