"""``python -m flashcute profile``, with an ncu that profiles nothing, and the reader of ncu's CSV."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

import fake_ncu
import flashcute as fc
import pytest
from fake_ncu import FORWARD, FakeNcu, make_fake, raw_page, read_lines, value_after
from flashcute.__main__ import main
from flashcute._cli import ncu, profile_
from flashcute._cli.options import UsageError

SMALL = ["--batch", "1", "--heads", "2", "--seqlen", "64", "--head-dim", "64"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNcu:
    return make_fake(tmp_path / "bin", monkeypatch)


# ---- the CSV -----------------------------------------------------------------------------------


def test_raw_page() -> None:
    """Thousands read as decimals, "n/a" as a number, an instance as the value, nanoseconds as seconds."""
    said = "==PROF== Connected to process 4711 (python)\n" + raw_page((FORWARD, "other"))
    first, second = ncu.parse_raw(said)
    assert (first.name, first.blocks, first.threads) == (FORWARD, 132, 384)
    assert second.name == "other"
    assert first.metrics["dram__bytes_read.sum"] == 201_326_592
    assert first.metrics["gpu__time_duration.sum"] == pytest.approx(8e-4)
    assert first.metrics["lts__throughput.avg.pct_of_peak_sustained_elapsed"] == 41.75
    assert "sm__warps_active.avg.pct_of_peak_sustained_active" not in first.metrics
    assert set(first.metrics) <= {name for name, _, _ in fake_ncu.RAW}  # no ID, no device


@pytest.mark.parametrize(
    ("unit", "scale"),
    [
        ("byte", 1), ("Kbyte", 1e3), ("Mbyte", 1e6), ("Gbyte", 1e9), ("Kbyte/block", 1e3), ("ns", 1e-9),
        ("nsecond", 1e-9), ("usecond", 1e-6), ("us", 1e-6), ("ms", 1e-3), ("second", 1), ("s", 1), ("%", 1), ("", 1),
        ("inst", 1), ("register/thread", 1), ("sector", 1),
    ],
)  # fmt: skip
def test_units(unit: str, scale: float) -> None:
    """Megabytes beside bytes: versions of ncu differ in the units that they choose."""
    assert ncu.scale_of(unit) == pytest.approx(scale)


@pytest.mark.parametrize("text", ["", "==WARNING== nothing\n", '"ID","Kernel Name"\n"",""\n'])
def test_pages_without_a_launch(text: str) -> None:
    """An IndexError where there is no table, or nothing in it."""
    assert ncu.parse_raw(text) == []


def test_stalls_are_in_order() -> None:
    """The longest wait, not the first column; warps that are issued do not wait."""
    (launch,) = ncu.parse_raw(raw_page())
    assert list(ncu.stalls_of(launch.metrics)) == ["not_selected", "gmma", "wait", "selected"]
    assert profile_.top_stall(launch.metrics) == "gmma"


# ---- the command lines -------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], list[str]]:
    """The lines for nsys and ncu."""
    assert main(["profile", "--print", *arguments]) == 0
    lines = [shlex.split(x) for x in capsys.readouterr().out.splitlines()]
    nsys, ncu_line = (line for line in lines if "flashcute" in line)
    return nsys, ncu_line


def test_print_runs_nothing(fake: FakeNcu, capsys: pytest.CaptureFixture[str]) -> None:
    """--print for a machine that has a GPU: this one need not have one, and nothing is run."""
    nsys, line = printed(capsys, *SMALL)
    assert nsys[:2] == ["nsys", "profile"]
    assert Path(line[0]).name == "ncu"
    assert fake.asked == []
    assert value_after(line, "--clock-control") == "none"
    assert value_after(line, "--launch-skip") == str(profile_.WARM_UP)
    assert value_after(line, "--launch-count") == "1"
    assert line[line.index("-m") - 1] == sys.executable


@pytest.mark.parametrize(
    ("head_dim", "config", "kernels"),
    [
        (64, "deterministic=0", 3),
        (64, "deterministic=1", 3),
        (64, "deterministic=1,kernel=sm80", 2),
        (256, "deterministic=1", 2),
    ],
)
def test_all_kernels_of_the_gradients(
    capsys: pytest.CaptureFixture[str], head_dim: int, config: str, kernels: int
) -> None:
    """A count that ends before the last pass of a call, or begins within one."""
    options = ["--head-dim", str(head_dim), "--config", config]
    _, line = printed(capsys, *SMALL, "--backward", *options)
    assert value_after(line, "--launch-count") == str(kernels)
    assert value_after(line, "--launch-skip") == str(kernels * profile_.WARM_UP)


def test_the_filter_finds_the_kernels() -> None:
    """Kernels that have other names than the filter expects: ncu would profile none. These are the names in the images
    that the build makes."""
    images = json.loads((Path(__file__).parents[2] / "images.json").read_text())
    found = {
        direction: {
            name for name in images if re.search(profile_.kernels_of(gradients=direction), name)
        }
        for direction in (False, True)
    }
    assert found[False].isdisjoint(found[True])
    assert {name for name in images if name.startswith("flashcute_sm")} == found[False] | found[
        True
    ]
    assert all("_fwd_" in name for name in found[False])


def test_another_process_takes_the_same_case(capsys: pytest.CaptureFixture[str]) -> None:
    """An argument that does not reach the program under the profiler: another problem is profiled."""
    asked = [
        *SMALL,
        "--kv-heads",
        "1",
        "--seqlen-k",
        "96",
        "--dtype",
        "float32",
        "--causal",
        "--window",
        "7,-1",
    ]
    _, line = printed(capsys, *asked, "--config", "block_m=64,swizzled=0")
    passed_on = line[line.index("--only-launch") + 1 :]
    _, again = printed(capsys, *passed_on)
    assert again[again.index("--only-launch") + 1 :] == passed_on
    assert {"--causal", "--window=7,-1", "block_m=64,swizzled=0"} <= set(passed_on)
    assert value_after(passed_on, "--seqlen-k") == "96"


@pytest.mark.parametrize("more", [[], ["--backward"], ["--backward", "--causal"]])
def test_only_launch(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What runs under the profiler fails, or prints what nobody reads. (Here on the CPU.)"""
    assert main(["profile", "--only-launch", *SMALL, "--dtype", "float32", *more]) == 0
    assert capsys.readouterr() == ("", "")


