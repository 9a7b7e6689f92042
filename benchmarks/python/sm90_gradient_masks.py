"""Checks and times Hopper's gradients under masks: windows, prefixes, lengths, sinks, packed sequences, block masks.

First against gradients in float64, from random inputs, into outputs and a workspace that hold NaN, with NaN in rows
that do not exist and in every other packed sequence. Then medians in milliseconds beside the mma.sync kernels, all
calls taking turns in one process, as CUDA graphs. The table comes last; the exit code is 1 if anything was wrong.

usage: python benchmarks/python/sm90_gradient_masks.py --prebuild     # compiles all kernels; needs no GPU
       python benchmarks/python/sm90_gradient_masks.py [--no-maps] [--no-check | --no-times]
           [--commit COMMIT] [--out LINES.jsonl]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flashcute as fc
import numpy as np
import torch
from flashcute._cli.kits import TorchCudaKit
from flashcute._cli.provenance import provenance

WIDTHS = (64, 128)
DEVICE = "cuda"
BOUND = 6e-3  # of relative errors (L2)
CALLS = 3  # of a graph
ROUNDS = 11

wrong = 0


def sm90(d: int, variant: fc.Variant) -> fc.BackwardConfig:
    causal = variant == fc.Variant(causal=True)
    cfg = fc.default_backward_config(d, "bfloat16", "sm_90", deterministic=False, causal=causal)
    assert cfg.kernel == "sm90"
    return cfg


def sm80(d: int) -> fc.BackwardConfig:
    """What Hopper takes where its own kernels do not run: the default of a GPU that has none."""
    cfg = fc.default_backward_config(d, "bfloat16", "sm_100", deterministic=False)
    assert cfg.kernel == "sm80"
    return cfg


def forward_config(d: int) -> fc.ForwardConfig:
    return fc.default_config(d, "bfloat16", "sm_90")


def prebuild(maps: bool) -> None:
    variants = [fc.Variant(), fc.Variant(causal=True), fc.Variant(window=(8, 8))]
    if maps:
        documents = fc.BlockMask.from_documents(np.zeros(64, np.int32))
        variants.append(fc.Variant(block_mask=documents))
    for variant in variants:
        cfgs = [cfg for d in WIDTHS for cfg in (sm90(d, variant), sm80(d), forward_config(d))]
        for kernel, origin in fc.prebuild(cfgs, "sm_90", variant=variant).items():
            print(kernel, origin)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def int32(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, device=DEVICE, dtype=torch.int32)


def grid(rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows, device=DEVICE)[:, None], torch.arange(keys, device=DEVICE)[None, :]


def log_normal(total: int, count: int) -> list[int]:
    """Lengths whose sum is `total`."""
    x = torch.randn(count).mul(0.9).exp()
    lengths = ((x / x.sum() * (total - count)).long() + 1).tolist()
    lengths[-1] += total - sum(lengths)
    return list(lengths)


def starts_of(lengths: list[int], first: int = 0) -> list[int]:
    return [first + sum(lengths[:n]) for n in range(len(lengths) + 1)]


# ---- checks --------------------------------------------------------------------------------------


def fail(*what: object) -> None:
    global wrong
    wrong += 1
    print("WRONG", *what, flush=True)


class Call:
    """q, k, v, dO and what the forward returns."""

    def __init__(self, d: int, inputs: tuple[torch.Tensor, ...], variant: fc.Variant) -> None:
        self.q, self.k, self.v, self.dout = inputs
        self.variant = variant
        self.out, self.lse = fc.forward(
            forward_config(d), self.q, self.k, self.v, variant=variant, return_lse=True
        )

    def memory(self, cfg: fc.BackwardConfig) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Gradients and a workspace that hold NaN."""
        size = fc.backward_workspace_size(cfg, self.q, self.v, variant=self.variant)
        found = [torch.full_like(x, torch.nan) for x in (self.q, self.k, self.v)]
        return found, torch.full((size,), torch.nan, device=DEVICE)

    def run(
        self, cfg: fc.BackwardConfig, found: list[torch.Tensor], workspace: torch.Tensor
    ) -> list[torch.Tensor]:
        dq, dk, dv = found
        return list(
            fc.backward(
                cfg, self.dout, self.q, self.k, self.v, self.out, self.lse,
                variant=self.variant, dq=dq, dk=dk, dv=dv, workspace=workspace,
            )
        )  # fmt: skip

    def gradients(self, cfg: fc.BackwardConfig) -> list[torch.Tensor]:
        found = self.run(cfg, *self.memory(cfg))
        torch.cuda.synchronize()
        return found


