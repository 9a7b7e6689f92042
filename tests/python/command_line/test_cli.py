"""``python -m flashcute`` and benchmarks/python/plot.py, on the CPU."""

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
from flashcute import _core
from flashcute.__main__ import main
from flashcute._cli import options, peers
from flashcute._cli.kits import NumPyKit
from flashcute._cli.problem import (
    Case,
    Errors,
    Result,
    complaint,
    errors,
    fp64_reference,
    naive_result,
)
from optional_torch import needs_torch

CASE = Case(1, 2, 2, 40, 40, 16, True, "float32")
BENCH = ["bench", "--device", "cpu", "--rounds", "1", "--budget-ms", "1", "--batch", "1"]
TINY = [*BENCH, "--seqlens", "64", "--head-dims", "16", "--heads", "2"]


def run_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


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
    assert [(call["causal"], call["variant"] is not None) for call in told] == [(causal, window)]


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


# ---- the judge ---------------------------------------------------------------------------------


def judged(result: Result, ref: Result, naive: Errors) -> str | None:
    return complaint(errors(result, ref), naive, ref, CASE.dtype)


def test_complaint() -> None:
    """Wrong results that pass: one bad element, NaN (never smaller than a bound), a wrong LSE."""
    kit = NumPyKit(seed=1)
    inputs = CASE.random_inputs(kit)
    ref = fp64_reference(kit, *inputs, CASE.causal)
    naive = errors(naive_result(kit, *inputs, CASE.causal), ref)
    right = peers.Flashcute(kit).result(kit, *inputs, CASE.causal)
    assert judged(right, ref, naive) is None
    for value in (np.nan, np.inf, 0.0):
        out = right.out.copy()
        out[0, 20, 1, 3] = value
        assert judged(Result(out, right.lse), ref, naive) is not None
        lse = right.lse.copy()
        lse[0, 1, 20] = value
        assert judged(Result(right.out, lse), ref, naive) is not None
    assert judged(Result(right.out * (1 + 1e-4), right.lse), ref, naive) is not None


def test_complaint_about_empty_rows() -> None:
    """An LSE of -inf that is not recognised as right, or any LSE that passes for it."""
    ref = Result(np.zeros((1, 2, 1, 4)), np.array([[[-np.inf, 1.0]]]))
    naive = Errors(0.0, 0.0, 0.0)
    assert judged(ref, ref, naive) is None
    assert judged(Result(ref.out, np.array([[[-1e30, 1.0]]])), ref, naive) is not None
    assert judged(Result(ref.out, np.array([[[-np.inf, -np.inf]]])), ref, naive) is not None


def break_flashcute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes flash_attention, as the commands call it, wrong in one row."""
    real = peers.flash_attention

    def broken(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        out = result[0] if isinstance(result, tuple) else result
        out[-1, -1] = 0.0
        return result

    monkeypatch.setattr(peers, "flash_attention", broken)


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


@pytest.mark.gpu
def test_bench_on_the_gpu(tmp_path: Path) -> None:
    """A benchmark that cannot capture, time or compare what it has to, on a GPU."""
    out = tmp_path / "lines.jsonl"
    sizes = ["--tokens", "1024", "--seqlens", "512", "--head-dims", "64", "--rounds", "1"]
    command = ["bench", "--device", "cuda", "--impls", "flashcute,sdpa_flash,naive", *sizes]
    assert main([*command, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["impl"] for line in lines} == {"flashcute", "sdpa_flash", "naive"}
    assert all(line["status"] == "ok" and line["ms_p50"] > 0 for line in lines)


@pytest.mark.gpu
def test_bench_backward_on_the_gpu(tmp_path: Path) -> None:
    """The same for gradients; a configuration of one's own."""
    out = tmp_path / "lines.jsonl"
    sizes = ["--tokens", "1024", "--seqlens", "512", "--head-dims", "64", "--rounds", "1"]
    impls = "flashcute,flashcute_deterministic,sdpa_flash,naive"
    command = [
        "bench",
        "--backward",
        "--device",
        "cuda",
        "--impls",
        impls,
        "--kv-ratio",
        "2",
        *sizes,
    ]
    assert main([*command, "--config", "deterministic=1", "--out", str(out)]) == 0
    lines = read_lines(out)
    assert {line["impl"] for line in lines} == {*impls.split(","), "flashcute[deterministic=1]"}
    assert all(line["status"] == "ok" and line["ms_p50"] > 0 for line in lines)
    assert all(line["timing"] == "CUDA graph" for line in lines if "flash" in line["impl"])
    assert all(line["peak_bytes"] > 0 for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [[], ["--backward"]], ids=["forward", "backward"])
