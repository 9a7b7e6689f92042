"""``python -m flashcute plot``: the charts as data, without matplotlib; and, with it, that they are drawn."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from flashcute.__main__ import main
from flashcute._cli import charts, drawing, recorded, traffic
from flashcute._cli.charts import Chart
from flashcute._cli.options import UsageError
from flashcute._cli.traffic import Ceilings

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="needs matplotlib, which draws"
)

# What can be drawn of the recorded lines: a chart of each kind.
COMMANDS = {
    "tflops": ["tflops", "gpu_forward_hopper.jsonl"],
    "gflops": ["tflops", "cpu_forward_float32.jsonl"],
    "speedup by length": ["speedup", "gpu_backward.jsonl"],
    "speedup by case": ["speedup", "gpu_forward_hopper_short.jsonl"],
    "memory": ["memory", "gpu_naive.jsonl"],
    "error": ["error", "gpu_backward.jsonl"],
    "error, relative": ["error", "gpu_naive.jsonl", "--relative-to", "naive"],
    "roofline": ["roofline", "gpu_forward_hopper.jsonl", "gpu_naive.jsonl"],
    "roofline without ceilings": ["roofline", "cpu_forward_float32.jsonl"],
    "masks": ["masks", "gpu_packed.jsonl", "gpu_block_masks.jsonl"],
}


def plot(name: str, *more: str) -> int:
    words = COMMANDS[name]
    return main(["plot", *(str(RESULTS / x) if x.endswith(".jsonl") else x for x in words), *more])


def line(impl: str = "flashcute", ms: float = 1.0, **fields: Any) -> dict[str, Any]:
    """A forward as bench writes it, with those fields that charts read."""
    sizes = {"batch": 2, "heads": 4, "kv_heads": 4, "seqlen_q": 1024, "seqlen_k": 1024}
    found = {"kind": "forward", "device": "NVIDIA H200, sm_90", "dtype": "bfloat16", "status": "ok"}
    found |= sizes | {"head_dim": 64, "causal": False, "impl": impl, "ms_p50": ms, "commit": "abc"}
    found |= fields
    flops = 4.0 * found["batch"] * found["heads"] * found["head_dim"] * found["seqlen_q"] ** 2
    return {"tflops": flops / found["ms_p50"] / 1e9 / (2 if found["causal"] else 1)} | found


def write(file: Path, *lines: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(file)


def values_of(chart: Chart) -> dict[tuple[str, str, float], float]:
    """(panel, implementation, x) -> y."""
    return {
        (panel.title, curve.name, x): y
        for row in chart.panels
        for panel in row
        for curve in panel.curves
        for x, y in curve.points
    }


# ---- kinds -------------------------------------------------------------------------------------


def test_table_of_what_bench_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A field that the benchmark writes under another name than the plot reads."""
    out = str(tmp_path / "lines.jsonl")
    bench = ["bench", "--device", "cpu", "--rounds", "1", "--budget-ms", "1", "--batch", "1"]
    sizes = ["--seqlens", "64", "--head-dims", "16", "--heads", "2", "--impls", "flashcute,naive"]
    assert main([*bench, *sizes, "--out", out]) == 0
    capsys.readouterr()
    assert main(["plot", "tflops", out]) == 0
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| 16 ")]
    assert [row.split(" | ")[:2] for row in rows] == [["| 16 full", "64"], ["| 16 causal", "64"]]
    assert all("**" in row for row in rows)
    for kind in ("speedup", "memory", "error", "roofline"):
        assert main(["plot", kind, out]) == 0
        assert "flashcute" in capsys.readouterr().out


def test_tflops() -> None:
    """Panels that mix head dimensions or masks; a repeated measurement that counts twice or hides the others."""
    lines = [
        *(line(tflops=x) for x in (300.0, 100.0, 200.0)),
        line("fa3", tflops=150.0),
        line(tflops=50.0, causal=True),
        line(tflops=70.0, head_dim=128, seqlen_q=2048, seqlen_k=2048),
        line(tflops=1.0, status="wrong"),
        line(tflops=1.0, seqlen_k=2048),
        line(tflops=1.0, window=[3, 0]),
    ]
    chart = charts.tflops(lines)
    assert values_of(chart) == {
        ("head dim 64, full", "flashcute", 1024): 200.0,
        ("head dim 64, full", "fa3", 1024): 150.0,
        ("head dim 64, causal", "flashcute", 1024): 50.0,
        ("head dim 128, full", "flashcute", 2048): 70.0,
    }
    assert chart.y == "TFLOP/s"
    assert chart.shown == 6
    assert "| 64 full | 1024 | **200** | 150 |" in chart.table


