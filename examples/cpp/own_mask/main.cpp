// Checks the mask of frames.hpp against its definition, element by element, for all small sizes: which blocks of keys a
// tile of queries visits, which of them are whole, and the same for tiles of keys. Needs no GPU and no CUDA.
//
//     g++ -std=c++20 -I ../../../include main.cpp -o own_mask && ./own_mask
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "frames.hpp"

namespace {

constexpr int frame = 5;
using Mask = FrameMask<frame>;
using Sequence = flashcute::UniformSequence;

/// The definition, by other means: the frame of the key is that of the diagonal, or before it.
bool sees(int q, int k, int diagonal) {
  int const key = q + diagonal;
  return key >= 0 && k / frame <= key / frame;
}

flashcute::ForwardParams problem(int rows, int keys) {
  flashcute::ForwardParams p{};
  p.batch = p.heads = p.kv_heads = 1;
  p.seqlen_q = rows, p.seqlen_k = keys;
  p.causal_offset = keys - rows;  // the last query lies on the diagonal of the last key
  return p;
}

/// How many of the elements [row0, row1) x [key0, key1) are visible.
int count_visible(int row0, int row1, int key0, int key1, int diagonal) {
  int count = 0;
  for (int q = row0; q < row1; ++q) {
    for (int k = key0; k < key1; ++k) count += sees(q, k, diagonal);
  }
  return count;
}

int failures = 0;
void expect(bool right, char const* what, int rows, int keys, int tile, int block) {
  if (right || ++failures > 10) return;
  std::printf("%s: wrong for %d queries, %d keys, tile %d, block %d\n", what, rows, keys, tile, block);
}

void check(int rows, int keys, int block_m, int block_n) {
  flashcute::ForwardParams const p = problem(rows, keys);
  int const diagonal = keys - rows;
  for (int i = 0; i < flashcute::ceil_div(rows, block_m); ++i) {
    auto const tile = flashcute::QueryTile<Sequence>::of(p, 0, i, block_m);
    flashcute::KvRange const range = Mask::kv_range(tile, p, block_n);
    for (int n = 0; n < flashcute::ceil_div(keys, block_n); ++n) {
      int const visible = count_visible(tile.row0, tile.row0 + tile.rows, n * block_n,
                                        flashcute::min_of((n + 1) * block_n, keys), diagonal);
      bool const visited = range.begin <= n && n < range.end;
      expect(visited == (visible > 0), "visited block of keys", rows, keys, i, n);
      if (visited) expect(range.is_partial(n) == (visible < tile.rows * block_n), "whole block", rows, keys, i, n);
    }
  }
  for (int i = 0; i < flashcute::ceil_div(keys, block_n); ++i) {
    auto const tile = flashcute::KeyTile<Sequence>::at(p, i, block_n);
    flashcute::QueryRange const range = Mask::query_range(tile, p, block_m);
    for (int m = 0; m < flashcute::ceil_div(rows, block_m); ++m) {
      int const row0 = m * block_m, row1 = flashcute::min_of(row0 + block_m, rows);
      int const visible = count_visible(row0, row1, tile.row0, tile.row0 + tile.rows, diagonal);
      bool const visited = range.begin <= m && m < range.end;
      expect(visited == (visible > 0), "visited block of queries", rows, keys, i, m);
      if (!visited) continue;
      expect((m < range.full_begin) == (visible < (row1 - row0) * tile.rows), "whole block", rows, keys, i, m);
    }
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (int rows = 1; rows <= 24; ++rows) {
    for (int keys = 1; keys <= 24; ++keys) {
      for (int const block_m : {4, 16}) {
        for (int const block_n : {3, 4, 16}) check(rows, keys, block_m, block_n), ++cases;
      }
    }
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
