"""``explain``: what a call with given sizes would run, and why."""

from __future__ import annotations

import argparse

from .. import ForwardConfig, explain
from .kits import add_device_argument, choose_kit
from .options import DTYPES, Commands, add_config_arguments, changed_config, given_changes, natural


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="which kernel a call would run, and why no other",
        description="Prints which backend, configuration and kernel image a call would run, and "
        "why the others were not taken. Runs nothing. An option of ForwardConfig changes the "
        "default configuration.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batch", type=natural, default=1, metavar="N")
    parser.add_argument("--heads", type=natural, default=16, metavar="N", help="query heads")
    parser.add_argument("--kv-heads", type=natural, metavar="N", help="default: as many as --heads")
    parser.add_argument("--seqlen-q", type=natural, default=1024, metavar="N")
    parser.add_argument("--seqlen-k", type=natural, metavar="N", help="default: --seqlen-q")
    parser.add_argument("--head-dim", type=natural, default=128, metavar="N")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--layout", choices=("bshd", "bhsd"), default="bshd")
    add_device_argument(parser)
    add_config_arguments(parser, ForwardConfig)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    kit = choose_kit(options.device, options.dtype, prefer_numpy=True)
    kv_heads = options.heads if options.kv_heads is None else options.kv_heads
    seqlen_k = options.seqlen_q if options.seqlen_k is None else options.seqlen_k

    def shape(seqlen: int, heads: int) -> tuple[int, ...]:
        if options.layout == "bshd":
            return options.batch, seqlen, heads, options.head_dim
        return options.batch, heads, seqlen, options.head_dim

    q = kit.empty(shape(options.seqlen_q, options.heads), options.dtype)
    k = kit.empty(shape(seqlen_k, kv_heads), options.dtype)
    changes = given_changes(options)
    cfg = changed_config(options.head_dim, options.dtype, kit.arch, changes) if changes else None
    print(explain(q, k, k, options.causal, cfg=cfg, layout=options.layout))
    return 0