def test_speedup_is_their_time_over_ours() -> None:
    """A ratio that stands upside down; medians of which only one side is taken."""
    lines = [*(line(ms=x) for x in (1.0, 4.0, 2.0)), line("fa3", 3.0), line("naive", 1.0)]
    chart = charts.speedup(lines)
    panel = "head dim 64, full"
    assert values_of(chart) == {(panel, "fa3", 1024): 1.5, (panel, "naive", 1024): 0.5}
    assert [(rule.across, rule.value) for rule in chart.rules] == [("y", 1.0)]
    assert "| geometric mean |  | 1.50 | 0.50 |" in chart.table
    swapped = charts.speedup(lines, ours="fa3", peers=["flashcute"])
    assert values_of(swapped) == {(panel, "flashcute", 1024): 2 / 3}
    assert "FlashAttention-3 is faster" in swapped.footer


def test_variants_of_ours_are_peers_only_when_named() -> None:
    """ "Their time" that is our own; a variant that cannot be compared at all."""
    lines = [line(), line("flashcute[block_m=64]", 2.0), line("fa3", 3.0)]
    assert {key[1] for key in values_of(charts.speedup(lines))} == {"fa3"}
    chart = charts.speedup(lines, peers=["flashcute[block_m=64]"])
    assert list(values_of(chart).values()) == [2.0]


def test_speedup_by_case_where_lengths_are_not_enough() -> None:
    """Cases that lie on one another, of which a curve shows the last."""
    cases = [{"batch": 2}, {"batch": 4}]
    lines = [
        line(impl, ms, **case) for impl, ms in (("flashcute", 1.0), ("fa3", 2.0)) for case in cases
    ]
    chart = charts.speedup(lines)
    assert chart.form == "dots"
    assert chart.panels[0][0].rows == ("b2 s1024 h4 full", "b4 s1024 h4 full")
    assert charts.speedup(lines[::2]).form == "lengths"
    with pytest.raises(UsageError, match=r"several problems .* b2 s1024 .*; b4 s1024"):
        charts.speedup(lines, by="length")


def test_masks() -> None:
    """A plot that divides the wrong way round, or loses the cases in which another library is faster."""
    files = [RESULTS / f"{name}.jsonl" for name in ("gpu_packed", "gpu_block_masks")]
    lines = recorded.read(files)
    chart = charts.masks(lines)
    assert [panel.title for row in chart.panels for panel in row] == ["head dim 64", "head dim 128"]
    curves = [(panel, curve) for row in chart.panels for panel in row for curve in panel.curves]
    assert {x.name for _, x in curves} == {"fa3", "varlen_attn", "flex", "flex_built"}
    lost = [
        (panel.rows[int(y)], x.name) for panel, x in curves for ratio, y in x.points if ratio < 1
    ]
    short = "short 1000x64, causal, 32/8 heads"
    assert sorted(lost) == [(short, "fa3"), (short, "varlen_attn")]
    (found,) = [x for x in lines if x.get("tokens") == 4096 and x["head_dim"] == 64]
    built = found["ms_flex_documents"] + found["ms_flex_build"]
    ours = found["ms_mapped_documents"] + found["ms_build_documents"]
    (mark,) = [x for panel, x in curves if x.name == "flex_built" and panel.title == "head dim 64"]
    assert mark.points[0][0] == pytest.approx(built / ours)


def test_memory_is_for_each_head_of_each_sequence() -> None:
    """A curve that bends because the benchmark takes smaller batches of longer sequences."""
    lines = [
        line(batch=4, peak_bytes=8 * 2**20),
        line(batch=2, seqlen_q=2048, seqlen_k=2048, peak_bytes=8 * 2**20),
        line(batch=1, peak_bytes=3 * 2**20),  # of two problems, the one that needs more
        line("naive"),
    ]
    chart = charts.memory(lines)
    panel = "head dim 64, full"
    expected = {(panel, "flashcute", 1024): 0.75 * 2**20, (panel, "flashcute", 2048): 2.0**20}
    assert values_of(chart) == expected
    assert "| 64 full | 2048 | 1.0 MiB |" in chart.table


