"""What every test here shares: where it runs, what it may touch, and how a fresh process is
made."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import optional_torch
import pytest
from optional_torch import torch

# JAX would otherwise take most of a GPU's memory at its first call.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
SEED = int(os.environ.get("FLASHCUTE_TEST_SEED", "0"))

_scratch = tempfile.TemporaryDirectory(prefix="flashcute_test_")


def pytest_configure(config: pytest.Config) -> None:
    # The user's cache is neither read nor written. Child processes inherit this folder, pytest-xdist's workers too.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ["FLASHCUTE_CACHE_DIR"] = str(Path(_scratch.name) / "cache")


def pytest_unconfigure(config: pytest.Config) -> None:
    for compilation in set(_compilations.values()):
        compilation.end()
    _scratch.cleanup()


def pytest_report_header(config: pytest.Config) -> str:
    import flashcute

    gpu = why_no_gpu() or "with a GPU"
    where = f"flashcute {flashcute.__version__} from {flashcute.__file__}"
    return f"{where}, FLASHCUTE_TEST_SEED={SEED}, {gpu}"


def why_no_gpu() -> str:
    """Empty where gpu tests can run."""
    import flashcute

    if not optional_torch.available:
        return "GPU tests need torch"
    info = flashcute._core.driver_info()
    if not info.gpus:
        return f"no GPU: {info.problem or 'the driver sees none'}"
    if info.gpus[0].arch < 80:
        return f"GPU 0 has compute capability {info.gpus[0].arch / 10}, 8.0 is needed"
    if not torch.cuda.is_available():
        return "torch was built without CUDA, or cannot use this driver"
    return ""


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Configurations, tuples and dicts in test names as what they hold. pytest alone names them sizes0, cfg3."""
    import flashcute

    if isinstance(val, flashcute.ForwardConfig | flashcute.BackwardConfig):
        return val.name
    if isinstance(val, tuple) and all(isinstance(item, int) for item in val):
        return "x".join(map(str, val)) or "()"
    if isinstance(val, dict):
        plain = bool, int, float, str, tuple, type(None)
        return ",".join(f"{k}={v}" if isinstance(v, plain) else str(k) for k, v in val.items())
    return None  # pytest's own


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Slow ones last: what they need is being compiled meanwhile.
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if reason := why_no_gpu():
        skip = pytest.mark.skip(reason=reason)
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and optional_torch.needed_by(callspec.params):
            item.add_marker(pytest.mark.skip(reason=optional_torch.REASON))


# ---- devices and data ----------------------------------------------------------------------------


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test on both backends."""
    return str(request.param)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Differs from test to test; the same in every run with one FLASHCUTE_TEST_SEED, which the
    header prints."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: an output that is not written shows, also those that flashcute
    allocates."""
    if not optional_torch.available:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


# ---- fresh processes -----------------------------------------------------------------------------

Runner = Callable[..., subprocess.CompletedProcess[str]]


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with changes; None removes a variable."""
    env = {**os.environ, **{k: v for k, v in changes.items() if v is not None}}
    for name, value in changes.items():
        if value is None:
            env.pop(name, None)
    return env


@pytest.fixture
def fresh(tmp_path: Path) -> Runner:
    """fresh(code, **env): runs a script in a new interpreter and returns the finished process,
    which succeeded."""

    def run(
        code: str, *, timeout: float = 120, check: bool = True, **env: str | None
    ) -> subprocess.CompletedProcess[str]:
        if optional_torch.imported_by(code) and not optional_torch.available:
            pytest.skip(optional_torch.REASON)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=environment(**env),
            cwd=tmp_path,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        if check:
            assert done.returncode == 0, (
                f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    return run


# ---- kernels that are compiled for the tests -----------------------------------------------------


class Compilation:
    """A process that compiles the kernels of some configurations, as many at once as the machine allows."""

    def __init__(self, cfgs: list[object]) -> None:
        import flashcute

        arch = flashcute._core.driver_info().gpus[0].arch
        code = (
            "import flashcute; from flashcute import BackwardConfig, ForwardConfig; "
            f"flashcute.prebuild({cfgs!r}, arch={arch})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=_scratch.name
        )

    def wait(self) -> None:
        _, problem = self.process.communicate() if self.process.returncode is None else ("", "")
        assert self.process.returncode == 0, problem

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        if self.process.stderr and not self.process.stderr.closed:  # else a test has waited for it
            self.process.communicate()


_compilations: dict[object, Compilation] = {}  # by configuration


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts what `compiled` will wait for while other tests use the GPU."""
    if why_no_gpu():
        return
    wanted: dict[object, None] = {}
    for item in session.items:
        cfg = getattr(item, "callspec", None) and item.callspec.params.get("compiled")
        marker = item.get_closest_marker("compiles")
        wanted.update(dict.fromkeys([cfg] if cfg is not None else marker.args[0] if marker else []))
    if wanted:
        _compilations.update(dict.fromkeys(wanted, Compilation(list(wanted))))


def _wait_for(cfg: object) -> None:
    if cfg not in _compilations:
        _compilations[cfg] = Compilation([cfg])
    _compilations[cfg].wait()


def backward_configurations_of_first_use() -> list[object]:
    """Those of the backward on this machine's GPU that are not compiled ahead of time. Tests that use them wait in the
    disk cache for what is being compiled."""
    import flashcute

    if why_no_gpu():
        return []
    arch = flashcute._core.driver_info().gpus[0].arch
    return [
        flashcute.default_backward_config(head_dim, dtype, arch, deterministic=deterministic)
        for head_dim in (64, 128, 256)
        for dtype in ("float16", "bfloat16", "float32")
        for deterministic in (True, False)
        if deterministic or dtype == "float32"
    ]


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> object:
    """Parametrised indirectly by a configuration: returns it when its kernels are in the cache."""
    _wait_for(request.param)
    return request.param


@pytest.fixture
def prebuilt(request: pytest.FixtureRequest) -> None:
    """Waits until the kernels that the marker `compiles` lists are in the cache."""
    marker = request.node.get_closest_marker("compiles")
    if marker is not None and not why_no_gpu():
        for cfg in marker.args[0]:
            _wait_for(cfg)


def narrow_configurations() -> list[object]:
    """What flash_attention takes on a GPU for a few rows whose head dim is no multiple of 8."""
    import flashcute as fc

    found = []
    copying = [cfg for cfg in fc.configs() if cfg.kernel == "sm80"]
    for head_dim in sorted({cfg.head_dim for cfg in copying}):
        of_bucket = [
            c for c in copying
            if c.dtype == "float16" and c.head_dim == head_dim and c.math == "tensor_core"
        ]  # fmt: skip
        smallest = min(of_bucket, key=lambda cfg: cfg.block_m)
        found += [smallest.replace(copy_bytes=n, async_copy=n >= 4) for n in (8, 4, 2)]
    return found
