"""Run-time compilation and its cache, through prebuild, which needs no GPU. The CUDA toolkit
is hidden wherever the NVRTC of the Python package is there to take its place.

A compilation takes 10 to 20 s, and prebuild makes two kernels, so they are shared: one cold
cache, on which a killed process, then sixteen at once have worked, serves the tests after it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flashcute as fc
import numpy as np
import pytest
from conftest import environment

CONFIG = fc.ForwardConfig(dtype="float16", head_dim=64, block_m=64, block_n=64, num_warps=4)
FULL, CAUSAL = f"flashcute_sm80_{CONFIG.name}_full", f"flashcute_sm80_{CONFIG.name}_causal"
PREBUILD = f"""
import flashcute
from flashcute import ForwardConfig
for kernel, origin in flashcute.prebuild({CONFIG!r}, arch="sm_90").items():
    print(kernel, "=", origin)
"""
PROCESSES = 16

needs_nvrtc = pytest.mark.skipif(
    bool(fc._core.build_info().jit_problem), reason=fc._core.build_info().jit_problem
)


def packaged_nvrtc() -> Path | None:
    """NVRTC as a Python package, where it is installed."""
    for root in filter(None, sys.path):
        for folder in ("cu13", "cuda_nvrtc"):
            library = Path(root) / "nvidia" / folder / "lib" / "libnvrtc.so.13"
            if library.exists():
                return library
    return None


def hidden_toolkit(cache: Path, **changes: str | None) -> dict[str, str]:
    """An environment that leads to no toolkit, and to this cache; everything is compiled."""
    path = [p for p in os.environ["PATH"].split(":") if not (Path(p) / "nvcc").exists()]
    variables = {
        "PATH": ":".join(path),
        "CUDA_HOME": None,
        "CUDA_PATH": None,
        "LD_LIBRARY_PATH": None if packaged_nvrtc() else os.environ.get("LD_LIBRARY_PATH"),
        "FLASHCUTE_NVRTC": None,
        "FLASHCUTE_CUDA_INCLUDE": None,
        "FLASHCUTE_QUIET": None,
        "FLASHCUTE_JIT": "force",
        "FLASHCUTE_CACHE_DIR": str(cache),
    }
    return environment(**{**variables, **changes})


def start(env: dict[str, str], code: str = PREBUILD, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def obey_modes() -> None:
    """Runs in a child before its program starts: root, too, then needs permission to read and
    write files."""
    drop_from_bounding_set, cap_dac_override, cap_dac_read_search = 24, 1, 2
    libc = ctypes.CDLL(None)
    for capability in (cap_dac_override, cap_dac_read_search):
        libc.prctl(drop_from_bounding_set, capability, 0, 0, 0)


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[dict[str, str], str]:
    """What prebuild returned, and stderr."""
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 0, errors
    lines = (line.partition(" = ") for line in out.splitlines())
    return {kernel: origin for kernel, _, origin in lines}, errors


def error_of(env: dict[str, str]) -> str:
    """The last line of the traceback of a prebuild that fails."""
    process = start(env)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    return errors[errors.rindex("\nflashcute.") + 1 :]


def entries(cache: Path) -> dict[str, Path]:
    """Kernel -> its image in the cache."""
    return {path.name.partition(".")[0]: path for path in cache.glob("*.image")}


def read_until(process: subprocess.Popen[str], text: str, timeout: float = 200) -> str:
    """Reads stderr up to a text, without waiting for the end of its line."""
    assert process.stderr is not None
    watchdog = threading.Timer(timeout, process.kill)
    watchdog.start()
    read = b""
    while text.encode() not in read:
        more = os.read(process.stderr.fileno(), 4096)
        if not more:
            break
        read += more
    watchdog.cancel()
    assert text.encode() in read, read.decode()
    return read.decode()


# ---- with the compiler ---------------------------------------------------------------------------


@dataclasses.dataclass
class Race:
    cache: Path
    after_kill: list[str]  # what the killed process left in the folder
    results: list[dict[str, str]]
    errors: list[str]


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Race:
    """A cold cache: a process is killed while it compiles, then sixteen start at once."""
    cache = tmp_path_factory.mktemp("cache") / "not" / "there" / "yet"
    env = hidden_toolkit(cache)
    victim = start(env)
    read_until(victim, "compiling")
    time.sleep(1)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    after_kill = sorted(path.name for path in cache.iterdir())
    racers = [start(env) for _ in range(PROCESSES)]
    try:
        finished = [finish(racer) for racer in racers]
    finally:
        for racer in racers:
            if racer.poll() is None:
                racer.kill()
                racer.communicate()
    return Race(cache, after_kill, [r for r, _ in finished], [e for _, e in finished])


@dataclasses.dataclass
class Unwritable:
    process: subprocess.Popen[str]
    reader: threading.Thread
    said: str = ""


@pytest.fixture(scope="module")
def unwritable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unwritable]:
    """A process, started early, whose cache folder cannot be made: there is a file in its way.
    It is stopped when its kernels are compiled."""
    file = tmp_path_factory.mktemp("unwritable") / "file"
    file.write_text("not a folder")
    process = start(hidden_toolkit(file / "cache"))

    def read() -> None:
        try:
            case.said = read_until(process, " s\n")
        finally:
            process.kill()

    case = Unwritable(process, threading.Thread(target=read))
    case.reader.start()
    yield case
    case.process.kill()
    case.reader.join()
    case.process.communicate()


@needs_nvrtc
@pytest.mark.slow
def test_processes_race_on_a_cold_cache(unwritable: Unwritable, race: Race) -> None:
    """Sixteen processes, none of which finds an image: each kernel is compiled once, by one of
    them, and all get it."""
    for kernel in (FULL, CAUSAL):
        origins = [result[kernel] for result in race.results]
        assert sum("compiled by NVRTC" in origin for origin in origins) == 1
        assert origins.count("disk cache") == PROCESSES - 1
    lines = [line for text in race.errors for line in text.splitlines()]
    assert len(lines) in (1, 2)  # processes, of which each compiled one or both
    assert all(f"flashcute: compiling {FULL} and 1 more for sm_90" in line for line in lines)
    assert "failed" not in "".join(race.errors)
    assert all(result.keys() == {FULL, CAUSAL} for result in race.results)


@needs_nvrtc
@pytest.mark.slow
def test_a_killed_compilation_leaves_no_damage(race: Race) -> None:
    """SIGKILL during a compilation: no image, whole or partial, and its lock holds nobody up
    ."""
    assert not [name for name in race.after_kill if not name.endswith(".lock")]
    assert race.after_kill, (
        "the process was killed before it locked anything: the test is too early"
    )
    assert len(race.results) == PROCESSES


@needs_nvrtc
@pytest.mark.slow
def test_the_cache_is_private_and_tidy(race: Race) -> None:
    """Mode 0700, a name for each kernel, and nothing temporary left."""
    for folder in (race.cache, race.cache.parent, race.cache.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    found = entries(race.cache)
    assert found.keys() == {FULL, CAUSAL}
    for path in found.values():
        assert path.stat().st_mode & 0o777 == 0o600
        assert ".sm_90." in path.name
        assert b"\x7fELF" in path.read_bytes()[:1000]
    assert not list(race.cache.glob("*.tmp"))


@needs_nvrtc
@pytest.mark.slow
def test_the_second_process_reads_the_cache(race: Race) -> None:
    """Warm: nothing is compiled, nothing is said."""
    before = {path: path.stat().st_ino for path in entries(race.cache).values()}
    result, errors = finish(start(hidden_toolkit(race.cache)))
    assert result == {FULL: "disk cache", CAUSAL: "disk cache"}
    assert errors == ""
    assert {path: path.stat().st_ino for path in entries(race.cache).values()} == before


@needs_nvrtc
@pytest.mark.slow
def test_the_toolkit_is_not_needed(race: Race) -> None:
    """The compiler that made these images is that of the Python package, and its headers are
    beside it."""
    library = packaged_nvrtc()
    if library is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    code = """
