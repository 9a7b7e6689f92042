"""Simulates orders in which Hopper's thread blocks may take the tiles of packed sequences under the causal mask.

Told is the work of the thread block that has the most over the mean of all: what a launch loses to the order alone. A
tile costs as many units as it visits blocks of keys, and its start. (docs/decisions/0021-packed-sequences.md)

- sorted: the tiles of all heads by cost, as include/flashcute/sm90/tile_order.hpp hands them out;
- sections of N: so for each N heads, one section after the other: what runs together reads the K and V of few heads;
- pairs: sequences by length, and of each sequence and head pairs of tiles, the longest with the shortest, so that all
  pairs of a sequence cost the same and read the same K and V. The tiles in the middle of odd sequences, and those of
  the last rounds, one by one, sorted.

usage: python benchmarks/python/packed_orders.py [--heads 16,32] [--blocks 132] [--start 2.5] [--last-rounds 2]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence

ROWS = 128  # of a tile, and keys of a block


def goes_back(number: int) -> bool:
    """Whether a round goes backwards, in the pattern of Thue and Morse."""
    return number.bit_count() % 2 == 1


class Launch:
    def __init__(self, blocks: int) -> None:
        self.work = [0.0] * blocks
        self.rounds = 0

    def deal(self, costs: Sequence[float]) -> None:
        """Hands out tiles, or units of several, a round after the other."""
        blocks = len(self.work)
        for first in range(0, len(costs), blocks):
            for turn, cost in enumerate(costs[first : first + blocks]):
                self.work[blocks - 1 - turn if goes_back(self.rounds) else turn] += cost
            self.rounds += 1

    def loss(self) -> float:
        return max(self.work) * len(self.work) / sum(self.work)


def tiles(length: int, start: float) -> list[float]:
    """The costs of a sequence's tiles, the longest first."""
    return [start + n for n in range(-(-length // ROWS), 0, -1)]


def by_cost(lengths: Sequence[int], heads: int, section: int, options: argparse.Namespace) -> float:
    launch = Launch(options.blocks)
    slots = sorted((x for n in lengths for x in tiles(n, options.start)), reverse=True)
    launch.deal(
        [x for first in range(0, heads, section) for x in slots
         for _ in range(min(section, heads - first))]
    )  # fmt: skip
    return launch.loss()


def by_pairs(lengths: Sequence[int], heads: int, options: argparse.Namespace) -> float:
    pairs: list[tuple[float, float]] = []
    rest: list[float] = []
    for length in sorted(lengths, reverse=True):
        costs = tiles(length, options.start)
        half = len(costs) // 2
        pairs += heads * list(
            zip(costs[:half], reversed(costs[-half:] if half else []), strict=True)
        )
        rest += heads * costs[half : len(costs) - half]
    rounds = max(0, len(pairs) // options.blocks - options.last_rounds)
    dealt = rounds * options.blocks
    launch = Launch(options.blocks)
    launch.deal([sum(pair) for pair in pairs[:dealt]])
    launch.deal(sorted([*rest, *(x for pair in pairs[dealt:] for x in pair)], reverse=True))
    return launch.loss()


def packs() -> Iterator[tuple[str, list[int]]]:
    for count, length in ((64, 256), (16, 1024), (8, 2048), (4, 4096), (1, 16384)):
        yield f"{count} x {length:,}", count * [length]
    for rows in (16384, 65536):
        of_length = random.Random(1)
        lengths: list[int] = []
        while (left := rows - sum(lengths)) > 0:
            lengths.append(min(left, max(1, int(of_length.lognormvariate(6.55, 1.1)))))
        yield f"log-normal, {rows:,}", lengths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--heads", type=lambda text: [int(x) for x in text.split(",")], default=[16, 32]
    )
    parser.add_argument("--blocks", type=int, default=132, help="thread blocks")
    parser.add_argument("--start", type=float, default=2.5, help="of a tile, in blocks of keys")
    parser.add_argument("--last-rounds", type=int, default=2, help="of pairs, taken apart")
    options = parser.parse_args()
    print(f"{'heads':6}{'pack':20}{'sorted':>8}{'sections of 4':>15}{'of 1':>8}{'pairs':>8}")
    for heads in options.heads:
        for name, lengths in packs():
            told = (
                *(by_cost(lengths, heads, n, options) for n in (heads, 4, 1)),
                by_pairs(lengths, heads, options),
            )
            print(f"{heads:<6}{name:20}{told[0]:8.3f}{told[1]:15.3f}{told[2]:8.3f}{told[3]:8.3f}")


if __name__ == "__main__":
    main()
