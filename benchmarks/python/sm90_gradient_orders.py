"""Times configurations of Hopper's gradients at a head dimension against the default, by turns in one process.

Each is checked against float64 first. Times are of CUDA graphs of three calls. In each round every graph is replayed
once, in a random order; told is the median over the rounds of the default's time over that of the configuration, with
its quartiles. `--profile` makes one call of each, for ncu.

usage: python benchmarks/python/sm90_gradient_orders.py --prebuild   # compiles all kernels at once; needs no GPU
       python benchmarks/python/sm90_gradient_orders.py [--head-dim=64] [--rounds 25] [--cold] [--out LINES.jsonl]
       ncu --metrics sm__cycles_elapsed.max --kernel-name regex:gradients_ \
           python benchmarks/python/sm90_gradient_orders.py --profile
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import flashcute as fc
import torch

HEAD_DIM = 64 if "--head-dim=64" in sys.argv else 128
BASE = fc.default_backward_config(HEAD_DIM, "bfloat16", "sm_90", deterministic=False)
FORWARD = fc.default_config(HEAD_DIM, "bfloat16", "sm_90")
CHANGES = {
    "default": {},
    "early_reads": {"early_reads": True},
    **{f"order {n}": {"order": n} for n in (1, 2, 4, 6, 8, 12, 13)},
    **{f"order {n}, early_reads": {"order": n, "early_reads": True} for n in (4, 5, 6, 7, 12, 13)},
    "80 queries": {"block_m": 80, "stages": 2},
    **{
        f"80 queries, order {n}, early_reads": {
            "block_m": 80,
            "stages": 2,
            "order": n,
            "early_reads": True,
        }
        for n in (4, 13, 15)
    },
    "80 queries, prompt, order 13, early_reads": {
        "block_m": 80,
        "stages": 2,
        "order": 13,
        "early_reads": True,
        "late_dq": False,
    },  # fmt: skip
    "prompt, order 13, early_reads": {"order": 13, "early_reads": True, "late_dq": False},
}


def exists(cfg: fc.BackwardConfig) -> bool:
    try:
        cfg.check("sm_90")
    except fc.ConfigError:
        return False
    return True


CONFIGS = {name: BASE.replace(**change) for name, change in CHANGES.items()}
CONFIGS = {name: cfg for name, cfg in CONFIGS.items() if exists(cfg)}
HEADS = 2048 // HEAD_DIM
CASES = [(causal, length) for length in (1024, 4096, 16384) for causal in (False, True)]
CALLS = 3


class Call:
    def __init__(
        self,
        batch: int,
        length: int,
        heads: int,
        causal: bool,
        kv_heads: int | None = None,
        d: int = HEAD_DIM,
    ):
        def normal(count: int) -> torch.Tensor:
            return torch.randn(batch, length, count, d, device="cuda", dtype=torch.bfloat16)

        self.q, self.k, self.v, self.dout = (
            normal(n or heads) for n in (heads, kv_heads, kv_heads, heads)
        )
        self.variant = fc.Variant(causal=causal)
        self.out, self.lse = fc.forward(
            FORWARD, self.q, self.k, self.v, variant=self.variant, return_lse=True
        )

    def memory(self, cfg: fc.BackwardConfig) -> tuple[list[torch.Tensor], torch.Tensor]:
        size = fc.backward_workspace_size(cfg, self.q, self.v, variant=self.variant)
        found = [torch.full_like(x, torch.nan) for x in (self.q, self.k, self.v)]
        return found, torch.full((size,), torch.nan, device="cuda")

    def run(self, cfg: fc.BackwardConfig, memory: tuple[list[torch.Tensor], torch.Tensor]) -> None:
        (dq, dk, dv), workspace = memory
        fc.backward(cfg, self.dout, self.q, self.k, self.v, self.out, self.lse, variant=self.variant,
                    dq=dq, dk=dk, dv=dv, workspace=workspace)  # fmt: skip


def check(name: str, cfg: fc.BackwardConfig) -> None:
    worst = 0.0
    for shape in (
        (2, 700, 4, True, 2),
        (1, 1111, 2, False, 2, HEAD_DIM - 8),
        (1, 333, 2, True, 1),
        (1, 77, 1, False, 1, 40),
    ):
        call = Call(*shape)
        memory = call.memory(cfg)
        call.run(cfg, memory)
        q, k, v = (x.double().requires_grad_() for x in (call.q, call.k, call.v))
        wide_k, wide_v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        s = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) / q.shape[-1] ** 0.5
        if call.variant.causal:
            seen = torch.ones(s.shape[-2:], dtype=torch.bool, device="cuda").tril()
            s = s.masked_fill(~seen, -torch.inf)
        out = torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), wide_v)
        want = torch.autograd.grad(out, (q, k, v), call.dout.double())
        for x, y in zip(memory[0], want, strict=True):
            worst = max(worst, ((x.double() - y).norm() / y.norm()).item())
    print(f"{name:36} relative error {worst:.1e}{'' if worst < 5e-3 else '   WRONG'}", flush=True)


def graph_of(call: Call, cfg: fc.BackwardConfig) -> torch.cuda.CUDAGraph:
    memory = call.memory(cfg)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            call.run(cfg, memory)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call.run(cfg, memory)
    graph.held = call, memory  # what the graph reads and writes
    return graph


def time_case(causal: bool, length: int, rounds: int, cold: bool) -> dict[str, list[float]]:
    """Milliseconds of each configuration in each round."""
    call = Call(16384 // length, length, HEADS, causal)
    graphs = {name: graph_of(call, cfg) for name, cfg in CONFIGS.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for n in range(rounds + 2):
        for name in random.sample(list(graphs), len(graphs)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if cold:
                time.sleep(0.01)
            begin.record()
            graphs[name].replay()
            end.record()
            torch.cuda.synchronize()
            if n >= 2:
                times[name].append(begin.elapsed_time(end) / CALLS)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--prebuild", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.prebuild:
        fc.prebuild([FORWARD, *CONFIGS.values()], "sm_90", causal=True)
        fc.prebuild([FORWARD, *CONFIGS.values()], "sm_90", causal=False)
        return
    torch.manual_seed(int(time.time()))
    if arguments.profile:
        for causal in (False, True):
            call = Call(1, 8192, HEADS, causal)
            for name, cfg in CONFIGS.items():
                print(name, causal, cfg.name)
                call.run(cfg, call.memory(cfg))
        torch.cuda.synchronize()
        return
    for name, cfg in CONFIGS.items() if not arguments.no_check else ():
        check(name, cfg)
    table: dict[str, list[str]] = {name: [] for name in CONFIGS}
    for causal, length in CASES:
        times = time_case(causal, length, arguments.rounds, arguments.cold)
        flops = 10 * 16384 * HEADS * length * HEAD_DIM / (2 if causal else 1)
        for name, of in times.items():
            ratios = [base / own for base, own in zip(times["default"], of, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rate = flops / statistics.median(of) / 1e9
            table[name].append(f"{rate:4.0f} {middle:.3f} ({low:.2f}-{high:.2f})")
            if arguments.out:
                line = {"kind": "gradient_orders", "config": name, "causal": causal, "seqlen": length,
                        "cold": arguments.cold, "tflops": rate, "over_default": middle, "quartiles": [low, high]}  # fmt: skip
                with arguments.out.open("a") as lines:
                    lines.write(json.dumps(line) + "\n")
    print(
        " " * 36
        + "".join(
            f"{length // 1024}k {'causal' if causal else 'full':22}" for causal, length in CASES
        )
    )
    for name, cells in table.items():
        print(f"{name:36}" + "  ".join(f"{cell:23}" for cell in cells))


if __name__ == "__main__":
    main()
