// In which order tiles of keys add their parts of dQ to the sums of a block of queries. Additions of floats in another
// order have other last bits.
#pragma once

#include "flashcute/policy/query_tile.hpp"
#include "flashcute/sm90/backward_layout.hpp"
#include "flashcute/sm90/backward_workspace.hpp"

namespace flashcute::sm90 {

/// In the pass before: sets the counter to 0 from which thread blocks take tiles of keys.
template <class Workspace>
FLASHCUTE_DEVICE void clear_started(BackwardParams const& p) {
  if (block_index() == 0 && thread_index() == 0) global_store(Workspace::started(p), 0u);
}

/// As they come, to sums that `prepare` has cleared.
template <BackwardKernelId Id>
class AnyOrder {
  static constexpr BackwardConfig C = Id.config;
  static constexpr int threads = num_threads(Id);
  using Mask = flashcute::Mask<Id.features.mask>;
  using Sequence = typename Mask::Sequence;
  using Workspace = GradientWorkspace<C, Sequence>;

 public:
  // ---- of the passes before and after ----

  /// Prepares the sums of a block of queries: all threads.
  FLASHCUTE_DEVICE static void prepare(BackwardParams const& p, int64_t number) {
    float* const sums = Workspace::sums(p, number);
    CUTE_UNROLL
    for (int i = 0; i < Workspace::sums_of_block; i += 4 * threads) {
      global_store(sums + i + 4 * thread_index(), float4{});
    }
    clear_started<Workspace>(p);
  }
  /// Whether a warpgroup's half of the sums of a block is in memory.
  FLASHCUTE_DEVICE static bool has_sums(BackwardParams const&, int64_t, int) { return true; }

  // ---- of the pass `gradients` ----

  /// For the warp that adds a warpgroup's half.
  FLASHCUTE_DEVICE AnyOrder(BackwardParams const&, KeyTile<Sequence> const&, int) {}

  /// The next block will be this one.
  template <class Passing>
  FLASHCUTE_DEVICE void look_at(Passing const&) {}
  /// Waits until the tile may add to the block.
  FLASHCUTE_DEVICE void await_turn() const {}
  /// Starts adding; of one element, adds.
  FLASHCUTE_DEVICE void add(float* sums, float const* from, int bytes) const { add_bulk(sums, from, bytes); }
  FLASHCUTE_DEVICE void add(float* sum, float x) const { reduce_add<1>(sum, &x); }
  /// Whether other tiles wait for this one's additions.
  FLASHCUTE_DEVICE static constexpr bool others_wait() { return false; }
  /// The block's additions have been started by this lane, or made by the warp's.
  FLASHCUTE_DEVICE void pass_on() const {}
};

/// With fewer tiles all heads add in the same order: by a model of the multiprocessors, those that wait for each other
/// would cost more than those that are long (docs/kernels/sm90_backward_notebook.md). (Other for a kernel of the
/// tests.)
template <BackwardKernelId Id>
inline constexpr uint32_t least_tiles_of_two_orders = 600;

/// From the last keys that the queries see to the first, or from the first to the last: the shapes say which. The first
/// to come stores, so nothing has to be cleared.
///
/// A tile waits for tiles of its head that add before it. So that they have always been started, thread blocks do not
/// take tiles by their own numbers, which start in any order: they count how many have come before them, and the tiles
/// of each head are taken in the order of additions. Each computes its tiles in the order in which it took them. So of
/// the tiles that are not done the one that was taken first waits for none, and it can go on, however many
/// multiprocessors there are. With two places for K its last dQ comes from the next tile's first block, which needs
/// loads and this tile's turns.
///
/// From the last keys on, tiles of a head that start together under a causal mask do not wait for each other: each
/// begins at its diagonal, which the tile of the keys before it reaches later. But the longest tiles come last, and at
/// the end of the launch some multiprocessors would still have half of one when others have nothing. So under that mask
/// the heads that are taken last add from the first keys on, and have their shortest tiles at the end. They are many:
/// a tile that begins at its diagonal waits until those of the keys before it have passed there, and with many heads in
/// turn they mostly have when it is taken.
template <BackwardKernelId Id>
class FixedOrder {
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Queries = QueryTile<typename Mask::Sequence>;
  using Keys = KeyTile<typename Mask::Sequence>;
  using L = BackwardLayout<C>;
  using Workspace = GradientWorkspace<C, typename Mask::Sequence>;

 public:
  // ---- of the passes before and after ----

  FLASHCUTE_DEVICE static void prepare(BackwardParams const& p, int64_t number) {
    if (thread_index() < L::warpgroups) global_store(Workspace::added(p, number, thread_index()), 0u);
    clear_started<Workspace>(p);
  }
  FLASHCUTE_DEVICE static bool has_sums(BackwardParams const& p, int64_t number, int warpgroup) {
    return global_load<uint32_t>(Workspace::added(p, number, warpgroup)) > 0;
  }

