"""The benchmark that trains a Llama with each attention."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import optional_torch
import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "python" / "train_llama.py"


@pytest.mark.skipif(
    not optional_torch.available or importlib.util.find_spec("transformers") is None,
    reason="needs torch and transformers",
)
def test_all_attentions_train_alike(tmp_path: Path) -> None:
    """A benchmark that nobody can run; runs that begin with other weights, or that see other data."""
    done = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            "--steps",
            "3",
            "--device",
            "cpu",
            "--tiny",
            "--out",
            "lines.jsonl",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["impl"] for line in lines] == ["fcute", "sdpa", "flash2"]
    for line in lines:
        assert line["losses"] == pytest.approx(lines[0]["losses"], abs=0.01)
        assert line["losses"][-1] < line["losses"][0]
        assert line["tokens_per_s"] == pytest.approx(2 * 64 * 1e3 / line["ms_p50"])
