"""``python -m flashcute bench``, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from broken_flashcute import break_flashcute
from flashcute import reference
from flashcute.__main__ import command_parser, main
from flashcute._cli import bench_forward, bench_host, peers, progress
from flashcute._cli.kits import NumPyKit
from flashcute._cli.presets import PRESETS
from flashcute._cli.problem import (
    Case,
    Errors,
    Given,
    Result,
    complaint,
    errors,
    fp64_reference,
    naive_result,
)
from flashcute._cli.progress import Work, seconds_left
from flashcute._cli.table import format_digits, format_seconds, format_table
from optional_torch import needs_torch

CASE = Case(1, 2, 2, 40, 40, 16, True, "float32")
BENCH = ["bench", "--device", "cpu", "--rounds", "1", "--budget-ms", "1"]
TINY = [*BENCH, "--batch", "1", "--seqlens", "64", "--head-dims", "16", "--heads", "2"]
CHEAPEST = [*TINY, "--causal", "1", "--impls", "flashcute"]


@pytest.fixture(autouse=True)
def frozen_objects() -> Iterator[None]:
    """The benchmark collects garbage before it measures memory. Among all objects of torch and pytest that would take
    most of the time of a test."""
    gc.freeze()
    yield
    gc.unfreeze()


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- the judge ---------------------------------------------------------------------------------


def judged(result: Result, ref: Result, naive: Errors) -> str | None:
    return complaint(errors(result, ref), naive, ref, CASE.dtype)


def test_complaint() -> None:
    """Wrong results that pass: one bad element, NaN (never smaller than a bound), a wrong LSE."""
    kit = NumPyKit(seed=1)
    given = Given(*CASE.random_inputs(kit), CASE.causal)
    ref = fp64_reference(kit, given)
    naive = errors(naive_result(kit, given), ref)
    right = peers.Flashcute(kit).result(kit, given)
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


def test_visible_pairs() -> None:
    """FLOP of pairs that a mask hides, where a window slides over an end of the keys or queries see none."""
    windows = [None, *itertools.product((-1, 0, 1, 4, 50), (-1, 0, 2, 50))]
    for queries, keys, causal, window in itertools.product(
        (1, 3, 8, 20), (1, 5, 8, 30), (False, True), windows
    ):
        case = Case(1, 1, 1, queries, keys, 8, causal, "float32", window)
        assert case.visible_pairs == sum(len(case.keys_of(i)) for i in range(queries)), case


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
    assert all(0.1 < x["error_ratio"] < 10 and x["schema"] == 2 for x in lines)
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
    command = [*BENCH, "--grid", str(grid), "--impls", "flashcute,naive", "--out", str(out)]
    assert main(command) == 0
    whole, _, windowed, _ = lines = read_lines(out)
    assert all(x["status"] == "ok" for x in lines)
    assert (whole["window"], windowed["window"]) == (None, [3, -1])
    assert windowed["visible"] == pytest.approx(sum(4 + 19 - i for i in range(20)) / 1000)


def test_bench_deadline(capsys: pytest.CaptureFixture[str]) -> None:
    """A deadline that is ignored, or that is silent about what it left out."""
    assert main([*TINY, "--deadline-s", "1e-9"]) == 0
    assert "2 of 2 cases were not started" in capsys.readouterr().out


def test_bench_without_room(capsys: pytest.CaptureFixture[str]) -> None:
    """A case whose inputs cannot be made, and that takes the others with it."""
    assert main([*CHEAPEST, "--seqlens", "64,1000000000000"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "b1 s64 h2 d16 causal: flashcute 0" in text
    assert "flashcute, skipped: its inputs do not fit into memory (b1 s1000000000000 h2" in text


def test_bench_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after an hour: tables that are lost, or an exit code as if all had been measured."""
    run_case, cases = bench_forward.run_case, []

    def interrupted(kit: Any, variants: list[Case], *more: Any) -> Any:
        cases.append(variants)
        if len(cases) == 2:
            raise KeyboardInterrupt
        return run_case(kit, variants, *more)

    monkeypatch.setattr(bench_forward, "run_case", interrupted)
    out = tmp_path / "lines.jsonl"
    assert main([*TINY, "--impls", "flashcute", "--out", str(out)]) == 130
    assert len(read_lines(out)) == 1
    text = capsys.readouterr().out
    assert "/naive" in text
    assert "interrupted: 1 of 2 cases were not measured" in text


