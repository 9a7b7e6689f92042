"""Tables of docs/reference that are read from the installed package."""

from __future__ import annotations

import flashcute
from flashcute import BackwardConfig, ForwardConfig, _core
from flashcute.__main__ import command_parser
from lines import table

# The default tile of each serves those below it, too.
BUCKETS = {64: "1 to 64", 128: "65 to 128", 256: "129 to 256"}
HEAD_DIMS = tuple(BUCKETS)
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
    rows: dict[tuple[int, ForwardConfig], list[str]] = {}
    for head_dim in HEAD_DIMS:
        for target in TARGETS:
            cfg = flashcute.default_config(head_dim, dtype, target)
            rows.setdefault((head_dim, cfg), []).append(target)
    told = [
        [*row(d, cfg, targets), f"{cfg.smem_bytes / 1024:g}", f"`{cfg.kernel}`", other_options(cfg)]
        for (d, cfg), targets in rows.items()
    ]
    return table([*HEADER, "KiB", "kernel", "other options"], told)


def backward_defaults(dtype: str) -> str:
    """The same of gradients, with and without the same bits in every run."""
    rows: dict[tuple[int, BackwardConfig], list[str]] = {}
    for head_dim in HEAD_DIMS:
        for deterministic in (False, True):
            for target in TARGETS:
                cfg = flashcute.default_backward_config(
                    head_dim, dtype, target, deterministic=deterministic
                )
                rows.setdefault((head_dim, cfg), []).append(target)
    told = [[*row(d, cfg, targets), other_options(cfg)] for (d, cfg), targets in rows.items()]
    return table([*HEADER, "other options"], told)


HEADER = ("head dimension", "GPUs", "tile", "warps", "stages")


def row(head_dim: int, cfg: Config, targets: list[str]) -> list[object]:
    """The columns that both tables have."""
    capabilities = ", ".join(f"{int(x[3:]) / 10:.1f}" for x in targets)
    tile = f"{cfg.block_m}×{cfg.block_n}"
    return [BUCKETS[head_dim], capabilities, tile, cfg.num_warps, cfg.stages]


def commands() -> str:
    """All commands with their sentence."""
    [found] = [x for x in command_parser()._actions if hasattr(x, "_choices_actions")]
    rows = [[f"[`{x.dest}`](cli.md#{x.dest})", x.help] for x in found._choices_actions]
    return table(["`python -m flashcute ...`", "does"], rows)


def environment() -> str:
    """All variables of a process with their defaults."""
    rows = [[f"`{name}`", default] for name, default, *_ in _core.environment_variables()]
    return table(["variable", "default"], rows)
