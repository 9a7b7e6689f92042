"""The disk cache of kernels that were compiled at run time: ``python -m flashcute cache``, and the limit of
its size under processes that compile at once. tests/cpp/image/test_cache.cpp has the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import environment
from flashcute import CacheError
from flashcute.__main__ import main

ROOT = Path(__file__).parents[3]
MiB = 1 << 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache, which this process uses."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("FLASHCUTE_CACHE_DIR", str(folder))
    monkeypatch.delenv("FLASHCUTE_CACHE_SIZE", raising=False)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """run(argument, ...): exit code and output of `python -m flashcute cache argument ...`."""

    def command(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["cache", *arguments])
        out, errors = capsys.readouterr()
        return code, out + errors

    return command


def add_image(cache: Path, kernel: str, minutes_ago: int = 0, size: int = MiB) -> Path:
    """An image as the library writes it, last used so many minutes ago."""
    hash_of_name = hashlib.sha256(kernel.encode()).hexdigest()
    key = f"{kernel}.sm_80.nvrtc13.0.{hash_of_name}"
    image = kernel.encode().ljust(size, b"x")
    header = (
        f"flashcute-image 1\nkey {key}\nsize {size}\nsha256 {hashlib.sha256(image).hexdigest()}\n"
    )
    path = cache / f"{key}.image"
    path.write_bytes(header.encode() + image)
    path.chmod(0o600)
    then = path.stat().st_mtime - 60 * minutes_ago
    os.utime(path, (then, then))
    return path


def test_list(cache: Path, run: Callable[..., tuple[int, str]]) -> None:
    """An image that is missing, in the wrong place, or without one of its properties; a wrong total or limit."""
    add_image(cache, "middle", minutes_ago=20, size=2 * MiB)
    add_image(cache, "recent", minutes_ago=10)
    add_image(cache, "old", minutes_ago=60 * 24 * 400)
    (cache / "foreign.image").write_text("x")
    for arguments in ([], ["list"]):
        code, text = run(*arguments)
        assert code == 0
        heading, *rows, empty, sums = text.splitlines()
        assert heading.split() == ["kernel", "target", "compiler", "last", "used", "size"]
        assert [row.split()[0] for row in rows] == ["recent", "middle", "old"]
        assert all(" sm_80 " in row and " NVRTC 13.0 " in row for row in rows)
        assert all(re.search(r" 20\d\d-\d\d-\d\d \d\d:\d\d ", row) for row in rows)
        assert "2.0 MiB" in rows[1]
        assert empty == ""
        assert sums == f"3 images, 4.0 MiB in {cache}; the limit is 1.0 GiB"


def test_list_of_nothing(
    cache: Path, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error where there is no cache yet, or a folder that was made by looking."""
    cache.rmdir()
    monkeypatch.setenv("FLASHCUTE_CACHE_SIZE", "512M")
    assert run() == (0, f"0 images, 0 B in {cache}; the limit is 512.0 MiB\n")
    assert run("check") == (0, f"checked 0 images, 0 B in {cache}: 0 damaged, 0 removed\n")
    assert run("clear") == (0, f"removed 0 images, 0 B from {cache}\n")
    assert not cache.exists()


def test_check(cache: Path, run: Callable[..., tuple[int, str]]) -> None:
    """Damage that is not found, not told or not removed; a whole image that is removed or counts as used."""
    whole, damaged = add_image(cache, "whole", minutes_ago=10), add_image(cache, "damaged")
    used = whole.stat().st_mtime_ns
    assert run("check") == (0, f"checked 2 images, 2.0 MiB in {cache}: 0 damaged, 0 removed\n")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"y")
    code, text = run("check")
    assert code == 1
    assert text.splitlines() == [
        "damaged for sm_80: damaged, removed",
        f"checked 2 images, 2.0 MiB in {cache}: 1 damaged, 1 removed",
    ]
    assert list(cache.iterdir()) == [whole]
    assert whole.stat().st_mtime_ns == used
    assert run("check") == (0, f"checked 1 image, 1.0 MiB in {cache}: 0 damaged, 0 removed\n")