def test_bench_overhead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host times that are not recorded, or not those of the two calls with a budget."""
    monkeypatch.setattr(bench_host, "BATCHES", 3)
    out = tmp_path / "lines.jsonl"
    assert main(["bench", "--overhead", "--device", "cpu", "--out", str(out)]) == 0
    lines = read_lines(out)
    assert [x["call"] for x in lines][:2] == ["forward(cfg, out=)", "flash_attention"]
    assert all(0 < x["us_p10"] <= x["us_p50"] <= x["us_p90"] for x in lines)
    assert "forward(cfg, out=)" in capsys.readouterr().out


# ---- which cases -------------------------------------------------------------------------------


def cases_of(device: str, *arguments: str) -> list[tuple[str | None, Case]]:
    options: argparse.Namespace = command_parser().parse_args(["bench", *arguments])
    kit: Any = SimpleNamespace(device=device)
    return list(bench_forward.make_cases(kit, options))


def test_study_grid() -> None:
    """A cell that is missing or there twice; a batch with which the CPU has no end."""
    cells = [
        (length, head_dim, heads, causal)
        for length in (1024, 2048, 4096, 8192, 16384)
        for head_dim in (64, 128)
        for heads in (8, 16, 32)
        for causal in (False, True)
    ]
    for device, tokens in (("cuda", 16384), ("cpu", None)):
        cases = [case for _, case in cases_of(device, "--grid", "study")]
        assert sorted((x.seqlen_q, x.head_dim, x.heads, x.causal) for x in cases) == sorted(cells)
        assert {x.batch if tokens is None else x.batch * x.seqlen_q for x in cases} == {tokens or 1}
        assert all(x.kv_heads == x.heads and x.seqlen_k == x.seqlen_q for x in cases)
    few = cases_of("cpu", "--grid", "study", "--heads", "4", "--causal", "1", "--head-dims", "64")
    assert [case.heads for _, case in few] == [4] * 5


def test_quick_grid_is_what_was_recorded() -> None:
    """Heads, batches or masks other than those of the recorded lines, because an option is no longer given."""
    cases = [case for _, case in cases_of("cuda")]
    assert cases[0] == Case(16, 32, 32, 1024, 1024, 64, False, "bfloat16")
    assert cases[-1] == Case(4, 16, 16, 4096, 4096, 128, True, "bfloat16")
    assert len(cases) == 8


def test_preset_sizes() -> None:
    """Sizes that are not the model's."""
    both: dict[str, Any] = {"dtype": "bfloat16", "causal": True}
    assert cases_of("cuda", "--preset", "gpt-oss-20b,deepseek-v3") == [
        ("gpt-oss-20b", Case(4, 64, 8, 4096, 4096, 64, window=(127, 0), sink=True, **both)),
        ("gpt-oss-20b", Case(1, 64, 8, 32768, 32768, 64, window=(127, 0), sink=True, **both)),
        ("deepseek-v3", Case(4, 128, 128, 4096, 4096, 192, head_dim_v=128, **both)),
        ("deepseek-v3", Case(1, 128, 128, 32768, 32768, 192, head_dim_v=128, **both)),
    ]
    [(name, case)] = cases_of("cpu", "--preset", "flux-dev")
    assert (name, case) == ("flux-dev", Case(1, 24, 24, 1536, 1536, 128, False, "float32"))
    chosen = cases_of("cpu", "--preset", "bert-base", "--seqlens", "64,32", "--batch", "3")
    assert [case[:6] for _, case in chosen] == [(3, 12, 12, n, n, 64) for n in (64, 32)]


