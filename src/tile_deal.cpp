#include "tile_deal.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "flashcute/mask.hpp"

namespace flashcute {
namespace {

/// All that a deal depends on.
struct Sizes {
  int32_t tile_rows, block_n, blocks;
  SectionRounds section_rounds;
  int32_t batch, heads, seqlen_q, seqlen_k, causal_offset;

  bool operator==(Sizes const&) const = default;
};

/// What a tile costs besides its blocks of keys: half of one. In halves, so that all costs are whole.
int64_t cost(QueryTile const& tile, ForwardParams const& p, int32_t block_n) {
  KvRange const range = Mask<MaskKind::causal>::kv_range(tile, p, block_n);
  return 2 * static_cast<int64_t>(range.end - range.begin) + 1;
}

TileDeal deal_by_load(Sizes const& s, ForwardParams const& p) {
  std::vector<TileRound> all;
  TileRounds rounds(p, s.tile_rows, s.blocks, s.section_rounds);
  for (TileRound round; rounds.next(round);) all.push_back(round);

  TileDeal deal{};
  deal.first_round = std::max<int32_t>(0, static_cast<int32_t>(all.size()) - TileDeal::rounds);
  std::vector<int64_t> load(static_cast<std::size_t>(s.blocks), 0);
  auto const add = [&](int32_t block, TileRound const& round, int32_t turn) {
    load[static_cast<std::size_t>(block)] += cost(round.tile(p, turn, s.tile_rows), p, s.block_n);
  };

  // Of the rounds before, those that may still be felt.
  constexpr int32_t replayed = 3 * TileDeal::rounds;
  for (int32_t i = std::max(0, deal.first_round - replayed); i < deal.first_round; ++i) {
    TileRound const& round = all[static_cast<std::size_t>(i)];
    for (int32_t block = 0; block < s.blocks; ++block) {
      int32_t const turn = round.turn(block, s.blocks);
      if (turn < round.count) add(block, round, turn);
    }
  }

  std::vector<int32_t> order(static_cast<std::size_t>(s.blocks));
  std::iota(order.begin(), order.end(), 0);
  for (auto& turns : deal.turns) std::fill(std::begin(turns), std::end(turns), std::uint8_t{0xff});
  for (std::size_t i = static_cast<std::size_t>(deal.first_round); i < all.size(); ++i) {
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return load[static_cast<std::size_t>(a)] < load[static_cast<std::size_t>(b)];
    });
    for (int32_t turn = 0; turn < all[i].count; ++turn) {
      int32_t const block = order[static_cast<std::size_t>(turn)];
      deal.turns[i - static_cast<std::size_t>(deal.first_round)][block] = static_cast<std::uint8_t>(turn);
      add(block, all[i], turn);
    }
  }
  return deal;
}

}  // namespace

int32_t persistent_clusters(ForwardConfig const& config, int64_t tiles, int32_t multiprocessors) {
  int32_t const at_once = std::min(multiprocessors, max_multiprocessors) / config.cluster;
  return static_cast<int32_t>(std::min<int64_t>(tiles, std::max(at_once, 1)));
}

TileDeal const& deal_tiles(ForwardKernelId const& kernel, ForwardParams const& p, int32_t blocks) {
  // Tiles that all cost the same need no more than the rounds' own order.
  static TileDeal const in_order{.first_round = std::numeric_limits<int32_t>::max(), .turns = {}};
  if (kernel.features.mask == MaskKind::full) return in_order;
  ForwardConfig const& c = kernel.config;
  Sizes const sizes{tile_rows(c), c.block_n,  blocks,     section_rounds(kernel), p.batch,
                    p.heads,      p.seqlen_q, p.seqlen_k, p.causal_offset};
  // The layers of a model call with the same sizes, one after the other.
  thread_local struct {
    Sizes sizes;
    TileDeal deal;
  } last{};
  if (last.sizes != sizes) last = {sizes, deal_by_load(sizes, p)};
  return last.deal;
}

}  // namespace flashcute
