"""``python -m flashcute io``: bytes in theory, and beside what ncu counts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from fake_ncu import FakeNcu, make_fake, raw_page, read_lines, value_after
from flashcute.__main__ import main
from flashcute._cli import ncu, traffic
from flashcute._cli.problem import Case
from optional_torch import needs_torch

CASE = Case(2, 4, 2, 256, 256, 64, False, "bfloat16")
TILES = fc.default_config(16, "float32", "cpu").replace(block_m=32, block_n=48)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNcu:
    return make_fake(tmp_path / "bin", monkeypatch)


# ---- theory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, (40, 0), (-1, 17), (5, 60), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sq", "sk"), [(192, 192), (300, 300), (77, 500), (500, 77), (1, 1)])
def test_visited_blocks_are_those_that_kernels_count(
    sq: int, sk: int, causal: bool, window: tuple[int, int] | None
) -> None:
    """A loop bound that is off by one block: bytes at L2 would be wrong where masks begin and end."""
    case = Case(1, 1, 1, sq, sk, 8, causal, "float32", window)
    q, k = (np.zeros((1, n, 1, 8), "float32") for n in (sq, sk))
    variant = fc.Variant(causal=causal, window=window)
    counted = fc.count_blocks(TILES, q, k, k, variant=variant)[0, 0].sum(axis=0)
    assert tuple(traffic.blocks_of(case, TILES)) == tuple(int(n) for n in counted)


@needs_torch
@pytest.mark.parametrize(("sq", "sk"), [(500, 500), (130, 700), (700, 130)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cluster", [1, 2])
def test_hoppers_tiles_are_cut_from_the_end(sq: int, sk: int, causal: bool, cluster: int) -> None:
    """Tiles cut from the first row on, or of one thread block of a cluster of two: other blocks are on the diagonal.
    By brute force, since only a Hopper GPU runs the kernel."""
    from block_counts import expected_block_counts

    cfg = fc.default_config(64, "bfloat16", "sm_90").replace(cluster=cluster)
    case = Case(1, 1, 1, sq, sk, 64, causal, "bfloat16")
    expected = expected_block_counts(cfg, sq, sk, causal).sum(dim=0).tolist()
    assert list(traffic.blocks_of(case, cfg)) == expected


def test_bytes_by_hand() -> None:
    """A factor that is forgotten: batch, heads, the two matrices K and V, the size of an element."""
    queries, keys = 2 * 4 * 256 * 64 * 2, 2 * 2 * 256 * 64 * 2  # bytes of Q, of K
    scores, lse = 2 * 4 * 256 * 256 * 2, 2 * 4 * 256 * 4
    assert traffic.standard(CASE) == (
        queries + keys + scores + scores + keys,
        scores + scores + queries,
    )
    assert traffic.flash_dram(CASE) == (queries + 2 * keys, queries + lse)
    cfg = fc.ForwardConfig(head_dim=64, block_m=64, block_n=64)
    # four tiles; each query head reads K and V for itself, so twice what is stored
    assert traffic.flash_l2(CASE, cfg) == (queries + 4 * 2 * 2 * keys, queries + lse)


def test_a_causal_mask_halves_what_tiles_read() -> None:
    """Full blocks counted where the mask skips them: 10 of 16 blocks are visited at four tiles of 64."""
    cfg = fc.ForwardConfig(head_dim=64, block_m=64, block_n=64)
    queries = 2 * 4 * 256 * 64 * 2
    full, causal = (traffic.flash_l2(CASE._replace(causal=c), cfg) for c in (False, True))
    assert (causal.read - queries) / (full.read - queries) == 10 / 16


def test_keys_that_no_query_sees_are_not_read() -> None:
    """A window over the last keys: whole of K and V counted at DRAM."""
    case = Case(1, 1, 1, 10, 1000, 64, True, "bfloat16", (29, 0))
    row = 64 * 2
    assert traffic.flash_dram(case).read == 10 * row + 2 * (10 + 29) * row


def test_the_last_block_has_only_keys_that_exist() -> None:
    """Blocks counted whole at the end of a sequence that they do not divide."""
    cfg = fc.ForwardConfig(head_dim=64, block_m=64, block_n=64)
    case = Case(1, 1, 1, 64, 100, 64, False, "bfloat16")
    assert traffic.flash_l2(case, cfg).read == (64 + 2 * 100) * 64 * 2


@pytest.mark.parametrize("ratio", [10.0, 50.0, 206.0])
def test_the_length_from_which_computing_bounds(ratio: float) -> None:
    """A search that returns a neighbour: the length before brings fewer FLOP for each byte."""
    cfg = fc.default_config(64, "bfloat16", "sm_90")
    found = traffic.bound_by_computing_from("flash, DRAM", CASE, cfg, ratio)
    assert found is not None

    def brings(length: int) -> float:
        case = CASE._replace(seqlen_q=length, seqlen_k=length)
        return traffic.intensity(case, traffic.flash_dram(case))

    assert brings(found) >= ratio > brings(found - 1)


def test_the_standard_algorithm_is_never_bound_by_computing() -> None:
    """Its FLOP for each byte approach head_dim / element size, 32 here: a number for "never"."""
    cfg = fc.default_config(64, "bfloat16", "sm_90")
    assert traffic.bound_by_computing_from("standard, DRAM", CASE, cfg, 32.1) is None
    assert traffic.bound_by_computing_from("standard, DRAM", CASE, cfg, 31.9) is not None


# ---- the command -------------------------------------------------------------------------------


def test_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A table or a record that shows other numbers than the functions return."""
    out = tmp_path / "io.jsonl"
    arguments = (
        "--batch 2 --heads 4 --kv-heads 2 --seqlen 256,512 --head-dim 64 --arch sm_80 --causal"
    )
    assert main(["io", *arguments.split(), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    cfg = fc.default_config(64, "bfloat16", "sm_80")
    assert text.count(f"{cfg.name} on sm_80") == 2
    assert "206 FLOP" in text
    lines = read_lines(out)
    assert [line["seqlen_q"] for line in lines] == [256, 512]
    for line in lines:
        case = CASE._replace(seqlen_q=line["seqlen_q"], seqlen_k=line["seqlen_q"], causal=True)
        assert line["kind"] == "io"
        assert {"commit", "date", "device", "config", "arch"} <= set(line)
        assert line["theory"]["flash_l2"] == traffic.flash_l2(case, cfg)._asdict()
        assert line["blocks"] == traffic.blocks_of(case, cfg)._asdict()
        assert line["measured"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kv-heads", "3"], "--kv-heads: expected a divisor of 16 heads, got 3"),
        (["--arch", "sm_90", "--config", "block_m=48"], "block_m"),
        (["--arch", "volta"], "volta"),
        (["--config", "column_warps=2"], "column_warps"),
        (["--out", "/nonexistent/io.jsonl"], "--out /nonexistent/io.jsonl: No such file"),
        (["--out", ""], "--out : No such file"),
        (["--config", "head_dim_v=64"], "--config: expected no head_dim_v"),
        (["--seqlen", "99999999999"], "expected at most 16,777,216, got 99,999,999,999"),
        (["--seqlen-k", "99999999999"], "expected at most 16,777,216, got 99,999,999,999"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    """A traceback, bytes of a configuration that no kernel has, or half of a table before the message."""
    assert main(["io", *arguments]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""


def test_a_window_without_limits_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Other FLOP for the same computation: half of all pairs count under a causal mask, and those that are visible with
    a window."""
    said = []
    for more in ([], ["--window=-1,-1"]):
        assert main(["io", "--causal", *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_what_cannot_be_recorded_is_not_measured(
    fake: FakeNcu, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error after the profiler has run."""
    assert main(["io", "--ncu", "--out", "/nonexistent/io.jsonl"]) == 2
    assert fake.asked == []


def test_ncu_needs_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU ncu would start, and say that no kernel was profiled."""
    monkeypatch.setattr(
        fc._core, "driver_info", lambda: argparse.Namespace(gpus=[], problem="no driver")
    )
    assert main(["io", "--ncu"]) == 2
    said = capsys.readouterr().err
    assert "no driver" in said
    assert "`io` without --ncu" in said


def test_measured_bytes_stand_beside_theory(
    fake: FakeNcu, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Ratios upside down; sectors taken for bytes; a column of another metric."""
    out = tmp_path / "io.jsonl"
    assert main(["io", "--ncu", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    (line,) = read_lines(out)
    assert line["measured"] == {
        "dram_read": 201_326_592,
        "dram_written": 66_060_288,
        "l2": 8_931_000_000,
        "l2_sectors_of_sms": 141_000_000,
        "l2_of_sms": 32 * 141_000_000,
        "seconds": pytest.approx(8e-4),
    }
    rows = {
        row[:16].strip(): row.split()[-1]
        for row in text.splitlines()
        if row.startswith(("DRAM,", "L2,"))
    }
    theory = line["theory"]["flash_dram"]
    assert float(rows["DRAM, read"]) == pytest.approx(201_326_592 / theory["read"], abs=1e-3)
    assert float(rows["DRAM, written"]) == pytest.approx(66_060_288 / theory["written"], abs=1e-3)
    profiled, imported = fake.asked
    assert value_after(profiled, "--metrics").startswith(
        "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum"
    )
    assert "--section" not in profiled  # fewer passes over the kernel
    assert value_after(imported, "--import") == value_after(profiled, "--export")


def test_a_counter_that_the_chip_lacks_is_left_out(
    fake: FakeNcu, capsys: pytest.CaptureFixture[str]
) -> None:
    """ncu profiles nothing if it does not know one of the metrics; another name is tried first."""
    fake.lacks("lts__t_sectors_srcunit_tex.sum", "dram__bytes_read.sum", "dram__bytes_op_read.sum")
    fake.says(page_without("lts__t_sectors_srcunit_tex.sum", "dram__bytes_read.sum"))
    assert main(["io", "--ncu"]) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith(("DRAM,", "L2,"))]
    assert [row.split()[-1] == "-" for row in rows] == [True, False, False, True]
    tried = [value_after(x, "--metrics").split(",") for x in fake.asked if "--metrics" in x]
    assert "dram__bytes_op_read.sum" in {name for names in tried for name in names}
    assert tried[-1] == ["dram__bytes_write.sum", "lts__t_bytes.sum", "gpu__time_duration.sum"]


def page_without(*names: str) -> str:
    page = raw_page()
    for name in names:
        page = page.replace(f'"{name}"', f'"absent {name.replace("__", "_")}"')
    return page


@pytest.mark.gpu
def test_ncu_counts_the_bytes_of_theory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On a GPU: counters whose names this ncu does not know, or a kernel that is not found by its name. DRAM is read at
    least once for each byte of Q, K and V, since ncu empties the caches, and not many times."""
    if ncu.find_ncu() is None:
        pytest.skip("ncu is not here")
    out = tmp_path / "io.jsonl"
    code = main(["io", "--ncu", "--seqlen", "2048", "--out", str(out)])
    said = capsys.readouterr()
    if "ERR_NVGPUCTRPERM" in said.err:
        pytest.skip("the driver reserves the counters for administrators")
    assert code == 0, said.err
    (line,) = read_lines(out)
    found: dict[str, Any] = line["measured"]
    assert 0.9 <= found["dram_read"] / line["theory"]["flash_dram"]["read"] <= 2
    assert found["l2"] >= 0.5 * sum(line["theory"]["flash_l2"].values())
