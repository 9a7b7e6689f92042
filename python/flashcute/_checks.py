"""Checks of arrays, whatever call they are for."""

from __future__ import annotations

from ._arrays import Array, library_of
from ._core import ArgumentError


def require_kind(traced: bool = False, **arrays: Array) -> None:
    """Raises ArgumentError for nested, sparse and other arrays that no call takes."""
    for name, array in arrays.items():
        problem = library_of(type(array)).kind_problem(array, traced)
        if problem:
            raise ArgumentError(f"{name}: expected {problem}")


def require_memory(**arrays: Array) -> None:
    """As require_kind, and that nothing stands between the arrays and their memory. Asked where a call has failed, or
    is no matter of microseconds."""
    require_kind(**arrays)
    for name, array in arrays.items():
        problem = library_of(type(array)).memory_problem(array)
        if problem:
            raise ArgumentError(f"{name}: expected {problem}")


def require_arrays(arrays: dict[str, Array]) -> None:
    for name, array in arrays.items():
        if not hasattr(array, "__dlpack__"):
            raise ArgumentError(
                f"{name}: expected an array that supports DLPack (NumPy, torch, CuPy, JAX, ...), got "
                f"{type(array).__module__}.{type(array).__qualname__}"
            )
        problem = library_of(type(array)).problem(array)
        if problem:
            raise ArgumentError(f"{name}: expected {problem}")


def require_mutable(name: str, array: Array) -> None:
    """Of an array to write to."""
    if library_of(type(array)).immutable:
        raise ArgumentError(
            f"{name}: expected a writable array, got an immutable one of JAX. Omit it"
        )
