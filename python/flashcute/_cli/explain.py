"""``explain``: what a call with given sizes would run, and why."""

from __future__ import annotations

import argparse

from .. import ForwardConfig, explain
from .kits import add_device_argument, choose_kit
from .options import (
    DTYPES,
    Commands,
    add_config_arguments,
    changed_config,
    diagonal,
    given_changes,
    natural,
    window,
)


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="which kernel a call would run, and why",
        description="Prints which backend, configuration and kernel image a call of these sizes would "
        "run, why, and why the others were not taken; with --gradients the same of its gradients. Runs "
        "nothing. With an option of ForwardConfig it explains the default configuration with that change.",
    )

    def size(name: str, default: int | None, help_text: str) -> None:
        parser.add_argument(name, type=natural, default=default, metavar="N", help=help_text)

    size("--batch", 1, "default: 1")
    size("--heads", 16, "query heads (default: 16)")
    size("--kv-heads", None, "key and value heads (default: as many as --heads)")
    size("--seqlen-q", 1024, "default: 1024")
    size("--seqlen-k", None, "default: as --seqlen-q")
    size("--head-dim", 128, "default: 128")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--causal", action="store_true", help="with the causal mask")
    parser.add_argument(
        "--diagonal",
        type=diagonal,
        default="end",
        metavar="end|start|N",
        help="of the causal mask, the window and the prefix (default: end)",
    )
    parser.add_argument(
        "--window",
        type=window,
        metavar="LEFT,RIGHT",
        help="how many keys before and after the diagonal a query sees; -1: no limit (default: no window)",
    )
    parser.add_argument(
        "--prefix",
        type=natural,
        metavar="N",
        help="with --causal: how many first keys every query sees (default: no prefix)",
    )
    parser.add_argument(
        "--seqlens",
        action="store_true",
        help="with seqlens_q and seqlens_k: batch entries have lengths of their own",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="with cu_seqlens_q and cu_seqlens_k: the batch entries one after the other, without a batch dimension",
    )
    parser.add_argument(
        "--sink", action="store_true", help="with a sink: one more logit of each query head"
    )
    parser.add_argument("--allow-tf32", action="store_true", help="let a GPU round float32 to TF32")
    parser.add_argument("--gradients", action="store_true", help="also how gradients are computed")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="gradients with the same bits in every run (with --gradients)",
    )
    parser.add_argument(
        "--layout", choices=("bshd", "bhsd"), default="bshd", help="of the tensors (default: bshd)"
    )
    add_device_argument(parser)
    add_config_arguments(parser, ForwardConfig)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    kit = choose_kit(options.device, options.dtype, prefer_numpy=True)
    kv_heads = options.heads if options.kv_heads is None else options.kv_heads
    seqlen_k = options.seqlen_q if options.seqlen_k is None else options.seqlen_k

    def shape(seqlen: int, heads: int) -> tuple[int, ...]:
        batch = () if options.packed else (options.batch,)
        rows = seqlen * options.batch if options.packed else seqlen
        if options.layout == "bshd":
            return *batch, rows, heads, options.head_dim
        return *batch, heads, rows, options.head_dim

    q = kit.empty(shape(options.seqlen_q, options.heads), options.dtype)
    k = kit.empty(shape(seqlen_k, kv_heads), options.dtype)
    # Which kernel runs depends on whether they are there, not on their numbers, which no call reads on the host.
    lengths = kit.lengths(options.batch) if options.seqlens else None
    starts = kit.lengths(options.batch + 1) if options.packed else None
    sink = kit.empty((options.heads,), options.dtype) if options.sink else None
    changes = given_changes(options, ForwardConfig)
    cfg = changed_config(options.head_dim, options.dtype, kit.arch, changes) if changes else None
    masks = {
        "diagonal": options.diagonal,
        "window": options.window,
        "prefix": options.prefix,
        "seqlens_q": lengths,
        "seqlens_k": lengths,
        "cu_seqlens_q": starts,
        "sink": sink,
    }
    told = explain(
        q,
        k,
        k,
        options.causal,
        cfg=cfg,
        gradients=options.gradients,
        **masks,
        layout=options.layout,
        allow_tf32=options.allow_tf32,
        deterministic=options.deterministic,
    )
    print(told)
    return 0
