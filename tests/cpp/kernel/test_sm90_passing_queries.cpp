// The order in which blocks of queries pass the tiles of Hopper's gradients, on the host.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "flashcute/sm90/passing_queries.hpp"

namespace flashcute {
namespace {

constexpr BackwardConfig config = {.dtype = DType::bfloat16,
                                   .head_dim = 128,
                                   .head_dim_v = 128,
                                   .block_m = 64,
                                   .block_n = 128,
                                   .num_warps = 8,
                                   .kernel = Kernel::sm90};

using Visit = std::pair<int, int>;  // a head and a block

/// Tiles of keys of the second of two heads, which query heads 4 to 7 share.
template <MaskKind Kind>
struct Visits {
  static constexpr BackwardKernelId id = kernel_of(config, BackwardPass::gradients, {Kind});
  using Queries = sm90::PassingQueries<id>;
  using Mask = flashcute::Mask<Kind>;

  BackwardParams p{};

  /// Query i sees the keys [i - before, i + after].
  Visits(int rows, int before, int after) {
    ForwardParams& f = p.forward;
    f.batch = 1, f.heads = 8, f.kv_heads = 2, f.head_dim = f.head_dim_v = 128;
    f.seqlen_q = f.seqlen_k = rows;
    f.causal_offset = after, f.window_offset = -before;
  }

  typename Queries::Tile tile(int number) const { return Queries::Tile::of(p.forward, 1u, number, config.block_n); }
  int tiles() const { return ceil_div(p.forward.seqlen_k, config.block_n); }
  auto range(int number) const { return Mask::query_range(tile(number), p.forward, config.block_m); }

  std::vector<Visit> of(int number) const {
    auto const r = range(number);
    int full_end = p.forward.seqlen_q / config.block_m;
    if constexpr (Mask::two_edges) full_end = r.full_end;
    std::vector<Visit> visits;
    for (auto at = Queries::of(p, tile(number)); at.left > 0; at = at.after()) {
      visits.emplace_back(at.head, at.block);
      EXPECT_EQ(at.partial(), at.block < r.full_begin || at.block >= full_end);
    }
    return visits;
  }

  /// How many different blocks there are at the n-th visit of any of the tiles [begin, end).
  std::size_t blocks_at_once(int begin, int end) const {
    std::vector<std::set<Visit>> seen;
    for (int number = begin; number < end; ++number) {
      auto const visits = of(number);
      if (seen.size() < visits.size()) seen.resize(visits.size());
      for (std::size_t n = 0; n < visits.size(); ++n) seen[n].insert(visits[n]);
    }
    std::size_t most = 0;
    for (auto const& blocks : seen) most = std::max(most, blocks.size());
    return most;
  }
};

template <MaskKind Kind>
void check_that_each_comes_once(int rows, int before, int after) {
  Visits<Kind> const all(rows, before, after);
  for (int number = 0; number < all.tiles(); ++number) {
    auto const visits = all.of(number);
    auto const range = all.range(number);
    EXPECT_EQ(visits.size(), 4u * static_cast<unsigned>(max_of(0, range.end - range.begin)));
    std::set<Visit> const different(visits.begin(), visits.end());
    EXPECT_EQ(different.size(), visits.size()) << "tile " << number;
    for (auto const& [head, block] : different) {
      EXPECT_TRUE(head >= 4 && head < 8 && block >= range.begin && block < range.end) << head << ", " << block;
    }
  }
}

// Guards against a block that a tile leaves out, or visits twice, where its order goes round.
TEST(Sm90PassingQueries, EachBlockComesOnceForEachHead) {
  for (int rows : {1, 63, 64, 65, 129, 1000, 4096}) {
    check_that_each_comes_once<MaskKind::causal>(rows, 0, 0);
    for (auto const& [before, after] :
         {std::pair{0, 0}, {63, 0}, {127, 0}, {300, 0}, {50, 70}, {300, -200}, {5000, 0}}) {
      SCOPED_TRACE(std::to_string(rows) + " rows, " + std::to_string(before) + " before, " + std::to_string(after) +
                   " after");
      check_that_each_comes_once<MaskKind::band>(rows, before, after);
    }
  }
}

// Guards against tiles that run at the same time and read other blocks each: with groups of heads they do not fit the
// level 2 cache. (Windows of 4,096 over 32k rows took 1.2 times as long, of 1,024 with 8 heads to each key head 1.5
// times.)
TEST(Sm90PassingQueries, TilesThatRunTogetherComeToTheSameBlocks) {
  Visits<MaskKind::causal> const causal(32768, 0, 0);
  EXPECT_EQ(causal.blocks_at_once(0, 132), 1);

  // Windows of 4,096: tiles have 66 blocks. Those of 132 tiles lie within 132 * 2 + 64 = 328, and of these 5 are the
  // same modulo 66.
  Visits<MaskKind::band> const window(32768, 4095, 0);
  EXPECT_EQ(window.range(7).end - window.range(7).begin, 66);
  EXPECT_LE(window.blocks_at_once(0, 132), 5);
  EXPECT_LE(window.blocks_at_once(50, 182), 5);

  // Without a window, or with one as wide, the order is that of a causal mask.
  Visits<MaskKind::band> const whole(32768, 32768, 0);
  for (int number : {0, 1, 100, 255}) EXPECT_EQ(whole.of(number), causal.of(number));
}

}  // namespace
}  // namespace flashcute
