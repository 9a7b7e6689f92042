"""What is to be done once another module is there, without importing it."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_pending: dict[str, list[Callable[[], object]]] = {}


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Runs `action` when the module has been imported: now, or at the end of its import. An action that raises warns:
    it must not make the import of another module fail."""
    _pending.setdefault(name, []).append(action)
    if sys.modules.get(name) is not None:
        import_module(name)  # waits where another thread has begun to import it
        _run(name)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _run(name: str) -> None:
    for action in _pending.pop(name, ()):
        try:
            action()
        except Exception as error:
            warnings.warn(
                f"flashcute: {name} was imported, but what goes with it failed: "
                f"{type(error).__name__}: {error}",
                stacklevel=4,
            )


class _Finder:
    """Lets the finders behind it find the module, and wraps what loads it. Never leaves sys.meta_path: who removes an
    entry makes another thread, which imports something at that moment, skip the one behind it."""

    def __init__(self) -> None:
        self.searching = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _pending or getattr(self.searching, "now", False):
            return None
        self.searching.now = True  # another finder may ask all others in turn, this one included
        try:
            behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
            for finder in behind:
                find = getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = find and find(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                    return spec
        finally:
            self.searching.now = False
        return None


class _Loader:
    """Loads by another loader, which it leaves in the module as if it had never been wrapped."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _run(module.__name__)
