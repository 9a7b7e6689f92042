"""``python -m flashcute doctor``: a defect that it does not name, or a healthy machine that it calls sick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from flashcute.__main__ import main
from flashcute._cli import doctor, model_shapes, self_test
from flashcute._cli.kits import NumPyKit, choose_kit
from optional_torch import needs_torch

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
}


def run_doctor(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flashcute", "doctor", *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_is_wrong_here() -> None:
    done = run_doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attention and its gradients are right" in done.stdout
    assert done.stdout.endswith("\nnothing wrong\n")


@pytest.mark.gpu
def test_a_gpu_is_tried() -> None:
    done = run_doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("attention and its gradients are right") == 2


def test_wrong_settings_are_named_and_do_not_stop_the_rest() -> None:
    done = run_doctor(FLASHCUTE_QUIET="yes")
    assert done.returncode == 1
    assert "WRONG  FLASHCUTE_QUIET" in done.stdout
    assert "attention and its gradients are right" in done.stdout
    assert done.stdout.endswith("\n1 wrong\n")


@pytest.mark.parametrize("kind", ["a file in the way", "no permission", "others may write"])
def test_a_cache_that_keeps_nothing(tmp_path: Path, kind: str) -> None:
    """Kernels that are compiled again in every process, and nobody knows why."""
    folder = tmp_path / "cache"
    if kind == "a file in the way":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o700)
    assert bool(doctor.why_not_writable(folder)) == (kind == "a file in the way")
    if kind == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        folder.chmod(0o500)
    elif kind == "others may write":
        folder.chmod(0o777)
    assert doctor.why_not_writable(folder)
    assert "WRONG  cache" in run_doctor(FLASHCUTE_CACHE_DIR=str(folder)).stdout


def test_a_cache_that_is_not_there_yet(tmp_path: Path) -> None:
    assert not doctor.why_not_writable(tmp_path / "not" / "yet")


@pytest.mark.parametrize("broken", ["out", "lse", "dq", "dk", "dv"])
def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """A self-test that cannot fail."""

    def off_in_one_place(results: tuple, which: int) -> tuple:
        results[which][..., -1] += np.float32(0.01)
        return results

    kit = NumPyKit(0)
    assert self_test.self_test(kit, "float32") == ""
    name = "forward" if broken in ("out", "lse") else "backward"
    which = ["out", "lse"].index(broken) if name == "forward" else ["dq", "dk", "dv"].index(broken)
    call = getattr(fc, name)
    monkeypatch.setattr(self_test, name, lambda *a, **o: off_in_one_place(call(*a, **o), which))
    wrong = self_test.self_test(kit, "float32")
    assert ("attention" if name == "forward" else broken) in wrong


def test_calls_that_raise_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise fc.DeviceError("launch: failed")

    monkeypatch.setattr(self_test, "forward", refuse)
    [found] = doctor.cpu()
    assert found.wrong
    assert "a call raises DeviceError: launch: failed" in found.text


def test_who_claims_flash_attn(tmp_path: Path) -> None:
    """A module of that name, with and without a distribution that owns it."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "flash_attn_interface.py").write_text("")
    info = tmp_path / "flash_attn-2.8.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    inherited = os.environ.get("PYTHONPATH", "")
    done = run_doctor(PYTHONPATH=f"{tmp_path}:{inherited}")
    assert f"flash_attn: flash-attn 2.8.3, {tmp_path}/flash_attn/__init__.py" in done.stdout
    assert "flash_attn_interface: no distribution flash-attn-3" in done.stdout
    assert done.returncode == 0


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The diagnosis ends where it is needed."""
    monkeypatch.setattr(doctor, "installed_version", lambda name: "2.0")
    monkeypatch.setitem(sys.modules, "torch", None)
    [found] = doctor.torch()
    assert found.text.startswith("2.0 is installed and cannot be imported: ")
    assert not found.wrong  # flashcute works without


@needs_torch
def test_the_active_implementation_of_sdpa() -> None:
    import torch
    from torch.nn import attention

    [version, sdpa] = doctor.torch()
    assert torch.__version__ in version.text
    if not hasattr(attention, "restore_flash_attention_impl"):
        assert "needs torch 2.11" in sdpa.text
        return
    assert "of torch itself is active" in sdpa.text

    class Handle:
        def remove(self) -> None: ...

    attention.register_flash_attention_impl("doctors", register_fn=Handle)
    try:
        attention.activate_flash_attention_impl("doctors")
        assert "of doctors is active" in next(x for x in doctor.torch() if x.subject == "SDPA").text
    finally:
        attention.restore_flash_attention_impl()


# ---- models ------------------------------------------------------------------------------------


def write(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    return folder


def test_what_a_model_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(write(tmp_path)), "--seqlen", "64"]) == 0
    text = capsys.readouterr().out
    assert "llama: 8 heads, 2 of keys, head dimension 32; float32" in text
    kit = choose_kit("auto", "float32", prefer_numpy=True)
    q = kit.empty((1, 64, 8, 32), "float32")
    k = kit.empty((1, 64, 2, 32), "float32")
    kernel = fc.explain(q, k, k, causal=True).kernel
    for call in ("prefill", "decode", "training"):
        line = next(x for x in text.splitlines() if x.split()[:1] == [call])
        assert kernel in line or call == "decode"
    assert "gradients by" in line


@pytest.mark.parametrize(
    ("member", "said"),
    [
        ({"attn_logit_softcapping": 50.0}, "capped scores"),
        ({"attention_dropout": 0.1}, "dropout of 0.1"),
    ],
)
def test_what_of_a_model_has_no_kernel(tmp_path: Path, member: dict, said: str) -> None:
    """A feature of the model that nobody tells, until training fails or is slow."""
    assert model_shapes.read(write(tmp_path)).not_served == []
    assert any(said in x for x in model_shapes.read(write(tmp_path, **member)).not_served)


def test_a_models_sinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another kernel than the model's, which has sinks; or sinks that are said to have none."""
    real, sinks = model_shapes.explain, []

    def explain(*arguments: Any, sink: Any, **options: Any) -> Any:
        sinks.append(None if sink is None else sink.shape)
        return real(*arguments, sink=sink, **options)

    monkeypatch.setattr(model_shapes, "explain", explain)
    folder = str(write(tmp_path, model_type="gpt_oss"))
    assert main(["doctor", "--model", folder, "--seqlen", "64"]) == 0
    text = capsys.readouterr().out
    assert "learned sinks" in text
    assert "no kernel" not in text
    heads = model_shapes.read(tmp_path).heads
    assert sinks == [(heads,)] * 3
    assert not model_shapes.read(write(tmp_path)).sinks


def test_a_models_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calls are explained with it; Qwen's files name a window that no layer uses."""
    folder = write(tmp_path, sliding_window=16)
    assert model_shapes.read(folder).window == 16
    assert main(["doctor", "--model", str(folder), "--seqlen", "64"]) == 0
    assert "window 16" in capsys.readouterr().out
    assert (
        model_shapes.read(write(tmp_path, sliding_window=16, use_sliding_window=False)).window
        is None
    )


def test_a_head_dimension_that_no_kernel_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--model", str(write(tmp_path, head_dim=512)), "--seqlen", "8"]) == 0
    assert "refused: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "expected a model's config.json"),
        ("[]", "expected an object"),
        ("{}", "expected num_attention_heads"),
        ('{"num_attention_heads": 8}', "expected hidden_size"),
        ('{"num_attention_heads": "8", "hidden_size": 64}', "got '8'"),
    ],
)
def test_files_that_describe_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert main(["doctor", "--model", str(file)]) == 2
    assert says in capsys.readouterr().err
    assert main(["doctor", "--model", str(tmp_path / "missing")]) == 2
