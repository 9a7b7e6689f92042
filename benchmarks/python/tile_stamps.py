"""Where a tile of Hopper's gradients spends its clocks: reads the stamps of a build that writes them (this commit's).

usage: python benchmarks/python/tile_stamps.py [--head-dim 128] [--seqlens 1024,4096] [--causal 0,1]

Medians over the tiles of the second of two calls, in clocks of the multiprocessor, for each of the two computing
warpgroups: from a thread block's entry to its first stamp, waits for K, Q and dO, the first block, a block after it, the
last dQ, the stores; and from a thread block's last store to the entry of the next one on that multiprocessor.
"""

import argparse
import statistics

import flashcute as fc
import torch

WORDS = 16
NAMES = ("entry to roles", "K", "Q", "dO", "first block", "a later block", "last dQ", "stores", "to the next entry")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seqlens", default="1024,4096")
    parser.add_argument("--causal", default="0,1")
    o = parser.parse_args()
    d = o.head_dim
    for n in (int(x) for x in o.seqlens.split(",")):
        for causal in (bool(int(x)) for x in o.causal.split(",")):
            b, h = 16384 // n, 2048 // d
            q, k, v, do = (torch.randn(b, n, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
            variant = fc.Variant(causal=causal)
            out, lse = fc.forward(fc.default_config(d, "bfloat16", "sm_90"), q, k, v, variant=variant, return_lse=True)
            cfg = fc.default_backward_config(d, "bfloat16", "sm_90", deterministic=False)
            size = fc.backward_workspace_size(cfg, q, v, variant=variant)
            tiles = b * h * n // 128
            ws = torch.zeros(size + 2 * WORDS * tiles, device="cuda")
            grads = [torch.empty_like(x) for x in (q, k, v)]
            for _ in range(2):
                fc.backward(cfg, do, q, k, v, out, lse, variant=variant, dq=grads[0], dk=grads[1], dv=grads[2], workspace=ws)
            torch.cuda.synchronize()
            s = ws[size:].view(torch.int32).view(tiles, 2, WORDS).cpu().long() & 0xFFFFFFFF
            print(f"d {d} {'causal' if causal else 'full'} {n}: {tiles} tiles")
            on: dict[int, list[tuple[int, int]]] = {}
            for t in s:
                end = max(int(t[0, 8]), int(t[1, 8]))
                on.setdefault(int(t[0, 10]), []).append((int(t[0, 0]), end))
            gaps = []
            for spans in on.values():
                spans.sort()
                gaps += [b[0] - a[1] for a, b in zip(spans, spans[1:]) if 0 <= b[0] - a[1] < 10**6]
            for w in range(2):
                t = s[:, w]
                step = lambda a, b: statistics.median(((t[:, b] - t[:, a]) & 0xFFFFFFFF).tolist())
                later = statistics.median((((t[:, 6] - t[:, 5]) & 0xFFFFFFFF) / (t[:, 9] - 1).clamp_min(1)).tolist())
                told = [step(0, 1), step(1, 2), step(2, 3), step(3, 4), step(4, 5), later, step(6, 7), step(7, 8)]
                told.append(statistics.median(gaps) if gaps else 0)
                print(f"  warpgroup {w + 1}: " + ", ".join(f"{name} {x:.0f}" for name, x in zip(NAMES, told)))


if __name__ == "__main__":
    main()
