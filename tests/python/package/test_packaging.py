"""What is installed, and what importing it costs."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
from pathlib import Path

import flashcute as fc
import pytest
from conftest import Runner

HERE = Path(fc.__file__).parent


@pytest.mark.parametrize("statement", ["import flashcute", "from flashcute import *"])
def test_import_is_light(fresh: Runner, statement: str) -> None:
    """No array library comes along, nor what takes long to import; flashcute serves all and
    needs none."""
    heavy = ["torch", "jax", "cupy", "ml_dtypes", "scipy"]
    # `reference` is part of *, and computes with NumPy.
    heavy += [] if "*" in statement else ["numpy", "asyncio"]
    done = fresh(f"import sys; {statement}; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_calls_on_numpy_import_no_other_library(fresh: Runner) -> None:
    """Nor does using it."""
    done = fresh("""
        import sys, numpy as np, flashcute as fc
        x = np.ones((1, 4, 2, 8), np.float16)
        fc.flash_attention(x, x, x, return_lse=True)
        fc.explain(x, x, x)
        print([m for m in ("torch", "jax", "cupy", "ml_dtypes") if m in sys.modules])
    """)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_nothing_is_reported_at_exit(fresh: Runner) -> None:
    """nanobind complains on stderr about objects that outlive the interpreter: ours do not, also
    where a configuration lies in a module, a cycle, a cache or a traceback."""
    done = fresh("""
        import functools, sys, numpy as np, flashcute as fc
        cfg = fc.ForwardConfig()
        cycle = {"cfg": cfg}
        cycle["cycle"] = cycle
        cached = functools.cache(lambda x: x)
        cached(cfg)
        sys.kept = cfg
        x = np.ones((1, 4, 2, 8), np.float16)
        told = fc.explain(x, x, x)
        try:
            fc.forward(cfg, x, x, x)
        except fc.ConfigError as error:
            sys.error = error
    """)
    assert done.stderr == ""


def test_all_exists() -> None:
    """Every public name is there and is documented."""
    assert sorted(fc.__all__) == fc.__all__
    for name in fc.__all__:
        assert inspect.getdoc(getattr(fc, name)), name
    assert not hasattr(fc, "no_such_name")


def test_version() -> None:
    """The extension, the package and its metadata are of one version."""
    assert fc.__version__ == fc._core.build_version() == importlib.metadata.version("flashcute")


def test_types_are_shipped() -> None:
    """py.typed, and a stub of the extension that parses and names what the extension has."""
    assert (HERE / "py.typed").is_file()
    tree = ast.parse((HERE / "_core.pyi").read_text())
    stub = {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    missing = {n for n in dir(fc._core) if not n.startswith("_")} - stub
    assert missing == set()


def test_device_headers_are_shipped() -> None:
    """Run-time compilation needs our headers, CuTe's and CCCL's; no toolkit has the first two."""
    include = HERE / "include"
    for header in ("flashcute/core/forward_config.hpp", "cute/tensor_impl.hpp"):
        assert (include / header).is_file(), header
    assert (include / "cccl").is_dir()
    assert any((include / "cccl").rglob("type_traits"))
    assert not [p for p in include.rglob("*") if p.is_symlink()], (
        "links break when a wheel is built"
    )


def test_headers_of_generated_sources_are_shipped() -> None:
    """A kernel that only builds with images have, because what its source includes stays behind: the one that makes
    block masks could not be compiled at run time."""
    extension = Path(fc._core.__file__).read_bytes()
    named = {name.decode() for name in re.findall(rb"flashcute/[a-z0-9_/]+\.hpp", extension)}
    assert "flashcute/sm80/entry.hpp" in named
    assert {name for name in named if not (HERE / "include" / name).is_file()} == set()


@pytest.mark.parametrize("name", ["LICENSE.cutlass.txt", "LICENSE.cccl.txt"])
def test_licences_of_shipped_headers(name: str) -> None:
    """Redistribution in source form must keep the licence text."""
    text = (HERE / "include" / name).read_text()
    assert "NVIDIA" in text
    assert "Redistribution" in text or "Apache License" in text


def test_own_licence_is_installed() -> None:
    """Ours too."""
    files = importlib.metadata.files("flashcute") or []
    assert [f for f in files if f.name == "LICENSE" and "Apache" in f.read_text()]


def test_nothing_else_is_installed() -> None:
    """No tests, no build files, no top-level module beside flashcute."""
    files = [f.parts for f in importlib.metadata.files("flashcute") or []]
    top = {parts[0] for parts in files if parts[0] != ".."}
    assert {t for t in top if not t.endswith(".dist-info")} == {"flashcute"}
    inner = {parts[1] for parts in files if parts[0] == "flashcute"}
    assert not inner & {"tests", "src", "CMakeLists.txt", "lib", "share"}


def test_environment_variables_are_listed() -> None:
    """What the library reads from the environment is in its own table, with a default and a
    meaning."""
    rows = fc._core.environment_variables()
    names = [name for name, *_ in rows]
    assert len(set(names)) == len(names)
    assert {"FLASHCUTE_JIT", "FLASHCUTE_CACHE_DIR", "FLASHCUTE_NVRTC"} <= set(names)
    assert all(
        name.startswith("FLASHCUTE_") and default and what for name, default, what, _ in rows
    )


def test_build_info(fresh: Runner) -> None:
    """The facts about a build can be asked for anywhere, and an empty fact has its reason."""
    info = fc._core.build_info()
    assert info.cpu_isa in ("baseline", "avx2", "avx512")
    assert info.cpu_threads >= 1
    assert bool(info.image_archs) == bool(info.image_compiler)
    assert bool(info.jit_compiler) != bool(info.jit_problem)
    assert Path(info.cache_folder).is_absolute()
    done = fresh(
        "import flashcute; print(flashcute._core.build_info().cpu_threads)",
        FLASHCUTE_NUM_THREADS="3",
    )
    assert done.stdout.strip() == "3"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_result(fresh: Runner, isa: str) -> None:
    """The machine that runs the tests has one best instruction set; users have the others."""
    flags = Path("/proc/cpuinfo").read_text()
    if {"avx2": "avx2", "avx512": "avx512vl"}.get(isa, "") not in flags:
        pytest.skip(f"this CPU has no {isa}")
    done = fresh(
        """
        import numpy as np, flashcute as fc
        from flashcute._core import build_info
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((2, 77, 3, 24)).astype(np.float32) for _ in range(3))
        s = np.einsum("bihd,bjhd->bhij", q.astype("f8"), k) / 24**0.5
        s = np.where(np.tri(77, dtype=bool), s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = fc.flash_attention(q, k, v, causal=True)
        print(build_info().cpu_isa, np.abs(out - np.einsum("bhij,bjhd->bihd", p, v)).max() < 1e-5)
        """,
        FLASHCUTE_CPU_ISA=isa,
    )
    assert done.stdout.split() == [isa, "True"]
