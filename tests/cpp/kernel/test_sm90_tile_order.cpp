// The order in which Hopper's thread blocks take the tiles of packed sequences, by what each emulated block finds
// alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "flashcute/core/defaults.hpp"
#include "flashcute/sm90/forward.hpp"
#include "kernel/kernel_problem.hpp"

namespace flashcute {
namespace {

using emulation::Sm90Block;

constexpr ForwardConfig config_of(int rows, int keys, int stages, int cluster = 1) {
  ForwardConfig c{.dtype = bf16, .head_dim = 64, .head_dim_v = 64, .block_m = rows, .block_n = keys};
  c.kernel = Kernel::sm90;
  c.num_warps = rows / 16;
  c.stages = stages;
  c.cluster = cluster;
  c.pingpong = rows == 128;
  return c;
}

constexpr ForwardConfig narrow = config_of(128, 64, 3);
constexpr ForwardConfig three_warpgroups = config_of(192, 64, 4);  // with too many rows for pairs
constexpr ForwardConfig single = config_of(64, 32, 2);             // with little room
constexpr ForwardConfig in_clusters = config_of(128, 64, 3, 2);

/// What all thread blocks, or clusters, do of packed sequences, by the order of tiles alone.
template <ForwardConfig C>
struct PackedTiles {
  using Mask = flashcute::Mask<MaskKind::band>;
  using Order = sm90::TileOrder<C, Mask>;
  using Storage = typename sm90::ForwardLayout<C, Mask>::SharedStorage;
  using Tile = QueryTile<BatchSequence>;

  std::vector<int32_t> starts{0};
  ForwardParams p{};
  int32_t blocks;
  bool sorted = true;
  std::vector<std::vector<Tile>> of_block;

  /// `large`: K and V do not fit the level 2 cache.
  PackedTiles(std::vector<int32_t> const& lengths, int32_t heads, int32_t blocks_, bool causal = true,
              bool large = true, int32_t heads_of_group = 1)
      : blocks(blocks_), of_block(static_cast<size_t>(blocks)) {
    for (int32_t const length : lengths) starts.push_back(starts.back() + length);
    p.batch = 1, p.heads = heads, p.kv_heads = heads / heads_of_group;
    p.seqlen_q = p.seqlen_k = starts.back();
    p.head_dim = p.head_dim_v = large ? 1 << 26 : 1;
    p.causal_offset = causal ? 0 : p.seqlen_k;
    p.window_offset = -p.seqlen_k;
    p.sequences.count = static_cast<int32_t>(lengths.size());
    p.sequences.cu_seqlens_q = p.sequences.cu_seqlens_k = starts.data();
    for (int32_t block = 0; block < blocks; ++block) run(block);
  }

  void run(int32_t block) {
    GlobalMemory memory;
    auto const index = static_cast<uint32_t>(block);
    Sm90Block const hopper{index, static_cast<uint32_t>(blocks), num_threads(C), sizeof(Storage), 1 + index};
    hopper.run(memory, [&](void* shared) {
      auto& smem = *static_cast<Storage*>(shared);
      Order::prepare(p, block, blocks, smem.q, smem.own_tiles);
      block_sync();
      if (thread_index() != 0) return;
      sorted = sorted && smem.own_tiles.sorted();
      if (!sorted) return;
      TilePlace place;
      for (int32_t next = 0; Order::find(p, next, block, blocks, smem.own_tiles, place);) {
        of_block[index].push_back(place.tile<Tile>(p, tile_rows(C)));
      }
    });
  }

  /// In halves of a block of keys.
  int64_t cost(Tile const& tile) const {
    auto const range = Mask::kv_range(tile, p, C.block_n);
    return 2 * (range.end - range.begin) + 1;
  }

  void expect_each_once() const {
    std::set<std::tuple<int32_t, int32_t, int32_t>> seen;
    for (auto const& tiles : of_block) {
      for (Tile const& t : tiles) {
        ASSERT_GT(t.rows, 0);
        EXPECT_TRUE(seen.emplace(t.head, t.entry.number, t.row0).second)
            << "twice: head " << t.head << ", sequence " << t.entry.number << ", row " << t.row0;
      }
    }
    size_t count = 0;
    for (size_t i = 1; i < starts.size(); ++i) {
      count += static_cast<size_t>(p.heads * ceil_div(starts[i] - starts[i - 1], tile_rows(C)));
    }
    EXPECT_EQ(seen.size(), count);
  }

