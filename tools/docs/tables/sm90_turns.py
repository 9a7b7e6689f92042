"""Tables of variants of Hopper's kernels that took turns: options in one process, headers in processes that live at
once."""

from __future__ import annotations

from lines import one, rounded, speed_ups, table, where

from tables.sm90_backward import HEAD_DIMS, MASKS, mean

FILE = "gpu_sm90_turns"
FA4, FA4_BEFORE = "gpu_sm90_backward_fa4_one_tile", "gpu_sm90_backward_fa4_before"
LENGTHS = (1024, 4096, 16384)
CELLS = {
    f"{mask} {length // 1024}k": (causal, length)
    for mask, causal in MASKS.items()
    for length in LENGTHS
}
ORDERS = {
    1: "dV begun before dS is published",
    2: "dK begun after dQ is passed on",
    4: "64-bit steps",
    8: "V waited for once",
}


def told_order(config: str) -> str:
    """The bits of the experiment's option `order` in words."""
    told = []
    for part in config.split(", "):
        if part.startswith("order "):
            bits = int(part.removeprefix("order "))
            told += [text for bit, text in ORDERS.items() if bits & bit]
        elif part == "prompt":
            told.append("`late_dq=False`")
        else:
            told.append(part.replace("early_reads", "early reads"))
    return ", ".join(told)


def options(head_dim: str) -> str:
    """The time of the default, which had none of them, over the time with each."""
    found: dict[str, dict[tuple[bool, int], float]] = {}
    for x in where(FILE, kind="gradient_orders", head_dim=int(head_dim)):
        found.setdefault(x["config"], {})[x["causal"], x["seqlen"]] = x["over_default"]
    rows = [
        [told_order(config), *(f"{of[cell]:.2f}" for cell in CELLS.values())]
        for config, of in found.items()
        if config != "default"
    ]
    return table(["d " + head_dim, *CELLS], rows, numbers=len(CELLS))


def turns(run: str, head_dim: str, base: str = "", group: str = "1") -> str:
    """The time of the variant `base`, by default the first, over the time of each; `group`: query heads that share a
    key head."""
    found: dict[str, dict[tuple[bool, int], float]] = {}
    of = {"head_dim": int(head_dim), "heads_per_kv_head": int(group), "what": "gradients"}
    for x in where(FILE, kind="hopper_turns", run=run, **of):
        found.setdefault(x["variant"], {})[x["causal"], x["seqlen"]] = x["ms"]
    compared = found[base or next(iter(found))]
    cells = {name: cell for name, cell in CELLS.items() if cell in compared}
    rows = [
        [variant, *(f"{compared[cell] / ms[cell]:.2f}" for cell in cells.values())]
        for variant, ms in found.items()
        if ms is not compared
    ]
    return table([f"d {head_dim}", *cells], rows, numbers=len(cells))


def forward_steps() -> str:
    """What 64-bit steps bring to the forward."""
    before, after = (
        {
            (x["head_dim"], x["causal"], x["seqlen"]): x["ms"]
            for x in where(
                FILE, kind="hopper_turns", run="steps", what="forward", variant=variant, map=None
            )
        }
        for variant in ("as it was", "64-bit steps")
    )
    told = []
    for head_dim in sorted({cell[0] for cell in before}):
        ratios = [before[cell] / after[cell] for cell in before if cell[0] == head_dim]
        told.append([head_dim, *(f"{x:.3f}" for x in (min(ratios), max(ratios)))])
    return table(["head dim", "lowest", "highest"], told, numbers=2)


def before_and_now() -> str:
    """FlashAttention-4's time over ours in two runs, each of one process."""
    runs = [speed_ups(file, "fa4") for file in (FA4_BEFORE, FA4)]
    rows = []
    for head_dim in HEAD_DIMS:
        for mask, causal in MASKS.items():
            for name, found in zip(("before", "now"), runs, strict=True):
                of = {cell[3]: x for cell, x in found.items() if cell[4:] == (head_dim, causal)}
                rows.append([f"{head_dim} {mask}, {name}", *(rounded(of[n]) for n in sorted(of))])
    lengths = sorted({cell[3] for cell in runs[0]})
    header = ["head dim, mask", *(f"{n // 1024}k" for n in lengths)]
    return table(header, rows, numbers=len(lengths))


def machine_code() -> str:
    """How long the loop's body is, from its first product to its last, with the tests in it and without."""

    def instructions(causal: bool, body: str) -> int:
        return int(
            one(FILE, kind="gradient_machine_code", causal=causal, body=body)["instructions"]
        )

    (full, plain), (causal, plain_causal) = (
        [instructions(of, f"{which} tests") for which in ("with", "without")]
        for of in MASKS.values()
    )
    return (
        f"From its first product to its last the body without tests has {plain} instructions for {full}, under the\n"
        f"causal mask {plain_causal} for {causal}, and no jump but those of barriers."
    )


def passes() -> str:
    """Microseconds of each launch of a call, by torch's profiler, ours and FlashAttention-4's."""
    names = {"flashcute": "ours", "fa4": "FlashAttention-4"}
    rows = []
    for x in where(FILE, kind="gradient_pass_times", impl="flashcute"):
        mask = "causal" if x["causal"] else "full"
        for impl, name in names.items():
            of = {key: x[key] for key in ("head_dim", "seqlen", "causal")}
            found = one(FILE, kind="gradient_pass_times", impl=impl, **of)
            told = [f"{found[f'us_{launch}']:.0f}" for launch in ("prepare", "gradients", "finish")]
            rows.append([f"{x['head_dim']} {mask}, {x['seqlen'] // 1024}k, {name}", *told])
    return table(["us", "before", "main pass", "after"], rows, numbers=3)


def grouped() -> str:
    """TFLOP/s of eight query heads for each key head."""
    file = "gpu_sm90_backward_gqa"
    ratios = speed_ups(file, "sdpa_cudnn")
    rows = []
    for head_dim in HEAD_DIMS:
        for mask, causal in MASKS.items():
            of = {cell[3]: x for cell, x in ratios.items() if cell[4:] == (head_dim, causal)}
            told = []
            for length, ratio in sorted(of.items()):
                cell = {"head_dim": head_dim, "causal": causal, "seqlen_q": length}
                rate = one(file, impl="flashcute", **cell)["tflops"]
                told.append(f"{rate:.0f} ({rounded(ratio)})")
            rows.append([f"{head_dim} {mask}", *told])
    header = [f"{n // 1024}k" for n in sorted({cell[3] for cell in ratios})]
    return (
        table(["head dim, mask", *header], rows, numbers=len(header))
        + f"\n\nGeometric mean over cuDNN: {mean(ratios)}."
    )
