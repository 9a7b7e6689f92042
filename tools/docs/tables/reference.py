"""Tables of docs/reference that are read from the installed package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flashcute
from flashcute import BackwardConfig, ForwardConfig, _core
from flashcute.__main__ import command_parser
from lines import table

HEAD_DIMS = range(1, 257)
TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100")
# Options that have a column of their own, or that a row is about.
COLUMNS = (
    "dtype",
    "head_dim",
    "head_dim_v",
    "block_m",
    "block_n",
    "num_warps",
    "stages",
    "kernel",
    "math",
)

Config = ForwardConfig | BackwardConfig


def other_options(cfg: Config) -> str:
    """What differs from a configuration with no options, in the words of Python."""
    plain = type(cfg)(dtype=cfg.dtype, head_dim=cfg.head_dim, kernel=cfg.kernel)
    names = [n for n, x in vars(type(cfg)).items() if isinstance(x, property)]
    skipped = (*COLUMNS, "name", "smem_bytes")
    changed = [n for n in names if n not in skipped and getattr(cfg, n) != getattr(plain, n)]
    return ", ".join(f"`{n}={getattr(cfg, n)!r}`" for n in changed)


def forward_defaults(dtype: str) -> str:
    """The default configurations of a dtype by head dimension and target; equal ones in one row."""
    found = buckets(lambda d, target: [flashcute.default_config(d, dtype, target)])
    told = [
        [*row(x), f"{x.cfg.smem_bytes / 1024:g}", f"`{x.cfg.kernel}`", other_options(x.cfg)]
        for x in found
    ]
    return table([*HEADER, "KiB", "kernel", "other options"], told)


def backward_defaults(dtype: str) -> str:
    """The same of gradients, with and without the same bits in every run, and under the causal mask."""
    kinds = (
        {"deterministic": False},
        {"deterministic": False, "causal": True},
        {"deterministic": True},
    )

    def every(head_dim: int, target: str) -> list[Config]:
        default = functools.partial(flashcute.default_backward_config, head_dim, dtype, target)
        return list(dict.fromkeys(default(**kind) for kind in kinds))  # of equal ones the first

    def whose(x: Bucket) -> str:
        default = functools.partial(flashcute.default_backward_config, x.first, dtype, x.targets[0])
        plain, causal = default(**kinds[0]), default(**kinds[1])
        return "`causal=True`: " if x.cfg == causal != plain else ""

    found = buckets(every)
    told = [[*row(x), f"`{x.cfg.kernel}`", whose(x) + other_options(x.cfg)] for x in found]
    return table([*HEADER, "kernel", "other options"], told)


class Bucket(NamedTuple):
    """Head dimensions and targets that have one default configuration."""

    first: int
    last: int
    targets: tuple[str, ...]
    cfg: Config


def buckets(defaults: Callable[[int, str], list[Config]]) -> list[Bucket]:
    """Of all head dimensions and targets, in their order. `defaults`: those of one, each of another kind."""
    ranges: dict[tuple[str, int, Config], list[int]] = {}
    for target in TARGETS:
        for head_dim in HEAD_DIMS:
            for kind, cfg in enumerate(defaults(head_dim, target)):
                ranges.setdefault((target, kind, cfg), []).append(head_dim)
    targets: dict[tuple[int, int, int, Config], list[str]] = {}
    for (target, kind, cfg), dims in ranges.items():
        targets.setdefault((dims[0], dims[-1], kind, cfg), []).append(target)
    found = [
        (first, kind, TARGETS.index(of[0]), Bucket(first, last, tuple(of), cfg))
        for (first, last, kind, cfg), of in targets.items()
    ]
    return [x[-1] for x in sorted(found, key=lambda x: x[:-1])]


HEADER = ("head dimension", "GPUs", "tile", "warps", "stages")


def row(bucket: Bucket) -> list[object]:
    """The columns that both tables have."""
    capabilities = ", ".join(f"{int(x[3:]) / 10:.1f}" for x in bucket.targets)
    cfg = bucket.cfg
    dims = f"{bucket.first} to {bucket.last}"
    return [dims, capabilities, f"{cfg.block_m}×{cfg.block_n}", cfg.num_warps, cfg.stages]


def commands() -> str:
    """All commands with their sentence."""
    [found] = [x for x in command_parser()._actions if hasattr(x, "_choices_actions")]
    rows = [[f"[`{x.dest}`](cli.md#{x.dest})", x.help] for x in found._choices_actions]
    return table(["`python -m flashcute ...`", "does"], rows)


def environment() -> str:
    """All variables of a process with their defaults."""
    rows = [[f"`{name}`", default] for name, default, *_ in _core.environment_variables()]
    return table(["variable", "default"], rows)
