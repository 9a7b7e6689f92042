"""Tables of speed-ups: their time over ours."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from lines import Cell, Line, lines, link, rounded, speed_ups, table, where

from tables.cases import IMPLEMENTATIONS

HEAD_DIMS = (64, 128, 256)


class Row(NamedTuple):
    what: str  # the call
    peer: str  # in words
    impl: str  # its name in the lines
    file: str
    ours: str = "flashcute"


ROWS = {
    "forward_hopper": [
        Row("forward, Hopper's kernel", "FlashAttention-3", "fa3", "gpu_forward_hopper"),
        Row("forward, Hopper's kernel", "cuDNN", "sdpa_cudnn", "gpu_forward_hopper"),
    ],
    "forward_hopper_again": [
        Row("the same, a second run", "FlashAttention-3", "fa3", "gpu_forward_hopper_second_run"),
        Row("the same, a second run", "cuDNN", "sdpa_cudnn", "gpu_forward_hopper_second_run"),
    ],
    "forward_hopper_short": [
        Row(
            "few tokens, or up to 8 query heads for each key head",
            peer,
            impl,
            "gpu_forward_hopper_short",
        )
        for peer, impl in (("FlashAttention-3", "fa3"), ("cuDNN", "sdpa_cudnn"))
    ],
    "windows": [
        Row("causal, with and without windows and sinks", "FlashAttention-4", "fa4", "gpu_windows_fa4"),
    ],
    "packed": [
        Row("packed sequences, Hopper's kernel", "FlashAttention-3", "fa3", "gpu_packed"),
        Row("packed sequences, Hopper's kernel", "torch's `varlen_attn`", "varlen_attn", "gpu_packed"),
    ],
    "forward_mma": [
        Row("forward, mma.sync kernel", "FlashAttention-2", "sdpa_flash", "gpu_forward"),
    ],
    "forward_float32": [
        Row("forward, float32", "torch, memory-efficient", "sdpa_efficient", "gpu_forward_float32"),
        Row("forward, float32", "torch, math", "sdpa_math", "gpu_forward_float32"),
    ],
    "gradients_hopper": [
        Row("gradients, Hopper's kernels", "FlashAttention-4", "fa4", "gpu_sm90_backward_fa4"),
        Row("gradients, Hopper's kernels", "cuDNN", "sdpa_cudnn", "gpu_sm90_backward_fa4"),
        Row("gradients, Hopper's, earlier", "FlashAttention-2", "sdpa_flash", "gpu_sm90_backward"),
        Row(
            "gradients, Hopper's, earlier",
            "our mma.sync kernels",
            "flashcute[kernel=sm80]",
            "gpu_sm90_backward",
        ),
        Row(
            "gradients, eight query heads for each key head, Hopper's kernels",
            "cuDNN",
            "sdpa_cudnn",
            "gpu_sm90_backward_gqa",
        ),
    ],
    "gradients_hopper_wide": [
        Row("gradients, wide heads, Hopper's kernels", "cuDNN", "sdpa_cudnn", "gpu_sm90_backward_wide"),
    ],
    "gradients_hopper_deterministic": [
        Row(
            "gradients, deterministic, Hopper's",
            peer,
            impl,
            "gpu_sm90_backward_deterministic",
            "flashcute_deterministic",
        )
        for peer, impl in (("cuDNN", "sdpa_cudnn"), ("our default ones", "flashcute"))
    ],
    "gradients": [
        Row("gradients, mma.sync kernel", "FlashAttention-2", "sdpa_flash", "gpu_backward"),
    ],
    "gradients_more": [
        Row(
            "gradients, deterministic",
            "FlashAttention-2",
            "sdpa_flash",
            "gpu_backward",
            "flashcute_deterministic",
        ),
        Row(
            "gradients, eight query heads for each key head",
            "FlashAttention-2",
            "sdpa_flash",
            "gpu_backward_gqa",
        ),
        *(
            Row(
                f"gradients, float32{more}",
                "torch, memory-efficient",
                "sdpa_efficient",
                "gpu_backward_float32",
                ours,
            )
            for more, ours in (("", "flashcute"), (", deterministic", "flashcute_deterministic"))
        ),
    ],
    "cpu": [
        Row("forward, CPU, float32", "torch on the CPU", "sdpa", "cpu_forward_float32"),
        Row("gradients, CPU, float32", "torch on the CPU", "sdpa", "cpu_backward_float32"),
    ],
    "cpu_naive": [
        Row("forward, CPU, float32", "naive, in torch", "naive", "cpu_forward_float32"),
    ],
}  # fmt: skip

FLEX = {
    "documents": ("causal documents in one row, Hopper's kernel", False),
    "documents_made": ("documents in one row, and their mask made", True),
}


def speed_up_rows(*groups: str) -> str:
    """Geometric means by head dimension, and the lowest and highest single cell, of these groups of rows."""
    told = []
    for group in groups:
        if group in FLEX:
            what, made = FLEX[group]
            file = "gpu_block_masks"
            told.append(
                [link(what, file), "FlexAttention, compiled", *summary(over_flex(file, made))]
            )
        for row in ROWS.get(group, []):
            found = of_columns(speed_ups(row.file, row.impl, row.ours))
            told.append([link(row.what, row.file), row.peer, *summary(found)])
        if group not in FLEX and group not in ROWS:
            raise ValueError(f"no group of rows {group!r}: {', '.join([*ROWS, *FLEX])}")
    header = ["call, and its measurements", "beside", *map(str, HEAD_DIMS), "lowest", "highest"]
    return table(header, told, numbers=5)


def of_columns(found: dict[Cell, float]) -> dict[Cell, float]:
    """Without head dimensions that have no column: the lowest and the highest are of what a row shows."""
    return {cell: ratio for cell, ratio in found.items() if cell[-2] in HEAD_DIMS}


def summary(found: dict[Cell, float]) -> list[str]:
    by_dim: dict[int, list[float]] = {}
    for (*_, head_dim, _), ratio in found.items():
        by_dim.setdefault(head_dim, []).append(ratio)
    means = [statistics.geometric_mean(by_dim[d]) if d in by_dim else None for d in HEAD_DIMS]
    return [rounded(x) for x in (*means, min(found.values()), max(found.values()))]


PRESETS = "gpu_presets"


def presets() -> str:
    """The attention of models, forward and gradients, beside the fastest of the others."""
    rows = []
    for x in where(PRESETS, impl="flashcute", status="ok"):
        peers = [y for y in lines(PRESETS) if y["impl"] != "flashcute" and same_call(x, y)]
        peer = min(
            (y for y in peers if y["status"] == "ok"), key=lambda y: y["ms_p50"], default=None
        )
        told = ["none"] if peer is None else [IMPLEMENTATIONS[peer["impl"]]]
        theirs = None if peer is None else peer["ms_p50"]
        rows.append(
            [x["preset"], f"{x['batch']} x {x['seqlen_q']:,}", layer_of(x), pass_of(x), *told]
            + [f"{x['ms_p50']:.2f}", f"{x['tflops']:.0f}"]
            + (["-", "-"] if theirs is None else [f"{theirs:.2f}", rounded(theirs / x["ms_p50"])])
        )
    header = [
        "model",
        "batch x length",
        "layer",
        "pass",
        "fastest of the others",
        "ms",
        "TFLOP/s",
        "theirs, ms",
    ]
    return table([*header, "speed-up"], rows, numbers=4)


def same_call(one: Line, other: Line) -> bool:
    fields = ("preset", "batch", "seqlen_q", "window")
    return pass_of(one) == pass_of(other) and all(one[name] == other[name] for name in fields)


def pass_of(line: Line) -> str:
    found = line.get("pass", line["kind"])
    return "gradients" if found == "backward" else str(found)


def layer_of(line: Line) -> str:
    return "causal" if line["window"] is None else f"window of {line['window'][0] + 1} keys"


def over_flex(file: str, made: bool) -> dict[Cell, float]:
    """Documents beside FlexAttention, each call alone or with the making of its mask."""
    found = {}
    for line in lines(file):
        if "ms_flex_documents" in line:
            theirs = line["ms_flex_documents"] + made * line["ms_flex_build"]
            ours = line["ms_mapped_documents"] + made * line["ms_build_documents"]
            found[(line["tokens"], line["head_dim"], True)] = theirs / ours
    return found


def windows() -> str:
    """Rates of visible pairs beside those of the causal kernel."""
    cases: dict[tuple[int, int, int, str], dict[str, float]] = {}
    for x in where("gpu_sm90_windows", kind="window", commit="e10124f"):
        width = x["window"][0] + 1  # before the query, and its own key
        column = "gradients" if x["pass"] == "backward" else kernel_of(x)
        heads = f"{x['heads']} for {x['kv_heads']}"
        cases.setdefault((x["head_dim"], x["seqlen_q"], width, heads), {})[column] = x["efficiency"]
    columns = ("sm90", "sm80", "gradients")
    rows = [
        [head_dim, f"{seqlen // 1024}k", f"{width:,}", heads, *(rounded(row[c]) for c in columns)]
        for (head_dim, seqlen, width, heads), row in cases.items()
    ]
    header = ["head dimension", "length", "window", "heads", "forward, Hopper's kernel"]
    return table([*header, "forward, mma.sync kernel", "gradients"], rows, numbers=3)


def mapped() -> str:
    """The longest rows, beside our own kernels for the same mask: their time over that with a map."""
    found = [x for x in lines("gpu_block_masks") if x["tokens"] == 16384]
    calls = {
        "a map that shows everything": ("ms_full", "ms_mapped_full"),
        "the same and the causal mask": ("ms_causal", "ms_mapped_causal"),
        "the same, gradients": ("ms_backward_causal", "ms_backward_mapped_causal"),
        "a map that shows everything, mma.sync kernel": ("ms_sm80_full", "ms_sm80_mapped_full"),
        "the same and the causal mask, mma.sync kernel": (
            "ms_sm80_causal",
            "ms_sm80_mapped_causal",
        ),
    }
    rows = [
        [call, *(rounded(x[without] / x[with_map]) for x in found)]
        for call, (without, with_map) in calls.items()
    ]
    rows.append(
        ["causal documents, beside the same sequences packed"]
        + [rounded(x["ms_packed"] / x["ms_mapped_documents"]) for x in found]
    )
    return table(["call", *(str(x["head_dim"]) for x in found)], rows, numbers=len(found))


def kernel_of(line: Line) -> str:
    return "sm90" if "_sm90" in line["config"] else "sm80"


def packed_equal() -> str:
    """Time of a batch over that of the same sequences packed, lowest and highest of head dimensions and masks."""
    ratios: dict[tuple[int, int], list[float]] = {}
    for x in lines("gpu_packed_order"):
        if "ms_batch" in x and "variant" not in x:
            ratios.setdefault((x["batch"], x["seqlen"]), []).append(x["ms_batch"] / x["ms_packed"])
    rows = [
        [sequences, f"{length:,}", rounded(min(found)), rounded(max(found))]
        for (sequences, length), found in sorted(ratios.items())
    ]
    return table(["sequences", "rows of each", "lowest", "highest"], rows, numbers=4)


def cpu_masks() -> str:
    """Time over that of the unmasked call, over the share of the blocks that are visited."""
    columns = {
        "a map that shows everything": "mapped_full",
        "the causal mask": "causal",
        "a map of the triangle": "mapped_causal",
        "causal documents": "documents",
        "a window of 1,025 keys": "window",
        "a map of the window": "mapped_window",
    }
    found = lines("cpu_block_masks")
    rows = []
    for what, name in columns.items():
        costs = [x[f"of_share_{name}"] for x in found]
        shares = sorted({f"{x[f'share_{name}']:.2f}" for x in found})
        rows.append(
            [what, " to ".join(dict.fromkeys((shares[0], shares[-1]))), min(costs), max(costs)]
        )
    told = [[what, shares, f"{low:.2f}", f"{high:.2f}"] for what, shares, low, high in rows]
    return table(["mask", "share of blocks", "lowest", "highest"], told, numbers=3)


def cpu_documents() -> str:
    found = lines("cpu_block_masks")
    torch = [x["ms_torch_documents"] / x["ms_documents"] for x in found]
    built = [x["ms_build_documents"] / x["ms_documents"] for x in found]
    dense = sorted({round(x["ms_build_dense"], 1) for x in found})
    return (
        f"torch's attention with the same documents as booleans takes {min(torch):.1f} to {max(torch):.1f} times as "
        f"long. Making the map of the documents takes {100 * min(built):.0f} to {100 * max(built):.0f} % of the "
        f"forward; from booleans {dense[0]} to {dense[-1]} ms."
    )


def host_cost() -> str:
    """Of the last run: what a call takes from Python until it returns."""
    found = [x for x in lines("gpu_overhead") if x["commit"] == lines("gpu_overhead")[-1]["commit"]]
    torch = next(x["us_p50"] for x in found if x["call"] == "sdpa")
    names = {"sdpa": "torch's `scaled_dot_product_attention`"}
    names["sdpa under activate()"] = "the same under `flashcute.sdpa.activate()`"
    rows = [
        [names.get(x["call"], f"`{x['call']}`"), f"{x['us_p50']:.0f}", f"{x['us_p50'] / torch:.2f}"]
        for x in found
    ]
    return table(["call", "µs", "of torch's"], rows, numbers=2)


def training() -> str:
    """Both hosts; the losses are those of the second run."""
    found = lines("gpu_train_llama")
    names = {
        "fcute": "`fcute`",
        "sdpa": "transformers' `sdpa`",
        "flash2": "FlashAttention-2 in torch",
    }
    runs = [
        [x for x in found if x["commit"] == c] for c in dict.fromkeys(x["commit"] for x in found)
    ]
    fast, slow = ({x["impl"]: x for x in run} for run in runs)
    sdpa = slow["sdpa"]["losses"]
    rows = []
    for impl, name in names.items():
        losses = slow[impl]["losses"]
        apart = max(abs(a - b) for a, b in zip(losses[:20], sdpa[:20], strict=True))
        cells = [f"{x[impl]['ms_p50']:.1f}" for x in (fast, slow)]
        cells += [
            f"{slow[impl]['peak_bytes'] / 1e9:.2f} GB",
            f"{statistics.mean(losses[-20:]):.4f}",
        ]
        rows.append([name, *cells, "" if impl == "sdpa" else f"{apart:.4f}"])
    header = ["attention", "ms a step, fast host", "slow host", "peak memory"]
    header += ["loss, mean of the last 20 steps", "largest difference from sdpa in the first 20"]
    return table(header, rows, numbers=5)


def first_call() -> str:
    """Seconds of the first call in a new process, by where its kernels came from."""
    roads = ("ahead of time", "disk cache", "compiled")
    calls = {
        "flash_attention": "forward",
        "flash_attention and its gradients": "a training step",
        "flash_attention and its deterministic gradients": "a training step, deterministic",
    }
    newest = lines("gpu_first_use")[-1]["commit"]
    found = where("gpu_first_use", commit=newest)
    rows: dict[tuple[int, str], dict[str, float]] = {}
    for x in found:
        call = calls[x["what"].partition(",")[0]]
        rows.setdefault((x["head_dim"], call), {})[x["road"]] = x["call_s"]
    told = [
        [head_dim, call, *(seconds(times.get(road)) for road in roads)]
        for (head_dim, call), times in sorted(rows.items())
    ]
    header = [
        "head dimension",
        "call",
        "kernels ahead of time",
        "from the disk cache",
        "compiled first",
    ]
    return table(header, told, numbers=3)


def seconds(time: float | None) -> str:
    if time is None:
        return "-"
    return f"{time:.3f} s" if time < 0.1 else f"{time:.2f} s" if time < 1 else f"{time:.1f} s"


def naive() -> str:
    """Time and memory of the naive computation beside ours."""
    cases: dict[tuple[int, bool], dict[str, Line]] = {}
    for x in lines("gpu_naive"):
        cases.setdefault((x["seqlen_q"], x["causal"]), {})[x["impl"]] = x
    rows = [
        [
            f"{seqlen:,}",
            "causal" if causal else "full",
            *(f"{by_impl[impl]['ms_p50']:.2f}" for impl in ("flashcute", "naive")),
            rounded(by_impl["naive"]["ms_p50"] / by_impl["flashcute"]["ms_p50"]),
            *(f"{by_impl[impl]['peak_bytes'] / 2**20:,.0f}" for impl in ("flashcute", "naive")),
        ]
        for (seqlen, causal), by_impl in sorted(cases.items())
    ]
    header = ["length", "mask", "flashcute, ms", "naive, ms", "speed-up"]
    return table([*header, "flashcute, MiB", "naive, MiB"], rows, numbers=5)