def test_bench_window_on_the_gpu(backward: list[str], tmp_path: Path) -> None:
    """A window that cannot be captured, or that runs the kernel without one."""
    out = tmp_path / "lines.jsonl"
    sizes = ["--tokens", "2048", "--seqlens", "1024", "--head-dims", "64", "--rounds", "1"]
    impls = ["--impls", "flashcute,sdpa,naive"]
    command = ["bench", "--device", "cuda", *backward, "--window", "99,0", "--causal", "1"]
    assert main([*command, *impls, *sizes, "--out", str(out)]) == 0
    lines = read_lines(out)
    assert [x["kind"] for x in lines] == [
        *["backward" if backward else "forward"] * 3,
        *["window"] * 3,
    ]
    assert all(x["status"] == "ok" and x["ms_p50"] > 0 for x in lines)
    assert all(x["efficiency"] > 0 for x in lines[3:])


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


# ---- bench -------------------------------------------------------------------------------------


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines without what is needed to judge them; figures that contradict each other."""
    out = tmp_path / "lines.jsonl"
    assert main([*TINY, "--note", "hello", "--commit", "abc", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    lines = read_lines(out)
    assert {x["causal"] for x in lines} == {False, True}
    for x in lines:
        assert (x["kind"], x["status"], x["note"], x["commit"]) == ("forward", "ok", "hello", "abc")
        for field in ("date", "device", "python", "library", "impl_version", "seed", "threads"):
            assert x[field], field
        case = Case(*(x[field] for field in Case._fields))
        assert case[:6] == (1, 2, 2, 64, 64, 16)
        assert x["ms_p10"] <= x["ms_p50"] <= x["ms_p90"] <= x["ms_p99"]
        assert x["tflops"] == pytest.approx(case.flops / x["ms_p50"] / 1e9)
        assert 0 < x["rel_l2"] < 1e-5
        assert 0 < x["max_error"] < 1e-4
        assert x["spot_max_error"] < 1e-4
    ours = [x for x in lines if x["impl"] == "flashcute"]
    assert len(ours) == 2
    assert all(x["config"].startswith("fwd_") and x["lse_error"] < 1e-4 for x in ours)
    assert "geometric mean" in text


@needs_torch
def test_bench_backward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gradients that are timed and not checked, or counted as if they were a forward."""
    file = tmp_path / "lines.jsonl"
    assert (
        main([*TINY, "--backward", "--causal", "1", "--dtype", "float64", "--out", str(file)]) == 0
    )
    assert "geometric mean" in capsys.readouterr().out
    lines = read_lines(file)
    assert {line["impl"] for line in lines} == {"flashcute", "sdpa", "naive"}
    for line in lines:
        assert line["kind"] == "backward"
        assert line["status"] == "ok"
        assert max(line[f"{name}_rel_l2"] for name in ("dq", "dk", "dv")) < 1e-13
        flops = 10 * 2 * 64 * 64 * 16 / 2
        assert line["tflops"] == pytest.approx(flops / line["ms_p50"] / 1e9)


@needs_torch
def test_bench_backward_configurations(tmp_path: Path) -> None:
    """Gradients of another configuration than the one that is named, or counted as the default's."""
    file = tmp_path / "lines.jsonl"
    impls = ["--impls", "flashcute,flashcute_deterministic"]
    configs = ["--config", "block_n=32", "--config", "block_m=8", "--config", "q_in_registers=1"]
    command = [*TINY, "--backward", "--causal", "1", *impls, *configs, "--out", str(file)]
    assert main(command) == 0
    lines = {line["impl"]: line for line in read_lines(file)}
    default, deterministic = lines["flashcute"], lines["flashcute_deterministic"]
    changed = lines["flashcute[block_n=32]"]
    assert {line["status"] for line in (default, deterministic, changed)} == {"ok"}
    assert default["config"].startswith("bwd_f32_d16_m64_n64")
    assert deterministic["config"].endswith("_deterministic")
    assert "_n32_" in changed["config"]
    assert "block_m" in lines["flashcute[block_m=8]"]["reason"]
    assert "q_in_registers" in lines["flashcute[q_in_registers=1]"]["reason"]


def test_deterministic_gradients_are_no_forward(capsys: pytest.CaptureFixture[str]) -> None:
    """Silently timed as something else."""
    impls = ["--impls", "flashcute,flashcute_deterministic"]
    assert main([*TINY, *impls, "--causal", "1"]) == 0
    assert "flashcute_deterministic needs --backward" in capsys.readouterr().out


