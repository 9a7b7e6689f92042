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
  /// The block's additions have been started by this lane, or made by the warp's.
  FLASHCUTE_DEVICE void pass_on() const {}
};

/// From the last keys that the queries see to the first. The first to come stores, so nothing has to be cleared.
///
/// A tile waits for the tiles of later keys. So that they have always been started, thread blocks do not take tiles by
/// their own numbers, which start in any order: they count how many have come before them, and the tiles of each head
/// are taken from its last keys on. Each computes its tiles in the order in which it took them. So of the tiles that
/// are not done the one that was taken first waits for none, and it can go on, however many multiprocessors there are.
/// With two places for K its last dQ comes from the next tile's first block, which needs loads and this tile's turns.
///
/// Under a causal mask the tiles of a head that start together do not wait for each other: each begins at its diagonal,
/// which the tile of the keys before it reaches later.
template <BackwardKernelId Id>
class LastKeysFirst {
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

  /// The next of `tiles` tiles, of which `started` have been started.
  FLASHCUTE_HD static uint32_t tile_number(uint32_t started, uint32_t tiles) { return tiles - 1 - started; }

  /// How many tiles add to a block before this one, which is one of them: those from the first key on do.
  FLASHCUTE_HD static int32_t tiles_before(Keys const& tile, int32_t head, int32_t block, ForwardParams const& p) {
    int32_t const row0 = block * C.block_m;
    Queries const queries{tile.entry, head, tile.kv_head, row0, min_of(C.block_m, p.seqlen_q - row0)};
    return Mask::kv_range(queries, p, C.block_n).end - 1 - tile.row0 / C.block_n;
  }

  FLASHCUTE_DEVICE LastKeysFirst(BackwardParams const& p, Keys const& tile, int warpgroup)
      : p_(p), tile_(tile), warpgroup_(warpgroup) {}

  FLASHCUTE_DEVICE void look_at(typename Mask::Passing const& at) {
    ForwardParams const& f = p_.forward;
    before_ = static_cast<uint32_t>(tiles_before(tile_, at.head, at.block, f));
    added_ = Workspace::added(p_, Workspace::number(f, tile_.entry, at.head, at.block), warpgroup_);
    has_turn_ = acquire_count(added_) == before_;  // mostly so: then the answer has come before the block's dQ
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

  /// Gives the turn to the next tile once the block's additions are done: mostly before the next block's dQ is there.
  FLASHCUTE_DEVICE void pass_on() const {
    await_bulk();
    release_count(added_);
  }

 private:
  BackwardParams const& p_;
  Keys const& tile_;
  int const warpgroup_;
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
struct DqOrder<Id> : LastKeysFirst<Id> {
  using LastKeysFirst<Id>::LastKeysFirst;
};

}  // namespace flashcute::sm90
