"""What an installation and a first call cost."""

from __future__ import annotations

from lines import Line, link, one, table, where

INSTALL = "compile_cost"
FIRST_USE = "gpu_first_use"
WHATS = {
    "flash_attention, 1024 tokens": "forward",
    "flash_attention and its gradients, 1024 tokens": "forward and gradients",
}
ROADS = ("compiled", "disk cache", "ahead of time")


def install() -> str:
    """How long an installation with all images takes, from its one line."""
    found = one(INSTALL, kind="install", what="make demo, until the package is installed")
    return (
        f"With `nvcc` and all five targets an installation took **{found['seconds']} seconds** on two idle cores of an "
        f"AMD EPYC ({found['compiler']}; a fresh clone, in which the build tools were fetched as well; one run: "
        f"{link('line', INSTALL)})."
    )


def first_use() -> str:
    """Seconds of a first call by where its kernels come from, in the newest run."""
    commit = where(FIRST_USE)[-1]["commit"]
    cases: dict[tuple[str, int], dict[str, Line]] = {}
    for x in where(FIRST_USE, commit=commit):
        if x["what"] in WHATS:
            cases.setdefault((WHATS[x["what"]], x["head_dim"]), {})[x["road"]] = x
    rows = [
        [what, head_dim, *(seconds(by_road[road]["call_s"]) for road in ROADS)]
        for (what, head_dim), by_road in sorted(cases.items())
    ]
    header = ["a first call of bfloat16", "head dimension", "by NVRTC", *ROADS[1:]]
    run = next(iter(next(iter(cases.values())).values()))
    told = (
        f"Seconds of the first call in a new process, {run['device'].partition(',')[0]}, {run['cores']} cores, "
        f"kernels compiled by NVRTC {run['cuda']} ({link('lines', FIRST_USE)}):"
    )
    return f"{told}\n\n{table(header, rows, numbers=4)}"


def seconds(number: float) -> str:
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"