def test_check_beside_another_process(cache: Path, run: Callable[..., tuple[int, str]]) -> None:
    """A damaged image that stays, because another process holds its lock, and counts as removed."""
    damaged = add_image(cache, "damaged")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"y")
    with damaged.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run("check") == (
            1,
            "damaged for sm_80: damaged; another process is working on it: not touched\n"
            f"checked 1 image, 1.0 MiB in {cache}: 1 damaged, 0 removed\n",
        )
    assert damaged.exists()


def test_clear(cache: Path, run: Callable[..., tuple[int, str]]) -> None:
    """An image that is left without a word, or removed while its lock is held; foreign files that are removed."""
    add_image(cache, "one")
    held = add_image(cache, "held")
    foreign = cache / "notes.lock"
    foreign.write_text("")
    lock_file = held.with_suffix(".lock")
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, text = run("clear")
        assert code == 1
        assert text.splitlines() == [
            "held for sm_80: another process is working on it: not removed",
            f"removed 1 image, 1.0 MiB from {cache}; 1 left",
        ]
        assert set(cache.iterdir()) == {held, lock_file, foreign}
    assert run("clear") == (0, f"removed 1 image, 1.0 MiB from {cache}\n")
    assert list(cache.iterdir()) == [foreign]


@pytest.mark.parametrize("action", ["list", "check", "clear"])
def test_unsafe_folder(cache: Path, run: Callable[..., tuple[int, str]], action: str) -> None:
    """Work in a folder into which others can write, or a traceback."""
    image = add_image(cache, "one")
    cache.chmod(0o777)
    code, text = run(action)
    assert code == 2
    assert text.startswith("error: ")
    assert str(cache) in text
    assert image.exists()
    assert issubclass(CacheError, OSError)


def test_bad_limit(
    cache: Path, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt limit that is taken for the default."""
    monkeypatch.setenv("FLASHCUTE_CACHE_SIZE", "1GB")
    code, text = run()
    assert code == 2
    assert "FLASHCUTE_CACHE_SIZE" in text
    assert "'1GB'" in text
    assert "512M" in text


def test_processes_share_a_small_cache(cache: Path, tmp_path: Path) -> None:
    """Processes that compile kernels at the same time, with room for three images: one that fails because another
    removed what it needed, and a cache that is too large in the end. The compiler compiles nothing: it hands out
    1 MiB."""
    cxx = shutil.which(os.environ.get("CXX", "c++"))
    if cxx is None:
        pytest.skip("needs a C++ compiler for a libnvrtc.so that compiles nothing")
    library = tmp_path / "libnvrtc.so"
    source = ROOT / "tests" / "cpp" / "fakes" / "fake_nvrtc.cpp"
    subprocess.run([cxx, "-std=c++17", "-shared", "-fPIC", "-o", library, source], check=True)
    (tmp_path / "cuda_fp16.h").write_text("")
    env = environment(
        FLASHCUTE_NVRTC=str(library),
        FLASHCUTE_CUDA_INCLUDE=str(tmp_path),
        FLASHCUTE_JIT="force",
        FLASHCUTE_CACHE_SIZE="4M",
    )
    code = """
import sys
import flashcute
for shift in range(6):
    block_m = 16 << (int(sys.argv[1]) + shift) % 3
    cfg = flashcute.default_config(64, "float16", "sm_80").replace(block_m=block_m, num_warps=1)
    origins = flashcute.prebuild(cfg, "sm_80")
    assert len(origins) == 2, origins
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(6)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "cannot be kept" not in errors
    files = list(cache.iterdir())
    assert {path.suffix for path in files} == {".image"}
    # The last to publish saw all others, but skipped an image whose lock another held just then. One job: two that
    # publish at the same time may each remove the other's image.
    env |= {"FLASHCUTE_CACHE_SIZE": "0", "FLASHCUTE_JIT_JOBS": "1"}
    subprocess.run([sys.executable, "-c", code, "0"], env=env, check=True, capture_output=True)
    (left,) = cache.iterdir()
    assert MiB < left.stat().st_size < 2 * MiB
