"""Tensors that live in a world of their own: distributed ones, and those without memory. All tensors of a call must be
of one world, of which torch's own errors do not tell by the name of the argument."""

from __future__ import annotations

import sys
from typing import Any

from .._arrays import active_fake_mode, has_own_dispatch
from .._core import ArgumentError
from .framework import Tensor, torch
from .problem import Problem


def is_distributed(x: Any) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def as_placed(x: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient that comes in with placements of its own, as torch's operators take it, with those of `like`."""
    if x is None or not is_distributed(x) or x.placements == like.placements:
        return x
    return x.redistribute(like.device_mesh, like.placements)


def require_one_world(problem: Problem) -> None:
    """Raises ArgumentError where DTensors, or fake tensors, meet tensors of another world, and for tensors of which no
    kernel will see the shape first."""
    if torch.compiler.is_compiling():  # the compiler has made all tensors of one world
        return
    given = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.options.arrays}
    given |= problem.masks
    tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
    _require_distributed_alike(tensors)
    _require_fake_alike(tensors)
    rank = 3 if problem.options.is_packed else 4
    for name in ("q", "k", "v"):
        if tensors[name].dim() != rank:  # what gives shapes without memory reads them
            raise ArgumentError(
                f"{name}: expected {rank} dimensions, got shape {tuple(tensors[name].shape)}"
            )


def _require_distributed_alike(tensors: dict[str, Tensor]) -> None:
    first = next((name for name, x in tensors.items() if is_distributed(x)), None)
    if first is None:
        return
    mesh = tensors[first].device_mesh
    for name, x in tensors.items():
        if not is_distributed(x):
            raise ArgumentError(
                f"{name}: expected a DTensor as {first}, got a {type(x).__name__}. Make one of it "
                f"(DTensor.from_local, distribute_tensor), or pass {first}.to_local()"
            )
        if x.device_mesh != mesh:
            raise ArgumentError(
                f"{name}: expected a DTensor on the mesh of {first}, {mesh}, got {x.device_mesh}"
            )


def _require_fake_alike(tensors: dict[str, Tensor]) -> None:
    kind = torch._subclasses.FakeTensor
    modes = (x.fake_mode for x in tensors.values() if isinstance(x, kind))
    mode = active_fake_mode() or next(modes, None)
    if mode is None:
        return
    for name, x in tensors.items():
        if isinstance(x, kind):
            if x.fake_mode is not mode:
                raise ArgumentError(
                    f"{name}: expected a FakeTensor of the active mode, or of the mode of the others, got one of "
                    "another mode"
                )
        elif not has_own_dispatch(type(x)) and not mode.allow_non_fake_inputs:
            raise ArgumentError(
                f"{name}: expected a FakeTensor beside others, or within FakeTensorMode, got a "
                f"{type(x).__name__} with memory. Pass mode.from_tensor({name})"
            )
