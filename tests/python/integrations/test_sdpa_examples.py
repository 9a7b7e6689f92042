"""The examples and the page about torch's scaled_dot_product_attention run, and do what they say."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flashcute
import pytest
from optional_torch import available, torch

ROOT = Path(__file__).parents[3]

needs_registry = pytest.mark.skipif(
    not (available and hasattr(torch.nn.attention, "restore_flash_attention_impl")),
    reason="needs torch 2.11 or later",
)


def run(example: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / example, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@needs_registry
def test_sdpa_unchanged(device: str) -> None:
    """A model of torch alone that does not reach flashcute, or learns something else there."""
    options = ["--steps", "4", "--batch", "2", "--seqlen", "40", "--width", "32", "--layers", "1"]
    done = run("sdpa_unchanged.py", *options, "--device", device)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"flashcute computed (\d+) calls of aten::(\S+)", done.stdout)
    assert [int(count) for count, _ in counts] == [4, 4]
    assert "torch computed" not in done.stdout


@needs_registry
def test_diffusers_native(device: str) -> None:
    """diffusers' native attention that does not reach flashcute; without diffusers, no word of what to install."""
    done = run("diffusers_native.py", "--size", "8", "--device", device)
    if find_spec("diffusers") is None:
        assert done.returncode == 2, done.stdout + done.stderr
        assert "pip install diffusers" in done.stderr
        pytest.skip("needs diffusers to run the model; without it the message was checked")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flashcute computed 4 attentions of 96 tokens" in done.stdout


@needs_registry
def test_the_page_runs(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A snippet that fails, or that leaves an activation behind. All of them in order, as a reader tries them."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "start" / "sdpa.md").read_text(), re.DOTALL
    )
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    before = flashcute.sdpa.served()
    try:
        with caplog.at_level(logging.ERROR, "flashcute"):
            for block in blocks:
                exec(block, names)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
    name = "_scaled_dot_product_flash_attention_for_cpu"
    assert flashcute.sdpa.served()[name] == before.get(name, 0) + 1
    assert not flashcute.sdpa.is_active()
    shown = capsys.readouterr().out
    assert name in shown
    assert "None\ndropout\n" in shown


def test_the_page_names_every_argument_and_function() -> None:
    """A table that lacks an argument, a page that lacks a function."""
    import inspect

    text = (ROOT / "docs" / "start" / "sdpa.md").read_text()
    for name in inspect.signature(flashcute.scaled_dot_product_attention).parameters:
        assert re.search(rf"^\|.*`{name}`", text, re.MULTILINE), name
    for name in set(flashcute.sdpa.__all__) - {"NAME", "Activation"}:
        assert f"{name}(" in text, name