@needs_torch
def test_bench_backward_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient that is timed as if it were right."""
    from flashcute._torch import autograd

    right = autograd.gradients
    monkeypatch.setattr(autograd, "gradients", lambda *x: tuple(1.01 * g for g in right(*x)))
    file = tmp_path / "lines.jsonl"
    assert main([*TINY, "--backward", "--impls", "flashcute", "--out", str(file)]) == 1
    assert {line["status"] for line in read_lines(file)} == {"wrong"}
    assert "dq: max error" in read_lines(file)[0]["reason"]


def test_bench_configurations(tmp_path: Path) -> None:
    """A configuration that cannot run and takes the others with it, or is silently replaced."""
    out = tmp_path / "lines.jsonl"
    configs = ["--config", "block_n=64", "--config", "block_m=40", "--impls", "flashcute"]
    assert main([*TINY, *configs, "--out", str(out), "--causal", "1"]) == 0
    good, changed, bad = read_lines(out)
    assert (good["status"], changed["status"], bad["status"]) == ("ok", "ok", "failed")
    assert "_n64_" in changed["config"]
    assert "block_m" in bad["reason"]
    assert "tflops" not in bad


def test_bench_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong results that are timed all the same."""
    break_flashcute(monkeypatch)
    out = tmp_path / "lines.jsonl"
    assert main([*TINY, "--impls", "flashcute,naive", "--causal", "0", "--out", str(out)]) == 1
    ours, naive = read_lines(out)
    assert ours["status"] == "wrong"
    assert "tflops" not in ours
    assert naive["status"] == "ok"


def test_bench_grid_file(tmp_path: Path) -> None:
    """torch's causal mask, aligned to the top left, where lengths differ; grouped heads."""
    pytest.importorskip("torch")
    case = {"batch": 1, "heads": 4, "kv_heads": 2, "seqlen_q": 20, "seqlen_k": 50, "head_dim": 32}
    grid = tmp_path / "grid.jsonl"
    grid.write_text(json.dumps({**case, "causal": True}) + "\n")
    out = tmp_path / "lines.jsonl"
    assert main([*BENCH, "--grid", str(grid), "--out", str(out)]) == 0
    lines = read_lines(out)
    assert [(x["impl"], x["status"]) for x in lines] == [
        ("flashcute", "ok"),
        ("sdpa", "ok"),
        ("naive", "ok"),
    ]
    assert all(x["seqlen_k"] == 50 and x["kv_heads"] == 2 for x in lines)


def test_bench_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A window that is timed and not computed, or checked where it hides nothing; pairs that are counted though they
    are hidden; a window that is compared with another mask, or taken for a case without one by who reads the lines."""
    out = tmp_path / "lines.jsonl"
    assert main([*TINY, "--window", "9,3", "--config", "block_n=32", "--out", str(out)]) == 0
    assert "/whole" in capsys.readouterr().out
    lines = read_lines(out)
    windowed = [x for x in lines if x["kind"] == "window"]
    assert [x["window"] for x in windowed] == [[9, 3]] * len(windowed)
    plain = [x for x in lines if x["kind"] == "forward"]
    assert all(x["window"] is None and "efficiency" not in x for x in plain)
    assert len(windowed) == len(plain)
    assert {x["status"] for x in lines} == {"ok"}
    i, j = np.arange(64)[:, None], np.arange(64)
    for x in windowed:
        right, whole = (0, j <= i) if x["causal"] else (3, j <= 63 + 0 * i)
        seen = int(((j >= i - 9) & (j <= i + right)).sum())
        [same] = [y for y in plain if (y["impl"], y["causal"]) == (x["impl"], x["causal"])]
        assert x["pass"] == "forward"
        assert x["visible"] == pytest.approx(seen / int(whole.sum()))
        assert x["tflops"] == pytest.approx(2 * 4 * 16 * seen / x["ms_p50"] / 1e9)
        assert x["ms_without"] == same["ms_p50"]
        assert x["efficiency"] == pytest.approx(x["visible"] * same["ms_p50"] / x["ms_p50"])
        assert x["max_error"] < 1e-4


@needs_torch
def test_bench_window_backward(tmp_path: Path) -> None:
    """Gradients of attention without the window, by autograd or with a configuration."""
    out = tmp_path / "lines.jsonl"
    options = ["--backward", "--window", "9,3", "--causal", "0", "--dtype", "float64"]
    assert main([*TINY, *options, "--config", "block_n=32", "--out", str(out)]) == 0
    lines = read_lines(out)
    assert [x["kind"] for x in lines] == ["backward"] * 4 + ["window"] * 4
    for x in lines:
        assert x["status"] == "ok"
        assert max(x[f"{name}_rel_l2"] for name in ("dq", "dk", "dv")) < 1e-13
    assert all(x["pass"] == "backward" and x["efficiency"] > 0 for x in lines[4:])


@needs_torch
@pytest.mark.parametrize("backward", [[], ["--backward"]], ids=["forward", "backward"])
def test_bench_window_notices(
    backward: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results without the window, which pass for right because the check has none either."""
    real = peers.flash_attention

    def ignorant(*arguments: Any, window: object, **options: Any) -> Any:
        return real(*arguments, **options)

    monkeypatch.setattr(peers, "flash_attention", ignorant)
    out = tmp_path / "lines.jsonl"
    command = [*TINY, *backward, "--window", "500,0", "--impls", "flashcute", "--causal", "1"]
    assert main([*command, "--out", str(out)]) == 1
    assert [x["status"] for x in read_lines(out)] == ["ok", "wrong"]


