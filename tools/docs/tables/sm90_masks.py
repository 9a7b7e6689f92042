"""Tables of what masks and widths cost Hopper's forward: the warp that scouts, and heads of other widths beside
FlashAttention-3."""

from __future__ import annotations

import statistics

from lines import one, rounded, table, where

SCOUT, WIDTHS, ENDS = "gpu_sm90_scout", "gpu_sm90_widths_masks", "gpu_sm90_tile_ends"
STARTS = "gpu_sm90_tile_starts"
LENGTHS = (1024, 2048, 4096, 8192, 16384)


def before_over_after() -> str:
    """Time without a scouting warp over that with one, by case and head dimension."""
    cases = {
        "a window of 1,024 keys, 4 x 4,096": "window 1023 4096",
        "the same, 16,384": "window 1023 16384",
        "a window of 4,096 keys, 32,768": "window 4095 32768",
        "all but one key, 4 x 4,096": "band 4096",
        "causal, packed: 4 x 4,096": "pack 4x4096 causal",
        "causal, packed: 16 x 1,024": "pack 16x1024 causal",
        "causal, packed: 64 x 256": "pack 64x256 causal",
        "packed: 4 x 4,096": "pack 4x4096 full",
        "packed: 16 x 1,024": "pack 16x1024 full",
        "packed: 64 x 256": "pack 64x256 full",
        "causal, packed: log-normal lengths": "pack lognormal",
    }
    rows = []
    for name, case in cases.items():
        told = []
        for head_dim in (64, 128):
            ms = one(SCOUT, run="case by case", case=case, head_dim=head_dim)["ms"]
            told.append(rounded(ms["before"] / ms["after"]))
        rows.append([name, *told])
    return table(["case", "64", "128"], rows, numbers=2)


def widths() -> str:
    """TFLOP/s over FlashAttention-3's."""
    rows = []
    for name, of in (
        ("96", {"head_dim": 96}),
        ("192", {"head_dim": 192, "head_dim_v": None}),
        ("192 / 128", {"head_dim": 192, "head_dim_v": 128}),
    ):
        for mask, causal in (("causal", True), ("full", False)):
            ratios = []
            for length in LENGTHS:
                ours, theirs = (
                    one(WIDTHS, impl=x, causal=causal, seqlen_q=length, **of)["ms_p50"]
                    for x in ("flashcute", "fa3")
                )
                ratios.append(rounded(theirs / ours))
            rows.append([f"{name} {mask}", *ratios])
    for mask, causal in (("causal", True), ("full", False)):
        rows.insert(
            2 + (not causal), [f"160 {mask}", *map(rounded, of_160("160: 128 x 128", causal))]
        )
    return table(["head dim, mask", *(f"{n // 1024}k" for n in LENGTHS)], rows, numbers=5)


def of_160(tile: str, causal: bool) -> list[float]:
    found = where(WIDTHS, kind="width_turns", causal=causal)
    rates = {x["seqlen_q"]: x["tflops"] for x in found}
    return [rates[n][tile] / rates[n]["fa3"] for n in LENGTHS]


def widths_of_160() -> str:
    """All tiles that were timed, over FlashAttention-3."""
    tiles = [x for x in where(WIDTHS, kind="width_turns")[0]["tflops"] if x != "fa3"]
    rows = [
        [f"{tile}, {mask}", *map(rounded, of_160(tile, causal))]
        for tile in tiles
        for mask, causal in (("causal", True), ("full", False))
    ]
    return table(["tile, mask", *(f"{n // 1024}k" for n in LENGTHS)], rows, numbers=5)


STEPS = {
    "next_tile": "the next tile is announced",
    "begin_scores": "its first S has begun",
    "output_done": "the last P V is done",
    "store": "the output is written",
    "scores_done": "the first S is done",
    "softmax": "its softmax",
    "value": "the first V has arrived",
}


def tile_start() -> str:
    """Cycles of a warpgroup from the last product of a tile to the first P V of the next."""
    cases = [(d, c) for d in (64, 128) for c in ("causal 4k", "band 4k", "window 4095 32k")]
    found = [one(ENDS, kind="tile_stamps", head_dim=d, case=c) for d, c in cases]
    rows = [[step, *(f"{x['cycles'][name]:,}" for x in found)] for name, step in STEPS.items()]
    rows.append(["all", *(f"{x['cycles_to_first_value']:,}" for x in found)])
    rows.append(["a block of keys", *(f"{x['cycles_per_block']:,}" for x in found)])
    names = {"causal 4k": "causal", "band 4k": "band", "window 4095 32k": "window of 4,096"}
    return table(["until", *(f"{d}, {names[c]}" for d, c in cases)], rows, numbers=len(cases))