  /// (Incomplete tiles count as shorter.)
  void expect_the_longest_first() const {
    for (auto const& own : of_block) {
      std::vector<int64_t> costs;
      for (Tile const& t : own) {
        if (t.rows == tile_rows(C)) costs.push_back(cost(t));
      }
      EXPECT_TRUE(std::is_sorted(costs.rbegin(), costs.rend()));
    }
  }

  /// What the busiest has to do, in shares of the average.
  double busiest() const {
    int64_t most = 0, sum = 0;
    for (auto const& tiles : of_block) {
      int64_t own = 0;
      for (Tile const& t : tiles) own += cost(t);
      most = std::max(most, own);
      sum += own;
    }
    return static_cast<double>(most) * blocks / static_cast<double>(sum);
  }

  /// How often each key is read from memory, if the tiles that blocks compute at the same time read it once.
  double reads() const {
    int64_t sum = 0;
    bool any = true;
    for (size_t i = 0; any; ++i) {
      std::map<std::pair<int32_t, int32_t>, int64_t> longest;
      for (auto const& tiles : of_block) {
        if (i >= tiles.size()) continue;
        auto& keys = longest[{tiles[i].head, tiles[i].entry.number}];
        keys = std::max(keys, int64_t{C.block_n} * Mask::kv_range(tiles[i], p, C.block_n).end);
      }
      for (auto const& [_, keys] : longest) sum += keys;
      any = !longest.empty();
    }
    return static_cast<double>(sum) / (static_cast<double>(p.seqlen_k) * p.heads);
  }
};

std::vector<int32_t> log_normal_lengths(std::mt19937& random, int32_t tokens, double mean) {
  std::lognormal_distribution length(std::log(mean) - 0.5, 1.);
  std::vector<int32_t> lengths;
  for (int32_t left = tokens; left > 0; left -= lengths.back()) {
    lengths.push_back(std::min(left, static_cast<int32_t>(length(random))));
  }
  return lengths;
}

TEST(Sm90TileOrder, EachTileIsDealtOnce) {
  std::mt19937 random(5);
  auto const check = [](auto const& tiles) {
    ASSERT_TRUE(tiles.sorted);
    tiles.expect_each_once();
    if (tiles.p.head_dim == 1) tiles.expect_the_longest_first();  // no pairs
  };
  for (int i = 0; i < 20; ++i) {
    std::vector<int32_t> lengths;
    for (int j = 0; j < 40; ++j) {
      lengths.push_back(static_cast<int32_t>(random() % 3 == 0   ? 0
                                             : random() % 7 == 0 ? random() % 3000
                                                                 : random() % 99));
    }
    auto const few = static_cast<int32_t>(2 + random() % 6);
    bool const causal = i % 2 == 0, large = i % 4 < 2;
    check(PackedTiles<narrow>(lengths, 3, max_of(few, 3), causal, large));
    check(PackedTiles<three_warpgroups>(lengths, 2, few, causal, large));
    check(PackedTiles<in_clusters>(lengths, 4, few, causal, large));
    check(PackedTiles<three_warpgroups>(lengths, 2, 20 + few, causal, large));
    check(PackedTiles<narrow>(lengths, 6, 4 + few, causal, large, 2));  // pairs, and heads that share keys
  }
  check(PackedTiles<narrow>(std::vector<int32_t>(1000, 1), 1, 10));
  check(PackedTiles<narrow>(std::vector<int32_t>(20, 100), 3, 1));
}

// Where keys do not come from the cache: guards against tiles of all sequences at the same time, each of which reads
// its own keys from memory. (By cost alone, all heads of a slot together, keys are read 3.7 to 9 times.)
TEST(Sm90TileOrder, TilesOfASequenceRunTogether) {
  constexpr ForwardConfig config = default_forward_config(DType::bfloat16, 128, 90);
  EXPECT_LT(PackedTiles<config>(std::vector(16, 1024), 16, 132).reads(), 2);
  EXPECT_LT(PackedTiles<config>(std::vector(4, 4096), 16, 132).reads(), 2);
  EXPECT_LT(PackedTiles<config>(std::vector(1, 16384), 16, 132).reads(), 3);
  EXPECT_LT(PackedTiles<config>(std::vector(4, 4096), 16, 132, false).reads(), 2);
  std::mt19937 random(7);
  EXPECT_LT(PackedTiles<config>(log_normal_lengths(random, 65536, 1000), 16, 132).reads(), 3);
}

// Guards against a query head that comes before or after those it shares keys with, which then are read twice.
TEST(Sm90TileOrder, HeadsThatShareKeysRunTogether) {
  constexpr ForwardConfig config = default_forward_config(DType::bfloat16, 128, 90);
  for (bool const causal : {false, true}) {
    PackedTiles<config> tiles(std::vector(8, 1024), 16, 32, causal, true, 4);
    ASSERT_TRUE(tiles.sorted);
    tiles.expect_each_once();
    for (size_t round = 0; round < tiles.of_block[0].size(); ++round) {
      std::map<std::tuple<int32_t, int32_t, int32_t>, int> heads;
      for (auto const& own : tiles.of_block) {
        ++heads[{own[round].kv_head, own[round].entry.number, own[round].row0}];
      }
      for (auto const& [_, count] : heads) EXPECT_EQ(count, 4);
    }
  }
}

TEST(Sm90TileOrder, NobodyHasMuchMoreToDo) {
  constexpr ForwardConfig config = default_forward_config(DType::bfloat16, 128, 90);
  for (bool const large : {false, true}) {
    double const equal_lengths =
        large ? 1.02 : 1.01;  // pairs are for keys that come from memory, at the cost of balance
    EXPECT_LT(PackedTiles<config>(std::vector(8, 2048), 32, 132, true, large).busiest(), equal_lengths);
    EXPECT_LT(PackedTiles<config>(std::vector(4, 4096), 32, 132, true, large).busiest(), equal_lengths);
    std::mt19937 random(7);
    for (int i = 0; i < 4; ++i) {
      bool const causal = i % 2 == 0;
      auto const few = log_normal_lengths(random, 16384, 1000), many = log_normal_lengths(random, 65536, 2000);
      EXPECT_LT(PackedTiles<config>(few, 32, 132, causal, large).busiest(), 1.05);
      EXPECT_LT(PackedTiles<config>(many, 32, 132, causal, large).busiest(), 1.02);
    }
  }
}

TEST(Sm90TileOrder, NotWhereItChangesNothingOrTilesDoNotFit) {
  std::vector<int32_t> const lengths(20, 100);
  EXPECT_FALSE(PackedTiles<narrow>(lengths, 1, 100).sorted);  // one round
  EXPECT_TRUE(PackedTiles<narrow>(lengths, 1, 10).sorted);
  EXPECT_FALSE(PackedTiles<narrow>(lengths, 100, 1).sorted);  // more rounds than shared memory has places for
  EXPECT_FALSE(PackedTiles<single>(std::vector<int32_t>(5000, 1), 1, 100).sorted);  // more slots
  // With pairs each unit has two places: here are fewer tiles than places, but more than half as many units.
  auto const most = static_cast<size_t>(decltype(PackedTiles<narrow>::Storage::own_tiles)::most);
  std::vector<int32_t> many(3 * most / 2, 1);
  EXPECT_TRUE(PackedTiles<narrow>(many, 1, 2).sorted);
  many.push_back(1000);
  EXPECT_FALSE(PackedTiles<narrow>(many, 1, 2).sorted);
  EXPECT_TRUE(PackedTiles<narrow>(many, 1, 2, true, false).sorted);
}

TEST(Sm90TileOrder, LevelsRiseWithCosts) {
  for (int32_t blocks = 0; blocks < 10'000; ++blocks) {
    int32_t const level = sm90::CostLevel::of(blocks);
    ASSERT_LT(level, sm90::CostLevel::count);
    if (blocks < sm90::CostLevel::exact) {
      ASSERT_EQ(level, blocks);
    } else {
      ASSERT_TRUE(level == sm90::CostLevel::of(blocks - 1) || level == sm90::CostLevel::of(blocks - 1) + 1);
    }
  }
}

}  // namespace
}  // namespace flashcute
