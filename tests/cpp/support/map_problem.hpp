// Block maps for tests: any mask by element, and the words that say the same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "cpu/make_block_map.hpp"

namespace flashcute {

/// The masks of some batch entries and heads, one byte an element.
struct MapProblem {
  int batch = 1, heads = 1;  // 1: for all
  int rows = 0, keys = 0;
  std::vector<uint8_t> shown;
  std::vector<uint64_t> memory;
  BlockMapParams params;

  static MapProblem of(int batch, int heads, int rows, int keys, auto&& sees) {
    MapProblem m{batch, heads, rows, keys, {}, {}, {}};
    for (int b = 0; b < batch; ++b)
      for (int h = 0; h < heads; ++h)
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < keys; ++j) m.shown.push_back(sees(b, h, i, j));
    m.build();
    return m;
  }

  /// Cells that are empty, whole and partial, with rows and keys in some partial ones that see nothing.
  static MapProblem random(int batch, int heads, int rows, int keys, uint64_t seed) {
    std::mt19937_64 random(seed);
    int const down = count_cells(rows), across = count_cells(keys);
    std::vector<int> kinds;
    for (int i = 0; i < batch * heads * down * across; ++i) kinds.push_back(static_cast<int>(random() % 4));
    std::vector<bool> hidden_rows, hidden_keys;
    for (int i = 0; i < rows; ++i) hidden_rows.push_back(random() % 8 == 0);
    for (int j = 0; j < keys; ++j) hidden_keys.push_back(random() % 8 == 0);
    return of(batch, heads, rows, keys, [&](int b, int h, int i, int j) {
      int const kind = kinds[static_cast<size_t>(((b * heads + h) * down + i / cell_size) * across + j / cell_size)];
      if (kind < 2) return kind == 1;
      if (kind == 3 && (hidden_rows[static_cast<size_t>(i)] || hidden_keys[static_cast<size_t>(j)])) return false;
      return random() % 2 == 0;
    });
  }

  bool exists() const { return !memory.empty(); }
  bool shows(int b, int h, int i, int j) const {
    int const map = (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
    return shown[(static_cast<size_t>(map) * static_cast<size_t>(rows) + static_cast<size_t>(i)) *
                     static_cast<size_t>(keys) +
                 static_cast<size_t>(j)] != 0;
  }
  uint32_t* words() { return reinterpret_cast<uint32_t*>(memory.data()); }
  uint32_t const* words() const { return reinterpret_cast<uint32_t const*>(memory.data()); }
  BlockMapSizes sizes() const { return {batch * heads, rows, keys}; }
  int64_t cells() const { return int64_t{batch} * heads * count_cells(rows) * count_cells(keys); }

  void build(int64_t capacity = -1) {
    if (capacity < 0) capacity = cells();
    memory.assign(static_cast<size_t>(ceil_div<int64_t>(BlockMapLayout::of(sizes(), capacity).size, 2)), ~uint64_t{0});
    BlockMapRules rules{};
    rules.sizes = sizes();
    rules.heads = heads;
    rules.capacity = capacity;
    rules.words = words();
    rules.dense = shown.data();
    int64_t const stride[] = {int64_t{heads} * rows * keys, int64_t{rows} * keys, keys, 1};
    std::copy_n(stride, 4, rules.dense_stride);
    cpu::make_block_map(rules);
    params = BlockMapParams::of(words(), sizes(), capacity, batch == 1 ? 0 : heads, heads == 1 ? 0 : 1);
  }

  /// For the memory where it is: a copy of a problem has its own.
  BlockMapParams described() const {
    BlockMapParams p = params;
    if (exists()) p.words = words();
    return p;
  }
};

}  // namespace flashcute
