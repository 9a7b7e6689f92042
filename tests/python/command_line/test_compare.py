"""``python -m flashcute compare``: ratios, noise, rounds, and the exit code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flashcute.__main__ import main
from flashcute._cli.compare import Change, Time, change, two_of_three

Line = dict[str, Any]
Compare = Callable[..., tuple[int, str]]


def line(ms: float | None = 1.0, spread: float | None = 0.01, **fields: Any) -> Line:
    """As bench writes it; the times of most calls lie within `spread` of the median, as a part of it."""
    found: Line = {"kind": "forward", "device": "D", "impl": "flashcute", "config": "fwd_a"}
    found |= {"batch": 2, "heads": 4, "kv_heads": 4, "seqlen_q": 128, "seqlen_k": 128}
    found |= {"head_dim": 64, "causal": True, "dtype": "float16", "status": "ok", "commit": "abc"}
    if ms is not None:
        found["ms_p50"] = ms
        if spread is not None:
            found |= {"ms_p10": ms * (1 - spread), "ms_p90": ms * (1 + spread)}
    return found | fields


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    def run(a: list[Line], b: list[Line], *options: str) -> tuple[int, str]:
        for name, lines in (("a", a), ("b", b)):
            text = "".join(json.dumps(x) + "\n" for x in lines)
            (tmp_path / name).write_text(text)
        code = main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *options])
        found = capsys.readouterr()
        return code, found.out + found.err

    return run


def row_of(text: str, impl: str = "flashcute") -> list[str]:
    """The cells of the first case of an implementation."""
    row = next(x for x in text.splitlines() if x.startswith("b2 ") and f" {impl} " in x)
    return row.replace("± ", "±").replace(" %", "%").split()[6:]


# ---- ratio and noise ---------------------------------------------------------------------------


def test_ratio_and_noise() -> None:
    """A ratio that stands upside down; a band that is not the one that the help describes."""
    found = change(Time(2.0, 1.9, 2.2), Time(1.0, 0.9, 1.1))
    assert found.ratio == 2.0
    assert found.noise == pytest.approx(math.sqrt(0.075**2 + 0.1**2))
    assert change(Time(2.0, None, None), Time(1.0, 0.9, 1.1)) == Change(2.0, None)


@pytest.mark.parametrize(
    ("ratio", "noise", "direction"),
    [
        (1.04, 0.05, 0),
        (1.06, 0.05, 1),
        (1 / 1.04, 0.05, 0),
        (1 / 1.06, 0.05, -1),
        (1.001, None, 1),
        (0.999, None, -1),
        (1.0, None, 0),
    ],
)
def test_direction(ratio: float, noise: float | None, direction: int) -> None:
    """Noise that counts as a change; a band that treats slower and faster differently."""
    assert Change(ratio, noise).direction == direction


def test_the_same_file_twice(compare: Compare) -> None:
    """A change that nobody made."""
    code, text = compare([line()], [line()])
    assert code == 0
    assert row_of(text)[1:] == ["1", "1", "1.000", "±1.4%", "1", "noise"]
    assert "regressions: none" in text


def test_faster(compare: Compare) -> None:
    """An exit code for what became better."""
    code, text = compare([line(2.0)], [line(1.0)])
    assert code == 0
    assert row_of(text)[-1] == "faster"


@pytest.mark.parametrize(
    ("spread", "options", "code"),
    [
        (0.01, [], 1),
        (0.1, [], 0),  # inside the noise
        (0.01, ["--fail-below", "0.9"], 0),
        (None, [], 1),
        (None, ["--fail-below", "0.9"], 0),
        (0.01, ["--markdown"], 1),
    ],
)
def test_regression(spread: float | None, options: list[str], code: int, compare: Compare) -> None:
    """A regression that passes, or noise that does not."""
    found, text = compare([line(0.93, spread)], [line(1.0, spread)], *options)
    assert found == code
    assert ("1 slower than 0.97 beyond the noise" in text) == bool(code)


def test_other_libraries_cannot_fail(compare: Compare) -> None:
    """A failed check because another library was slower."""
    a, b = ([line(), line(ms, impl="fa3")] for ms in (1.0, 2.0))
    code, text = compare(a, b)
    assert code == 0
    assert row_of(text, "fa3")[-1] == "slower"


# ---- rounds ------------------------------------------------------------------------------------


def test_two_of_three() -> None:
    """A rule that one outlier of three decides."""
    needed = {
        n: next(k for k in range(n + 1) if two_of_three([True] * k + [False] * (n - k)))
        for n in range(1, 7)
    }
    assert needed == {1: 1, 2: 2, 3: 2, 4: 3, 5: 4, 6: 4}


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        ((1.0, 1.0, 1.0), (1.1, 1.1, 1.0), 1),
        ((1.0, 1.0, 1.0), (1.1, 1.0, 1.0), 0),
        ((1.0, 1.0), (1.1, 1.0), 0),
        ((1.0, 1.1, 1.2), (1.0, 1.1, 1.2), 0),  # both drift
        ((1.0,), (1.1, 1.0, 1.0), 1),  # one pair, the first of each
    ],
)
def test_rounds(
    before: tuple[float, ...], after: tuple[float, ...], code: int, compare: Compare
) -> None:
    """Rounds that are compared crosswise, or of which one decides."""
    found, _ = compare([line(x) for x in before], [line(x) for x in after])
    assert found == code


def test_times_are_medians_of_rounds(compare: Compare) -> None:
    """The last round alone; how many there were is not told."""
    _, text = compare([line(x) for x in (1.0, 5.0, 2.0)], [line(4.0)])
    assert row_of(text)[1:4] == ["2", "4", "0.500"]
    assert row_of(text)[5] == "3/1"


# ---- what is in one file only ------------------------------------------------------------------


def test_new_and_missing(compare: Compare) -> None:
    """A case that silently is no longer measured."""
    a = [line(), line(head_dim=32)]
    b = [line(), line(head_dim=16), line(None, head_dim=32, status="skipped", reason="no room")]
    code, text = compare(a, b)
    assert code == 0
    before, after = text.split("\nonly in A: 1\n")[1].split("\nonly in B: 1\n")
    assert "d32" in before
    assert "skipped: no room" in before
    assert "d16" in after
    assert "d32" not in after.partition("regressions")[0]
    assert text.endswith(
        "regressions: none\nnot compared: 1 of 2 of A, which B lacks (only in A)\n"
    )


@pytest.mark.parametrize(
    ("impl", "status", "code"),
    [
        ("flashcute", "failed", 1),
        ("flashcute", "wrong", 1),
        ("flashcute", "skipped", 0),
        ("fa3", "failed", 0),
    ],
)
def test_what_no_longer_works(impl: str, status: str, code: int, compare: Compare) -> None:
    """A kernel that fails, and so is not slower."""
    a = [line(), line(impl=impl, head_dim=32)]
    b = [line(), line(None, impl=impl, head_dim=32, status=status, reason="because")]
    found, text = compare(a, b)
    assert found == code
    assert f"{status}: because" in text


def test_another_configuration(compare: Compare) -> None:
    """A change of the default that is taken for a change of the kernel."""
    _, text = compare([line()], [line(config="fwd_b")])
    assert "other config" in text
    told = text.split("with another configuration")[1].splitlines()
    assert told[2].split()[-2:] == ["fwd_a", "fwd_b"]


def test_lines_without_a_time_are_counted(compare: Compare) -> None:
    """A file of which most is passed over in silence."""
    others = [{"kind": "compile", "seconds": 3}] * 2
    _, text = compare([line(), *others], [line(), line(None, impl="fa3", status="skipped")])
    assert "passed over in A, without a time: 2 compile" in text
    assert "passed over in B, without a time: 1 forward (skipped)" in text


def test_lines_of_an_older_bench(compare: Compare) -> None:
    """A file that compares with no newer one, because bench writes more fields now."""
    new = line(schema=2, preset=None, window=None, head_dim_v=64, sink=False, seed=7)
    code, text = compare([line()], [new])
    assert code == 0
    assert "cases in both: 1" in text
    assert compare([line()], [new | {"sink": True}])[0] == 2


def test_worst(compare: Compare) -> None:
    """The best ones, or ones that are faster, among the worst."""
    lengths = [64 * i for i in range(1, 10)]
    a = [line(seqlen_q=n, seqlen_k=n) for n in lengths]
    b = [line(1.0 + (n - 128) / 1000, seqlen_q=n, seqlen_k=n) for n in lengths]
    _, text = compare(a, b)
    worst = text.split("the worst 5")[1].split("regressions")[0].splitlines()[2:7]
    assert [row.split()[1] for row in worst] == ["s576", "s512", "s448", "s384", "s320"]


def test_means(compare: Compare) -> None:
    """A mean that one extreme case decides, or over all implementations together."""
    a = [line(), line(head_dim=32), line(impl="fa3")]
    b = [line(0.25), line(1.0, head_dim=32), line(2.0, impl="fa3")]
    _, text = compare(a, b)
    rows = text.replace("± ", "").split("by implementation")[1].splitlines()[2:4]
    means = {x.split()[0]: x.split()[1:] for x in rows}
    assert means == {
        "flashcute": ["2", "2.000", "1.0", "%", "1", "1", "0"],
        "fa3": ["1", "0.500", "1.4", "%", "0", "0", "1"],
    }


@pytest.mark.parametrize(
    ("factor", "cases", "impl", "code"),
    [
        (1.06, 20, "flashcute", 1),
        (1.06, 1, "flashcute", 0),
        (1.02, 20, "flashcute", 0),
        (1.06, 20, "fa3", 0),
    ],
)
def test_all_cases_a_little_slower(
    factor: float, cases: int, impl: str, code: int, compare: Compare
) -> None:
    """A regression of the whole that hides in the noise of each case."""
    lengths = range(1, cases + 1)
    a, b = (
        [line(ms, 0.1, seqlen_q=n, seqlen_k=n, impl=impl) for n in lengths] for ms in (1.0, factor)
    )
    found, text = compare(a, b)
    assert found == code
    assert ("the mean of flashcute below 0.97" in text) == bool(code)


def test_markdown(compare: Compare) -> None:
    """A table that Markdown does not read as one."""
    _, text = compare([line()], [line()], "--markdown")
    assert "| case | implementation | A ms | B ms | ratio | noise | rounds | change |" in text
    assert "\n\n| case" in text
    assert (
        "| b2 s128 h4 d64 causal float16 | flashcute | 1 | 1 | 1.000 | ± 1.4 % | 1 | noise |"
        in text
    )


# ---- wrong files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([line()], [line(head_dim=32)], "no case is in both files"),
        (
            [line()],
            [{"kind": "compile"}],
            "no line with the time of an implementation (ms_p50), only 1 compile",
        ),
        (
            [line(), line(device="E")],
            [line()],
            "several devices in the lines: D, E; choose with --device",
        ),
    ],
)
def test_files_that_cannot_be_compared(
    a: list[Line], b: list[Line], message: str, compare: Compare
) -> None:
    """An exit code that says that all is well, or that something is slower."""
    code, text = compare(a, b)
    assert code == 2
    assert message in text


def test_filters(compare: Compare) -> None:
    """A filter that is dropped on its way."""
    lines = [line(), line(device="E"), line(head_dim=32), line(impl="fa3")]
    filters = ["--device", "D", "--head-dims", "64", "--impls", "flashcute"]
    code, text = compare(lines, lines, *filters)
    assert code == 0
    assert "cases in both: 1" in text