  // ---- of the pass `gradients` ----

  /// The next of `count` tiles, of which `started` have been started.
  FLASHCUTE_HD static Keys tile(ForwardParams const& p, uint32_t started, uint32_t count) {
    uint32_t const from_first = heads_from_first(p), others = count - from_first * tiles_of_head(p);
    if (started < others) return Keys::at(p, others - 1 - started, C.block_n, sizeof(float), from_first);
    HeadsInTurn<uint32_t> const turn{0, from_first, started - others};
    return Keys::of(p, turn.head(), turn.tile(), C.block_n);
  }

  /// How many heads, of all batches, are taken last and add from the first keys on: three quarters at most. `enough`
  /// was measured: more heads' queries do not fit the level 2 cache.
  FLASHCUTE_HD static uint32_t heads_from_first(ForwardParams const& p) {
    constexpr uint32_t enough = 400;
    if (Id.features.mask != MaskKind::causal || p.kv_heads != p.heads) return 0;
    auto const heads = static_cast<uint32_t>(p.batch) * static_cast<uint32_t>(p.kv_heads);
    uint32_t const tiles = heads * tiles_of_head(p);
    return tiles < least_tiles_of_two_orders<Id>
               ? 0
               : min_of(heads - ceil_div(heads, 4u), ceil_div(enough, tiles_of_head(p)));
  }

  /// What says the tile's turns. From the first keys on that is its number among the tiles of its head, n. From the
  /// last keys on it is -1 - n: with the number of tiles that a block of queries sees it makes the turn.
  FLASHCUTE_HD static int32_t place(Keys const& tile, ForwardParams const& p) {
    auto const head = static_cast<uint32_t>(tile.entry.batch * p.kv_heads + tile.kv_head);
    int32_t const number = tile.row0 / C.block_n;
    return head < heads_from_first(p) ? number : -1 - number;
  }

  /// How many tiles add to a block before this one, which is one of them.
  FLASHCUTE_HD static int32_t tiles_before(Keys const& tile, int32_t place, int32_t head, int32_t block,
                                           ForwardParams const& p) {
    if (place >= 0) return place;
    int32_t const row0 = block * C.block_m;
    Queries const queries{tile.entry, head, tile.kv_head, row0, min_of(C.block_m, p.seqlen_q - row0)};
    return Mask::kv_range(queries, p, C.block_n).end + place;
  }

  FLASHCUTE_DEVICE FixedOrder(BackwardParams const& p, Keys const& tile, int warpgroup)
      : p_(p), tile_(tile), warpgroup_(warpgroup), place_(place(tile, p.forward)) {}

  template <class Passing>
  FLASHCUTE_DEVICE void look_at(Passing const& at) {
    ForwardParams const& f = p_.forward;
    before_ = static_cast<uint32_t>(tiles_before(tile_, place_, at.head, at.block, f));
    added_ = Workspace::added(p_, Workspace::number(f, tile_.entry, at.head, at.block), warpgroup_);
    has_turn_ = peek_at_count(added_) == before_;  // mostly so: then the answer has come before the block's dQ
  }

  FLASHCUTE_DEVICE void await_turn() const {
    if (!has_turn_) await_count(added_, before_);
    keep_bulk_behind();
  }

  FLASHCUTE_DEVICE void add(float* sums, float const* from, int bytes) const {
    if (before_ == 0) {
      store_bulk(sums, from, bytes);
    } else {
      add_bulk(sums, from, bytes);
    }
  }
  FLASHCUTE_DEVICE void add(float* sum, float x) const {
    if (before_ == 0) {
      global_store(sum, x);
    } else {
      reduce_add<1>(sum, &x);
    }
  }

  /// Whether other tiles wait for this one's additions: from the first keys on a tile stands where the one before it
  /// has just been.
  FLASHCUTE_DEVICE bool others_wait() const { return place_ >= 0; }

  /// Gives the turn to the next tile once the block's additions are done: mostly before the next block's dQ is there.
  FLASHCUTE_DEVICE void pass_on() const {
    await_bulk();
    release_count(added_);
  }

 private:
  FLASHCUTE_HD static uint32_t tiles_of_head(ForwardParams const& p) {
    return Keys::template tiles_of_head<uint32_t>(p, C.block_n);
  }

  BackwardParams const& p_;
  Keys const& tile_;
  int const warpgroup_;
  int32_t const place_;
  uint32_t before_ = 0;        // tiles that add to the block before this one
  uint32_t* added_ = nullptr;  // those that have
  bool has_turn_ = false;
};

template <BackwardKernelId Id>
struct DqOrder : AnyOrder<Id> {
  using AnyOrder<Id>::AnyOrder;
};

template <BackwardKernelId Id>
  requires(Id.config.deterministic)
struct DqOrder<Id> : FixedOrder<Id> {
  using FixedOrder<Id>::FixedOrder;
};

}  // namespace flashcute::sm90
