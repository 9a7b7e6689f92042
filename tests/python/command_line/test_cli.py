"""``python -m flashcute``, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from broken_flashcute import break_flashcute
from flashcute import _core
from flashcute.__main__ import main
from flashcute._cli import options


def run_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# ---- info, explain, compile --------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that is not listed or whose value is not shown; a failure where there is no GPU."""
    monkeypatch.setenv("FLASHCUTE_QUIET", "1")
    monkeypatch.setenv("FLASHCUTE_CACHE_SIZE", "2G")
    monkeypatch.delenv("FLASHCUTE_JIT", raising=False)
    meanings = {name: meaning for name, _, meaning, _ in _core.environment_variables()}
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in meanings)
    assert meanings["FLASHCUTE_QUIET"] in text
    assert meanings["FLASHCUTE_JIT"] not in text  # what is not set says nothing
    assert f"{_core.build_info().cache_folder}, at most 2.0 GiB\n" in text
    assert main(["info", "--verbose"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and meaning in text for name, meaning in meanings.items())
    assert "numpy " + np.__version__ in text
    line = next(x for x in text.splitlines() if "FLASHCUTE_QUIET" in x)
    assert line.split() == ["FLASHCUTE_QUIET", "1", "0"]


WRONG_VALUES = {
    "FLASHCUTE_JIT": "yes",
    "FLASHCUTE_JIT_JOBS": "0",
    "FLASHCUTE_CACHE_DIR": "cache",
    "FLASHCUTE_CACHE_SIZE": "12Q",
    "FLASHCUTE_NVRTC": "/nonexistent/libnvrtc.so",
    "FLASHCUTE_CUDA_INCLUDE": "/nonexistent",
    "FLASHCUTE_NUM_THREADS": "0",
    "FLASHCUTE_CPU_ISA": "mmx",
    "FLASHCUTE_QUIET": "yes",
}


def info_with(settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a new process: what is found of NVRTC stays for a process."""
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("FLASHCUTE_")}
    return subprocess.run(
        [sys.executable, "-m", "flashcute", "info"],
        env=inherited | settings,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", [name for name, *_ in _core.environment_variables()])
def test_info_with_a_wrong_setting(name: str) -> None:
    """An error in place of all facts; a wrong value that no line tells, or that ends with exit code 0."""
    facts = info_with({}).stdout.partition("environment\n")[0]
    value = WRONG_VALUES[name]
    done = info_with({name: value})
    assert done.returncode == 1
    assert done.stdout.startswith(facts)
    settings = done.stdout.removeprefix(facts).splitlines()
    row = next(i for i, line in enumerate(settings) if line.split()[:2] == [name, value])
    assert settings[row + 2].startswith("      error: ")
    assert name in settings[row + 2]
    assert value in settings[row + 2]
    assert done.stdout.count("error: ") == 1


def test_info_with_wrong_settings() -> None:
    """The first of several alone."""
    assert info_with(WRONG_VALUES).stdout.count("      error: ") == len(WRONG_VALUES)


def test_info_leaves_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong variable that is no longer set afterwards."""
    monkeypatch.setenv("FLASHCUTE_QUIET", "yes")
    assert main(["info"]) == 1
    assert os.environ["FLASHCUTE_QUIET"] == "yes"


def test_info_imports_no_array_library() -> None:
    """A slow or failing import of a library only to tell its version."""
    code = (
        "import sys; from flashcute.__main__ import main; main(['info'])\n"
        "print('LOADED', [x for x in ('numpy', 'torch', 'cupy', 'jax') if x in sys.modules])"
    )
    done = run_new_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_reader_that_stops() -> None:
    """A traceback from `python -m flashcute info | head -1`."""
    command = f"{sys.executable} -m flashcute info | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("flashcute ")
    assert done.stderr == ""


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    """Options that do not reach the tensors or the configuration."""
    sizes = ["--heads", "4", "--kv-heads", "2", "--head-dim", "64", "--dtype", "float32"]
    where = ["--device", "cpu", "--causal"]
    assert main(["explain", *sizes, *where]) == 0
    assert "backend cpu" in capsys.readouterr().out
    assert main(["explain", *sizes, *where, "--block-m", "128"]) == 0
    assert "block_m=128" in capsys.readouterr().out
    assert main(["explain", *sizes, *where, "--kv-heads", "3"]) == 0
    assert "nothing can run this call" in capsys.readouterr().out
    assert main(["explain", *sizes, *where]) == 0
    assert "gradients" not in capsys.readouterr().out
    assert main(["explain", *sizes, *where, "--gradients", "--deterministic"]) == 0
    assert "\ngradients by backend cpu" in capsys.readouterr().out


def test_explain_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that is not the call's."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "flashcute._cli.explain.explain", lambda q, k, v, causal, **given: told.append(given)
    )
    where = ["explain", "--device", "cpu", "--dtype", "float32", "--causal"]
    assert main(where) == 0
    assert main([*where, "--diagonal", "-3", "--deterministic", "--allow-tf32"]) == 0
    assert main([*where, "--diagonal", "start", "--gradients", "--layout", "bhsd"]) == 0
    names = ("diagonal", "deterministic", "allow_tf32", "gradients", "layout", "cfg")
    assert [tuple(given[name] for name in names) for given in told] == [
        ("end", False, False, False, "bshd", None),
        (-3, True, True, False, "bshd", None),
        ("start", False, False, True, "bhsd", None),
    ]


def test_explain_with_lengths_and_sinks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arrays of another shape or dtype than a call takes, or that do not reach it."""
    where = ["explain", "--device", "cpu", "--dtype", "float32", "--batch", "3", "--heads", "4"]
    options = ["--causal", "--prefix", "5", "--seqlens", "--sink"]
    assert main([*where, *options, "--gradients"]) == 0
    text = capsys.readouterr().out
    assert "backend cpu" in text
    assert "\ngradients by backend cpu" in text
    assert main([*where, "--prefix", "5"]) == 2
    assert "prefix: expected causal=True" in capsys.readouterr().err

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "flashcute._cli.explain.explain", lambda q, k, v, causal, **given: told.append(given)
    )
    assert main([*where, *options]) == 0
    assert main(where) == 0
    given, without = told
    assert given["prefix"] == 5
    assert [given[name].shape for name in ("seqlens_q", "seqlens_k", "sink")] == [(3,), (3,), (4,)]
    assert all(without[name] is None for name in ("prefix", "seqlens_q", "seqlens_k", "sink"))


def test_explain_with_packed_sequences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch beside starts of sequences, which no call takes."""
    where = ["explain", "--device", "cpu", "--dtype", "float32", "--batch", "3", "--heads", "4"]
    for layout in ("bshd", "bhsd"):
        assert main([*where, "--packed", "--causal", "--gradients", "--layout", layout]) == 0
        assert "backend cpu" in capsys.readouterr().out
    shapes = []
    monkeypatch.setattr(
        "flashcute._cli.explain.explain",
        lambda q, k, v, causal, **given: shapes.append((q.shape, given["cu_seqlens_q"].shape)),
    )
    assert main([*where, "--packed", "--seqlen-q", "100", "--head-dim", "64"]) == 0
    assert shapes == [((300, 4, 64), (4,))]


@pytest.mark.parametrize(
    ("argument", "causal", "window"),
    [
        ([], None, False),
        (["--causal"], True, False),
        (["--no-causal"], False, False),
        (["--window"], None, True),
    ],
)
def test_compile_of_one_mask(
    argument: list[str], causal: bool | None, window: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that the command drops on its way."""
    told: list[dict[str, Any]] = []

    def prebuild(cfgs: object, arch: str, **given: Any) -> dict[str, str]:
        told.append(given)
        return {}

    monkeypatch.setattr("flashcute._cli.compile_.prebuild", prebuild)
    assert main(["compile", "--arch", "sm_80", *argument]) == 0
    assert [(call.get("causal"), "variant" in call) for call in told] == [(causal, window)]


def test_compile_of_a_default_by_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the causal mask Hopper's gradients have another default: that of no mask would be compiled in vain."""
    told: list[tuple[int, bool]] = []

    def prebuild(cfgs: list[fc.BackwardConfig], arch: str, *, causal: bool) -> dict[str, str]:
        told.extend((cfg.k_stages, causal) for cfg in cfgs)
        return {}

    monkeypatch.setattr("flashcute._cli.compile_.prebuild", prebuild)
    assert main(["compile", "--backward", "--arch", "sm_90"]) == 0
    assert told == [(1, False), (2, True)]


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--stages", "3"], [("k_stages", 1)]),  # for which the causal default has no room
        (["--dout-stages", "3"], [("dout_stages", 3)]),
        (["--config", "stages=2,dout_stages=3"], [("k_stages", 1), ("dout_stages", 3)]),
        (["--causal", "--early-reads", "0"], [("k_stages", 2), ("early_reads", False)]),
    ],
)
def test_compile_of_changes_to_a_default_by_mask(
    arguments: list[str], want: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes that are legal without a mask, and that the command refuses for the mask's own default."""
    told: list[fc.BackwardConfig] = []

    def prebuild(cfgs: list[fc.BackwardConfig], arch: str, **_: Any) -> dict[str, str]:
        for cfg in cfgs:
            cfg.check(arch)
        told.extend(cfgs)
        return {}

    monkeypatch.setattr("flashcute._cli.compile_.prebuild", prebuild)
    assert main(["compile", "--backward", "--arch", "sm_90", *arguments]) == 0
    for name, value in want:
        assert any(getattr(cfg, name) == value for cfg in told)


def test_explain_a_window(capsys: pytest.CaptureFixture[str]) -> None:
    """An argument that the command drops, or cannot read."""
    sizes = ["explain", "--device", "cpu", "--dtype", "float32", "--seqlen-q", "8"]
    assert main([*sizes, "--window", "3,0"]) == 0
    assert main([*sizes, "--window=-2,0"]) == 2
    assert "window: expected (left, right)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*sizes, "--window", "3"])
    assert "expected two integers, LEFT,RIGHT, got '3'" in capsys.readouterr().err


@pytest.mark.skipif(not _core.build_info().image_archs, reason="built without images")
def test_compile(capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration that is not the one asked for, or compiled though its image exists."""
    assert main(["compile", "--arch", "sm_80", "--head-dim", "64", "--dtype", "float16"]) == 0
    *kernels, seconds = capsys.readouterr().out.splitlines()
    assert ["_f16_d64_" in line for line in kernels] == [True, True]
    assert [line.partition(" for sm_80: ")[2] for line in kernels] == ["ahead of time"] * 2
    assert seconds.endswith(" s")
    assert main(["compile", "--arch", "sm_80", "--all"]) == 0
    assert main(["compile", "--arch", "sm_80", "--dtype", "float32"]) == 0
    assert "tf32x3" in capsys.readouterr().out


@pytest.mark.skipif(not _core.build_info().image_archs, reason="built without images")
@pytest.mark.skipif(bool(_core.build_info().jit_problem), reason="no run-time compiler")
@pytest.mark.slow
def test_compile_several(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kernels of several configurations, of which some are ahead of time and the others are compiled together."""
    monkeypatch.setenv("FLASHCUTE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASHCUTE_JIT_JOBS", "7")  # restored afterwards
    backward = ["compile", "--backward", "--arch", "sm_80", "--head-dim", "64", "--jobs", "2"]
    assert main([*backward, "--config", "deterministic=1"]) == 0
    assert os.environ["FLASHCUTE_JIT_JOBS"] == "2"
    *kernels, _ = capsys.readouterr().out.splitlines()
    names = [line.partition(" for ")[0] for line in kernels]
    assert all(name.startswith("flashcute_sm80_bwd_bf16_d64_") for name in names)
    deterministic = ["_deterministic_" in name for name in names]
    assert deterministic == [False] * 4 + [True] * (len(names) - 4)
    assert any(name.endswith("_gradients_causal") for name in names)
    assert any(name.endswith("_queries_causal") for name in names)
    origins = [line.partition(": ")[2] for line in kernels]
    assert origins[:4] == ["ahead of time"] * 4
    assert set(origins[4:]) == {origin for origin in origins[4:] if "compiled by NVRTC" in origin}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice"),
        (["bench", "--impls", "flashcute,foo"], "'foo'"),
        (["bench", "--config", "block_q=3"], "block_q"),
        (["bench", "--config", "block_m=many"], "block_m"),
        (["bench", "--seqlens", "64,x"], "--seqlens"),
        (["bench", "--rounds", "0"], "at least 1"),
        (["bench", "--overhead", "--first-use"], "not allowed with"),
        (["bench", "--device", "cpu", "--grid", "no/such/file"], "no/such/file"),
        (["bench", "--device", "cpu", "--kv-ratio", "3", "--heads", "2"], "--kv-ratio"),
        (["bench", "--device", "cpu", "--out", "no/such/folder/file"], "--out"),
        (["compile", "--all", "--block-m", "64"], "--all"),
        (["compile", "--all", "--backward"], "--all"),
        (["compile", "--arch", "sm_80", "--deterministic", "1"], "deterministic"),
        (["compile", "--backward", "--arch", "sm_80", "--dtype", "float64"], "float64"),
        (
            ["compile", "--backward", "--arch", "sm_80", "--rescale-threshold", "0"],
            "rescale_threshold",
        ),
        (["compile", "--arch", "sm_8x"], "sm_8x"),
        (["compile", "--arch", "sm_80", "--num-warps", "3"], "num_warps"),
        (["explain", "--seqlen-q", "-1"], "at least 0"),
        (["bench", "--window=-2,0"], "two integers >= -1"),
        (["explain", "--prefix", "-1"], "at least 0"),
        (["explain", "--diagonal", "middle"], "expected end, start or an integer, got 'middle'"),
        (["demo", "--dtype", "int8"], "--dtype"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x,
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tracebacks, or exit code 0, for what the user can mend."""
    try:
        code = main(arguments)
    except SystemExit as stopped:  # argparse
        code = int(str(stopped.code))
    stderr = capsys.readouterr().err
    assert code == 2
    assert "error: " in stderr
    assert message in stderr.splitlines()[-1]


def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """--device cuda that runs on the CPU instead of saying why it cannot."""
    if _core.driver_info().gpus:
        pytest.skip("there is a GPU")
    for command in (["demo"], ["bench"], ["explain"]):
        assert main([*command, "--device", "cuda"]) == 2
        assert _core.driver_info().problem in capsys.readouterr().err


# ---- demo --------------------------------------------------------------------------------------


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """The main use on real input, with the libraries that are here."""
    assert main(["demo", "--device", "cpu", "--tokens", "300"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("flashcute  ")] == [
        ["flashcute", "full"],
        ["flashcute", "causal"],
    ]


@pytest.mark.gpu
def test_demo_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """A demo that takes the CPU where there is a GPU, or breaks there."""
    assert main(["demo", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "sm_" in out


def test_demo_without_torch() -> None:
    """A demo that needs torch."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from flashcute.__main__ import main; sys.exit(main(['demo', '--quick']))"
    )
    done = run_new_process(code)
    assert done.returncode == 0, done.stderr
    assert "numpy" in done.stdout
    assert "sdpa" not in done.stdout


def test_demo_notices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 for wrong numbers."""
    break_flashcute(monkeypatch)
    assert main(["demo", "--device", "cpu", "--tokens", "100"]) == 1
    assert "WRONG: " in capsys.readouterr().out


def test_changes_of_mma_sync_where_hopper_has_its_own() -> None:
    """A variant of the mma.sync kernel could not be timed on a Hopper GPU: its options are none of the default's."""
    changed = options.changed_config(128, "bfloat16", "sm_90", {"kernel": "sm80", "block_m": 64})
    assert changed == fc.default_config(128, "bfloat16", "sm_100").replace(block_m=64)
    assert options.changed_config(128, "bfloat16", "sm_90", {"stages": 2}).kernel == "sm90"
    assert (
        options.changed_config(128, "float32", "sm_90", {"math": "cuda_core"}).math == "cuda_core"
    )