import flashcute
print(flashcute._core.build_info().jit_compiler)
print({line.split()[-1] for line in open("/proc/self/maps") if "libnvrtc" in line})
"""
    done = start(hidden_toolkit(race.cache), code)
    out, errors = done.communicate()
    assert errors == ""
    compiler, mapped = out.splitlines()
    assert str(library) in compiler
    found = {Path(p).parent for p in eval(mapped)}
    assert found == {library.parent}


@needs_nvrtc
@pytest.mark.slow
def test_a_read_only_cache_is_read(race: Race, tmp_path: Path) -> None:
    """An image that is there is used though nothing can be written, not even a lock."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for path in entries(race.cache).values():
        shutil.copy(path, cache)
        (cache / path.name).chmod(0o400)
    cache.chmod(0o500)
    env = hidden_toolkit(cache)
    write = start(env, f"open({str(cache / 'x')!r}, 'w')", preexec_fn=obey_modes)
    if "PermissionError" not in write.communicate()[1]:
        pytest.skip("this user can write to a folder of mode 0500")
    result, errors = finish(start(env, preexec_fn=obey_modes))
    assert result == {FULL: "disk cache", CAUSAL: "disk cache"}
    assert errors == ""


@needs_nvrtc
@pytest.mark.slow
def test_damaged_entries_are_rebuilt(race: Race, tmp_path: Path) -> None:
    """A truncated image and one with a flipped bit are neither used nor in the way."""
    cache = tmp_path / "cache"
    shutil.copytree(race.cache, cache)
    found = entries(cache)
    good = {kernel: path.read_bytes() for kernel, path in found.items()}
    found[FULL].write_bytes(good[FULL][: len(good[FULL]) // 2])
    flipped = bytearray(good[CAUSAL])
    flipped[len(flipped) // 2] ^= 1
    found[CAUSAL].write_bytes(flipped)
    result, errors = finish(start(hidden_toolkit(cache)))
    assert all("compiled by NVRTC" in origin for origin in result.values())
    assert errors.count(f"flashcute: compiling {FULL} and 1 more") == 1
    assert "... 1 2, " in errors
    assert {kernel: path.read_bytes() for kernel, path in entries(cache).items()} == good


@needs_nvrtc
@pytest.mark.slow
def test_without_a_cache_it_still_compiles(unwritable: Unwritable) -> None:
    """It says once that images cannot be kept, with the reason, and compiles all the same."""
    unwritable.reader.join(timeout=200)
    said = unwritable.said
    assert said.count("compiled images cannot be kept in ") == 1
    assert "Not a directory" in said
    assert "FLASHCUTE_CACHE_DIR" in said
    assert f"flashcute: compiling {FULL} and 1 more for sm_90" in said
    assert said.splitlines()[1].endswith(" s")
    assert "failed" not in said


@needs_nvrtc
def test_ctrl_c_ends_a_compilation(cache: Path) -> None:
    """A terminal sends SIGINT to Python and to the processes that compile for it: what comes is
    KeyboardInterrupt, not an error of the compiler, and nothing is left."""
    # As a terminal starts it: where the tests run in a script's background, SIGINT is ignored.
    process = start(
        hidden_toolkit(cache),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    read_until(process, "compiling")
    time.sleep(1)  # it is said just before the compiler's processes are started
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert list(cache.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


# ---- without compiling ---------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_switched_off(cache: Path) -> None:
    """FLASHCUTE_JIT=off: an error that names the variable and the kernel, and nothing is made."""
    error = error_of(hidden_toolkit(cache, FLASHCUTE_JIT="off"))
    assert error.startswith("flashcute.UnsupportedError: ")
    assert "FLASHCUTE_JIT=off" in error
    assert FULL in error
    assert "python -m flashcute compile" in error
    assert not cache.exists()


def test_switched_off_does_not_stop_ahead_of_time_kernels(cache: Path) -> None:
    """With FLASHCUTE_JIT=off, and as default, the kernels of the build are found."""
    if not fc._core.build_info().image_archs:
        pytest.skip("built without images")
    code = "import flashcute; print(set(flashcute.prebuild(arch='sm_90').values()))"
    for mode in ("off", "on", None):
        process = start(hidden_toolkit(cache, FLASHCUTE_JIT=mode), code)
        out, errors = process.communicate(timeout=60)
        assert out.strip() == "{'ahead of time'}", errors
        assert errors == ""
    assert not cache.exists()


def test_unknown_mode(cache: Path) -> None:
    """A misspelled mode is not the default mode."""
    error = error_of(hidden_toolkit(cache, FLASHCUTE_JIT="yes"))
    assert error.startswith("flashcute.ArgumentError: ")
    assert "FLASHCUTE_JIT" in error
    assert "on, off, fastest, force" in error
    assert "'yes'" in error


def install_command() -> str:
    """With the packages of the extra: flashcute itself is where it was installed from, and perhaps on no index."""
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    return "pip install " + " ".join(re.findall(r'"(nvidia-cuda-[^"]+)"', pyproject))


@pytest.mark.parametrize("library", ["/nonexistent/libnvrtc.so", "libm.so.6"])
def test_no_compiler(cache: Path, library: str) -> None:
    """Which library was tried, and what brings one."""
    env = hidden_toolkit(cache, FLASHCUTE_NVRTC=library)
    error = error_of(env)
    assert error.startswith("flashcute.UnsupportedError: ")
    assert install_command() in error
    assert library in error
    process = start(
        env,
        "import flashcute; i = flashcute._core.build_info(); print(i.jit_compiler, i.jit_problem)",
    )
    out, errors = process.communicate(timeout=60)
    assert errors == ""
    assert out.startswith(" NVRTC")
    assert install_command() in out


@needs_nvrtc
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_refused(cache: Path, mode: int) -> None:
    """Its images would run on the GPU with the user's rights: whoever wrote them."""
    cache.mkdir()
    cache.chmod(mode)
    error = error_of(hidden_toolkit(cache))
    assert error.startswith("flashcute.CacheError: ")
    assert str(cache) in error
    assert f"0{mode:o}" in error
    assert "0700" in error
    assert "FLASHCUTE_CACHE_DIR" in error
    assert not list(cache.iterdir())


@needs_nvrtc
def test_a_folder_of_another_user_is_refused(cache: Path) -> None:
    """Its owner could replace an image after it was checked."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    cache.mkdir(mode=0o700)
    nobody = pwd.getpwnam("nobody").pw_uid
    os.chown(cache, nobody, -1)
    error = error_of(hidden_toolkit(cache))
    assert error.startswith("flashcute.CacheError: ")
    assert f"belongs to user {nobody}" in error


@needs_nvrtc
def test_a_relative_folder_is_refused(cache: Path) -> None:
    """It would be another folder after each chdir."""
    error = error_of(hidden_toolkit(cache, FLASHCUTE_CACHE_DIR="cache"))
    assert error.startswith("flashcute.ArgumentError: ")
    assert "FLASHCUTE_CACHE_DIR" in error
    assert "absolute" in error


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FLASHCUTE_CACHE_DIR": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/flashcute"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/flashcute"),
        ({"XDG_CACHE_HOME": None, "HOME": "/h"}, "/h/.cache/flashcute"),
    ],
)
def test_where_the_cache_is(variables: dict[str, str | None], expected: str) -> None:
    """The variable, else the XDG folder, else ~/.cache."""
    env = hidden_toolkit(Path("/unused"), **{"FLASHCUTE_CACHE_DIR": None, **variables})
    process = start(env, "import flashcute; print(flashcute._core.build_info().cache_folder)")
    out, errors = process.communicate(timeout=60)
    assert errors == ""
    assert out.strip() == expected


@pytest.mark.parametrize(
    ("arch", "says"),
    [
        ("sm_70", "8.0 or later"),
        ("cpu", "arch: expected a GPU's compute capability"),
        (None, "arch"),
    ],
)
def test_prebuild_for_impossible_architectures(arch: str | None, says: str) -> None:
    """Refused before a compiler is looked for."""
    if arch is None and fc._core.driver_info().gpus:
        pytest.skip("with a GPU, None means its architecture")
    with pytest.raises((fc.ArgumentError, fc.ConfigError), match=says):
        fc.prebuild(CONFIG, arch=arch)


def test_prebuild_checks_the_configuration_first(cache: Path) -> None:
    """A rule that is broken costs no compilation."""
    with pytest.raises(fc.ConfigError, match="num_warps must be"):
        fc.prebuild(CONFIG.replace(num_warps=3), arch="sm_90")


@pytest.mark.parametrize("cfgs", ["fast", 3, [None], ["fast"]], ids=repr)
def test_prebuild_of_what_is_no_configuration(cfgs: object) -> None:
    """Named like every other argument."""
    with pytest.raises((fc.ArgumentError, TypeError), match=r"^cfgs?: expected .*got"):
        fc.prebuild(cfgs, arch="sm_90")  # type: ignore[arg-type]


@pytest.mark.slow
@needs_nvrtc
def test_every_family_compiles_at_run_time(tmp_path: Path) -> None:
    """A kernel that nvcc compiles and NVRTC does not: its users without a toolkit would find out.
    One configuration of each ahead-of-time family, side by side."""
    families = {(cfg.head_dim, cfg.kernel): cfg for cfg in fc.configs()}
    running = [
        start(hidden_toolkit(tmp_path), PREBUILD.replace(repr(CONFIG), repr(cfg)))
        for cfg in families.values()
    ]
    for process in running:
        origins, _ = finish(process)
        assert origins
        assert all("compiled by NVRTC" in origin for origin in origins.values())


@pytest.mark.slow
@needs_nvrtc
def test_the_backward_compiles_at_run_time(tmp_path: Path) -> None:
    """The same of the backward, whose passes are kernels of their own."""
    code = PREBUILD.replace("import ForwardConfig", "import BackwardConfig")
    cfgs = [
        fc.default_backward_config(head_dim, arch="sm_90", deterministic=deterministic)
        for head_dim, deterministic in ((64, True), (64, False), (128, False))
    ]
    running = [
        start(hidden_toolkit(tmp_path), code.replace(repr(CONFIG), repr(cfg))) for cfg in cfgs
    ]
    for process in running:
        origins, _ = finish(process)
        assert len(origins) == 4
        assert all("compiled by NVRTC" in origin for origin in origins.values())


@pytest.mark.parametrize(("causal", "first"), [(None, FULL), (False, FULL), (True, CAUSAL)])
def test_prebuild_of_one_mask(
    causal: bool | None, first: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel of the other mask, which nobody asked for. Without a compiler, the message names the first one."""
    monkeypatch.setenv("FLASHCUTE_JIT", "off")
    monkeypatch.setenv("FLASHCUTE_CACHE_DIR", str(tmp_path))
    with pytest.raises(fc.UnsupportedError, match=first):
        fc.prebuild(CONFIG, arch="sm_90", causal=causal)


ONES = np.ones(1, np.int32)
VARIANTS = [
    (fc.Variant(), "full"), (fc.Variant(causal=True, diagonal=3), "causal"), (fc.Variant(window=(-1, 5)), "causal"),
    (fc.Variant(window=(0, -1)), "band"), (fc.Variant(causal=True, window=(9, 0)), "band"),
    (fc.Variant(causal=True, prefix=3), "band"), (fc.Variant(causal=True, prefix=ONES), "band"),
    (fc.Variant(seqlens_q=ONES), "band"), (fc.Variant(seqlens_k=ONES), "band"), (fc.Variant(sink=ONES), "band"),
    (fc.Variant(attn_mask=ONES[None] == 1), "mapped"), (fc.Variant(causal=True, documents=ONES), "mapped"),
    (fc.Variant(sink=ONES, block_mask=fc.BlockMask.from_documents(ONES)), "mapped"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "mask"), VARIANTS, ids=range(len(VARIANTS)))
def test_prebuild_of_variants(
    variant: fc.Variant, mask: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Other kernels than those of the calls, which would compile them when they are needed."""
    monkeypatch.setenv("FLASHCUTE_JIT", "off")
    monkeypatch.setenv("FLASHCUTE_CACHE_DIR", str(tmp_path))
    with pytest.raises(fc.UnsupportedError, match=FULL.replace("_full", f"_{mask}")):
        fc.prebuild(CONFIG, arch="sm_90", variant=variant)


@pytest.mark.parametrize("causal", [1, "yes"])
def test_prebuild_of_no_mask(causal: Any) -> None:
    """Named, as by the calls."""
    with pytest.raises(fc.ArgumentError, match=r"^causal: expected True, False or None, got"):
        fc.prebuild(CONFIG, arch="sm_90", causal=causal)


def test_prebuild_of_nothing() -> None:
    """An empty list is not "all"."""
    assert fc.prebuild([], arch="sm_90") == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"variant": 1}, r"^variant: expected a Variant or None, got 1"),
        ({"variant": fc.Variant(causal=True), "causal": True}, r"^causal: expected None beside variant="),
        ({"variant": fc.Variant(), "causal": False}, r"^causal: expected None beside variant="),
    ],
    ids=["number", "causal", "not causal"],
)  # fmt: skip
def test_a_variant_says_it_all(given: Any, says: str) -> None:
    """Two that say which mask: one would be left out."""
    with pytest.raises(fc.ArgumentError, match=says):
        fc.prebuild(CONFIG, arch="sm_90", **given)
