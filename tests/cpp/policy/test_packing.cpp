// Packed sequences: that slots for tiles suffice whatever the lengths are, and that every row has its tile.
#include <gtest/gtest.h>

#include <algorithm>
#include <climits>
#include <random>
#include <vector>

#include "flashcute/policy/query_tile.hpp"

namespace flashcute {
namespace {

ForwardParams packed(std::vector<int32_t> const& starts_q, std::vector<int32_t> const& starts_k, int32_t rows,
                     int32_t keys) {
  ForwardParams p{};
  p.batch = 1, p.heads = 4, p.kv_heads = 2;
  p.seqlen_q = rows, p.seqlen_k = keys;
  p.sequences.count = static_cast<int32_t>(starts_q.size()) - 1;
  p.sequences.cu_seqlens_q = starts_q.data();
  p.sequences.cu_seqlens_k = starts_k.data();
  return p;
}

std::vector<int32_t> random_starts(std::mt19937& random, int sequences, int longest) {
  auto const below = [&](int n) { return static_cast<int32_t>(random() % static_cast<unsigned>(n)); };
  std::vector<int32_t> starts{below(4)};
  for (int i = 0; i < sequences; ++i) starts.push_back(starts.back() + (below(3) == 0 ? 0 : below(longest + 1)));
  return starts;
}

// Guards against rows in no tile or in two, tiles of rows of two sequences, and keys that belong to another.
TEST(Packing, TilesCoverEachRowOnce) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 300; ++trial) {
    auto const starts_q = random_starts(random, trial % 9, 50), starts_k = random_starts(random, trial % 9, 50);
    ForwardParams const p = packed(starts_q, starts_k, starts_q.back() + static_cast<int32_t>(random() % 4),
                                   starts_k.back() + static_cast<int32_t>(random() % 4));
    int32_t const block = 1 + static_cast<int32_t>(random() % 20);
    auto const sequence_of = [](std::vector<int32_t> const& starts, int32_t row) {
      auto const after = std::upper_bound(starts.begin(), starts.end(), row);
      return after == starts.end() ? static_cast<int32_t>(starts.size())  // none
                                   : static_cast<int32_t>(after - starts.begin());
    };
    for (bool from_end : {false, true}) {
      std::vector<int> seen(static_cast<size_t>(p.heads * p.seqlen_q));
      int32_t const slots = QueryTile<BatchSequence>::blocks_of_head(p, block);
      ASSERT_EQ(count_query_tiles(p, block), int64_t{p.heads} * slots);
      for (int32_t i = 0; i < p.heads * slots; ++i) {
        auto const tile = from_end ? QueryTile<BatchSequence>::from_end(p, i / slots, i % slots, block)
                                   : QueryTile<BatchSequence>::at(p, i, block);
        ASSERT_GE(tile.rows, 0);
        ASSERT_LE(tile.rows, block);
        for (int32_t row = tile.row0; row < tile.row0 + tile.rows; ++row) {
          int32_t const at = tile.entry.first_query + row, number = sequence_of(starts_q, at);
          ASSERT_EQ(tile.entry.number, number) << "row " << at;
          bool const real = number > 0 && number < static_cast<int32_t>(starts_q.size());
          auto const first = static_cast<size_t>(number - 1);
          ASSERT_EQ(tile.entry.queries, real ? starts_q[first + 1] - starts_q[first] : 0);
          ASSERT_EQ(tile.entry.keys, real ? starts_k[first + 1] - starts_k[first] : 0);
          if (real) ASSERT_EQ(tile.entry.first_key, starts_k[first]);
          ++seen[static_cast<size_t>(tile.head * p.seqlen_q + at)];
        }
      }
      EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
    }
    std::vector<int> keys(static_cast<size_t>(p.kv_heads * p.seqlen_k));
    for (int64_t i = 0; i < count_key_tiles(p, block); ++i) {
      auto const tile = KeyTile<BatchSequence>::at(p, static_cast<uint32_t>(i), block);
      for (int32_t key = tile.row0; key < tile.row0 + tile.rows; ++key) {
        ++keys[static_cast<size_t>(tile.kv_head * p.seqlen_k + tile.entry.first_key + key)];
      }
    }
    EXPECT_TRUE(std::all_of(keys.begin(), keys.end(), [](int n) { return n == 1; }));
  }
}

// Guards against a search from a hint that ends elsewhere than one from the start.
TEST(Packing, TheSearchMayBeginNearby) {
  std::mt19937 random(5);
  for (int trial = 0; trial < 100; ++trial) {
    auto const starts = random_starts(random, 1 + trial % 40, 30);
    ForwardParams const p = packed(starts, starts, starts.back() + 3, starts.back() + 3);
    Packing const queries = Packing::of_queries(p);
    int32_t const block = 1 + trial % 16, slots = query_blocks(p, block);
    for (int32_t slot = 0; slot < slots; ++slot) {
      int32_t const found = queries.sequence_of_slot(slot, block);
      for (int32_t near = 0; near <= queries.count + 1; ++near) {
        ASSERT_EQ(queries.sequence_of_slot(slot, block, near), found) << "slot " << slot << " near " << near;
      }
    }
  }
}

// Guards against an access outside of the tensors where the numbers are no ascending order of rows.
TEST(Packing, NoNumberLeadsOutOfTheTensor) {
  std::mt19937 random(7);
  std::vector<int32_t> const odd = {INT_MIN, -5, 0, 3, 40, 41, 1000, INT_MAX};
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<int32_t> starts_q(1 + trial % 6), starts_k(starts_q.size());
    for (auto* starts : {&starts_q, &starts_k}) {
      for (int32_t& x : *starts) x = odd[random() % odd.size()];
    }
    ForwardParams const p = packed(starts_q, starts_k, 41, 37);
    auto const inside = [](int32_t first, int32_t count, int32_t rows) { return first >= 0 && first + count <= rows; };
    for (int64_t i = 0; i < count_query_tiles(p, 8); ++i) {
      auto const tile = QueryTile<BatchSequence>::at(p, static_cast<uint32_t>(i), 8);
      EXPECT_TRUE(tile.rows == 0 || inside(tile.entry.first_query + tile.row0, tile.rows, 41));
      EXPECT_TRUE(inside(tile.entry.first_key, tile.entry.keys, 37));
      EXPECT_TRUE(tile.row0 >= 0);
    }
    for (int64_t i = 0; i < count_key_tiles(p, 8); ++i) {
      auto const tile = KeyTile<BatchSequence>::at(p, static_cast<uint32_t>(i), 8);
      EXPECT_TRUE(tile.rows == 0 || inside(tile.entry.first_key + tile.row0, tile.rows, 37));
      EXPECT_TRUE(inside(tile.entry.first_query, tile.entry.queries, 41));
    }
  }
}

TEST(Packing, WhereNoRowIsNoTileIs) {
  std::vector<int32_t> const starts(5, 0);
  ForwardParams const p = packed(starts, starts, 0, 0);
  EXPECT_EQ(count_query_tiles(p, 16), 0);
  EXPECT_EQ(count_key_tiles(p, 16), 0);
}

}  // namespace
}  // namespace flashcute
