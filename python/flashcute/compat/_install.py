"""`import flash_attn` finds flashcute.compat, for as long as a handle says so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType

from .._core import ArgumentError, UnsupportedError

# Which module stands for which.
STAND_INS = {
    "flash_attn": "flash_attn",
    "flash_attn.flash_attn_interface": "flash_attn",
    "flash_attn.bert_padding": "bert_padding",
}


def install(version: str = "2.8.3", metadata: bool = False, replace: bool = False) -> Handle:
    """Lets `import flash_attn` find flashcute's functions.

    There are flash_attn, flash_attn.flash_attn_interface and flash_attn.bert_padding. The import of other modules of
    flash-attn (layers, ops, losses, ...) raises ModuleNotFoundError.

    Call it before the packages that use flash-attn are imported: they look for it once.

    version: what flash_attn.__version__ says, of flash-attn 2. The functions of flash-attn 3 are to be imported from
        flashcute.compat.flash_attn_interface.
    metadata: also show a distribution named flash-attn to importlib.metadata, which transformers and diffusers ask for.
    replace: take the place of an installed flash-attn.

    Returns a handle, which is a context manager: its `remove()`, or the end of the block, undoes it all. Functions that
    were imported meanwhile go on working, and what packages have concluded meanwhile stays with them.

    Raises UnsupportedError (a NotImplementedError), without a change, where another package would break, or would not
    notice: where flash-attn is installed (unless replace=True) or imported, transformers, diffusers or Megatron are
    imported already, xFormers or vLLM can be imported, or, with metadata=True, Transformer Engine. Raises ArgumentError
    (a ValueError) for a version other than 2.x.
    """
    if not isinstance(version, str) or not re.fullmatch(r"2(\.\d+)+(\.?\w+)*", version):
        raise ArgumentError(
            f"version: expected one of flash-attn 2, such as '2.8.3', got {version!r}. The functions of flash-attn 3 "
            "are in flashcute.compat.flash_attn_interface"
        )
    for problem in _problems(metadata, replace):
        raise UnsupportedError(f"install: {problem}")
    return Handle(_Finder(version, metadata), first=replace)


class Handle:
    """Undoes an `install`."""

    def __init__(self, finder: _Finder, first: bool) -> None:
        self._finder = finder
        # Last: as long as there is no other, and because a removal in front of other finders makes an import that
        # another thread is at skip one of them.
        sys.meta_path.insert(0 if first else len(sys.meta_path), finder)
        importlib.invalidate_caches()

    def remove(self) -> None:
        """Takes flash_attn out of sys.modules, and its finder out of sys.meta_path. More than once is once."""
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for name in STAND_INS:
            if self._finder.made(sys.modules.get(name)):
                del sys.modules[name]
        importlib.invalidate_caches()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


# ---- what would break ----------------------------------------------------------------------------------


def _problems(metadata: bool, replace: bool) -> Iterable[str]:
    """Why flash_attn should not be there, one sentence each."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        yield "flashcute is installed as flash_attn already: remove() that handle first"
    if "flash_attn" in sys.modules:
        yield "flash_attn is imported already: call install first"
    if not replace and (_findable("flash_attn") or _distributed("flash-attn")):
        yield "flash-attn is installed: replace=True hides it while the handle lives"
    for name in ("transformers", "diffusers", "megatron.core"):
        if name in sys.modules:
            yield f"{name} is imported already, and has looked for flash_attn: call install before it is imported"
    if _findable("xformers"):
        yield (
            "xFormers can be imported, and would fail: where it finds flash_attn, it needs its compiled module, which "
            "flashcute has not"
        )
    if _findable("vllm"):
        yield (
            "vLLM can be imported, and would fail: where it finds flash_attn, it imports rotary embeddings from it, "
            "which flashcute has not"
        )
    if metadata and _findable("transformer_engine"):
        yield (
            "metadata: Transformer Engine can be imported, and would fail: where it finds a distribution flash-attn, "
            "it imports its compiled module, which flashcute has not. metadata=False leaves it alone"
        )


def _findable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: it is there, put into sys.modules by hand
        return name in sys.modules


def _distributed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# ---- what import and importlib.metadata ask --------------------------------------------------------------


class _Finder(importlib.metadata.DistributionFinder):
    """Finds and loads flash_attn's modules, and its distribution if that is to be seen."""

    def __init__(self, version: str, metadata: bool) -> None:
        self.version = version
        self.metadata = metadata

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in STAND_INS:
            return None
        file = Path(__file__).with_name(f"{STAND_INS[name]}.py")
        spec = importlib.util.spec_from_file_location(name, file, loader=self)  # type: ignore[arg-type]
        if spec is not None and name == "flash_attn":
            spec.submodule_search_locations = []  # a package, whose modules no other finder looks for
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual module."""

    def exec_module(self, module: ModuleType) -> None:
        """A module of its own with the same functions: importlib writes to what it loads."""
        source = import_module(f"{__package__}.{STAND_INS[module.__name__]}")
        own = {"__name__", "__package__", "__loader__", "__spec__", "__file__", "__cached__"}
        vars(module).update({k: v for k, v in vars(source).items() if k not in own})
        if module.__name__ == "flash_attn":
            vars(module)["__version__"] = self.version

    def made(self, module: ModuleType | None) -> bool:
        return getattr(getattr(module, "__spec__", None), "loader", None) is self

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        context = context or importlib.metadata.DistributionFinder.Context()
        # Who names folders asks what lies there.
        if self.metadata and context.path is sys.path:
            name = context.name
            if name is None or re.sub(r"[-_.]+", "-", name).lower() == "flash-attn":
                yield _Distribution(self.version)


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, version: str) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n"
            "Summary: flash-attn's functions by flashcute.compat\n",
            "top_level.txt": "flash_attn\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(str(filename))

    def locate_file(self, path: object) -> Path:
        return Path(__file__).parent / str(path)
