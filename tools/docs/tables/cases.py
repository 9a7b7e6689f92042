"""Every case of a file of recorded lines, and where the lines come from."""

from __future__ import annotations

from lines import Line, lines, link, rounded, table

IMPLEMENTATIONS = {
    "flashcute": "flashcute",
    "flashcute_deterministic": "flashcute, deterministic",
    "fa3": "FlashAttention-3",
    "sdpa_cudnn": "cuDNN",
    "sdpa_flash": "FlashAttention-2",
    "sdpa_efficient": "torch, memory-efficient",
    "sdpa_math": "torch, math",
    "sdpa": "torch",
    "naive": "naive, in torch",
}


def every(file: str) -> str:
    """A row for each case and implementation."""
    unit, factor = (
        ("TFLOP/s", 1.0) if lines(file)[0]["device"].startswith("NVIDIA") else ("GFLOP/s", 1e3)
    )
    found = [x for x in lines(file) if x["status"] == "ok" and x["impl"] in IMPLEMENTATIONS]
    order = list(IMPLEMENTATIONS)
    found.sort(
        key=lambda x: (
            x["head_dim"],
            x.get("head_dim_v") or 0,
            x["causal"],
            x["seqlen_q"],
            x["kv_heads"],
            order.index(x["impl"]),
        )
    )
    ours = {case_of(x): x["ms_p50"] for x in found if x["impl"] == "flashcute"}
    rows = [
        [
            case_of(x),
            IMPLEMENTATIONS[x["impl"]],
            f"{x['ms_p50']:.3f}",
            f"{x['ms_p99']:.3f}",
            f"{x['tflops'] * factor:.0f}",
            f"{x['peak_bytes'] / 2**20:,.0f}",
            f"{relative_error(x):.1e}",
            "" if x["impl"].startswith("flashcute") else rounded(x["ms_p50"] / ours[case_of(x)]),
        ]
        for x in found
    ]
    header = [
        "case",
        "implementation",
        "p50, ms",
        "p99, ms",
        unit,
        "memory, MiB",
        "error",
        "speed-up",
    ]
    return table(header, rows, numbers=6)


def case_of(line: Line) -> str:
    heads = str(line["heads"])
    if line["kv_heads"] != line["heads"]:
        heads += f"/{line['kv_heads']}"
    mask = "causal" if line["causal"] else "full"
    dims = " / ".join(str(line[n]) for n in ("head_dim", "head_dim_v") if line.get(n) is not None)
    return f"d {dims}, {mask}, {line['batch']} x {heads} x {line['seqlen_q']:,}"


def relative_error(line: Line) -> float:
    """Of gradients the largest of the three."""
    names = ("rel_l2",) if "rel_l2" in line else ("dq_rel_l2", "dk_rel_l2", "dv_rel_l2")
    return max(line[name] for name in names)


def origin(file: str) -> str:
    """Where lines come from: every distinct value, in a sentence."""
    found = lines(file)

    def values(field: str, before: str = "") -> list[str]:
        return [f"{before}{x}" for x in dict.fromkeys(x.get(field) for x in found) if x is not None]

    parts = [
        *values("device"),
        *values("dtype"),
        *values("driver", "driver "),
        *values("cuda", "CUDA "),
    ]
    parts += [*values("library"), *values("cudnn", "cuDNN "), *values("commit", "commit ")]
    days = sorted({x["date"][:10] for x in found})
    return f"{link('Lines', file)}: {', '.join([*parts, *dict.fromkeys((days[0], days[-1]))])}."
