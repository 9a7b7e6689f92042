"""What docs/guides/ says and neither its cells nor its generated blocks check."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import flashcute
import numpy as np
import pytest
from tables import guides

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "cpp" / "own_mask"
compiler = shutil.which("g++") or ""
needs_compiler = pytest.mark.skipif(not compiler, reason="needs g++")


@pytest.mark.parametrize("width", [1, 100, 128, 1000])
@pytest.mark.parametrize(
    ("tokens", "rows", "keys"), [(1024, 128, 64), (1000, 64, 64), (700, 192, 64)]
)
def test_visited_blocks_of_the_table(tokens: int, rows: int, keys: int, width: int) -> None:
    """A table that counts other blocks than the loops visit. (The CPU cuts the last tile; Hopper's kernel, whose first
    one is incomplete, is counted on a GPU by tests/python/configurations/test_sm90.py.)"""
    cfg = flashcute.ForwardConfig(dtype="float32", head_dim=16, block_m=rows, block_n=keys)
    q = np.zeros((1, tokens, 1, 16), np.float32)
    variant = flashcute.Variant(causal=True, window=(width - 1, 0))
    counts = flashcute.count_blocks(cfg, q, q, q, variant=variant)
    assert guides.visited(tokens, rows, keys, width, False) == counts[..., :2].sum()
    if tokens % rows == 0:
        assert guides.visited(tokens, rows, keys, width, True) == counts[..., :2].sum()


def test_limits_are_read_from_the_header() -> None:
    """A regular expression that takes the default for an architecture that is listed, or the other way round."""
    found = {arch: guides.limit("max_smem_bytes", arch) // 1024 for arch in guides.GPUS}
    assert found == {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
    threads = {arch: guides.limit("max_threads_per_sm", arch) for arch in guides.GPUS}
    assert threads == {"sm_80": 2048, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}


@needs_compiler
def test_own_mask(tmp_path: Path) -> None:
    """The example of "Adding a mask", which does not compile any more, or skips a block that is visible."""
    program = tmp_path / "own_mask"
    command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'include'}"]
    subprocess.run([*command, EXAMPLE / "main.cpp", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "3456 cases, 0 failures" in done.stdout
    assert "3456 cases, 0 failures" in (ROOT / "docs" / "guides" / "add_mask.md").read_text()


@needs_compiler
def test_own_mask_within_the_library(tmp_path: Path) -> None:
    """Steps 1 to 3 of "Adding a mask" do not suffice for the CPU, or the page shows a mask that the library refuses."""
    copy = runpy.run_path(str(ROOT / "tests" / "cpp" / "new_feature.py"))["Copy"](
        ROOT, str(tmp_path), compiler, []
    )
    last = 'ROW(mapped, "mapped")'
    copy.edit("include/flashcute/core/enums.hpp", last, f'{last} ROW(frames, "frames")')
    mapped = "    case MaskKind::mapped: return {1,"
    copy.edit("include/flashcute/sm90/rounds.hpp", mapped, f"    case MaskKind::frames:\n{mapped}")
    copy.expect_error("src/cpu/dispatch.cpp", "incomplete type.*Mask<.*frames")
    mask = (EXAMPLE / "frames.hpp").read_text().partition("/// Frames of")[2]
    kind = "template <>\nstruct Mask<MaskKind::frames> : FrameMask<256> {};\n"
    assert kind in (ROOT / "docs" / "guides" / "add_mask.md").read_text()
    end = "}  // namespace flashcute\n"
    copy.edit("include/flashcute/policy/mask.hpp", end, f"/// {mask}\n{kind}\n{end}")
    copy.expect_compiled("src/cpu/dispatch.cpp")
    copy.expect_compiled("src/launch/tile_deal.cpp")
