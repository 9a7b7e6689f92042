"""What import of flashcute and of torch, in either order, leaves behind: operators that saved programs name, and as
little else as may be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from optional_torch import REASON

pytest.importorskip("torch", reason=REASON, exc_type=ImportError)

from conftest import Runner, environment
from flashcute import _import_hook

# ---- saved programs ------------------------------------------------------------------------------

SAVE = """
import sys, warnings
import torch, flashcute
warnings.simplefilter("ignore")

class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return flashcute.flash_attention(q, k, v, causal=True)

torch.manual_seed(0)
tensors = tuple(torch.randn(1, 6, 2, 16) for _ in range(3))
torch.save((tensors, Attention()(*tensors)), "tensors.pt")
torch.export.save(torch.export.export(Attention(), tensors), "exported.pt2")
torch.jit.trace(Attention(), tensors).save("traced.pt")
"""

LOAD = """
import warnings
{imports}
warnings.simplefilter("ignore")
tensors, expected = torch.load("tensors.pt")
for program in (torch.export.load("exported.pt2").module(), torch.jit.load("traced.pt")):
    torch.testing.assert_close(program(*tensors), expected)
"""


def run(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with programs that another process saved."""
    folder = tmp_path_factory.mktemp("saved")
    run(SAVE, folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import torch, flashcute",
        "import flashcute, torch",
        "import importlib.util, flashcute; importlib.util.find_spec('torch'); import torch",
        "import flashcute, importlib, torch; importlib.reload(flashcute)",
        "import flashcute, importlib; importlib.reload(flashcute); import torch",
        "import flashcute, threading; t = threading.Thread(target=lambda: __import__('torch')); "
        "t.start(); t.join(); import torch",
        "import flashcute, torch, os\nif os.fork(): raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))",
    ],
)
def test_saved_programs_load(saved: Path, imports: str) -> None:
    """Operators that only the first recorded call registers: the loader of a saved program does not know them."""
    run(LOAD.format(imports=imports), saved)


@pytest.mark.slow
def test_compiled_package_loads(saved: Path) -> None:
    """As above, of a package that AOTInductor compiled: forward, scale, LSE, grouped heads."""
    run(
        """
import warnings
import torch, flashcute
warnings.simplefilter("ignore")

class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        out, lse = flashcute.flash_attention(q * 2, k, v, causal=True, scale=0.3, return_lse=True)
        return out + 1, lse

torch.manual_seed(0)
tensors = tuple(torch.randn(2, 6, heads, 16) for heads in (4, 2, 2))
with torch.no_grad():
    torch.save((tensors, Attention()(*tensors)), "packaged.pt")
    program = torch.export.export(Attention(), tensors)
    torch._inductor.aoti_compile_and_package(program, package_path="package.pt2")
        """,
        saved,
    )
    run(
        """
import flashcute, torch
tensors, expected = torch.load("packaged.pt")
torch.testing.assert_close(tuple(torch._inductor.aoti_load_package("package.pt2")(*tensors)), expected)
        """,
        saved,
    )


@pytest.mark.parametrize("imports", ["import torch, flashcute", "import flashcute, torch"])
def test_import_loads_little(fresh: Runner, imports: str) -> None:
    """The compiler of torch takes seconds to import, and its counter of FLOPs writes a warning where Triton is not
    installed: neither is loaded to register something with it."""
    done = fresh(f"""
        import sys
        {imports}
        assert hasattr(torch.ops.flashcute, "flash_attention_forward")
        assert "torch._dynamo" not in sys.modules
        assert "torch.utils.flop_counter" not in sys.modules
    """)
    assert done.stderr == ""


def test_torch_is_as_if_imported_without(fresh: Runner) -> None:
    """Tools ask a module for its loader, by its class."""
    fresh("""
        import flashcute, torch, importlib.machinery
        assert type(torch.__loader__) is importlib.machinery.SourceFileLoader
        assert torch.__spec__.loader is torch.__loader__
    """)


def test_without_torch(fresh: Runner) -> None:
    """A name that is blocked (None), and a module of that name that is something else: neither is an error of
    flashcute's import, the second is told."""
    fresh("""
        import sys, numpy as np
        sys.modules["torch"] = None
        import flashcute
        x = np.ones((1, 4, 1, 8), np.float32)
        assert (flashcute.flash_attention(x, x, x) == 1).all()
    """)
    done = fresh("""
        import sys, types, numpy as np
        sys.modules["torch"] = types.ModuleType("torch")
        import flashcute
        x = np.ones((1, 4, 1, 8), np.float32)
        assert (flashcute.flash_attention(x, x, x) == 1).all()
    """)
    assert "flashcute: torch was imported, but" in done.stderr


# ---- the hook itself -----------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a module that can be imported as some_module, and that tells how often it was run."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    file = tmp_path / "some_module.py"
    file.write_text("runs = globals().get('runs', 0) + 1\n")
    yield file
    sys.modules.pop("some_module", None)
    _import_hook._pending.pop("some_module", None)


@pytest.mark.usefixtures("module")
def test_action_runs_at_the_end_of_an_import() -> None:
    """Once, whether the module is there or comes later; when it runs the module is complete."""
    calls = []

    def action() -> None:
        calls.append(sys.modules["some_module"].runs)

    _import_hook.when_imported("some_module", action)
    assert calls == []
    import some_module  # type: ignore[import-not-found]

    assert calls == [1]
    _import_hook.when_imported("some_module", action)
    assert calls == [1, 1]
    import importlib

    importlib.reload(some_module)
    assert calls == [1, 1]


def test_action_waits_for_an_import_that_succeeds(module: Path) -> None:
    """One that fails may be repeated."""
    calls: list[int] = []
    _import_hook.when_imported("some_module", lambda: calls.append(1))
    good = module.read_text()
    module.write_text("raise ImportError('a library is missing')\n")
    with pytest.raises(ImportError, match="a library is missing"):
        import some_module
    assert calls == []
    module.write_text(good + "# a longer file, so that no cached one is taken for it\n")
    import some_module  # noqa: F401

    assert calls == [1]


@pytest.mark.usefixtures("module")
def test_action_that_fails_warns() -> None:
    """The import of another module does not fail by it."""
    _import_hook.when_imported("some_module", lambda: 1 / 0)
    with pytest.warns(UserWarning, match=r"some_module was imported, but .*ZeroDivisionError"):
        import some_module
    assert some_module.runs == 1


@pytest.mark.usefixtures("module")
def test_finders_that_ask_each_other() -> None:
    """Another library's hook that asks all finders but itself, the one of flashcute among them: no endless
    recursion."""

    class Other:
        def find_spec(self, name: str, path: object = None, target: object = None) -> object:
            for finder in sys.meta_path:
                if finder is not self and (spec := finder.find_spec(name, path, target)):  # type: ignore
                    return spec
            return None

    calls: list[int] = []
    sys.meta_path.insert(0, Other())  # type: ignore[arg-type]
    _import_hook.when_imported("some_module", lambda: calls.append(1))
    ours = next(x for x in sys.meta_path if isinstance(x, _import_hook._Finder))
    sys.meta_path.remove(ours)
    sys.meta_path.insert(0, ours)  # so that each has the other behind or before it
    import some_module  # noqa: F401

    assert calls == [1]
