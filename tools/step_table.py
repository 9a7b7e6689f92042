"""Writes the table of a run of variants: each beside the faster of the others' kernels, in each case.

    python tools/step_table.py benchmarks/results/gpu_hopper_steps.jsonl --run 16

The lines are of kind "step", with TFLOP/s by variant; `fa3` and `cudnn` are the others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PEERS = ("fa3", "cudnn")


def rows_of(line: dict[str, Any]) -> list[str]:
    """One row for a case: its sizes, the best of the others in TFLOP/s, and every variant's ratio to it."""
    speeds = line["tflops"]
    best = max((speeds[peer], peer) for peer in PEERS if peer in speeds)
    own = sorted((name for name in speeds if name not in PEERS), key=lambda name: -speeds[name])
    ratios = ", ".join(f"{name} {speeds[name] / best[0]:.2f}" for name in own)
    heads = f"{line['heads']}" + (
        f"/{line['kv_heads']}" if line["kv_heads"] != line["heads"] else ""
    )
    mask = "causal" if line["causal"] else "full"
    case = f"{line['head_dim']} {mask} | {line['batch']} x {heads} x {line['seqlen']}"
    return [f"| {case} | {best[0]:.0f} ({best[1]}) | {ratios} |"] if own else []


def table(lines: list[dict[str, Any]], run: int) -> str:
    """The table of a run, sorted by head dimension, mask, heads and length."""
    chosen = [x for x in lines if x["kind"] == "step" and x["run"] == run and x.get("tflops")]
    chosen.sort(
        key=lambda x: (x["head_dim"], x["causal"], x["kv_heads"] != x["heads"], x["seqlen"])
    )
    head = ["| head dim, mask | batch x heads x length | best of the others | ours beside it |"]
    return "\n".join([*head, "|---|---|---|---|", *(row for x in chosen for row in rows_of(x))])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("lines", type=Path)
    parser.add_argument("--run", type=int, required=True)
    options = parser.parse_args()
    print(table([json.loads(x) for x in options.lines.read_text().splitlines()], options.run))


if __name__ == "__main__":
    main()
