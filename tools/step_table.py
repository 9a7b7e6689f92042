"""Writes the table of a run of variants: each beside the faster of the others' kernels, in each case.

    python tools/step_table.py benchmarks/results/gpu_hopper_steps.jsonl --run 16
    python tools/step_table.py benchmarks/results/gpu_hopper_steps.jsonl --run 28 --cycles

The lines are of kind "step", with TFLOP/s by variant, where `fa3` and `cudnn` are the others, or with
thousands of cycles by variant, where the first is what the rest is beside.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PEERS = ("fa3", "cudnn")


def case_of(line: dict[str, Any]) -> str:
    """The first two cells: head dimension and mask, sizes."""
    heads = f"{line['heads']}"
    if line["kv_heads"] != line["heads"]:
        heads += f"/{line['kv_heads']}"
    mask = "causal" if line["causal"] else "full"
    return f"{line['head_dim']} {mask} | {line['batch']} x {heads} x {line['seqlen']}"


def speed_rows(line: dict[str, Any]) -> list[str]:
    """One row for a case: the best of the others in TFLOP/s, and every variant's ratio to it."""
    speeds = line["tflops"]
    best = max((speeds[peer], peer) for peer in PEERS if peer in speeds)
    own = sorted((name for name in speeds if name not in PEERS), key=lambda name: -speeds[name])
    ratios = ", ".join(f"{name} {speeds[name] / best[0]:.2f}" for name in own)
    return [f"| {case_of(line)} | {best[0]:.0f} ({best[1]}) | {ratios} |"] if own else []


def cycle_rows(line: dict[str, Any]) -> list[str]:
    """One row for a case: thousands of cycles of the first variant, and of the others."""
    (first, before), *others = line["kcycles"].items()
    rest = ", ".join(f"{name} {cycles:.0f}" for name, cycles in others)
    return [f"| {case_of(line)} | {first} {before:.0f} | {rest} |"]


def table(lines: list[dict[str, Any]], run: int, *, cycles: bool = False) -> str:
    """The table of a run, sorted by head dimension, mask, heads and length."""
    key, rows_of = ("kcycles", cycle_rows) if cycles else ("tflops", speed_rows)
    chosen = [x for x in lines if x["kind"] == "step" and x["run"] == run and x.get(key)]
    chosen.sort(
        key=lambda x: (x["head_dim"], x["causal"], x["kv_heads"] != x["heads"], x["seqlen"])
    )
    columns = "before | after" if cycles else "best of the others | ours beside it"
    head = [f"| head dim, mask | batch x heads x length | {columns} |", "|---|---|---|---|"]
    return "\n".join([*head, *(row for x in chosen for row in rows_of(x))])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("lines", type=Path)
    parser.add_argument("--run", type=int, required=True)
    parser.add_argument("--cycles", action="store_true", help="thousands of cycles, not TFLOP/s")
    options = parser.parse_args()
    lines = [json.loads(x) for x in options.lines.read_text().splitlines()]
    print(table(lines, options.run, cycles=options.cycles))


if __name__ == "__main__":
    main()
