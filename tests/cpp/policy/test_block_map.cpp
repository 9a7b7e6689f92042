// Block maps: what is made of rules, element by element, and which blocks tiles visit.
#include <gtest/gtest.h>

#include <set>

#include "flashcute/policy/mask.hpp"
#include "support/map_problem.hpp"

namespace flashcute {
namespace {

/// The bit of an element, from the words and nothing else.
bool shown(uint32_t const* words, CellPlanes const& planes, int64_t map, int row, int column) {
  int64_t const at = (map * planes.rows + row / 64) * planes.words + column / 64 / 32;
  uint32_t const bit = 1u << column / 64 % 32;
  if (!(words[planes.some + at] & bit)) return false;
  if (words[planes.whole + at] & bit) return true;
  uint32_t number = words[planes.first + at];
  for (uint32_t other = 1; other < bit; other *= 2) {
    number += (words[planes.some + at] & other) && !(words[planes.whole + at] & other);
  }
  int64_t const word = planes.bits + number * int64_t{128} + row % 64 * 2 + column % 64 / 32;
  return words[word] >> column % 32 & 1;
}

void expect_words_say(MapProblem const& m) {
  BlockMapLayout const layout = BlockMapLayout::of(m.sizes(), m.params.capacity);
  for (int b = 0; b < m.batch; ++b) {
    for (int h = 0; h < m.heads; ++h) {
      for (int i = 0; i < m.rows; ++i) {
        for (int j = 0; j < m.keys; ++j) {
          bool const want = m.shows(b, h, i, j);
          ASSERT_EQ(shown(m.words(), layout.by_query, b * m.heads + h, i, j), want) << "query " << i << ", key " << j;
          ASSERT_EQ(shown(m.words(), layout.by_key, b * m.heads + h, j, i), want) << "query " << i << ", key " << j;
        }
      }
    }
  }
}

TEST(BlockMap, DenseRules) {
  for (auto const& [rows, keys] : {std::pair{1, 1}, {64, 64}, {63, 129}, {200, 65}, {70, 2200}, {2100, 3}}) {
    for (auto const& [batch, heads] : {std::pair{1, 1}, {2, 3}}) {
      expect_words_say(MapProblem::random(batch, heads, rows, keys, 3));
    }
  }
  expect_words_say(MapProblem::of(1, 1, 130, 140, [](int, int, int, int) { return true; }));
  expect_words_say(MapProblem::of(1, 1, 130, 140, [](int, int, int, int) { return false; }));
}

// Nothing is written beyond the words, and nothing is left as it was.
TEST(BlockMap, EmptyTensors) {
  for (auto const& [rows, keys] : {std::pair{0, 0}, {0, 100}, {100, 0}}) {
    MapProblem m = MapProblem::random(1, 1, rows, keys, 1);
    EXPECT_EQ(m.words()[0], 0u);
    EXPECT_EQ(m.words()[1], 0u);
  }
}

// A map that has no room tells how much it would have needed.
TEST(BlockMap, CountsPartialCells) {
  MapProblem m = MapProblem::of(1, 1, 130, 140, [](int, int, int i, int j) { return j <= i; });
  EXPECT_EQ(m.words()[0], 3u);  // those on the diagonal
  uint32_t const by_query = m.words()[0], by_key = m.words()[1];
  m.build(0);
  EXPECT_EQ(m.words()[0], by_query);
  EXPECT_EQ(m.words()[1], by_key);
  ForwardParams p{};
  p.map = m.described();
  EXPECT_TRUE(CellMap::overflowed(p));
}

MapProblem made(MapProblem like, BlockMapRules rules) {
  rules.sizes = like.sizes();
  rules.heads = like.heads;
  rules.capacity = like.params.capacity;
  rules.words = like.words();
  cpu::make_block_map(rules);
  return like;
}

// Documents in any order, queries and keys with numbers of their own, and some of none.
TEST(BlockMap, Documents) {
  std::mt19937 random(1);
  for (bool sorted : {false, true}) {
    int const rows = 200, keys = 330;
    std::vector<int> q(2 * rows), k(2 * keys);
    for (int& x : q) x = static_cast<int>(random() % 5) - 1;
    for (int& x : k) x = static_cast<int>(random() % 5) - 1;
    if (sorted) {
      for (int b = 0; b < 2; ++b) {
        std::sort(q.begin() + b * rows, q.begin() + (b + 1) * rows);
        std::sort(k.begin() + b * keys, k.begin() + (b + 1) * keys);
      }
    }
    auto const at = [](std::vector<int> const& x, int i) { return x[static_cast<size_t>(i)]; };
    MapProblem const want = MapProblem::of(2, 1, rows, keys, [&](int b, int, int i, int j) {
      return at(q, b * rows + i) >= 0 && at(q, b * rows + i) == at(k, b * keys + j);
    });
    BlockMapRules rules{};
    rules.documents_q = q.data(), rules.documents_k = k.data();
    rules.documents_stride_q = rows, rules.documents_stride_k = keys;
    expect_words_say(made(want, rules));
    rules.dense = want.shown.data();  // the same once more, as another rule beside it
    int64_t const stride[] = {rows * keys, 0, keys, 1};
    std::copy_n(stride, 4, rules.dense_stride);
    expect_words_say(made(want, rules));
  }
}

TEST(BlockMap, Combinations) {
  MapProblem const a = MapProblem::random(2, 1, 150, 210, 1), b = MapProblem::random(1, 3, 150, 210, 2);
  for (auto const operation : {MapOperation::both, MapOperation::either, MapOperation::first_only}) {
    MapProblem const want = MapProblem::of(2, 3, 150, 210, [&](int batch, int head, int i, int j) {
      bool const x = a.shows(batch, head, i, j), y = b.shows(batch, head, i, j);
      return operation == MapOperation::both ? x && y : operation == MapOperation::either ? x || y : x && !y;
    });
    BlockMapRules rules{};
    rules.first = a.described(), rules.second = b.described();
    rules.operation = operation;
    expect_words_say(made(want, rules));
  }
}

/// All blocks that hold a visible element are visited, those that need a test are known, and a loop that asks for one
/// after the other visits the same.
TEST(BlockMap, BlocksOfTiles) {
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    int const rows = static_cast<int>(random() % 300) + 1, keys = static_cast<int>(random() % 2500) + 1;
    MapProblem const m = MapProblem::random(1, 1, rows, keys, random());
    ForwardParams p{};
    p.batch = p.heads = p.kv_heads = 1;
    p.seqlen_q = rows, p.seqlen_k = keys;
    p.causal_offset = static_cast<int>(random() % 2) == 0 ? keys : keys / 2;
    p.window_offset = static_cast<int>(random() % 2) == 0 ? -rows : -rows / 3;
    p.map = m.described();
    using Mapped = Mask<MaskKind::mapped>;
    using Queries = QueryTile<MappedSequence>;
    using Keys = KeyTile<MappedSequence>;
    auto const visible = [&](int i, int j) {
      return m.shows(0, 0, i, j) && i + p.window_offset <= j && j <= i + p.causal_offset;
    };
    int const sizes[] = {16, 32, 64, 80, 128, 176, 192};
    int const block_m = sizes[random() % 7], block_n = sizes[random() % 7];
    auto const check = [&](std::set<int> const& visited, std::set<int> const& full, PassingCells passing, int row0,
                           int count, int block, int columns, auto&& sees) {
      for (int const n : visited) {
        ASSERT_GT(passing.left, 0);
        EXPECT_EQ(passing.left > 1, n != *visited.rbegin());
        EXPECT_EQ(passing.block, n);
        EXPECT_EQ(passing.head, 3);
        EXPECT_EQ(passing.partial(), !full.contains(n));
        passing = passing.after();
      }
      EXPECT_EQ(passing.left, 0);
      for (int n = 0; n * block < columns; ++n) {
        bool any = false, all = (n + 1) * block <= columns;
        for (int i = row0; i < row0 + count; ++i) {
          for (int j = n * block; j < std::min((n + 1) * block, columns); ++j) (sees(i, j) ? any : all) = sees(i, j);
        }
        EXPECT_TRUE(!any || visited.contains(n)) << "block " << n << " is left out";
        EXPECT_TRUE(all || !full.contains(n)) << "block " << n << " needs a test";
      }
    };
    for (int64_t i = 0; i < count_query_tiles(p, block_m); ++i) {
      auto const tile = Queries::at(p, i, block_m);
      auto const range = Mapped::kv_range(tile, p, block_n);
      EXPECT_EQ(PassingCells::of(range, 3).left == 0, range.empty());
      int const visits = range.visits();
      std::set<int> visited, full;
      while (!range.empty()) {
        int const ahead = range.first();
        MapBlock const block = range.take();
        EXPECT_EQ(block.number, ahead);
        EXPECT_TRUE(visited.empty() || block.number < *visited.begin());
        visited.insert(block.number);
        if (!block.partial) full.insert(block.number);
      }
      EXPECT_EQ(visits, static_cast<int>(visited.size()));
      // The same page by page, as Hopper's forward takes them.
      auto const pages = Mapped::pages(tile, p, block_n);
      auto next = visited.rbegin();
      for (int page = pages.end_page() - 1; page >= pages.first_page(); --page) {
        int full_left = -1;
        for (auto rest = pages.read(page); rest.visited != 0;) {
          MapBlock const block = rest.take_last();
          ASSERT_TRUE(next != visited.rend());
          int const number = 32 * page + block.number;
          EXPECT_EQ(number, *next++);
          EXPECT_EQ(block.partial, !full.contains(number));
          EXPECT_TRUE(full_left < 0 || block.partial == (full_left == 0)) << "announced as full, or not";
          EXPECT_TRUE(full_left <= 0 || rest.full_at_end() == full_left - 1);
          full_left = rest.full_at_end();
        }
        EXPECT_LE(full_left, 0) << "after the last block";
      }
      EXPECT_TRUE(next == visited.rend());
      check(visited, full, PassingCells::of(Mapped::kv_range(tile, p, block_n), 3), tile.row0, tile.rows, block_n, keys,
            visible);
    }
    for (int64_t i = 0; i < count_key_tiles(p, block_n); ++i) {
      auto const tile = Keys::at(p, i, block_n);
      auto const range = Mapped::query_range(tile, p, block_m);
      std::set<int> visited, full;
      range.for_each([&](int m, auto partial) {
        visited.insert(m);
        if (!decltype(partial)::value) full.insert(m);
      });
      check(visited, full, PassingCells::of(range, 0, 3, 1), tile.row0, tile.rows, block_m, rows,
            [&](int key, int query) { return visible(query, key); });
    }
    MappedSequence const s(p, MappedSequence::Entry::of(p, 0), 0);
    for (int i = 0; i < rows; ++i) {
      bool any = false;
      for (int j = 0; j < keys; ++j) {
        any = any || visible(i, j);
        ASSERT_EQ(Mapped::visible(i, j, s), visible(i, j));
      }
      ASSERT_EQ(Mapped::empty_row(i, s), !any) << "row " << i;
    }
  }
}

/// A thread's columns of a block, from any of the first 8, or the first 32 where warps share them.
template <int32_t count, int32_t spread>
void check_bits(MapProblem const& m, ForwardParams const& p) {
  MappedSequence const s(p, MappedSequence::Entry::of(p, 0), 0);
  using Mapped = Mask<MaskKind::mapped>;
  for (int first = 0; first < spread; first += 2) {
    for (int block = 0; block * count < m.keys; ++block) {
      for (int i = 0; i < m.rows; i += 7) {
        auto const seen = Mapped::seen<count, spread>(i, block * count + first, s);
        for (int d = 0; d + first < count; d += d % 8 == 0 ? 1 : 7) {
          int const key = block * count + first + d;
          ASSERT_EQ(seen.at(d), key < m.keys && m.shows(0, 0, i, key)) << "query " << i << ", key " << key;
        }
      }
    }
    for (int block = 0; block * count < m.rows; ++block) {
      for (int j = 0; j < m.keys; j += 7) {
        auto const seen = Mapped::queries_seeing<count, spread>(j, block * count + first, s);
        for (int d = 0; d + first < count; d += d % 8 == 0 ? 1 : 7) {
          int const query = block * count + first + d;
          ASSERT_EQ(seen.at(d), query < m.rows && m.shows(0, 0, query, j)) << "query " << query << ", key " << j;
        }
      }
    }
  }
}

TEST(BlockMap, BitsOfBlocks) {
  MapProblem const m = MapProblem::random(1, 1, 300, 410, 9);
  ForwardParams p{};
  p.batch = p.heads = p.kv_heads = 1;
  p.seqlen_q = m.rows, p.seqlen_k = m.keys, p.causal_offset = m.keys, p.window_offset = -m.rows;
  p.map = m.described();
  check_bits<16, 8>(m, p);
  check_bits<32, 8>(m, p);
  check_bits<64, 8>(m, p);
  check_bits<64, 32>(m, p);
  check_bits<96, 8>(m, p);
  check_bits<128, 8>(m, p);
  check_bits<128, 32>(m, p);
  check_bits<176, 8>(m, p);
}

}  // namespace
}  // namespace flashcute