def test_presets_as_transformers_has_them() -> None:
    """A preset that is not what a model's own description says, where transformers' defaults are that model."""
    transformers = pytest.importorskip("transformers")
    gpt_oss, gemma, deepseek = (
        getattr(transformers, f"{name}Config")() for name in ("GptOss", "Gemma3Text", "DeepseekV3")
    )
    for name, config in (("gpt-oss-20b", gpt_oss), ("gemma3-4b", gemma)):
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert PRESETS[name][:3] == heads
    assert PRESETS["gpt-oss-20b"].window == gpt_oss.sliding_window
    mla = PRESETS["deepseek-v3"]
    assert (mla.heads, mla.head_dim, mla.head_dim_v) == (
        deepseek.num_attention_heads, deepseek.qk_head_dim, deepseek.v_head_dim,
    )  # fmt: skip


def test_presets_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head dimension, a window or a sink that is refused or computed wrongly; rows that do not say whose they are."""
    out = tmp_path / "lines.jsonl"
    names = ("gpt-oss-20b", "gemma3-4b", "deepseek-v3", "siglip-so400m")  # one of each kind
    command = [*BENCH, "--preset", ",".join(names), "--seqlens", "24", "--impls", "flashcute"]
    assert main([*command, "--out", str(out)]) == 0
    lines = read_lines(out)
    assert {x["status"] for x in lines} == {"ok"}
    assert [(x["preset"], x["window"]) for x in lines] == [
        ("gpt-oss-20b", None),
        ("gpt-oss-20b", [127, 0]),
        ("gemma3-4b", None),
        ("gemma3-4b", [1023, 0]),
        ("deepseek-v3", None),
        ("siglip-so400m", None),
    ]
    assert "\ndeepseek-v3 b1 s24 h128 d192/128 causal  " in capsys.readouterr().out


@needs_torch
@pytest.mark.parametrize("backward", [[], ["--backward"]], ids=["forward", "backward"])
def test_bench_sinks_and_other_values(
    backward: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Products of the wrong head dimension that are counted; a peer without sinks that is timed without them; gradients
    of sinks that nobody checks."""
    grid, out = tmp_path / "grid.jsonl", tmp_path / "lines.jsonl"
    case = {"batch": 1, "heads": 4, "kv_heads": 2, "seqlen_q": 20, "seqlen_k": 30, "causal": False}
    case |= {"head_dim": 24, "head_dim_v": 16, "sink": True, "dtype": "float64"}
    grid.write_text(json.dumps(case) + "\n")
    command = [*BENCH, *backward, "--grid", str(grid), "--config", "block_n=32"]
    assert main([*command, "--out", str(out)]) == 0
    lines = {x["impl"]: x for x in read_lines(out)}
    assert {name: x["status"] for name, x in lines.items()} == {
        "flashcute": "ok", "sdpa": "skipped", "naive": "ok", "flashcute[block_n=32]": "ok",
    }  # fmt: skip
    assert lines["sdpa"]["reason"] == "has no sinks"
    flops = 2 * 4 * 20 * 30 * (3 * 24 + 2 * 16 if backward else 24 + 16)
    for name in ("flashcute", "naive", "flashcute[block_n=32]"):
        x = lines[name]
        assert x["tflops"] == pytest.approx(flops / x["ms_p50"] / 1e9)
        assert (x["head_dim_v"], x["sink"]) == (16, True)
        assert max(value for field, value in x.items() if field.endswith("max_error")) < 1e-12
        assert ("dsink_max_error" in x) == bool(backward)
    assert "_dv16_" in lines["flashcute[block_n=32]"]["config"]
    said = capsys.readouterr().out
    assert "b1 s20/30 h4/2 d24/16 full sink: flashcute " in said
    assert (
        "; skipped: sdpa\n" in said
    )  # beside the case, where a reason for each of many peers filled the screen
    assert said.count("has no sinks") == 1
    assert "  sdpa, skipped: has no sinks (b1 s20" in said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sink": 1}, "line 2: expected true or false as causal and sink, got {"),
        ({"causal": None}, "expected true or false"),
        ({"head_dim_v": 0}, "expected sizes that are positive integers, got {"),
        ({"head_dim_v": "16"}, "expected sizes that are positive integers"),
        ({"kv_heads": 3}, "expected kv_heads that divide heads"),
        (
            {"dtype": "int8"},
            "expected a dtype among float16, bfloat16, float32, float64, got 'int8'",
        ),
        ({"window": [3]}, "expected two integers >= -1 as window, got [3]"),
        ({"window": [3, -2]}, "expected two integers >= -1 as window, got [3, -2]"),
        ({"window": [3, 0.5]}, "expected two integers >= -1 as window"),
        ({"window": "3,0"}, "expected two integers >= -1 as window"),
        ({"seqlen": 5}, "expected fields among batch, heads, kv_heads, "),
        ("[1]", "line 2: expected an object, got [1]"),
        ('{"heads": 2}', "line 2: expected batch, got {'heads': 2}"),
        ("{", "line 2: expected JSON: "),
        ("", "expected JSON lines, got an empty file"),
    ],
    ids=str,
)
def test_bench_wrong_grid_file(
    row: dict[str, Any] | str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value that is taken for something else; a run of no case that ends well."""
    grid = tmp_path / "grid.jsonl"
    case = {"batch": 1, "heads": 2, "seqlen_q": 20, "head_dim": 16, "causal": False}
    grid.write_text("\n" + (row if isinstance(row, str) else json.dumps(case | row)) + "\n")
    assert main([*BENCH, "--grid", str(grid)]) == 2
    assert f"--grid {grid}" in (error := capsys.readouterr().err)
    assert message in error


def test_bench_grid_file_has_the_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A size that is given and silently not taken."""
    for option in ("--batch", "--tokens", "--seqlens", "--head-dims", "--heads", "--kv-ratio"):
        assert main([*BENCH, "--grid", str(tmp_path / "grid.jsonl"), option, "1"]) == 2
        assert f"--grid FILE says what {option} would" in capsys.readouterr().err


def test_bench_sink_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results without the sink, which pass for right because the check has none either."""
    real = peers.flash_attention

    def ignorant(*arguments: Any, sink: object, **options: Any) -> Any:
        return real(*arguments, **options)

    monkeypatch.setattr(peers, "flash_attention", ignorant)
    out = tmp_path / "lines.jsonl"
    command = [*BENCH, "--preset", "gpt-oss-20b", "--seqlens", "16", "--impls", "flashcute"]
    assert main([*command, "--out", str(out)]) == 1
    assert [x["status"] for x in read_lines(out)] == ["wrong", "wrong"]


def test_preset_help(capsys: pytest.CaptureFixture[str]) -> None:
    """A preset that can only be found in the source."""
    assert main(["bench", "--preset", "help"]) == 0
    rows = {x.split()[0]: x for x in capsys.readouterr().out.splitlines()}
    assert set(PRESETS) < set(rows)
    assert rows["gpt-oss-20b"].split()[1:7] == ["64/8", "64", "causal,", "also", "window", "128,"]
    assert all(len(row) <= 120 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "llama3-9b"], "llama3-70b"),
        (["--preset", "llama3-8b", "--grid", "study"], "--grid"),
        (["--preset", "llama3-8b", "--causal", "0"], "--causal"),
        (["--preset", "llama3-8b", "--kv-ratio", "2"], "--kv-ratio"),
        (["--preset", "llama3-8b", "--overhead"], "--preset: expected nothing beside --overhead"),
        (
            ["--overhead", "--config", "block_m=64,stages=1"],
            "got block_m=64,stages=1; it takes --device",
        ),
        (["--overhead", "--window=-1,0"], "--window: expected nothing beside --overhead, which"),
        (
            ["--first-use", "--impls", "flashcute,naive"],
            "got flashcute,naive; it takes --head-dims",
        ),
        (["--first-use", "--causal", "0,1"], "--causal: expected nothing beside --first-use"),
        (["--first-use", "--rounds", "2"], "--rounds: expected nothing beside --first-use"),
        (
            ["--first-use", "--head-dims", "64,128"],
            "--head-dims: expected one beside --first-use, got 64,128",
        ),
        (["--grid", "studies"], "expected quick, peers, study, or a file"),
        (["--kv-ratio", "3", "--heads", "2"], "--kv-ratio: expected a divisor of 2 heads, got 3"),
        (["--budget-ms", "inf"], "--budget-ms: expected a number above 0, got 'inf'"),
        (["--rounds", "x"], "--rounds: expected an integer, at least 1, got 'x'"),
        (["--seqlens", "64,"], "--seqlens: expected an integer, at least 1, got ''"),
        (["--seed", "-1"], "--seed: expected an integer, at least 0, got '-1'"),
        (["--seed", str(2**63)], "--seed: expected an integer below 2**63"),
        (
            ["--impls", "flashcute_deterministic"],
            "none of these is here: left out: flashcute_determ",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
@needs_torch
def test_wrong_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two that is silently ignored; a message that does not say what came and what is allowed."""
    try:
        code = main(["bench", "--device", "cpu", *arguments])
    except SystemExit as stopped:  # argparse
        code = int(str(stopped.code))
    assert code == 2
    assert message in capsys.readouterr().err


# ---- xFormers ----------------------------------------------------------------------------------


class LowerTriangularFromBottomRightMask:
    pass


class LocalAttentionFromBottomRightMask:
    def __init__(self, *, window_left: int, window_right: int) -> None:
        assert min(window_left, window_right) >= 0  # the real one has no "no limit"
        self.window = window_left, window_right


class FakeXformers:
    """What the benchmark uses of xFormers. It computes with the reference, and notes what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], object]] = []
        package, ops, biases = (
            ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha.attn_bias")
        )
        vars(package)["__version__"] = "0.0.99"
        vars(ops)["memory_efficient_attention"] = self.memory_efficient_attention
        for bias in (LowerTriangularFromBottomRightMask, LocalAttentionFromBottomRightMask):
            vars(biases)[bias.__name__] = bias
        for module in (package, ops, biases):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def memory_efficient_attention(self, q: Any, k: Any, v: Any, *, attn_bias: Any = None) -> Any:
        self.calls.append((tuple(q.shape), tuple(k.shape), k.stride(), attn_bias))
        shape = (*q.shape[:-1], v.shape[-1])
        if q.ndim == 5:  # as many heads of keys as of queries, whatever their strides
            q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        causal = isinstance(attn_bias, LowerTriangularFromBottomRightMask)
        window = getattr(attn_bias, "window", None)
        return reference.naive(q, k, v, causal, window=window).reshape(shape)


def timed_by_xformers(
    cases: list[dict[str, Any]], tmp_path: Path, *arguments: str
) -> list[dict[str, Any]]:
    grid, out = tmp_path / "grid.jsonl", tmp_path / "lines.jsonl"
    same = {"batch": 1, "heads": 4, "seqlen_q": 20, "head_dim": 16}
    grid.write_text("\n".join(json.dumps({**same, **case}) for case in cases))
    command = [*BENCH, *arguments, "--grid", str(grid), "--impls", "xformers"]
    assert main([*command, "--out", str(out)]) == 0
    return read_lines(out)


def test_a_failure_of_flashcute_is_told_by_the_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run in which nothing of ours was timed, and which ends as if all were well."""
    assert main([*CHEAPEST, "--head-dims", "300"]) == 1
    assert "between 1 and 256" in capsys.readouterr().out


@needs_torch
def test_xformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is aligned to the top left, or not handed over; heads of keys that are copied or mixed up."""
    fake = FakeXformers(monkeypatch)
    cases = [
        {"causal": True, "seqlen_k": 50},
        {"causal": True, "window": [5, 7]},
        {"causal": False, "window": [-1, 3], "kv_heads": 2},
    ]
    lines = timed_by_xformers(cases, tmp_path)
    assert {(x["status"], x["impl_version"]) for x in lines} == {("ok", "0.0.99")}
    assert len(lines) == 5  # windows also without

    def biases(rows: int, keys: int, dims: int) -> set[object]:
        """Of calls of the real problem: a window, or the kind of mask."""
        return {
            getattr(bias, "window", type(bias))
            for q, k, _, bias in fake.calls
            if (q[1], k[1], len(q)) == (rows, keys, dims)
        }

    triangle = LowerTriangularFromBottomRightMask
    assert biases(20, 50, 4) == {triangle}
    assert biases(20, 20, 4) == {triangle, (5, 0)}
    assert biases(20, 20, 5) == {type(None), (40, 3)}
    for q, k, strides, _ in fake.calls:
        if len(q) == 5:
            assert q == k
            assert strides[3] == 0  # repeated, not copied


@needs_torch
def test_xformers_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of repeated heads that are not summed."""
    FakeXformers(monkeypatch)
    [line] = timed_by_xformers([{"causal": True, "kv_heads": 2}], tmp_path, "--backward")
    assert line["status"] == "ok"


@needs_torch
def test_xformers_without_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with sinks that is timed without them."""
    FakeXformers(monkeypatch)
    out = tmp_path / "lines.jsonl"
    command = [*BENCH, "--preset", "gpt-oss-20b", "--seqlens", "16"]
    assert main([*command, "--impls", "xformers", "--out", str(out)]) == 0
    assert {(x["status"], x["reason"]) for x in read_lines(out)} == {("skipped", "has no sinks")}


@needs_torch
def test_without_xformers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is not there and ends the whole run, or is left out without a word."""
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert main([*CHEAPEST, "--impls", "flashcute,xformers"]) == 0
    before, _, after = capsys.readouterr().out.partition("\nNot measured:\n")
    assert "left out: xformers needs the package xformers" in before
    assert "left out: xformers needs the package xformers" in after


# ---- FlashAttention-4 --------------------------------------------------------------------------


class FakeFlashAttention4:
    """What the benchmark uses of flash-attn-4. It computes with the reference, and notes what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[bool, tuple[int | None, int | None], object]] = []
        for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules["flash_attn.cute.interface"])["flash_attn_func"] = self.flash_attn_func
        real = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda x: "4.0.0b99" if x == "flash-attn-4" else real(x)
        )

    def flash_attn_func(
        self, q: Any, k: Any, v: Any, *, causal: bool, window_size: Any, learnable_sink: Any
    ) -> Any:
        self.calls.append((causal, window_size, learnable_sink))
        window = tuple(-1 if side is None else side for side in window_size)
        sink = None if learnable_sink is None else learnable_sink.double()
        return reference.naive(q, k, v, causal, window=window, sink=sink), None


@needs_torch
def test_flash_attention_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A side without a limit that is handed over as a number; gradients that do not pass through its tuple."""
    fake = FakeFlashAttention4(monkeypatch)
    grid, out = tmp_path / "grid.jsonl", tmp_path / "lines.jsonl"
    same = {"batch": 1, "heads": 4, "seqlen_q": 20, "head_dim": 16, "causal": True}
    grid.write_text(json.dumps(same) + "\n" + json.dumps({**same, "window": [5, -1]}))
    command = [*BENCH, "--grid", str(grid), "--impls", "fa4"]
    for more in ([], ["--backward"]):
        assert main([*command, *more, "--out", str(out)]) == 0
    lines = read_lines(out)
    assert {(x["status"], x["impl_version"]) for x in lines} == {("ok", "4.0.0b99")}
    assert {x[:2] for x in fake.calls} == {(True, (None, None)), (True, (5, None))}


@needs_torch
def test_flash_attention_4_has_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with sinks that is timed without them."""
    fake = FakeFlashAttention4(monkeypatch)
    command = [*BENCH, "--preset", "gpt-oss-20b", "--seqlens", "16", "--impls", "fa4"]
    assert main([*command, "--out", str(tmp_path / "lines.jsonl")]) == 0
    assert {str(sink.dtype) for _, _, sink in fake.calls} == {"torch.bfloat16"}


@needs_torch
def test_without_flash_attention_4(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is not there and ends the whole run."""
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    assert main([*CHEAPEST, "--impls", "flashcute,fa4"]) == 0
    assert "left out: fa4 needs the package flash-attn-4" in capsys.readouterr().out


# ---- what it says ------------------------------------------------------------------------------


def test_bench_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure that is in the lines alone, or that is another one than there; a speed-up the wrong way round."""
    out = tmp_path / "lines.jsonl"
    command = [*TINY, "--causal", "1", "--impls", "flashcute,naive", "--out", str(out)]
    assert main(command) == 0
    ours, naive = read_lines(out)
    details, summary = capsys.readouterr().out.split("\n\n")[1:3]
    header, case, *rows, _ = details.splitlines()[:5]
    assert header.split() == [
        "p50", "ms", "p99", "ms", "GFLOP/s", "memory", "max", "error", "/naive", "speed-up",
    ]  # fmt: skip
    assert case == "b1 s64 h2 d16 causal"
    for x, row in zip((ours, naive), rows, strict=True):
        name, p50, p99, rate, _, _, error, ratio, *speed_up = row.split()
        assert name == x["impl"]
        assert float(p50) == pytest.approx(x["ms_p50"], rel=0.01)
        assert float(p99) == pytest.approx(x["ms_p99"], rel=0.01)
        assert float(rate) == pytest.approx(x["tflops"] * 1e3, rel=0.01)
        assert float(error) == pytest.approx(x["max_error"], rel=0.06)
        assert float(ratio) == pytest.approx(x["error_ratio"], abs=0.006)
        wanted = [] if x is ours else [f"{naive['ms_p50'] / ours['ms_p50']:.2f}"]
        assert speed_up == wanted
    assert summary.splitlines()[0].split() == ["GFLOP/s", "flashcute", "naive", "/best"]
    assert summary.splitlines()[1].split()[-1] == f"{naive['ms_p50'] / ours['ms_p50']:.2f}"


@pytest.mark.parametrize(
    ("table", "shown"),
    [("both", [True, True]), ("details", [True, False]), ("summary", [False, True])],
)
def test_bench_one_table(table: str, shown: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    """A choice without effect."""
    assert main([*CHEAPEST, "--impls", "flashcute,naive", "--table", table]) == 0
    text = capsys.readouterr().out
    assert ["p99 ms" in text, "geometric mean" in text] == shown


def test_bench_reasons(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without figures of which nothing says why after the tables; a reason as often as there are cases."""
    monkeypatch.setattr(peers.Naive, "score_bytes", lambda self, case: 10**15)
    arguments = ["--impls", "flashcute,naive", "--config", "block_m=40"]
    assert main([*TINY, *arguments, "--deadline-s", "600"]) == 0
    text = " ".join(capsys.readouterr().out.partition("\nNot measured:\n")[2].split())
    assert "naive, skipped: its S x S matrices do not fit into memory (in all cases)" in text
    assert text.count("block_m must be") == 1


def test_bench_lines_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines for another program between lines for people."""
    assert main([*CHEAPEST, "--impls", "flashcute,naive", "--out", "-"]) == 0
    told = capsys.readouterr()
    assert [json.loads(x)["impl"] for x in told.out.splitlines()] == ["flashcute", "naive"]
    assert "geometric mean" in told.err


def test_plain_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """A long run that is silent, or whose results are mixed with what it says of itself."""
    assert main([*TINY, "--impls", "flashcute"]) == 0
    told = capsys.readouterr()
    first, second = told.err.splitlines()
    assert first == "case 1 of 2: b1 s64 h2 d16 full"
    assert second.startswith("case 2 of 2, ")
    assert second.endswith(" left: b1 s64 h2 d16 causal")
    assert " of 2" not in told.out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rich_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that does not change; results that go where the line is; a thread that draws beside timed calls."""
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    live: list[Any] = []
    start = progress.RichProgress.__enter__

    def entered(self: progress.RichProgress) -> progress.Progress:
        live.append(self.live)
        return start(self)

    monkeypatch.setattr(progress.RichProgress, "__enter__", entered)
    assert main([*TINY, "--impls", "flashcute"]) == 0
    assert "\x1b[" in terminal.getvalue()
    for what in ("case 2 of 2", " left", "checking flashcute", "round 1 of 1"):
        assert what in terminal.getvalue(), what
    assert live[0].auto_refresh is False
    out = capsys.readouterr().out
    assert "geometric mean" not in terminal.getvalue()
    assert "b1 s64 h2 d16 causal: flashcute " in out
    assert "\x1b" not in out


@pytest.mark.parametrize("why", ["--plain", "no rich", "--out -"])
def test_plain_on_a_terminal(
    why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters though none are wanted; a crash without rich."""
    if why == "no rich":
        monkeypatch.setattr(progress, "find_spec", lambda name: None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main([*CHEAPEST, *(why.split() if why.startswith("--") else [])]) == 0
    assert "\x1b" not in terminal.getvalue()
    assert "case 1 of 1: b1 s64 h2 d16 causal\n" in terminal.getvalue()


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--preset", "help"]], ids=" ".join)
def test_imports(arguments: list[str]) -> None:
    """A command that waits for libraries which it may not need."""
    code = (
        "import sys; from flashcute.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('LOADED', {'numpy', 'torch', 'rich', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "LOADED set()", done.stderr


def test_seconds_left() -> None:
    """Minutes that are told for seconds, or the reverse: where checks take most of the time and where calls do."""
    small, large, double = Work(3, 1e9), Work(3, 1e12), Work(6, 2e9)
    assert seconds_left([], [small]) is None
    assert seconds_left([(small, 3.0)], []) == 0
    assert seconds_left([(small, 3.0)], [small, double]) == pytest.approx(9.0)
    checks = seconds_left([(small, 3.0), (large, 3.0)], [small, large])
    assert checks == pytest.approx(6.0, rel=0.01)
    calls = seconds_left([(small, 3.0), (large, 103.0)], [large, double])
    assert calls == pytest.approx(109.0, rel=0.01)
    for done in ([(small, 60.0), (large, 3.0)], [(small, 0.0), (large, 60.0)]):
        left = seconds_left(done, [large])
        assert left is not None
        assert 3 < left <= 60  # what was slow at first is no reason to expect a negative rate
    assert seconds_left([(Work(3, 0.0), 2.0)], [Work(3, 0.0)]) == pytest.approx(2.0)


def test_numbers() -> None:
    """Exponents, digits that are lost, or minutes that have 60 seconds."""
    digits = {0.012345: "0.0123", 1.2345: "1.23", 123.45: "123", 12345.6: "12346", 0.0: "0.00"}
    assert {x: format_digits(x) for x in digits} == digits
    assert format_digits(None) == "-"
    seconds = {
        0.2: "0 s",
        59.4: "59 s",
        59.6: "1 min 00 s",
        3599.7: "1 h 00 min",
        7500: "2 h 05 min",
    }
    assert {x: format_seconds(x) for x in seconds} == seconds


def test_table_with_a_long_cell() -> None:
    """A cell for the rest of a line that makes its column as wide."""
    rows = [["all of them"], ["  c", "2", "3"], ["  b", "skipped"]]
    assert format_table(["", "x", "y"], rows).splitlines() == [
        "     x  y",
        "all of them",
        "  c  2  3",
        "  b  skipped",
    ]


# ---- on a GPU ----------------------------------------------------------------------------------


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
