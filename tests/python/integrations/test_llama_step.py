"""The benchmark of a training step of a Llama."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import optional_torch
import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "python" / "llama_step.py"


@pytest.mark.skipif(
    not optional_torch.available or importlib.util.find_spec("transformers") is None,
    reason="needs torch and transformers",
)
@pytest.mark.parametrize("head_dim", ["64", "128"])
def test_all_attentions_have_the_same_gradients(tmp_path: Path, head_dim: str) -> None:
    """A benchmark that nobody can run; attentions of which one leaves something out, and is the faster for it."""
    options = f"--device cpu --tiny --rounds 1 --head-dim {head_dim} --out lines.jsonl"
    done = subprocess.run(
        [sys.executable, SCRIPT, *options.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["impl"] for line in lines] == ["fcute", "fcute_sm80", "cudnn", "flash2"]
    for line in lines:
        assert line["apart"] < 1e-4
        assert line["ms_p50"] > 0