def plain_ends() -> str:
    """The time with logarithms and selections at the end of every tile over that without."""
    rows = []
    for name, case in (
        ("a window of 1,024 keys, 4 x 4,096", ("window-1024", 4096)),
        ("causal, packed: 4 x 4,096", ("packed", 4096)),
        ("causal, packed: 16 x 1,024", ("packed", 1024)),
        ("packed: 4 x 4,096", ("packed-full", 4096)),
        ("packed: 16 x 1,024", ("packed-full", 1024)),
        ("a window of 4,096 keys, 32,768", ("window-4096", 32768)),
    ):
        told = []
        for head_dim in (64, 128):
            x = one(ENDS, kind="compared_builds", mask=case[0], seqlen=case[1], head_dim=head_dim)
            told += [rounded(x["over_first"][run]) for run in ("after", "addresses_early")]
        rows.append([name, *told])
    header = ["case", "64", "64, addresses early", "128", "128, addresses early"]
    return table(header, rows, numbers=4)


def late_store() -> str:
    """The time of the same kernel over that with `late_store`."""
    rows = []
    for head_dim in (64, 128, 256):
        for mask in ("causal", "full"):
            ratios = [
                one(ENDS, kind="late_store_builds", mask=mask, seqlen=length, head_dim=head_dim)[
                    "over_first"
                ]["late"]
                for length in (1024, 2048, 4096, 16384)
            ]
            rows.append([f"{head_dim} {mask}", *map(rounded, ratios)])
    for head_dim in (96, 160, 192):
        for mask, causal in (("causal", True), ("full", False)):
            rates = [
                one(ENDS, kind="late_store", causal=causal, seqlen=length, head_dim=head_dim)[
                    "tflops"
                ]
                for length in (1024, 2048, 4096, 16384)
            ]
            rows.append([f"{head_dim} {mask}", *(rounded(x["late"] / x["early"]) for x in rates)])
    return table(["head dim, mask", "1k", "2k", "4k", "16k"], rows, numbers=4)


def start_steps() -> str:
    """Time before the starts of tiles were shortened over that after each step, each with those before it."""
    steps = ("flags", "flags, rows", "flags, rows, 32 bits")
    rows = []
    for head_dim in (64, 128, 256):
        for mask in ("causal", "full"):
            cell = {"head_dim": head_dim, "mask": mask}
            found = [one(STARTS, run="steps", seqlen=n, **cell)["over_first"] for n in (1024, 4096)]
            whole = [
                one(STARTS, run="all", seqlen=n, **cell)["over_first"]["after"]
                for n in (1024, 2048, 4096, 16384)
            ]
            told = [x[step] for x in found for step in steps]
            rows.append([f"{head_dim} {mask}", *map(rounded, (*told, *whole))])
    each = ("flags", "rows", "32 bits")
    header = [
        "head dim, mask",
        *(f"{n}: {step}" for n in ("1k", "4k") for step in each),
        *(f"all, {n}" for n in ("1k", "2k", "4k", "16k")),
    ]
    return table(header, rows, numbers=10)


def orders() -> str:
    """Deterministic gradients: the time of one order for all heads over that of two."""
    rows = []
    for run, head_dims in (
        ("all in parts", (128,)),
        ("parts", (128,)),
        ("at once", (64, 128)),
        ("at once, 8,192 tokens", (64, 128)),
    ):
        for head_dim in head_dims:
            found = where("gpu_sm90_orders", run=run, head_dim=head_dim, causal=True)
            names = list(dict.fromkeys(name for x in found for name in x["over_first"]))
            for name in names:
                by_length = {x["seqlen"]: x["over_first"].get(name) for x in found}
                rows.append(
                    [f"d {head_dim}, {run}: {name}", *(rounded(by_length.get(n)) for n in LENGTHS)]
                )
    return table(["", *(f"{n // 1024}k" for n in LENGTHS)], rows, numbers=5)


LLAMA = {
    "fcute": "`fcute`",
    "fcute_sm80": "the same, gradients by the mma.sync kernels",
    "cudnn": "SDPA, cuDNN",
    "flash2": "SDPA, FlashAttention-2",
}


def llama_step() -> str:
    """A training step, and attention's share of its kernels."""
    rows = []
    for impl, name in LLAMA.items():
        told = []
        for head_dim in (64, 128):
            x = one("gpu_llama_step", impl=impl, head_dim=head_dim)
            share = x["ms_attention"] / x["ms_kernels"]
            told += [f"{x['ms_p50']:.1f}", f"{x['ms_attention']:.1f}", f"{100 * share:.0f} %"]
        rows.append([name, *told])
    header = ["attention", "64: ms a step", "of it attention", "share of kernels"]
    return table(
        [*header, "128: ms a step", "of it attention", "share of kernels"], rows, numbers=6
    )


def llama_summary() -> str:
    ratios = []
    for head_dim in (64, 128):
        ours, theirs = (
            one("gpu_llama_step", impl=x, head_dim=head_dim) for x in ("fcute", "cudnn")
        )
        ratios += [theirs["ms_p50"] / ours["ms_p50"], theirs["ms_attention"] / ours["ms_attention"]]
    steps, attention = ratios[::2], ratios[1::2]
    return (
        f"A step is {min(steps):.2f} to {max(steps):.2f} times as fast as with cuDNN, its attention "
        f"{statistics.mean(attention):.2f} times."
    )