def test_nothing_to_divide_by_and_no_logarithm() -> None:
    """A traceback for one key, whose output is exact, or for memory that the meter of the CPU does not notice."""
    lines = [line(peak_bytes=0, rel_l2=0.0), line("naive", peak_bytes=8 * 2**10, rel_l2=0.0)]
    assert {name for _, name, _ in values_of(charts.memory(lines))} == {"naive"}
    with pytest.raises(UsageError, match="no line holds peak_bytes above 0"):
        charts.memory(lines[:1])
    assert values_of(charts.error(lines, relative_to="naive")) == {}
    assert "| output | head dim 64, full | - |" in charts.error(lines, relative_to="naive").table


def test_what_is_not_known() -> None:
    """A KeyError for a dtype or a device that came later than the plot."""
    unknown = line(dtype="float8", rel_l2=0.1)
    assert charts.error([unknown]).rules == ()
    with pytest.raises(UsageError, match="no line whose FLOP per byte is known"):
        charts.roofline([unknown])
    assert charts.roofline([line(device=None)]).rules == ()


def test_error() -> None:
    """A gradient's error under another one's name; a ratio to the implementation itself, or upside down."""
    errors = {"dq_rel_l2": 1e-3, "dk_rel_l2": 2e-3, "dv_rel_l2": 4e-3}
    lines = [
        line(kind="backward", **errors),
        line("naive", kind="backward", **{name: 2 * x for name, x in errors.items()}),
        line("fa3", kind="backward", causal=True, **errors),
    ]
    chart = charts.error(lines)
    assert [panel.title for panel in chart.panels[0]] == [f"gradient of {x}" for x in "qkv"]
    ours = {panel.title[-1]: panel.curves[0].points for panel in chart.panels[0]}
    assert ours == {"q": ((1e-3, 0.0),), "k": ((2e-3, 0.0),), "v": ((4e-3, 0.0),)}
    assert chart.rules[0].value == 2**-8
    relative = charts.error(lines, relative_to="naive")
    assert {x.name for panel in relative.panels[0] for x in panel.curves} == {"flashcute"}
    assert relative.panels[0][2].curves[0].points == ((0.5, 0.0),)
    with pytest.raises(UsageError, match="--relative-to: no line of sdpa, only of"):
        charts.error(lines, relative_to="sdpa")


def test_bytes_of_the_roofline() -> None:
    """Bytes that forget the log-sum-exp, the shared heads, or the scores that the naive computation stores."""
    sizes = {"batch": 3, "heads": 8, "kv_heads": 2, "seqlen_q": 1000, "seqlen_k": 1000}
    queries, keys, lse = 3 * 8 * 1000 * 64 * 2, 3 * 2 * 1000 * 64 * 2, 3 * 8 * 1000 * 4
    scores = 3 * 8 * 1000 * 1000 * 2
    forward, naive = line(**sizes), line("naive", **sizes)
    assert charts.theoretical_bytes(forward) == 2 * queries + 2 * keys + lse
    assert charts.theoretical_bytes(naive) == 2 * queries + 2 * keys + 4 * scores
    backward = line(kind="backward", **sizes)
    assert charts.theoretical_bytes(backward) == 4 * queries + 4 * keys + lse
    assert charts.theoretical_bytes(naive | {"kind": "backward"}) is None
    case = charts.case_of(forward)  # the same as of the command io
    assert charts.theoretical_bytes(forward) == traffic.flash_dram(case).total
    assert charts.theoretical_bytes(naive) == traffic.standard(case).total
    wide = line(head_dim_v=128, **sizes)
    assert charts.theoretical_bytes(wide) == 1.5 * (2 * queries + 2 * keys) + lse


