"""Simulates the orders in which Hopper's thread blocks may take the tiles of packed sequences.

Told are, of each order, the work of the thread block that has the most over the mean of all, and how often a key is
read from memory if only tiles of the same round share what they read. (docs/decisions/0021-packed-sequences.md)

- cost: the tiles of all heads by cost, those of the same cost head after head;
- pairs: units by cost: of a sequence and head the last tile with the first, and so on, and single tiles where both
  cost the same; the last rounds as single tiles. So include/flashcute/sm90/tile_order.hpp deals where keys come from
  memory. (It takes incomplete tiles for cheaper, which is left out here.)

usage: python benchmarks/python/packed_orders.py [--head-dim 128] [--heads 16] [--mask causal] [--blocks 132]
           [--last-rounds 1]
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TILES = {64: (192, 64), 128: (128, 128), 256: (128, 64)}  # rows, and keys of a block


def level(cost: int) -> int:
    """As CostLevel::of in include/flashcute/sm90/counting_sort.hpp."""
    octave = 0
    while cost >> octave >= 64:
        octave += 1
    return min(32 * octave + (cost >> octave), 255)


def goes_back(number: int) -> bool:
    """Whether a round goes backwards, in the pattern of Thue and Morse."""
    return number.bit_count() % 2 == 1


@dataclass(frozen=True)
class Tile:
    sequence: int
    visits: int  # blocks of keys
    keys: int  # that it reads


@dataclass(frozen=True)
class Kernel:
    rows: int
    keys: int  # of a block
    ends: int  # what a tile costs beside its blocks, in blocks

    @classmethod
    def of(cls, head_dim: int) -> Kernel:
        rows, keys = TILES[head_dim]
        return cls(rows, keys, max(1, (1 << 24) // (4 * rows * keys * head_dim)))

    def tiles(self, sequence: int, length: int, causal: bool) -> list[Tile]:
        """Of one head, the last rows first."""
        seen = range(length, 0, -self.rows) if causal else itertools.repeat(length)
        count = -(-length // self.rows)
        return [Tile(sequence, -(-n // self.keys), n) for n in itertools.islice(seen, count)]

    def cost(self, unit: Sequence[Tile]) -> int:
        return sum(tile.visits + self.ends for tile in unit)


Unit = tuple[Tile, ...]


def dealt(units: Sequence[Unit], heads: int, kernel: Kernel) -> list[tuple[Unit, int]]:
    """Units and heads by level, the highest first; of the same level head after head."""
    in_order = sorted(units, key=lambda unit: -level(kernel.cost(unit)))
    levels = itertools.groupby(in_order, lambda unit: level(kernel.cost(unit)))
    return [
        (unit, head)
        for alike in (list(units) for _, units in levels)
        for head in range(heads)
        for unit in alike
    ]


class Launch:
    def __init__(self, blocks: int, kernel: Kernel) -> None:
        self.work, self.kernel = [0] * blocks, kernel
        self.rounds = self.keys_read = 0

    def deal(self, units: Sequence[tuple[Unit, int]]) -> None:
        """A round after the other."""
        blocks = len(self.work)
        for first in range(0, len(units), blocks):
            read: dict[tuple[int, int], int] = {}
            for turn, (unit, head) in enumerate(units[first : first + blocks]):
                self.work[blocks - 1 - turn if goes_back(self.rounds) else turn] += (
                    self.kernel.cost(unit)
                )
                of = (unit[0].sequence, head)
                read[of] = max(read.get(of, 0), *(tile.keys for tile in unit))
            self.keys_read += sum(read.values())
            self.rounds += 1

    def told(self, keys: int) -> str:
        loss = max(self.work) * len(self.work) / sum(self.work)
        return f"{loss:8.3f}{self.keys_read / keys:7.1f}"


def by_cost(tiles: Sequence[Sequence[Tile]], options: argparse.Namespace, launch: Launch) -> None:
    units = [(tile,) for of in tiles for tile in of]
    launch.deal(dealt(units, options.heads, launch.kernel))


def by_pairs(tiles: Sequence[Sequence[Tile]], options: argparse.Namespace, launch: Launch) -> None:
    units: list[Unit] = []
    for of in tiles:
        for first, last in zip(of, reversed(of), strict=True):
            if level(first.visits) == level(last.visits):
                units.append((first,))
            elif first.visits > last.visits:
                units.append((first, last))
    order = dealt(units, options.heads, launch.kernel)
    count = max(0, len(order) // options.blocks - options.last_rounds) * options.blocks
    launch.deal(order[:count])
    rest = [((tile,), head) for unit, head in order[count:] for tile in unit]
    launch.deal(sorted(rest, key=lambda one: -level(launch.kernel.cost(one[0]))))


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
    parser.add_argument("--head-dim", type=int, choices=TILES, default=128)
    parser.add_argument("--heads", type=int, default=16, help="each with keys of its own")
    parser.add_argument("--mask", choices=("causal", "full"), default="causal")
    parser.add_argument("--blocks", type=int, default=132, help="thread blocks")
    parser.add_argument("--last-rounds", type=int, default=1, help="of pairs, taken apart")
    options = parser.parse_args()
    kernel = Kernel.of(options.head_dim)
    print(f"{'pack':20}{'cost':>8}{'reads':>7}{'pairs':>8}{'reads':>7}")
    for name, lengths in packs():
        tiles = [kernel.tiles(i, n, options.mask == "causal") for i, n in enumerate(lengths)]
        text = f"{name:20}"
        for order in (by_cost, by_pairs):
            launch = Launch(options.blocks, kernel)
            order(tiles, options, launch)
            text += launch.told(sum(lengths) * options.heads)
        print(text)


if __name__ == "__main__":
    main()
