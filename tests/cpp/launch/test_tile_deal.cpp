// Who computes which tile in Hopper's kernel: each tile once, and nobody much more than the others. The kernel walks
// the same rounds by the same functions.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "flashcute/core/defaults.hpp"
#include "flashcute/policy/mask.hpp"
#include "launch/recent.hpp"
#include "launch/tile_deal.hpp"

namespace {

/// By `new`, of this thread.
thread_local std::size_t allocated_bytes = 0;

}  // namespace

// Not inlined: g++ would warn of memory from `new` that goes to `free`.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  allocated_bytes += bytes;
  if (void* const memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace flashcute {
namespace {

using Queries = QueryTile<UniformSequence>;

struct Problem {
  ForwardKernelId kernel;
  ForwardParams params{};
  int32_t blocks;

  Problem(MaskKind mask, int32_t head_dim, int32_t multiprocessors, int32_t batch, int32_t heads, int32_t seqlen_q,
          int32_t seqlen_k, int32_t cluster = 1)
      : kernel{kernel_of(default_forward_config(DType::bfloat16, head_dim, 90), {.mask = mask})} {
    kernel.config.cluster = cluster;
    params.batch = batch;
    params.heads = params.kv_heads = heads;
    params.seqlen_q = seqlen_q;
    params.seqlen_k = seqlen_k;
    params.causal_offset = seqlen_k - seqlen_q;
    blocks = persistent_clusters(kernel.config, count_query_tiles(params, tile_rows(kernel.config)), multiprocessors);
  }

  /// As the kernel's TileSchedule: the tiles of each block, in its order.
  std::vector<std::vector<Queries>> tiles(TileDeal const& deal) const {
    ForwardConfig const& c = kernel.config;
    int32_t const row_blocks = ceil_div(params.seqlen_q, tile_rows(c));
    std::vector<std::vector<Queries>> all(static_cast<std::size_t>(blocks));
    for (int32_t block = 0; block < blocks; ++block) {
      TileRounds rounds(params, row_blocks, blocks, section_rounds(kernel));
      int32_t index = 0;
      for (TileRound round; rounds.next(round); ++index) {
        int32_t const turn = deal.turn(index, round, block, blocks);
        if (turn < round.count)
          all[static_cast<std::size_t>(block)].push_back(
              round.place(turn, row_blocks).tile<Queries>(params, tile_rows(c)));
      }
    }
    return all;
  }
};

void expect_each_tile_once(Problem const& problem) {
  std::set<std::tuple<int32_t, int32_t, int32_t>> seen;
  for (auto const& tiles : problem.tiles(deal_tiles(problem.kernel, problem.params, problem.blocks))) {
    for (Queries const& t : tiles) {
      EXPECT_TRUE(t.entry.batch >= 0 && t.entry.batch < problem.params.batch && t.head >= 0 &&
                  t.head < problem.params.heads);
      EXPECT_TRUE(t.row0 >= 0 && t.rows > 0 && t.row0 + t.rows <= problem.params.seqlen_q);
      EXPECT_TRUE(seen.emplace(t.entry.batch, t.head, t.row0).second) << "twice: head " << t.head << ", row " << t.row0;
    }
  }
  EXPECT_EQ(static_cast<int64_t>(seen.size()), count_query_tiles(problem.params, tile_rows(problem.kernel.config)));
}

TEST(TileDeal, EveryTileIsDealtOnce) {
  std::mt19937 random(std::random_device{}());
  auto const from_to = [&](int32_t low, int32_t high) { return std::uniform_int_distribution(low, high)(random); };
  for (int i = 0; i < 300; ++i) {
    Problem const problem(i % 2 == 0 ? MaskKind::causal : MaskKind::full, 64 << i % 3, from_to(1, 200), from_to(1, 5),
                          from_to(1, 40), from_to(1, 3000), from_to(1, 3000), from_to(1, 2));
    SCOPED_TRACE(testing::Message() << "blocks " << problem.blocks << " batch " << problem.params.batch << " heads "
                                    << problem.params.heads << " seqlen_q " << problem.params.seqlen_q << " seqlen_k "
                                    << problem.params.seqlen_k);
    expect_each_tile_once(problem);
  }
}

TEST(TileDeal, MoreRoundsThanTheTableHas) {
  Problem const problem(MaskKind::causal, 128, 132, 64, 32, 2048, 2048);
  EXPECT_GT(deal_tiles(problem.kernel, problem.params, problem.blocks).first_round, 3 * TileDeal::rounds);
  expect_each_tile_once(problem);
}

/// What the busiest thread block has to do, in shares of the average: blocks of keys, and half of one a tile.
double busiest(Problem const& problem, TileDeal const& deal) {
  double most = 0, sum = 0;
  for (auto const& tiles : problem.tiles(deal)) {
    double own = 0;
    for (Queries const& t : tiles) {
      auto const range = Mask<MaskKind::causal>::kv_range(t, problem.params, problem.kernel.config.block_n);
      own += range.end - range.begin + 0.5;
    }
    most = std::max(most, own);
    sum += own;
  }
  return most / (sum / problem.blocks);
}

TEST(TileDeal, NobodyHasMuchMoreToDo) {
  // The grid of the benchmarks, and more rounds than the table has. The rounds' own order fails in the last line.
  double by_load = 0, in_order = 0;
  for (int32_t const head_dim : {64, 128, 256}) {
    for (int32_t seqlen = 512; seqlen <= 16384; seqlen *= 2) {
      for (int32_t const tokens : {16384, 1 << 20}) {
        Problem const problem(MaskKind::causal, head_dim, 132, tokens / seqlen, 2048 / head_dim, seqlen, seqlen);
        TileDeal deal = deal_tiles(problem.kernel, problem.params, problem.blocks);
        double const share = busiest(problem, deal);
        EXPECT_LT(share, 1.035) << "head_dim " << head_dim << ", seqlen " << seqlen << ", tokens " << tokens;
        by_load += share - 1;
        deal.first_round = std::numeric_limits<int32_t>::max();
        in_order += busiest(problem, deal) - 1;
      }
    }
  }
  EXPECT_LT(by_load, 0.5 * in_order);
}

TEST(TileDeal, FollowsTheSizesOfTheCall) {
  // It is remembered from call to call.
  for (int32_t const seqlen : {1000, 3000, 1000}) {
    for (int32_t const head_dim : {64, 128}) {
      expect_each_tile_once(Problem(MaskKind::causal, head_dim, 100, 2, 30, seqlen, 2000));
    }
  }
}

/// Another thread remembers nothing yet.
TileDeal dealt_anew(Problem const& problem) {
  TileDeal deal;
  std::thread([&] { deal = deal_tiles(problem.kernel, problem.params, problem.blocks); }).join();
  return deal;
}

bool same(TileDeal const& a, TileDeal const& b) {
  return a.first_round == b.first_round && std::memcmp(a.turns, b.turns, sizeof a.turns) == 0;
}

// Guards against deals that are made again in each call where a model calls with a few sizes in turn, and against the
// deal of other sizes.
TEST(TileDeal, EachOfAFewSizesIsDealtOnce) {
  auto const deal = [](Problem const& p) -> TileDeal const& { return deal_tiles(p.kernel, p.params, p.blocks); };
  std::vector<Problem> problems;
  for (std::size_t i = 0; i <= remembered_deals; ++i) {
    problems.emplace_back(MaskKind::causal, 128, 132, 2, 30, 1000 + 100 * static_cast<int32_t>(i), 2000);
  }
  std::vector<TileDeal const*> places;
  for (std::size_t i = 0; i < remembered_deals; ++i) places.push_back(&deal(problems[i]));
  EXPECT_EQ(std::set(places.begin(), places.end()).size(), remembered_deals) << "all are remembered";
  for (int repeat = 0; repeat < 3; ++repeat) {
    for (std::size_t i = 0; i < remembered_deals; ++i) {
      EXPECT_EQ(&deal(problems[i]), places[i]);
      EXPECT_TRUE(same(*places[i], dealt_anew(problems[i])));
    }
  }
  EXPECT_EQ(&deal(problems.back()), places[0]) << "in the place of the one that was not asked for longest";
  for (Problem const& problem : problems) EXPECT_TRUE(same(deal(problem), dealt_anew(problem)));
}

TEST(Recent, MakesWhatItHasForgottenAlone) {
  Recent<int, int, 3> squares;
  std::vector<int> made;
  auto const square = [&](int x) { return squares.get(x, [&] { return made.push_back(x), x * x; }); };
  for (int const x : {1, 2, 3, 1, 2, 3, 1, 4, 1, 3, 4, 2}) EXPECT_EQ(square(x), x * x);
  EXPECT_EQ(made, (std::vector{1, 2, 3, 4, 2}));
  EXPECT_THROW(squares.get(5, []() -> int { throw std::runtime_error("nothing is made"); }), std::runtime_error);
  EXPECT_EQ(square(4), 16);
  EXPECT_EQ(made.size(), 5u);
}

// Guards against memory for all rounds of a launch: these are half a million.
TEST(TileDeal, ManyRoundsNeedNoMemory) {
  Problem const problem(MaskKind::causal, 64, 132, 1 << 14, 64, 192 * 64, 192 * 64);
  ASSERT_EQ(count_query_tiles(problem.params, 192), 1 << 26);
  allocated_bytes = 0;
  TileDeal const& deal = deal_tiles(problem.kernel, problem.params, problem.blocks);
  EXPECT_LT(allocated_bytes, 100'000u);
  EXPECT_GT(deal.first_round, 1 << 18);
}

// Guards against a deal where each thread block has one tile: a step of a decoder has other sizes each time.
TEST(TileDeal, OneRoundIsNotDealt) {
  allocated_bytes = 0;
  for (int32_t keys = 1000; keys < 1100; ++keys) {
    Problem const problem(MaskKind::causal, 128, 132, 32, 4, 1, keys);
    EXPECT_EQ(deal_tiles(problem.kernel, problem.params, problem.blocks).first_round,
              std::numeric_limits<int32_t>::max());
  }
  EXPECT_EQ(allocated_bytes, 0u);
  expect_each_tile_once(Problem(MaskKind::causal, 128, 132, 32, 4, 1, 1000));
}

TEST(TileDeal, NoMoreBlocksThanTilesOrTheTableHolds) {
  ForwardConfig config = default_forward_config(DType::bfloat16, 128, 90);
  EXPECT_EQ(persistent_clusters(config, 7, 132), 7);
  EXPECT_EQ(persistent_clusters(config, int64_t{1} << 40, 132), 132);
  EXPECT_EQ(persistent_clusters(config, 1000, 500), max_multiprocessors);
  config.cluster = 2;
  EXPECT_EQ(persistent_clusters(config, 7, 132), 7);
  EXPECT_EQ(persistent_clusters(config, 1000, 132), 66);
  EXPECT_EQ(persistent_clusters(config, 1000, 1), 1) << "the driver says why there is no room";
}

TEST(TileDeal, TheTileThatLacksRowsIsTheFirstRows) {
  // Under a causal mask the last rows' tile is the longest: there, warpgroups without rows would wait longest.
  Problem const problem(MaskKind::causal, 64, 132, 1, 1, 1000, 1000);
  std::vector<std::pair<int32_t, int32_t>> rows;
  for (auto const& tiles : problem.tiles(deal_tiles(problem.kernel, problem.params, problem.blocks))) {
    for (Queries const& t : tiles) rows.emplace_back(t.row0, t.rows);
  }
  std::sort(rows.begin(), rows.end());
  ASSERT_EQ(tile_rows(problem.kernel.config), 192);
  EXPECT_EQ(rows, (std::vector<std::pair<int32_t, int32_t>>{
                      {0, 40}, {40, 192}, {232, 192}, {424, 192}, {616, 192}, {808, 192}}));
}

}  // namespace
}  // namespace flashcute
