"""Tables of docs/reference that are read from the installed package."""

from __future__ import annotations

import flashcute
from flashcute import BackwardConfig, ForwardConfig, _core
from flashcute.__main__ import command_parser
from lines import table

HEAD_DIMS = (64, 128, 256)
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


def other_options(cfg: Config, deterministic: bool = False) -> str:
    """What differs from a configuration with no options, in the words of Python."""
    plain = type(cfg)(dtype=cfg.dtype, head_dim=cfg.head_dim, kernel=cfg.kernel)
    names = [n for n, x in vars(type(cfg)).items() if isinstance(x, property)]
    skipped = (*COLUMNS, "name", "smem_bytes", *(["deterministic"] if deterministic else []))
    changed = [n for n in names if n not in skipped and getattr(cfg, n) != getattr(plain, n)]
    return ", ".join(f"`{n}={getattr(cfg, n)!r}`" for n in changed)


def forward_defaults(dtype: str, *targets: str) -> str:
    """The default configurations of a dtype by head dimension and target; equal ones in one row."""
    rows: dict[tuple[int, ForwardConfig], list[str]] = {}
    for head_dim in HEAD_DIMS:
        for target in targets or TARGETS:
            cfg = flashcute.default_config(head_dim, dtype, target)
            rows.setdefault((head_dim, cfg), []).append(target)
    told = [
        [
            "65 to 128" if d == 128 else "129 to 256" if d == 256 else "1 to 64",
            ", ".join(f"`{x}`" for x in found),
            f"`{cfg.kernel}`",
            cfg.block_m,
            cfg.block_n,
            cfg.num_warps,
            cfg.stages,
            f"{cfg.smem_bytes / 1024:g}",
            other_options(cfg),
        ]
        for (d, cfg), found in rows.items()
    ]
    header = [
        "head dimension",
        "target",
        "`kernel`",
        "`block_m`",
        "`block_n`",
        "`num_warps`",
        "`stages`",
    ]
    return table([*header, "shared memory, KiB", "also"], told)


def backward_defaults(dtype: str, *targets: str) -> str:
    """The same of gradients, with and without the same bits in every run."""
    rows: dict[tuple[int, BackwardConfig, bool], list[str]] = {}
    for head_dim in HEAD_DIMS:
        for same_bits in (False, True):
            for target in targets or TARGETS:
                cfg = flashcute.default_backward_config(
                    head_dim, dtype, target, deterministic=same_bits
                )
                rows.setdefault((head_dim, cfg, same_bits), []).append(target)
    told = [
        [
            "65 to 128" if d == 128 else "129 to 256" if d == 256 else "1 to 64",
            ", ".join(f"`{x}`" for x in found),
            same_bits,
            cfg.block_m,
            cfg.block_n,
            cfg.num_warps,
            cfg.stages,
            other_options(cfg, deterministic=True),
        ]
        for (d, cfg, same_bits), found in rows.items()
    ]
    header = [
        "head dimension",
        "target",
        "`deterministic`",
        "`block_m`",
        "`block_n`",
        "`num_warps`",
        "`stages`",
    ]
    return table([*header, "also"], told)


def commands() -> str:
    """All commands with their sentence."""
    [found] = [x for x in command_parser()._actions if hasattr(x, "_choices_actions")]
    rows = [[f"[`{x.dest}`](cli.md#{x.dest})", x.help] for x in found._choices_actions]
    return table(["`python -m flashcute ...`", "does"], rows)


def environment() -> str:
    """All variables of a process with their defaults."""
    rows = [[f"`{name}`", default] for name, default, *_ in _core.environment_variables()]
    return table(["variable", "default"], rows)
