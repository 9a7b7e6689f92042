"""Argument types, and kernel configurations from arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from .. import BackwardConfig, ConfigError, ForwardConfig, default_backward_config, default_config

# What `commands` of argparse is; the class is generic in the type checker's eyes only.
Commands = Any

GPU_DTYPES = ("float16", "bfloat16", "float32")
DTYPES = (*GPU_DTYPES, "float64")

INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it


class UsageError(Exception):
    """A request that cannot be met here; the message says what to do instead."""


def positive_int(text: str) -> int:
    return _int_from(text, 1)


def natural(text: str) -> int:
    return _int_from(text, 0)


def _int_from(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected an integer, at least {least}, got {text!r}")
    return number


def seed(text: str) -> int:
    """What the generators of all libraries take."""
    number = natural(text)
    if number >= 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer below 2**63, got {text!r}")
    return number


def diagonal(text: str) -> str | int:
    if text in ("end", "start"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected end, start or an integer, got {text!r}"
        ) from None


def window(text: str) -> tuple[int, int]:
    try:
        left, right = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected two integers, LEFT,RIGHT, got {text!r}"
        ) from None
    return left, right


def bounded_window(text: str) -> tuple[int, int]:
    left, right = window(text)
    if min(left, right) < -1:
        raise argparse.ArgumentTypeError(f"expected two integers >= -1, LEFT,RIGHT, got {text!r}")
    return left, right


def positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def boolean(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected 0 or 1, got {text!r}")
    return values[text.lower()]


def list_of(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of a comma-separated list, whose items' type reports what is wrong by an ArgumentTypeError."""
    return lambda text: [item(part) for part in text.split(",")]


# ---- configurations ----------------------------------------------------------------------------

Config = ForwardConfig | BackwardConfig


def config_options(kind: type[Config]) -> dict[str, Callable[[str], Any]]:
    """The options of a class beside dtype and head_dim, and the types of their arguments."""
    example = kind()
    parsers: dict[type, Callable[[str], Any]] = {bool: boolean, int: int, str: str}
    return {
        name: parsers[type(getattr(example, name))]
        for name, member in vars(kind).items()
        if isinstance(member, property) and name not in ("name", "smem_bytes", "dtype", "head_dim")
    }


def config_changes(text: str) -> dict[str, Any]:
    """Type of an argument like "block_m=64,swizzled=0": changes to the default configuration."""
    known = config_options(ForwardConfig) | config_options(BackwardConfig)
    changes: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in known:
            raise argparse.ArgumentTypeError(
                f"expected name=value with a name among {', '.join(known)}, got {part!r}"
            )
        try:
            changes[name] = known[name](value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{name}: expected a number, got {value!r}") from None
    return changes


def add_config_arguments(parser: argparse.ArgumentParser, *kinds: type[Config]) -> None:
    """One argument per option of these classes; those not given are absent from the namespace."""
    classes: dict[str, list[str]] = {}
    parsers: dict[str, Callable[[str], Any]] = {}
    for kind in kinds:
        for name, parse in config_options(kind).items():
            classes.setdefault(name, []).append(kind.__name__)
            parsers[name] = parse
    for name, parse in parsers.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=parse,
            default=argparse.SUPPRESS,
            metavar="0|1" if parse is boolean else "N" if parse is int else "NAME",
            help=", ".join(f"{kind}.{name}" for kind in classes[name]),
        )


def changes_text(changes: dict[str, Any]) -> str:
    """What `config_changes` reads."""
    return ",".join(
        f"{name}={value if isinstance(value, str) else int(value)}"
        for name, value in changes.items()
    )


def given_changes(options: argparse.Namespace, *kinds: type[Config]) -> dict[str, Any]:
    """What the arguments were set to that add_config_arguments added for these classes."""
    known = {name for kind in kinds for name in config_options(kind)}
    return {name: value for name, value in vars(options).items() if name in known}


def changed_config(
    head_dim: int,
    dtype: str,
    arch: str | int,
    changes: dict[str, Any],
    head_dim_v: int | None = None,
) -> ForwardConfig:
    """The default configuration with changes; where it asks for what Hopper's kernel has not,
    of what other GPUs take."""
    base = default_config(head_dim, dtype, arch, head_dim_v=head_dim_v)
    wanted = {name: changes.get(name, getattr(base, name)) for name in ("kernel", "math")}
    if base.kernel == "sm90" and wanted != {"kernel": "sm90", "math": "tensor_core"}:
        base = default_config(head_dim, dtype, "sm_100", head_dim_v=head_dim_v)
    return base.replace(**changes)


def changed_backward_config(
    head_dim: int,
    dtype: str,
    arch: str | int,
    changes: dict[str, Any],
    head_dim_v: int | None = None,
    causal: bool = False,
) -> BackwardConfig:
    """The same of the backward; `deterministic` has a default configuration of its own, and so may the causal mask.
    Changes for which the causal one has no room are of the other."""
    deterministic = bool(changes.get("deterministic", False))

    def default(arch: str | int, causal: bool) -> BackwardConfig:
        return default_backward_config(
            head_dim,
            dtype,
            arch,
            head_dim_v=head_dim_v,
            deterministic=deterministic,
            causal=causal,
        )

    base, plain = default(arch, causal), default(arch, causal=False)
    if base.kernel == "sm90" and changes.get("kernel", "sm90") != "sm90":
        base = plain = default("sm_100", causal=False)
    return changed_if_legal(base, plain, changes, arch)


def changed_if_legal(
    base: BackwardConfig, plain: BackwardConfig, changes: dict[str, Any], arch: str | int
) -> BackwardConfig:
    """`base` with changes; if that is no configuration of `arch`, `plain` with them."""
    changed = base.replace(**changes)
    if base != plain:
        try:
            changed.check(arch)
        except ConfigError:
            return plain.replace(**changes)
    return changed