def test_bench_grid_file_with_a_window(tmp_path: Path) -> None:
    """Queries that are not as many as the keys, where the window lies about the other end."""
    case = {"batch": 1, "heads": 2, "seqlen_q": 20, "seqlen_k": 50, "head_dim": 16, "causal": False}
    grid, out = tmp_path / "grid.jsonl", tmp_path / "lines.jsonl"
    grid.write_text(json.dumps({**case, "window": [3, -1]}) + "\n")
    command = [*BENCH, "--grid", str(grid), "--impls", "flashcute,naive"]
    assert main([*command, "--out", str(out)]) == 0
    whole, _, windowed, _ = lines = read_lines(out)
    assert all(x["status"] == "ok" for x in lines)
    assert (whole["window"], windowed["window"]) == (None, [3, -1])
    assert windowed["visible"] == pytest.approx(sum(4 + 19 - i for i in range(20)) / 1000)
    for wrong in ([3], [3, -2], [3, 0.5], "3,0"):
        grid.write_text(json.dumps({**case, "window": wrong}) + "\n")
        assert main(command) == 2


def test_bench_deadline(capsys: pytest.CaptureFixture[str]) -> None:
    """A deadline that is ignored, or that is silent about what it left out."""
    assert main([*TINY, "--deadline-s", "1e-9"]) == 0
    assert "2 of 2 cases were not started" in capsys.readouterr().out


def test_bench_overhead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Host times that are not recorded, or not those of the two calls with a budget."""
    out = tmp_path / "lines.jsonl"
    assert main(["bench", "--overhead", "--device", "cpu", "--out", str(out)]) == 0
    lines = read_lines(out)
    assert [x["call"] for x in lines][:2] == ["forward(cfg, out=)", "flash_attention"]
    assert all(0 < x["us_p10"] <= x["us_p50"] <= x["us_p90"] for x in lines)
    assert "forward(cfg, out=)" in capsys.readouterr().out


# ---- plot --------------------------------------------------------------------------------------


def test_plot_table(tmp_path: Path) -> None:
    """A plot script that does not understand what the benchmark writes."""
    plot = Path(__file__).parents[3] / "benchmarks" / "python" / "plot.py"
    out = tmp_path / "lines.jsonl"
    assert main([*TINY, "--impls", "flashcute,naive", "--out", str(out)]) == 0
    done = subprocess.run([sys.executable, plot, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| 16 ")]
    assert len(rows) == 2
    assert all(row.count("**") == 2 for row in rows)


def test_plot_of_masks() -> None:
    """A plot that divides the wrong way round, or loses the cases in which another library is faster."""
    benchmarks = Path(__file__).parents[3] / "benchmarks"
    script = (
        "import json, sys, plot_masks as p\n"
        "lines = [json.loads(x) for file in sys.argv[1:] for x in open(file)]\n"
        "print(json.dumps([*p.packed(lines), *p.documents(lines)]))"
    )
    files = [benchmarks / "results" / f"{x}.jsonl" for x in ("gpu_packed", "gpu_block_masks")]
    done = subprocess.run(
        [sys.executable, "-c", script, *files],
        cwd=benchmarks / "python",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    marks = json.loads(done.stdout)
    assert {peer for _, _, peer, _ in marks} == {"fa3", "varlen_attn", "flex", "flex_built"}
    lost = [(case, peer) for _, case, peer, speed_up in marks if speed_up < 1]
    short = "short 1000x64, causal, 32/8 heads"
    assert sorted(lost) == [(short, "fa3"), (short, "varlen_attn")]


def test_changes_of_mma_sync_where_hopper_has_its_own() -> None:
    """A variant of the mma.sync kernel could not be timed on a Hopper GPU: its options are none of the default's."""
    changed = options.changed_config(128, "bfloat16", "sm_90", {"kernel": "sm80", "block_m": 64})
    assert changed == fc.default_config(128, "bfloat16", "sm_100").replace(block_m=64)
    assert options.changed_config(128, "bfloat16", "sm_90", {"stages": 2}).kernel == "sm90"
    assert (
        options.changed_config(128, "float32", "sm_90", {"math": "cuda_core"}).math == "cuda_core"
    )