# ---- a report in words -------------------------------------------------------------------------


def test_twelve_metrics(fake: FakeNcu, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A metric that the command does not ask for, or shows from another column."""
    out = tmp_path / "lines.jsonl"
    assert main(["profile", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert len(profile_.METRICS) == 12
    for value in (
        "0.8 ms, 687 TFLOP/s",  # 4 * 4 * 16 * 4096**2 * 128 FLOP
        "tensor cores      94.4 %",
        "exponential unit  47.3 %",
        "1,250 (2.5 % of 50,000 wavefronts)",
        "L2                41.8 %",
        "n/a (168 registers a thread at launch, 226.0 KiB of shared memory a block)",
        "0 B read, 0 B written",
        "gmma, 35 %: for WGMMA",
        "Busiest: the tensor cores, 94 %.",
    ):
        assert value in text, value
    asked = set(value_after(fake.asked[0], "--metrics").split(","))
    assert asked == {names[0] for names in profile_.ALL_METRICS}
    assert value_after(fake.asked[0], "--section") == "WarpStateStats"
    (line,) = read_lines(out)
    assert line["kernel"] == FORWARD
    assert line["stall"] == "gmma"
    assert line["metrics"]["launch__shared_mem_per_block"] == 231_424
    assert not [name for name in line["metrics"] if name.startswith("device__")]


def test_rate(fake: FakeNcu, capsys: pytest.CaptureFixture[str]) -> None:
    """TFLOP/s of all pairs under a causal mask, or of gradients, whose passes do not have them."""
    assert main(["profile", "--causal"]) == 0
    assert (
        f"0.8 ms, {4 * 4 * 16 * 4096**2 * 128 / 2 / 8e-4 / 1e12:.0f} TFLOP/s"
        in capsys.readouterr().out
    )
    assert main(["profile", "--backward"]) == 0
    assert "TFLOP/s" not in capsys.readouterr().out


def test_every_metric_may_be_missing() -> None:
    """A KeyError on a chip that lacks a counter."""
    assert {metric.told({}) for metric in profile_.METRICS} == {profile_.ABSENT}
    assert "No unit was counted" in profile_.verdict({})


def test_units_that_are_alike() -> None:
    """Of two units that are equally busy only the one that is a tenth above; two thirds told as a limit."""
    text = profile_.verdict(
        {profile_.TENSOR[0]: 64.2, profile_.EXPONENTIALS[0]: 64.3, profile_.L2[0]: 24.6}
    )
    assert text.startswith("Busiest: the tensor cores, 64 %; the exponential unit, 64 %. None is")
    assert profile_.verdict({profile_.TENSOR[0]: 94.8, profile_.SHARED[0]: 57.5}) == (
        "Busiest: the tensor cores, 95 %."
    )


def test_passes_of_the_gradients(fake: FakeNcu, capsys: pytest.CaptureFixture[str]) -> None:
    """Advice for kernels that multiply given to a pass that only reads and writes: larger tiles because L2 is busy."""
    name = "flashcute_sm80_bwd_bf16_d64_m64_n128_w4_"
    fake.says(raw_page((f"{name}prepare", f"{name}gradients_full", f"{name}finish")))
    assert main(["profile", "--backward", "--head-dim", "64"]) == 0
    said = capsys.readouterr().out
    assert said.count("This pass only reads and writes") == 2
    assert said.count("Tiles read K and V through L2") == 1
    assert said.count("tensor cores      94.4 %") == 3
    assert "Of 2.4 ms: prepare 33.3 %, gradients 33.3 %, finish 33.3 %." in said


def test_the_passes_are_those_of_the_images() -> None:
    """A pass that has another name than the command expects."""
    images = json.loads((Path(__file__).parents[2] / "images.json").read_text())
    passes = {profile_.pass_of(name) for name in images if "_bwd_" in name}
    assert {"prepare", "gradients", "finish"} <= passes
    assert {profile_.pass_of(name) for name in images if "_fwd_" in name} == {""}


def test_a_kernel_that_waits() -> None:
    """The busiest unit named as the bound where none is busy."""
    text = profile_.verdict({profile_.TENSOR[0]: 31.0, profile_.L2[0]: 12.0})
    assert "No unit is busy" in text
    assert "31 %" in text


def test_the_report_is_kept(
    fake: FakeNcu, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """--out without the suffix, which ncu appends: the import would look for another file."""
    assert main(["profile", "--out", str(tmp_path / "kept")]) == 0
    assert (tmp_path / "kept.ncu-rep").exists()
    assert f"ncu-ui {tmp_path / 'kept.ncu-rep'}" in capsys.readouterr().out


def test_the_program_runs_under_ncu(fake: FakeNcu, capsys: pytest.CaptureFixture[str]) -> None:
    """A command line that ncu could not start: the fake one starts it too."""
    fake.runs_the_program()
    assert main(["profile", *SMALL, "--dtype", "float32"]) == 0


# ---- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters "
            "on the target device 0.",
            "NVreg_RestrictProfilingToAdminUsers=0",
        ),
        ("==WARNING== No kernels were profiled.", "no launch of a flashcute kernel"),
        ("Traceback: something else", "ncu failed. It said:\n    ==PROF== Connected"),
        ("==ERROR== Failed to find metric regex:^nobody_asked_for_this$", "Failed to find metric"),
    ],
)
def test_failures_are_explained(
    fake: FakeNcu, capsys: pytest.CaptureFixture[str], failure: str, says: str
) -> None:
    """A traceback, an empty table, or a loop without an end, instead of what to do."""
    fake.fails(failure)
    assert main(["profile", *SMALL]) == 2
    assert says in capsys.readouterr().err


def test_an_empty_report(fake: FakeNcu, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of nothing, if no kernel had the name."""
    fake.says(raw_page(()))
    assert main(["profile", *SMALL]) == 2
    assert "profiled no kernel whose name matches" in capsys.readouterr().err


def test_without_ncu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A FileNotFoundError of subprocess, which does not say what ncu is and where it comes from."""
    monkeypatch.setattr(ncu, "require_gpu", lambda: None)
    monkeypatch.setattr(ncu, "find_ncu", lambda: None)
    assert main(["profile", *SMALL]) == 2
    said = capsys.readouterr().err
    assert "part of the CUDA toolkit" in said
    assert "--print" in said


def test_where_ncu_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toolkit's, which is seldom on PATH, is not found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ncu"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert ncu.find_ncu() == str(program)


def test_newest_version_is_last() -> None:
    """2025.10 before 2025.2, as text would have it."""
    assert sorted(["2025.10.0", "2025.2.1"], key=ncu.version_of) == ["2025.2.1", "2025.10.0"]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """ncu started for nothing."""
    monkeypatch.setattr(
        fc._core, "driver_info", lambda: argparse.Namespace(gpus=[], problem="no driver")
    )
    assert main(["profile", *SMALL]) == 2
    assert "no driver" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seqlen", "64,128"], "--seqlen: expected one length, got 2"),
        (["--config", "block_m=40"], "block_m"),
        (["--backward", "--config", "kernel=sm80,column_warps=3"], "column_warps must be"),
        (["--out", "/nonexistent/report"], "--out: expected a file in a folder that exists"),
        (["--out", ""], "--out: expected a file in a folder that exists, got ''"),
        (["--out", "/"], "--out: expected a file in a folder that exists, got '/'"),
        (["--json", "/nonexistent/lines"], "--json /nonexistent/lines: No such file"),
        (["--heads", "6", "--kv-heads", "4"], "--kv-heads: expected a divisor of 6 heads, got 4"),
    ],
)
def test_bad_arguments(
    fake: FakeNcu, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    """An error after the profiler has run, or in the program under it, where nobody reads it."""
    assert main(["profile", *SMALL, *arguments]) == 2
    assert says in capsys.readouterr().err
    assert fake.asked == []


def test_a_program_that_cannot_be_started() -> None:
    """An OSError without the program's name."""
    with pytest.raises(UsageError, match="/nonexistent/ncu"):
        ncu.output_of(["/nonexistent/ncu"])


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["--backward"]])
def test_ncu_knows_the_metrics(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, more: list[str]
) -> None:
    """On a GPU: a metric that this version of ncu does not have, a section of another name, kernels that the filter
    does not find."""
    if ncu.find_ncu() is None:
        pytest.skip("ncu is not here")
    out = tmp_path / "lines.jsonl"
    code = main(["profile", "--seqlen", "1024", "--json", str(out), *more])
    said = capsys.readouterr()
    if "ERR_NVGPUCTRPERM" in said.err:
        pytest.skip("the driver reserves the counters for administrators")
    assert code == 0, said.err
    lines = read_lines(out)
    assert len(lines) == (3 if more else 1)
    for line in lines:
        assert line["kernel"].startswith("flashcute_sm")
        absent = [names[0] for names in profile_.ALL_METRICS if names[0] not in line["metrics"]]
        assert absent == []
        assert line["stall"] in profile_.STALL_MEANINGS