def test_roofline() -> None:
    """FLOP per byte of another problem; bytes of ncu that count for another kernel; ceilings that are not the GPU's."""
    ours, theirs = line(config="fwd_a"), line("fa3", 2.0)
    io = {name: ours[name] for name in ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k")}
    io |= {name: ours[name] for name in ("head_dim", "causal", "dtype", "device", "config")}
    io |= {"kind": "io", "window": None, "measured": {"dram_read": 1e6, "dram_written": 3e6}}
    flops = 4.0 * 2 * 4 * 64 * 1024**2
    expected = charts.theoretical_bytes(theirs)
    assert expected is not None

    def xs(*lines: dict[str, Any]) -> dict[str, float]:
        return {name: x for (_, name, x) in values_of(charts.roofline(lines))}

    in_theory = pytest.approx(flops / expected)
    assert xs(ours, theirs) == {"flashcute": in_theory, "fa3": in_theory}
    assert xs(io, ours, theirs) == {"flashcute": pytest.approx(flops / 4e6), "fa3": in_theory}
    assert xs(io | {"config": "fwd_b"}, ours)["flashcute"] == in_theory
    chart = charts.roofline([ours])
    assert [(rule.across, rule.value) for rule in chart.rules] == [("slope", 4.8), ("y", 989.4)]
    assert "in theory" in chart.footer
    assert "as measured" in charts.roofline([io, ours]).footer


def test_ceilings() -> None:
    """A board that is taken for another one with the same chip; half of the ceilings that the user gave."""
    assert charts.ceilings_of(line(dtype="float32"), None, None) == Ceilings(494.7, 4800.0)
    assert charts.ceilings_of(line(), 800.0, None) == Ceilings(800.0, 4800.0)
    other = line(device="NVIDIA H200 NVL, sm_90")
    assert charts.ceilings_of(other, None, None) is None
    assert charts.ceilings_of(other, 800.0, 4000.0) == Ceilings(800.0, 4000.0)
    with pytest.raises(UsageError, match="expected both"):
        charts.ceilings_of(other, 800.0, None)
    assert Ceilings(1000.0, 2000.0).at(100.0) == 200.0
    assert Ceilings(1000.0, 2000.0).at(1e6) == 1000.0


def test_digest_of_what_is_shown() -> None:
    """A stale picture that passes for the present one; one that is stale although it shows the same."""
    lines = [line(ms=1.0), line("fa3", 2.0)]
    digest = charts.speedup(lines).digest
    assert charts.speedup([*lines, line(status="wrong")]).digest == digest
    assert charts.speedup([line(ms=1 + 1e-9), lines[1]]).digest == digest
    assert charts.speedup([line(ms=1.001), lines[1]]).digest != digest
    assert charts.speedup([lines[0], line("sdpa", 2.0)]).digest != digest
    assert charts.speedup([line(commit="abd"), lines[1]]).digest != digest


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_tables_need_no_matplotlib(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table that is lost with the picture."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot(name) == 0
    text = capsys.readouterr().out
    rows = [x for x in text.splitlines() if x.startswith("|")]
    assert len(rows) > 2
    assert len({row.count("|") for row in rows}) == 1
    assert "commit" in text


def test_picture_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback in place of what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot("tflops", "--out", str(tmp_path / "x.svg")) == 2
    found = capsys.readouterr()
    assert 'pip install "flashcute[bench]"' in found.err
    assert found.out == ""


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([line(), line(device="NVIDIA H100")], [], "several devices in the lines: NVIDIA H100, NV"),
        ([line(), line(dtype="float16")], [], "several dtypes in the lines: bfloat16, float16; "),
        ([line(), line(kind="backward")], [], "several passes in the lines: backward, forward"),
        ([line(), line(kv_heads=2)], [], "choose with --kv-ratio"),
        ([line(), line(batch=1)], [], "b1 s1024 h4 d64 full bfloat16; b2 s1024"),
        ([line(heads=8, kv_heads=8), line()], [], "for example --where heads=8"),
        ([line()], ["--device", "A100"], "no measurement matches"),
        ([line()], ["--impls", "fa3"], "no measurement matches"),
        ([line()], ["--where", "batch=3"], "the selected lines: none"),
        ([line(status="failed")], [], "the selected lines: 1 forward (failed)"),
        ([line()], ["--relative-to", "naive"], "--relative-to: expected with error, not tflops"),
        ([line()], ["--peak-tflops", "900"], "--peak-tflops: expected with roofline, not tflops"),
        (
            [line()],
            ["--out", "x.jpg"],
            "expected a name that ends in .svg, .png, .pdf, got 'x.jpg'",
        ),
    ],
)
def test_messages(
    lines: list[dict[str, Any]],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A mixture of what does not compare; a message that does not say what came and what is allowed."""
    assert main(["plot", "tflops", write(tmp_path / "x.jsonl", *lines), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "an empty file"),
        ('{"kind": "a"}\n{"kind"', "line 2: expected JSON: "),
        ('{"kind": "a", "x": NaN}', "line 1: expected JSON, which has no NaN"),
        (
            '{"kind": "forward", "impl": "a"}',
            "line 1: expected batch, which lines of kind forward have",
        ),
        ('{"kind": "a", "ms_p50": 0}', "line 1: expected a positive number as ms_p50, got 0"),
        ('{"kind": "a", "heads": true}', "line 1: expected a positive integer as heads, got True"),
        ('{"kind": "a", "causal": 1}', "line 1: expected true or false as causal, got 1"),
        ('{"kind": "a", "window": [1]}', "line 1: expected two integers as window, got [1]"),
        ('{"kind": "a", "rel_l2": -1}', "line 1: expected a number >= 0 as rel_l2, got -1"),
        ('{"kind": "a", "impl": 5}', "line 1: expected a name as impl, got 5"),
        ("[1]\n", 'line 1: expected an object with a "kind"'),
        ('{"a": 1}\n', 'line 1: expected an object with a "kind"'),
        ("\ud800", "bytes that are no text"),
    ],
)
def test_wrong_files(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or silence about which file and line is wrong."""
    file = tmp_path / "x.jsonl"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogatepass"))
    for command in (["plot", "tflops", str(file)], ["compare", str(file), str(file)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(file) in error


def test_filters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A filter that is dropped on its way."""
    wanted = line(tflops=111.0)
    others = [
        line(tflops=222.0, **{name: value})
        for name, value in {
            "device": "NVIDIA H100", "dtype": "float16", "kind": "backward", "head_dim": 32,
            "kv_heads": 1, "impl": "naive", "batch": 9,
        }.items()
    ]  # fmt: skip
    file = write(tmp_path / "x.jsonl", wanted, *others)
    filters = ["--device", "H200", "--dtype", "bfloat16", "--pass", "forward", "--head-dims", "64"]
    filters += ["--kv-ratio", "1", "--impls", "flashcute,fa3", "--where", "batch=2"]
    assert main(["plot", "tflops", file, *filters]) == 0
    text = capsys.readouterr().out
    assert "| 64 full | 1024 | **111** |" in text
    assert "222" not in text
    assert "1 of 8 lines are shown" in text


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback after Ctrl-C, or an exit code that says that all went well."""

    def interrupted(files: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recorded, "read", interrupted)
    assert plot("tflops") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_names_with_commas() -> None:
    """A variant that is torn apart at the comma between its options."""
    parse = recorded.implementation_names
    assert parse("fa3,flashcute[a=1,b=2],x") == ["fa3", "flashcute[a=1,b=2]", "x"]
    for wrong in ("", "a,", "a[b,c", "a]"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected NAME,NAME"):
            parse(wrong)


# ---- pictures ----------------------------------------------------------------------------------


@needs_matplotlib
@pytest.mark.parametrize("name", COMMANDS)
def test_pictures(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chart that cannot be drawn; a picture without its data's digest or its title."""
    out = tmp_path / "x.svg"
    assert plot(name, "--out", str(out)) == 0
    text = out.read_text()
    assert f"flashcute plot {COMMANDS[name][0]}, data " in text
    assert "<title>" in text
    assert "<dc:date>" not in text
    assert "fill: #ffffff" in text


@needs_matplotlib
def test_pictures_are_the_same_in_every_process(tmp_path: Path) -> None:
    """A date, random ids or the user's own style in the file."""
    code = (
        "import sys; from flashcute.__main__ import main\n"
        "sys.exit(max(main(['plot', 'memory', sys.argv[1], '--out', x]) for x in sys.argv[2:]))"
    )
    found: list[list[bytes]] = []
    for i, style in enumerate(("", "font.size: 30\nfigure.facecolor: black\n")):
        (tmp_path / "matplotlibrc").write_text(style)
        files = [tmp_path / f"{i}{suffix}" for suffix in drawing.FORMATS]
        command = [sys.executable, "-c", code, RESULTS / "gpu_naive.jsonl", *files]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append([file.read_bytes() for file in files])
    assert found[0] == found[1]


@needs_matplotlib
def test_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback for a folder that does not exist."""
    assert plot("memory", "--out", str(tmp_path / "no" / "x.svg")) == 2
    assert "No such file" in capsys.readouterr().err
