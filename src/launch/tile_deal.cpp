#include "launch/tile_deal.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <vector>

#include "flashcute/policy/mask.hpp"
#include "launch/recent.hpp"

namespace flashcute {
namespace {

/// The cache key of a deal: everything that it depends on.
struct Sizes {
  int32_t tile_rows, block_n, blocks;
  SectionRounds section_rounds;
  Features features;
  int32_t batch, heads, seqlen_q, seqlen_k, causal_offset, window_offset, prefix, prefix_offset;

  bool operator==(Sizes const&) const = default;
};

/// The cost of a tile: its blocks of keys, and half a block for the rest. Counted in half blocks, so that it is an
/// integer.
template <class Mask>
int64_t cost(QueryTile<typename Mask::Sequence> const& tile, ForwardParams const& p, int32_t block_n) {
  return 2 * int64_t{Mask::kv_range(tile, p, block_n).visits()} + 1;
}

/// As if every sequence filled the tensors and a map showed everything: lengths, prefixes and maps may be in the GPU's
/// memory.
ForwardParams without_memory(ForwardParams p) {
  p.map.words = nullptr;
  p.sequences.seqlens_q = p.sequences.seqlens_k = nullptr;
  if (p.sequences.prefixes != nullptr) p.sequences.prefix = 0;
  p.sequences.prefixes = nullptr;
  return p;
}

template <class Mask>
TileDeal deal_by_load(Sizes const& s, ForwardParams const& p) {
  // There may be millions of rounds; only the last ones matter: those of the table, and those before it whose load is
  // still uneven. Round i is at i % kept.
  constexpr int32_t kept = 4 * TileDeal::rounds;
  std::array<TileRound, kept> last;
  int32_t count = 0;
  int32_t const row_blocks = ceil_div(p.seqlen_q, s.tile_rows);
  TileRounds rounds(p, row_blocks, s.blocks, s.section_rounds);
  for (TileRound round; rounds.next(round); ++count) last[static_cast<std::size_t>(count % kept)] = round;
  auto const round_at = [&](int32_t i) -> TileRound const& { return last[static_cast<std::size_t>(i % kept)]; };

  TileDeal deal{};
  deal.first_round = std::max(0, count - TileDeal::rounds);
  std::vector<int64_t> load(static_cast<std::size_t>(s.blocks), 0);
  auto const add = [&](int32_t block, TileRound const& round, int32_t turn) {
    load[static_cast<std::size_t>(block)] += cost<Mask>(
        round.place(turn, row_blocks).tile<QueryTile<typename Mask::Sequence>>(p, s.tile_rows), p, s.block_n);
  };

  for (int32_t i = std::max(0, count - kept); i < deal.first_round; ++i) {
    TileRound const& round = round_at(i);
    for (int32_t block = 0; block < s.blocks; ++block) {
      int32_t const turn = round.turn(block, s.blocks);
      if (turn < round.count) add(block, round, turn);
    }
  }

  std::vector<int32_t> order(static_cast<std::size_t>(s.blocks));
  std::iota(order.begin(), order.end(), 0);
  for (auto& turns : deal.turns) std::fill(std::begin(turns), std::end(turns), std::uint8_t{0xff});
  for (int32_t i = deal.first_round; i < count; ++i) {
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return load[static_cast<std::size_t>(a)] < load[static_cast<std::size_t>(b)];
    });
    for (int32_t turn = 0; turn < round_at(i).count; ++turn) {
      int32_t const block = order[static_cast<std::size_t>(turn)];
      deal.turns[i - deal.first_round][block] = static_cast<std::uint8_t>(turn);
      add(block, round_at(i), turn);
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
  // If all tiles cost the same, the regular order of the rounds is good enough, and so it is for a single round, before
  // which all blocks have the same load. Of packed sequences the costs are not known here.
  static TileDeal const in_order{.first_round = std::numeric_limits<int32_t>::max(), .turns = {}};
  ForwardConfig const& c = kernel.config;
  SectionRounds const section = section_rounds(kernel);
  if (section == equally_long || p.sequences.packed() || count_query_tiles(p, tile_rows(c)) <= blocks) return in_order;
  Sizes const sizes{.tile_rows = tile_rows(c),
                    .block_n = c.block_n,
                    .blocks = blocks,
                    .section_rounds = section,
                    .features = kernel.features,
                    .batch = p.batch,
                    .heads = p.heads,
                    .seqlen_q = p.seqlen_q,
                    .seqlen_k = p.seqlen_k,
                    .causal_offset = p.causal_offset,
                    .window_offset = p.window_offset,
                    .prefix = p.sequences.prefixes != nullptr ? 0 : p.sequences.prefix,
                    .prefix_offset = p.sequences.prefix_offset};
  // The layers of a model call with the same few sizes again and again: those of self and cross attention, of an
  // encoder and a decoder. Computing a deal takes as long as the rest of a call.
  thread_local Recent<Sizes, TileDeal, remembered_deals> deals;
  return deals.get(sizes, [&] {
    return with_constant(kernel.features.mask,
                         [&]<MaskKind mask>() { return deal_by_load<Mask<mask>>(sizes, without_memory(p)); });
  });
}

}  // namespace flashcute
