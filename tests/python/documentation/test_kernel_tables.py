"""The tables of docs/kernels/ that come from recorded lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import lines
import pytest
from tables import kernels, options, steps


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for lines in place of the recorded ones."""
    folder = tmp_path / lines.RESULTS
    folder.mkdir(parents=True)
    monkeypatch.setattr(lines, "ROOT", tmp_path)
    lines.lines.cache_clear()
    yield folder
    lines.lines.cache_clear()


def write(file: Path, *records: dict[str, object]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_steps_are_beside_the_faster_of_the_others(recorded: Path) -> None:
    """A ratio to the slower one, upside down, or sorted by name."""
    sizes = {"head_dim": 64, "causal": True, "batch": 2, "heads": 8, "kv_heads": 2, "seqlen": 512}
    tflops = {"fa3": 100.0, "cudnn": 200.0, "a": 100.0, "b": 220.0}
    write(
        recorded / "gpu_hopper_steps.jsonl", {"kind": "step", "run": 3, **sizes, "tflops": tflops}
    )
    row = steps.table("3").splitlines()[-1]
    assert row == "| 64 causal | 2 x 8/2 x 512 | 200 (cuDNN) | b 1.10, a 0.50 |"


def test_a_run_or_an_option_without_lines_is_an_error() -> None:
    """A block with a number that is none, which would become an empty table."""
    with pytest.raises(ValueError, match="no line of run 999 has tflops"):
        steps.table("999")
    with pytest.raises(ValueError, match="no line with swizzle=0"):
        options.effect("head_dim,rates", "swizzle=0")
    with pytest.raises(ValueError, match="with several changes also change, got head_dim,rate"):
        options.effect("head_dim,rate", "swizzled=0")


def test_speed_up_over_the_faster_of_two(recorded: Path) -> None:
    """Over the slower one the kernel would look better than it is."""
    cell = {"batch": 1, "heads": 2, "kv_heads": 2, "seqlen_q": 64, "head_dim": 64, "causal": True}
    times = {"flashcute": 2.0, "fa3": 3.0, "sdpa_cudnn": 5.0}
    write(
        recorded / "a.jsonl", *({**cell, "impl": impl, "ms_p50": ms} for impl, ms in times.items())
    )
    assert kernels.over_the_faster("a") == {(1, 2, 2, 64, 64, True): 1.5}