def exact(
    inputs: tuple[torch.Tensor, ...], seen: torch.Tensor, sink: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """In float64. `seen`: what the mask shows, broadcast to (batch, heads, rows, keys)."""
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(group, 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) / q.shape[-1] ** 0.5
    s = s.masked_fill(~seen, -torch.inf)
    wanted = [q, k, v]
    if sink is not None:
        wanted.append(sink.double().requires_grad_())
        column = wanted[-1][None, :, None, None].expand(*s.shape[:3], 1)
        s = torch.cat([s, column], -1)
    p = torch.where(s.amax(-1, keepdim=True) == -torch.inf, 0.0, s.softmax(-1))
    if sink is not None:
        p = p[..., :-1]
    out = torch.einsum("bhqk,bkhd->bqhd", p, wide_v)
    return torch.autograd.grad(out, wanted, inputs[3].double())


def compare(
    what: object, found: list[torch.Tensor], want: tuple[torch.Tensor, ...], bound: float = BOUND
) -> float:
    worst = 0.0
    for name, x, exact_x in zip(("dq", "dk", "dv", "dsink"), found, want, strict=False):
        error = ((x.double() - exact_x).norm() / exact_x.norm().clamp_min(1e-2)).item()
        worst = max(worst, error)
        if not error < bound:
            fail(what, name, f"{error:.1e}", "" if x.isfinite().all() else "not finite")
    return worst


def check_batch(
    what: str,
    d: int,
    shape: tuple[int, int, int, int, int],
    variant: fc.Variant,
    seen: torch.Tensor,
    no_query: torch.Tensor | None = None,
    no_key: torch.Tensor | None = None,
) -> float:
    """`no_query`, `no_key`: which rows of (batch, rows) do not exist: they hold NaN, and their gradients are 0."""
    batch, rows, keys, heads, kv_heads = shape
    q, dout = normal(batch, rows, heads, d), normal(batch, rows, heads, d)
    k, v = normal(batch, keys, kv_heads, d), normal(batch, keys, kv_heads, d)
    if no_query is not None and no_key is not None:
        q[no_query], dout[no_query] = torch.nan, torch.nan
        k[no_key], v[no_key] = torch.nan, torch.nan
    found = Call(d, (q, k, v, dout), variant).gradients(sm90(d, variant))
    for absent, name, x in zip((no_query, no_key, no_key), ("dq", "dk", "dv"), found, strict=False):
        if absent is not None and not (x[absent] == 0).all():
            fail(what, d, name, "of rows that do not exist is not 0")
    clean = tuple(x.nan_to_num() for x in (q, k, v, dout))
    return compare((what, d, shape), found, exact(clean, seen, variant.sink))


def check_windows() -> Iterator[float]:
    for d in WIDTHS:
        for shape in ((2, 700, 900, 4, 2), (1, 1111, 300, 2, 1), (1, 257, 1500, 2, 2)):
            rows, keys = shape[1:3]
            i, j = grid(rows, keys)
            for left, right in ((7, 0), (63, 0), (200, 7), (5, 333), (4095, 0)):
                for offset in (keys - rows, 0, -130):
                    seen = (j >= i + offset - left) & (j <= i + offset + right)
                    variant = fc.Variant(window=(left, right), diagonal=offset)
                    yield check_batch(f"window {left, right} {offset}", d, shape, variant, seen)
            seen = ((j <= i + keys - rows) | (j < 270)) & (j >= i + keys - rows - 500)
            variant = fc.Variant(causal=True, window=(500, -1), prefix=270)
            yield check_batch("prefix", d, shape, variant, seen)


def check_lengths() -> Iterator[float]:
    shape = (6, 600, 700, 4, 2)
    queries, keys = int32([600, 33, 1, 0, 128, 513]), int32([700, 700, 40, 9, 0, 385])
    i, j = grid(600, 700)
    no_query, no_key = i[:, 0] >= queries[:, None], j[0] >= keys[:, None]
    offset = (keys - queries)[:, None, None]
    for d in WIDTHS:
        sink = torch.randn(4, device=DEVICE)
        for causal, window, logits in ((True, None, None), (False, None, sink), (True, (100, 0), sink)):  # fmt: skip
            seen = ~no_query[:, :, None] & ~no_key[:, None, :]
            if causal:
                seen = seen & (j <= i + offset)
            if window:
                seen = seen & (j >= i + offset - window[0])
            variant = fc.Variant(
                causal=causal, window=window, seqlens_q=queries, seqlens_k=keys, sink=logits
            )
            what = f"lengths, causal {causal}, window {window}"
            yield check_batch(what, d, shape, variant, seen[:, None], no_query, no_key)


def check_packed() -> Iterator[float]:
    """Each sequence against itself alone, beside neighbours of NaN."""
    heads, kv_heads = 4, 2
    for d in WIDTHS:
        for causal, window in ((True, None), (False, None), (True, (150, 0))):
            other_keys = window is not None or not causal
            lengths = [0, 1, 127, 128, 129, 64, *log_normal(4000, 9)]
            keys = [n - 7 if n > 60 else n + 3 for n in lengths] if other_keys else lengths
            # Some rows before the first sequence and after the last belong to none.
            of_q, of_k = starts_of(lengths, 5), starts_of(keys, 3)
            total_q, total_k = of_q[-1] + 70, of_k[-1] + 77
            q, dout = normal(total_q, heads, d), normal(total_q, heads, d)
            k, v = normal(total_k, kv_heads, d), normal(total_k, kv_heads, d)
            variant = fc.Variant(
                causal=causal, window=window, cu_seqlens_q=int32(of_q), cu_seqlens_k=int32(of_k)
            )
            for poison in (None, 0, 1):  # of every other sequence
                inputs = tuple(x.clone() for x in (q, k, v, dout))
                if poison is not None:
                    for x, starts in zip(inputs, (of_q, of_k, of_k, of_q), strict=True):
                        x[: starts[0]], x[starts[-1] :] = torch.nan, torch.nan
                        for n in range(poison, len(lengths), 2):
                            x[starts[n] : starts[n + 1]] = torch.nan
                found = Call(d, inputs, variant).gradients(sm90(d, variant))
                for name, x, starts in zip(("dq", "dk", "dv"), found, (of_q, of_k, of_k), strict=True):  # fmt: skip
                    if (x[: starts[0]] != 0).any() or (x[starts[-1] :] != 0).any():
                        fail("packed", d, name, "of rows of no sequence is not 0")
                for n in range(len(lengths)):
                    rows, columns = slice(of_q[n], of_q[n + 1]), slice(of_k[n], of_k[n + 1])
                    if n % 2 == poison or lengths[n] == 0 or keys[n] == 0:
                        continue
                    i, j = grid(lengths[n], keys[n])
                    offset = keys[n] - lengths[n]
                    seen = (j <= i + offset) if causal else (j >= 0) & (i >= 0)
                    if window:
                        seen = seen & (j >= i + offset - window[0])
                    alone = (q[None, rows], k[None, columns], v[None, columns], dout[None, rows])
                    what = f"packed, causal {causal}, window {window}, NaN {poison}, sequence {n}"
                    yield compare(
                        (what, d, lengths[n], keys[n]),
                        [found[0][None, rows], found[1][None, columns], found[2][None, columns]],
                        exact(alone, seen),
                        8e-3,  # of few rows
                    )


def check_maps() -> Iterator[float]:
    for d in WIDTHS:
        for batch, length, heads, kv_heads in ((2, 1100, 4, 2), (1, 2048, 2, 1)):
            shape = (batch, length, length, heads, kv_heads)
            documents = torch.repeat_interleave(
                torch.arange(9, dtype=torch.int32), torch.tensor(log_normal(length, 9))
            ).to(DEVICE)
            documents = torch.stack([documents.roll(100 * n) for n in range(batch)])
            i, j = grid(length, length)
            same = documents[:, None, :, None] == documents[:, None, None, :]
            mask = fc.BlockMask.from_documents(documents)
            for causal in (False, True):
                seen = same & (j <= i) if causal else same
                variant = fc.Variant(causal=causal, block_mask=mask)
                yield check_batch(f"documents, causal {causal}", d, shape, variant, seen)
            shown = torch.rand(batch, heads, length, length, device=DEVICE) < 0.3
            shown[:, :, : length // 2, length // 4 :] = False
            shown[:, :, length // 2 :, : length // 4] = True
            variant = fc.Variant(block_mask=fc.BlockMask.from_dense(shown))
            yield check_batch("random map", d, shape, variant, shown)


CHECKS = {
    "windows": check_windows,
    "lengths and sinks": check_lengths,
    "packed": check_packed,
    "maps": check_maps,
}


# ---- times ---------------------------------------------------------------------------------------


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.call = call  # whose memory the graph reads and writes
    return graph


def graphs_of(
    name: str, d: int, shape: tuple[int, ...], variant: fc.Variant
) -> dict[str, torch.cuda.CUDAGraph]:
    """The gradients of a call by each kernel."""
    inputs = tuple(normal(*shape) for _ in range(4))
    call = Call(d, inputs, variant)
    graphs = {}
    for cfg in (sm90(d, variant), sm80(d)):
        memory = call.memory(cfg)
        graphs[f"{name} {cfg.kernel}"] = graph_of(
            lambda cfg=cfg, memory=memory: call.run(cfg, *memory)
        )
    return graphs


def medians(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    events: dict[str, list[Any]] = {name: [] for name in graphs}
    for n in range(ROUNDS + 2):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            if n >= 2:
                events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) for begin, end in pairs) / CALLS
        for name, pairs in events.items()
    }


def problems(d: int, maps: bool) -> Iterator[dict[str, torch.cuda.CUDAGraph]]:
    """What is timed together, of 2,048 columns."""
    heads = 2048 // d
    window = fc.Variant(causal=True, window=(4095, 0))
    yield graphs_of("causal window of 4096, 32k", d, (1, 32768, heads, d), window)
    for causal in (True, False):
        mask = "causal" if causal else "full"
        plain = fc.Variant(causal=causal)
        lengths = fc.Variant(causal=causal, seqlens_k=int32([4096] * 4))  # which hide nothing
        packed = fc.Variant(causal=causal, cu_seqlens_q=int32(starts_of([4096] * 4)))
        yield {
            **graphs_of(f"{mask} 4 x 4096", d, (4, 4096, heads, d), plain),
            **graphs_of(f"{mask} 4 x 4096, as a band", d, (4, 4096, heads, d), lengths),
            **graphs_of(f"{mask} 4 x 4096, packed", d, (16384, heads, d), packed),
        }
    torch.manual_seed(5)
    lengths_of = log_normal(16384, 24)
    packed = fc.Variant(causal=True, cu_seqlens_q=int32(starts_of(lengths_of)))
    graphs = graphs_of("24 log-normal lengths of 16k, packed", d, (16384, heads, d), packed)
    if maps:
        documents = torch.repeat_interleave(
            torch.arange(24, dtype=torch.int32), torch.tensor(lengths_of)
        ).to(DEVICE)
        mask = fc.BlockMask.from_documents(documents[None])
        variant = fc.Variant(causal=True, block_mask=mask)
        graphs |= graphs_of("24 log-normal lengths of 16k, a map", d, (1, 16384, heads, d), variant)
    yield graphs


def timed(maps: bool) -> Iterator[dict[str, Any]]:
    """A line for each case, of what is timed together."""
    for d in WIDTHS:
        for group, graphs in enumerate(problems(d, maps)):
            found = medians(graphs)
            for name in (x.removesuffix(" sm90") for x in found if x.endswith(" sm90")):
                milliseconds = {f"ms_{x}": round(found[f"{name} {x}"], 4) for x in ("sm90", "sm80")}
                yield {"head_dim": d, "group": group, "case": name, **milliseconds}


def print_table(times: list[dict[str, Any]]) -> None:
    print(f"{'d':>4} {'case':40} {'sm90 ms':>9} {'sm80 ms':>9} {'over sm80':>9} {'of first':>9}")
    first: dict[tuple[int, int], float] = {}
    for x in times:
        base = first.setdefault((x["head_dim"], x["group"]), x["ms_sm90"])
        print(
            f"{x['head_dim']:4} {x['case']:40} {x['ms_sm90']:9.3f} {x['ms_sm80']:9.3f} "
            f"{x['ms_sm80'] / x['ms_sm90']:9.2f} {base / x['ms_sm90']:9.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--prebuild", action="store_true")
    parser.add_argument("--no-maps", action="store_true")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--commit", help="default: that of the checkout")
    parser.add_argument("--out", type=Path, help="file to which JSON lines are added")
    arguments = parser.parse_args()
    maps = not arguments.no_maps
    if arguments.prebuild:
        return prebuild(maps)

    start = time.time()
    torch.manual_seed(int(start))
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    lines: list[dict[str, Any]] = []
    for name, check in CHECKS.items() if not arguments.no_check else ():
        if name == "maps" and not maps:
            continue
        errors = list(check())
        lines.append(
            {"kind": "gradient_masks_error", "checks": name, "cases": len(errors), "rel_l2": max(errors)}
        )  # fmt: skip
        print(
            f"{name}: {len(errors)} cases, relative errors up to {max(errors):.1e}  "
            f"[{time.time() - start:.0f} s]",
            flush=True,
        )
    times = list(timed(maps)) if not arguments.no_times else []
    print(f"\n{wrong} wrong  [{time.time() - start:.0f} s]")
    print_table(times)
    lines += [{"kind": "gradient_masks", "rounds": ROUNDS, "calls": CALLS, **x} for x in times]
    if arguments.out:
        origin = {**provenance(TorchCudaKit(0), arguments.commit), "dtype": "bfloat16"}
        with arguments.out.open("a") as out:
            for line in lines:
                out.write(json.dumps({"kind": line["kind"], **origin, **line}) + "\n")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
