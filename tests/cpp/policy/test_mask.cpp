// The blocks that a tile visits against the truth about every element, for all small sizes.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

#include "flashcute/policy/mask.hpp"
#include "support/mask_definition.hpp"

namespace flashcute {
namespace {

ForwardParams problem(int32_t seqlen_q, int32_t seqlen_k, int32_t offset, int32_t window_offset = 0) {
  ForwardParams p{};
  p.batch = p.heads = p.kv_heads = 1;
  p.seqlen_q = seqlen_q;
  p.seqlen_k = seqlen_k;
  p.causal_offset = offset;
  p.window_offset = window_offset;
  return p;
}

template <MaskKind Kind>
using Queries = QueryTile<typename Mask<Kind>::Sequence>;
template <MaskKind Kind>
using Keys = KeyTile<typename Mask<Kind>::Sequence>;

/// Of batch entry 0.
template <MaskKind Kind>
auto sequence_of(ForwardParams const& p) {
  using Sequence = typename Mask<Kind>::Sequence;
  return Sequence(p, Sequence::Entry::of(p, 0), 0);
}

bool sees(MaskKind kind, int32_t q, int32_t k, ForwardParams const& p) {
  SequenceParams const& s = p.sequences;
  int32_t const rows = s.seqlens_q != nullptr ? *s.seqlens_q : p.seqlen_q;
  int32_t const keys = s.seqlens_k != nullptr ? *s.seqlens_k : p.seqlen_k;
  int64_t const shift = s.from_end ? (keys - p.seqlen_k) - (rows - p.seqlen_q) : 0;
  return definition::sees(
      kind, q, k,
      {keys, p.causal_offset + shift, p.window_offset + shift, kind == MaskKind::band ? rows : INT64_MAX,
       s.prefixes != nullptr ? *s.prefixes : s.prefix, s.prefix_offset + shift});
}

/// A loop that asks the range for one block after another visits the same blocks in the same order, and knows how many
/// are left.
template <class Range>
void check_walk(Range const& range, std::set<int32_t> const& visited, std::set<int32_t> const& full) {
  auto expected = visited.rbegin();
  auto left = static_cast<int32_t>(visited.size());
  for (int32_t n = range.first(); range.left(n) > 0; n = range.next(n), ++expected, --left) {
    ASSERT_NE(expected, visited.rend());
    EXPECT_EQ(n, *expected);
    EXPECT_EQ(range.left(n), left);
    EXPECT_EQ(range.is_last(n), left == 1);
    EXPECT_EQ(range.next(n), n + Range::step);
    EXPECT_EQ(range.is_partial(n), !full.contains(n));
    if (full.contains(n)) {
      int32_t count = 0;
      while (full.contains(n - count)) ++count;
      EXPECT_EQ(range.full_left(n), count);
    }
  }
  EXPECT_EQ(expected, visited.rend());
}

/// What is corrected for values that are not finite must be looked for in exactly the keys of the blocks visited, or of
/// the partial ones, and never beyond the sequence. (Where both ends are partial, in those between them too.)
template <class Range, class Sequence>
void check_keys(Range const& range, std::set<int32_t> const& visited, std::set<int32_t> const& full, int32_t block_n,
                Sequence const& sequence) {
  constexpr bool one_end = std::is_same_v<Range, KvRange>;
  for (bool const only_partial : {false, true}) {
    RowRange const keys = range.keys(only_partial, block_n, sequence);
    for (int32_t k = 0; k < sequence.keys() + 2 * block_n; ++k) {
      int32_t const n = k / block_n;
      bool const expected =
          k < sequence.keys() && visited.contains(n) && !(only_partial && one_end && full.contains(n));
      ASSERT_EQ(keys.begin <= k && k < keys.end, expected) << "key " << k;
    }
  }
}

/// The GPU's backward visits the same blocks of one K/V head from the first to the last.
template <class Range>
void check_passing_blocks(Range const& range, std::set<int32_t> const& visited, std::set<int32_t> const& full) {
  auto blocks = PassingBlocks::of(range, 5);
  for (int32_t const n : visited) {
    ASSERT_GT(blocks.left, 0);
    EXPECT_EQ(blocks.head, 5);
    EXPECT_EQ(blocks.block, n);
    EXPECT_EQ(blocks.partial(), !full.contains(n)) << "block " << n;
    blocks = blocks.after();
  }
  EXPECT_EQ(blocks.left, 0);
}

template <MaskKind Kind>
void check_all_tiles(ForwardParams const& p, int32_t block_m, int32_t block_n) {
  for (int64_t index = 0; index < count_query_tiles(p, block_m); ++index) {
    auto const tile = Queries<Kind>::at(p, index, block_m);
    auto const range = Mask<Kind>::kv_range(tile, p, block_n);
    std::set<int32_t> visited, full;
    int32_t last = std::numeric_limits<int32_t>::max();
    range.for_each_backward([&](int32_t n, auto partial) {
      EXPECT_LT(n, last) << "blocks must come from the last to the first";
      last = n;
      EXPECT_TRUE(visited.insert(n).second);
      if (!decltype(partial)::value) full.insert(n);
    });
    EXPECT_EQ(range.empty(), visited.empty());
    check_walk(range, visited, full);
    check_keys(range, visited, full, block_n, tile.sequence(p));
    check_passing_blocks(range, visited, full);
    for (int32_t n = 0; n * block_n < p.seqlen_k + 2 * block_n; ++n) {
      // Queries that do not exist do not make a block partial: their results are not used.
      bool any = false, all = true;
      for (int32_t q = tile.row0; q < tile.row0 + tile.rows; ++q) {
        for (int32_t k = n * block_n; k < (n + 1) * block_n; ++k) {
          bool const visible = sees(Kind, q, k, p);
          EXPECT_EQ((Mask<Kind>::visible(q, k, tile.sequence(p))), visible);
          EXPECT_EQ((Mask<Kind>::keys_of(q, tile.sequence(p)).has(k)), visible) << "query " << q << ", key " << k;
          any = any || visible;
          all = all && (visible || q >= tile.row0 + tile.existing(p));
        }
      }
      ASSERT_EQ(visited.contains(n), any) << "block " << n << " sq " << p.seqlen_q << " sk " << p.seqlen_k;
      ASSERT_EQ(full.contains(n), any && all) << "block " << n << " sq " << p.seqlen_q << " sk " << p.seqlen_k;
    }
  }
}

// Guards against visiting a block outside the mask, missing one inside it, and testing elements (or worse,
// not testing them) in the wrong blocks.
TEST(Mask, BlockRangesAgreeWithElementVisibility) {
  for (int32_t sq = 0; sq <= 11; ++sq) {
    for (int32_t sk = 0; sk <= 11; ++sk) {
      for (int32_t block_m : {1, 2, 4}) {
        for (int32_t block_n : {1, 2, 4}) {
          check_all_tiles<MaskKind::full>(problem(sq, sk, 0), block_m, block_n);
          for (int32_t offset : {sk - sq, 0, -3, 5}) {
            check_all_tiles<MaskKind::causal>(problem(sq, sk, offset), block_m, block_n);
            for (int32_t const size : {0, 1, 2, 3, 5, 8, 20}) {
              check_all_tiles<MaskKind::band>(problem(sq, sk, offset, offset - size), block_m, block_n);
            }
          }
        }
      }
    }
  }
}

/// As check_keys.
template <class Range, class Sequence>
void check_rows(Range const& range, std::set<int32_t> const& visited, std::set<int32_t> const& full, int32_t block_m,
                Sequence const& sequence) {
  if (range.empty()) return;
  constexpr bool one_end = std::is_same_v<Range, QueryRange>;
  for (bool const only_partial : {false, true}) {
    RowRange const rows = range.rows(only_partial, block_m, sequence);
    for (int32_t q = 0; q < sequence.rows() + 2 * block_m; ++q) {
      int32_t const m = q / block_m;
      bool const expected =
          q < sequence.rows() && visited.contains(m) && !(only_partial && one_end && full.contains(m));
      ASSERT_EQ(rows.begin <= q && q < rows.end, expected) << "row " << q;
    }
  }
}

/// The GPU's backward walks over the same blocks once for each head, and also tests the elements of a block that lacks
/// rows.
template <class Range>
void check_passing_blocks(Range const& range, std::set<int32_t> const& visited, std::set<int32_t> const& full,
                          int32_t complete) {
  constexpr int32_t first_head = 3, heads = 2;
  auto blocks = PassingBlocks::of(range, complete, first_head, heads);
  for (int32_t head = first_head; head < first_head + heads; ++head) {
    for (int32_t const m : visited) {
      ASSERT_GT(blocks.left, 0);
      EXPECT_EQ(blocks.head, head);
      EXPECT_EQ(blocks.block, m);
      EXPECT_EQ(blocks.partial(), !full.contains(m) || m >= complete) << "block " << m;
      blocks = blocks.after();
    }
  }
  EXPECT_EQ(blocks.left, 0);
}

template <MaskKind Kind>
void check_all_key_tiles(ForwardParams const& p, int32_t block_m, int32_t block_n) {
  for (int64_t index = 0; index < count_key_tiles(p, block_n); ++index) {
    auto const tile = Keys<Kind>::at(p, index, block_n);
    auto const range = Mask<Kind>::query_range(tile, p, block_m);
    std::set<int32_t> visited, full;
    range.for_each([&](int32_t m, auto partial) {
      EXPECT_TRUE(visited.empty() || m > *visited.rbegin()) << "blocks must come from the first to the last";
      visited.insert(m);
      if (!decltype(partial)::value) full.insert(m);
    });
    EXPECT_EQ(range.empty(), visited.empty());
    check_rows(range, visited, full, block_m, tile.sequence(p));
    check_passing_blocks(range, visited, full, tile.sequence(p).rows() / block_m);
    for (int32_t m = 0; m * block_m < p.seqlen_q + 2 * block_m; ++m) {
      bool any = false, all = true;
      for (int32_t q = m * block_m; q < std::min((m + 1) * block_m, p.seqlen_q); ++q) {
        for (int32_t k = tile.row0; k < tile.row0 + tile.rows; ++k) {
          bool const visible = sees(Kind, q, k, p);
          any = any || visible;
          all = all && (visible || k >= tile.row0 + tile.existing(p));
        }
      }
      // Where queries are hidden on both sides, a block that lacks rows is a partial one.
      all = all && (!Mask<Kind>::two_edges || (m + 1) * block_m <= p.seqlen_q);
      ASSERT_EQ(visited.contains(m), any) << "block " << m << " sq " << p.seqlen_q << " sk " << p.seqlen_k;
      ASSERT_EQ(full.contains(m), any && all) << "block " << m << " sq " << p.seqlen_q << " sk " << p.seqlen_k;
    }
  }
}

// The same for the backward, where a block of keys visits blocks of queries.
TEST(Mask, QueryRangesAgreeWithElementVisibility) {
  for (int32_t sq = 0; sq <= 11; ++sq) {
    for (int32_t sk = 0; sk <= 11; ++sk) {
      for (int32_t block_m : {1, 2, 4}) {
        for (int32_t block_n : {1, 2, 4}) {
          check_all_key_tiles<MaskKind::full>(problem(sq, sk, 0), block_m, block_n);
          for (int32_t offset : {sk - sq, 0, -3, 5, sk, -sq}) {
            check_all_key_tiles<MaskKind::causal>(problem(sq, sk, offset), block_m, block_n);
          }
          for (int32_t offset : {sk - sq, 0, -3, 5}) {
            for (int32_t const size : {0, 1, 2, 3, 5, 8, 20}) {
              check_all_key_tiles<MaskKind::band>(problem(sq, sk, offset, offset - size), block_m, block_n);
            }
          }
        }
      }
    }
  }
}

// Sequences shorter than their tensors, and prefixes: guards against blocks and elements taken from the tensors'
// lengths, and against a prefix that a window does not cut.
TEST(Mask, RangesOfShortSequencesAndPrefixes) {
  std::mt19937 random(3);
  auto const from_to = [&](int32_t low, int32_t high) { return std::uniform_int_distribution(low, high)(random); };
  for (int i = 0; i < 30000 && !testing::Test::HasFailure(); ++i) {
    int32_t const sq = from_to(0, 11), sk = from_to(0, 11), offset = from_to(-4, 9);
    int32_t const rows = from_to(0, sq), keys = from_to(0, sk);
    ForwardParams p = problem(sq, sk, offset, offset - from_to(0, 15));
    p.sequences.from_end = from_to(0, 1) == 1;
    if (from_to(0, 3) > 0) p.sequences.seqlens_q = &rows;
    if (from_to(0, 3) > 0) p.sequences.seqlens_k = &keys;
    int32_t const prefix = from_to(0, 12);
    if (from_to(0, 1) == 1) {
      (from_to(0, 1) == 1 ? p.sequences.prefix = prefix : (p.sequences.prefixes = &prefix, 0));
      p.sequences.prefix_offset = from_to(p.window_offset, p.causal_offset);
    }
    int32_t const block_m = 1 << from_to(0, 2), block_n = 1 << from_to(0, 2);
    check_all_tiles<MaskKind::band>(p, block_m, block_n);
    check_all_key_tiles<MaskKind::band>(p, block_m, block_n);
  }
}

// A length in memory is data: it must not reach beyond the tensors, whatever it is.
TEST(Mask, LengthsAreHeldWithinTheTensors) {
  ForwardParams p = problem(7, 9, 2);
  for (int32_t const length : {INT32_MIN, -1, 0, 3, 1000, INT32_MAX}) {
    p.sequences.seqlens_q = p.sequences.seqlens_k = &length;
    auto const s = sequence_of<MaskKind::band>(p);
    EXPECT_EQ(s.rows(), std::clamp(length, 0, 7));
    EXPECT_EQ(s.keys(), std::clamp(length, 0, 9));
  }
}

/// Columns as a thread of Hopper's kernel has them: pairs, 8 apart.
struct PairsOfColumns {
  static int32_t distance(int32_t j) { return j % 2 + j / 2 * 8; }
  static int32_t columns_before(int32_t distance) {
    int32_t count = 0;
    while (PairsOfColumns::distance(count) < distance) ++count;
    return count;
  }
};

/// Columns side by side.
struct AllColumns {
  static int32_t distance(int32_t j) { return j; }
  static int32_t columns_before(int32_t distance) { return std::max(distance, 0); }
};

/// In a band a query that does not exist counts as the last one that does.
template <MaskKind Kind>
int32_t counted(int32_t q, ForwardParams const& p) {
  return Mask<Kind>::two_edges ? std::min(q, p.seqlen_q - 1) : q;
}

template <MaskKind Kind, class Columns>
void expect_bits(int32_t q, int32_t key0, ForwardParams const& p) {
  auto const s = sequence_of<Kind>(p);
  for (int32_t const first : {0, 32, 64}) {
    uint32_t const bits = Mask<Kind>::template seen<>(q, key0, s).template bits<Columns>(first);
    for (int32_t bit = 0; bit < 32; ++bit) {
      int32_t const k = key0 + Columns::distance(first + bit);
      ASSERT_EQ(bits >> bit & 1, sees(Kind, counted<Kind>(q, p), k, p))
          << "query " << q << ", key " << k << ", column " << first + bit;
    }
  }
}

/// From random places in and around a sequence of random lengths: `seen` one by one and as bits, and `seen_by`.
template <MaskKind Kind>
void check_seen(std::mt19937& random) {
  auto const from_to = [&](int32_t low, int32_t high) { return std::uniform_int_distribution(low, high)(random); };
  int32_t const sq = from_to(1, 200), sk = from_to(0, 700);
  int32_t const offset = from_to(0, 1) == 0 ? sk - sq : from_to(-300, 700);
  ForwardParams const p = problem(sq, sk, offset, offset - from_to(0, 1) * from_to(0, 300));
  auto const s = sequence_of<Kind>(p);
  SCOPED_TRACE(testing::Message() << "sq " << sq << " sk " << sk << " offset " << p.causal_offset);
  int32_t const q0 = from_to(0, sq + 64), key0 = from_to(0, sk + 64);
  expect_bits<Kind, PairsOfColumns>(q0, key0, p);
  expect_bits<Kind, AllColumns>(q0, key0, p);
  auto const seen_by = Mask<Kind>::seen_by(key0, q0, s);
  for (int32_t i = 0; i < 40; ++i) {
    for (int32_t j = 0; j < 40; ++j) {
      bool const visible = sees(Kind, q0 + i, key0 + j, p);
      ASSERT_EQ(Mask<Kind>::template seen<>(q0 + i, key0, s).at(j), sees(Kind, counted<Kind>(q0 + i, p), key0 + j, p))
          << "query " << q0 + i << ", key " << key0 + j;
      ASSERT_EQ(seen_by.at(i, j), q0 + i < sq && visible) << "query " << q0 + i << ", key " << key0 + j;
    }
  }
}

// Guards against kernels that hide a visible key or show a hidden one: they do not ask `visible`, but what one query
// sees of many keys, on Hopper 32 at a time, or which queries see the keys that stay.
TEST(Mask, SeenAgreesWithElementVisibility) {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    check_seen<MaskKind::full>(random);
    check_seen<MaskKind::causal>(random);
    check_seen<MaskKind::band>(random);
  }
}

// Guards against sums that do not fit 32 bits: of the longest tensors that the host lets pass, and rows that a tile has
// beyond them.
TEST(Mask, CausalSumsOfTheLongestTensors) {
  using Causal = Mask<MaskKind::causal>;
  constexpr int64_t most = INT32_MAX - 1024;
  for (int64_t const sq : {int64_t{0}, int64_t{1}, most / 2, most - 1, most}) {
    int64_t const sk = most - sq;
    for (int64_t const offset : {-sq, int64_t{0}, sk - sq, sk}) {
      auto const p = problem(static_cast<int32_t>(sq), static_cast<int32_t>(sk), static_cast<int32_t>(offset));
      auto const sequence = sequence_of<MaskKind::causal>(p);
      for (int64_t const beyond : {-1, 0, 63, 511}) {
        int64_t const q = std::max<int64_t>(sq + beyond, 0), k = std::max<int64_t>(sk + beyond, 0);
        EXPECT_EQ(Causal::visible_keys(static_cast<int32_t>(q), sequence), std::clamp<int64_t>(q + offset + 1, 0, sk));
        EXPECT_EQ(Causal::first_query(static_cast<int32_t>(k), sequence), std::clamp<int64_t>(k - offset, 0, sq));
      }
    }
  }
}

// Guards against shifts by 32 or more, or by less than 0, which are undefined.
TEST(Mask, LowBitsOfAnyCount) {
  EXPECT_EQ(low_bits(INT32_MIN), 0u);
  EXPECT_EQ(low_bits(-1), 0u);
  EXPECT_EQ(low_bits(0), 0u);
  EXPECT_EQ(low_bits(1), 1u);
  EXPECT_EQ(low_bits(31), 0x7fffffffu);
  EXPECT_EQ(low_bits(32), 0xffffffffu);
  EXPECT_EQ(low_bits(33), 0xffffffffu);
  EXPECT_EQ(low_bits(INT32_MAX), 0xffffffffu);
}

template <class Word>
void check_nonzero_bytes(std::mt19937& random) {
  uint8_t const values[] = {0, 0, 0, 1, 0x7f, 0x80, 0xff, static_cast<uint8_t>(random())};
  Word word = 0, expected = 0;
  for (size_t i = 0; i < sizeof(Word); ++i) {
    uint8_t const byte = values[random() % std::size(values)];
    word |= Word{byte} << 8 * i;
    expected |= Word{byte != 0} << i;
  }
  ASSERT_EQ(nonzero_bytes(word), expected) << std::hex << word;
}

// Guards against a boolean that is true by another bit than its lowest, and against carries from byte to byte.
TEST(Mask, NonzeroBytesOfAnyWord) {
  std::mt19937 random(2);
  for (int i = 0; i < 5000; ++i) {
    check_nonzero_bytes<uint32_t>(random);
    check_nonzero_bytes<uint64_t>(random);
  }
}

// Guards against keys whose gradient is computed twice or never.
TEST(KeyTile, TilesCoverEveryKeyOnce) {
  for (int32_t sk : {1, 15, 16, 17, 33}) {
    ForwardParams p = problem(8, sk, 0);
    p.batch = 3;
    p.heads = 6;
    p.kv_heads = 2;
    std::set<std::tuple<int32_t, int32_t, int32_t>> keys;
    for (int64_t i = 0; i < count_key_tiles(p, 16); ++i) {
      auto const tile = KeyTile<UniformSequence>::at(p, i, 16);
      EXPECT_GE(tile.rows, 1);
      for (int32_t r = 0; r < tile.rows; ++r)
        EXPECT_TRUE(keys.emplace(tile.entry.batch, tile.kv_head, tile.row0 + r).second);
    }
    EXPECT_EQ(keys.size(), static_cast<size_t>(p.batch) * p.kv_heads * sk);
  }
}

template <MaskKind Kind>
void check_empty_rows(ForwardParams const& p) {
  auto const sequence = sequence_of<Kind>(p);
  bool any_empty = false;
  for (int32_t q = 0; q < p.seqlen_q; ++q) {
    bool any = false;
    for (int32_t k = 0; k < p.seqlen_k; ++k) any = any || sees(Kind, q, k, p);
    EXPECT_EQ(Mask<Kind>::empty_row(q, sequence), !any);
    EXPECT_EQ(Mask<Kind>::keys_of(q, sequence).empty(), !any);
    any_empty = any_empty || !any;
  }
  if constexpr (!Mask<Kind>::two_edges) EXPECT_EQ(Mask<Kind>::has_empty_rows(sequence), any_empty);
}

// A row without keys must be known to be empty, and no other.
TEST(Mask, EmptyRowsAreThoseThatSeeNoKey) {
  for (int32_t sq = 1; sq <= 9; ++sq) {
    for (int32_t sk = 0; sk <= 9; ++sk) {
      check_empty_rows<MaskKind::full>(problem(sq, sk, 0));
      for (int32_t offset = -sq; offset <= sk; ++offset) {
        check_empty_rows<MaskKind::causal>(problem(sq, sk, offset));
        for (int32_t window = -sq; window <= offset; ++window) {
          check_empty_rows<MaskKind::band>(problem(sq, sk, offset, window));
        }
      }
    }
  }
}

// Guards against tiles that are computed twice or never, in any order of dispatch.
TEST(QueryTile, TilesCoverEveryRowOnce) {
  for (int32_t sq : {1, 15, 16, 17, 33}) {
    ForwardParams p = problem(sq, 8, 0);
    p.batch = 3;
    p.heads = 6;
    p.kv_heads = 2;
    std::set<std::tuple<int32_t, int32_t, int32_t>> rows;
    for (int64_t i = 0; i < count_query_tiles(p, 16); ++i) {
      auto const tile = QueryTile<UniformSequence>::at(p, i, 16);
      EXPECT_EQ(tile.kv_head, tile.head / 3);
      EXPECT_GE(tile.rows, 1);
      for (int32_t r = 0; r < tile.rows; ++r)
        EXPECT_TRUE(rows.emplace(tile.entry.batch, tile.head, tile.row0 + r).second);
      // A GPU computes the same with its 32-bit block index.
      auto const same = QueryTile<UniformSequence>::at(p, static_cast<uint32_t>(i), 16);
      EXPECT_EQ(same.row0, tile.row0);
      EXPECT_EQ(same.head, tile.head);
      EXPECT_EQ(same.entry.batch, tile.entry.batch);
    }
    EXPECT_EQ(rows.size(), static_cast<size_t>(p.batch) * p.heads * sq);
  }
}

// The same with the tiles of heads in turn; and against long tiles, those with the last rows, that start after shorter
// ones of heads which fit the cache together.
TEST(QueryTile, TilesOfHeadsInTurnCoverEveryRowOnce) {
  for (int32_t head_dim : {64, 1 << 20}) {  // all heads at once, or three
    for (int32_t sq : {1, 16, 33, 80}) {
      ForwardParams p = problem(sq, 8, 0);
      p.batch = 3;
      p.heads = 6;
      p.kv_heads = 2;
      p.head_dim = p.head_dim_v = head_dim;
      int32_t const at_once = head_dim == 64 ? 18 : 3, tiles = ceil_div(sq, 16);
      std::set<std::tuple<int32_t, int32_t, int32_t>> rows;
      for (uint32_t i = 0; i < count_query_tiles(p, 16); ++i) {
        auto const tile = QueryTile<UniformSequence>::in_turn(p, i, 16, 2);
        EXPECT_EQ(tile.kv_head, tile.head / 3);
        int32_t const head = tile.entry.batch * p.heads + tile.head, turn = head / at_once;
        EXPECT_EQ(turn, static_cast<int32_t>(i) / (at_once * tiles));
        int32_t const width = min_of(at_once, 18 - turn * at_once);
        EXPECT_EQ(tile.row0 / 16, tiles - 1 - (static_cast<int32_t>(i) - turn * at_once * tiles) / width);
        for (int32_t r = 0; r < tile.rows; ++r)
          EXPECT_TRUE(rows.emplace(tile.entry.batch, tile.head, tile.row0 + r).second);
      }
      EXPECT_EQ(rows.size(), static_cast<size_t>(p.batch) * p.heads * sq);
    }
  }
}

// Guards against one head more at once than the cache holds, where heads fit it exactly: a rounded quotient would be
// the next integer.
TEST(QueryTile, HeadsThatFitTheCacheExactly) {
  int64_t const cache = HeadsInTurn<uint32_t>::cache_bytes;
  for (int32_t heads : {1, 2, 4, 8, 64}) {
    EXPECT_EQ(HeadsInTurn<uint32_t>::at(0, 1000, 1, cache / heads).width, static_cast<uint32_t>(heads));
    EXPECT_EQ(HeadsInTurn<int64_t>::at(0, 1000, 1, cache / heads).width, heads);
  }
  EXPECT_EQ(HeadsInTurn<uint32_t>::at(0, 1000, 1, 5 * cache).width, 1u);
}

// Guards against 32-bit overflow in any offset. Every term alone exceeds 2^31 elements.
TEST(QueryTile, OffsetsAre64Bit) {
  ForwardParams p{};
  p.batch = 70000;
  p.heads = 64;
  p.kv_heads = 8;
  p.seqlen_q = 1 << 20;
  p.seqlen_k = 1 << 20;
  int64_t const big = int64_t{1} << 33;
  p.q_stride = {big, big / 2, big / 4};
  p.k_stride = {big + 8, 128, big};
  p.v_stride = {big + 16, 128, big + 8};
  p.out_stride = {big + 24, big, big + 16};
  QueryTile<UniformSequence> tile{};
  tile.entry.batch = 65537;
  tile.head = 63;
  tile.kv_head = 7;
  tile.row0 = (1 << 20) - 128;
  tile.rows = 128;
  using Wide = __int128;
  auto const expect = [](int64_t got, Wide expected) { EXPECT_TRUE(static_cast<Wide>(got) == expected); };
  expect(tile.q_offset(p), Wide{65537} * big + Wide{tile.row0} * (big / 2) + Wide{63} * (big / 4));
  expect(tile.k_offset(p), Wide{65537} * (big + 8) + Wide{7} * big);
  expect(tile.v_offset(p), Wide{65537} * (big + 16) + Wide{7} * (big + 8));
  expect(tile.out_offset(p), Wide{65537} * (big + 24) + Wide{tile.row0} * big + Wide{63} * (big + 16));
  expect(tile.lse_offset(p), (Wide{65537} * 64 + 63) * (1 << 20) + tile.row0);
}

// Tile counts beyond 65,535, and beyond 32 bits where the host must notice.
TEST(QueryTile, CountIs64Bit) {
  ForwardParams p = problem(1 << 20, 1, 0);
  p.batch = 65537;
  p.heads = 128;
  EXPECT_EQ(count_query_tiles(p, 16), int64_t{65537} * 128 * (1 << 16));
}

}  // namespace
}  // namespace flashcute
