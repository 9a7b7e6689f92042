// The tiles of keys that a thread block of Hopper's gradients computes, one after the other. The loading warp finds
// them and announces each to the warps that compute, add and inspect, in shared memory. So it can load what the next
// tile begins with while the others end with the one before.
#pragma once

#include "flashcute/sm90/dq_order.hpp"

namespace flashcute::sm90 {

/// Which tiles the thread block gets: run by the loading lane.
template <BackwardKernelId Id>
class KeyTiles {
  static constexpr BackwardConfig C = Id.config;
  using Sequence = typename Mask<Id.features.mask>::Sequence;
  using Tile = KeyTile<Sequence>;
  using Workspace = GradientWorkspace<C, Sequence>;
  /// Of passes that add to sums of dQ in an order: the first tile's number comes from the counter too, not from the
  /// thread block's.
  static constexpr bool in_order = C.deterministic && !splits_dq(C);
  static constexpr int bytes_per_element = splits_dq(C) ? size_of(C.dtype) : int{sizeof(float)};

 public:
  static constexpr bool persistent = is_persistent(Id);

  FLASHCUTE_DEVICE explicit KeyTiles(BackwardParams const& p)
      : p_(p), count_(static_cast<uint32_t>(count_key_tiles(p.forward, C.block_n))) {}

  /// Sets `tile` to the next one; false if there is none.
  FLASHCUTE_DEVICE bool next(Tile& tile) {
    while (next_number()) {
      if constexpr (in_order) {
        tile = FixedOrder<Id>::tile(p_.forward, number_, count_);
      } else {
        tile = at<Tile>(p_.forward, number_);
      }
      if (Sequence::fills_tensors || tile.rows > 0) return true;  // else a slot that no sequence needs
    }
    return false;
  }

  /// (A template for the tests, which have tiles of another sequence type.)
  template <class AnyTile>
  FLASHCUTE_HD static AnyTile at(ForwardParams const& p, uint32_t number) {
    return AnyTile::at(p, number, C.block_n, bytes_per_element);
  }

 private:
  FLASHCUTE_DEVICE bool next_number() {
    // Without queries nothing clears the counter, and there is a thread block for each tile.
    bool const counts = p_.forward.seqlen_q > 0;
    if (!first_ && !(persistent && counts)) return false;
    if (in_order && counts) {
      number_ = count_up(Workspace::started(p_), 1);
    } else {
      number_ = first_ ? block_index() : block_count() + count_up(Workspace::started(p_), 1);
    }
    first_ = false;
    return number_ < count_;
  }

  BackwardParams const& p_;
  uint32_t const count_;
  uint32_t number_ = 0;
  bool first_ = true;
};

/// How a warp holds a tile that it needs for every block: in registers, since what it reads from shared memory waits
/// behind the products of other warps. But one that has the place and the lengths of its sequence would be spilled.
template <class Sequence>
using HeldTile = std_::conditional_t<Sequence::fills_tensors, KeyTile<Sequence> const, KeyTile<Sequence> const&>;

/// What the loading warp says of a tile, and the inspecting warp of what it looked at.
template <class Tile>
struct AnnouncedTile {
  Tile tile;
  bool exists;       // else there are no more
  bool seen;         // by some query: else nothing is loaded
  bool keys_finite;  // all of K
  bool dropped;      // whether non-finite values were replaced by 0 in a partial block of Q or dO
};

/// Tile n is announced after every warp has released K of n - 2: so every warp has come to n - 2, where some still are,
/// and has left n - 3, whose place is taken. Two places would be too few.
template <class L, class Sequence>
struct StorageWithTiles : L::SharedStorage {
  static constexpr int places = 3;
  AnnouncedTile<KeyTile<Sequence>> tiles[places];
  Barrier tile_full[places];

  /// Initialises the mbarriers. One thread calls it, before all others synchronise with it.
  FLASHCUTE_DEVICE void init(bool inspected) {
    for (int i = 0; i < places; ++i) barrier_init(tile_full[i], 1);
    L::init(*this, inspected);
    publish_barriers();
  }
};

/// A warp's way through the tiles that are announced to it. Each tile has one phase of the mbarriers of V and of a
/// place of K, also one that nothing is loaded for: every warp that arrives at k_empty or v_empty has waited for
/// k_full.
template <BackwardKernelId Id, class L>
class TilesInTurn {
  using Sequence = typename Mask<Id.features.mask>::Sequence;
  using Storage = StorageWithTiles<L, Sequence>;
  using Tile = KeyTile<Sequence>;
  static constexpr bool persistent = is_persistent(Id);

 public:
  FLASHCUTE_DEVICE explicit TilesInTurn(Storage& smem) : smem_(smem) {}

  /// Calls compute() at each tile. All lanes of a warp call it.
  template <class Compute>
  FLASHCUTE_DEVICE void for_each(Compute const& compute) {
    while (next()) {
      compute();
      if constexpr (!persistent) return;
      // Without __syncwarp the compiler assumes that lanes which stored other rows stay diverged in all that follows,
      // and keeps addresses in registers of each lane instead of uniform registers.
      reconverge();
    }
  }

  /// Calls compute() at each tile that some query sees, once its K is there, and pass_over() at others.
  template <class Compute, class PassOver>
  FLASHCUTE_DEVICE void for_each(Compute const& compute, PassOver const& pass_over) {
    for_each([&] {
      barrier_wait(smem_.k_full[k_place()], k_parity());
      if (uniform(announced().seen)) {
        compute();
      } else {
        pass_over();
      }
    });
  }

  /// By the loading lane: goes on to the next tile, and announces it. With one place for K every warp has released that
  /// of the last tile but one: else K of the last could not have been requested.
  FLASHCUTE_DEVICE void announce(AnnouncedTile<Tile> const& tile) {
    ++number_;
    if constexpr (L::k_places > 1) await_place_of_k();
    announced() = tile;
    barrier_arrive(smem_.tile_full[place()]);
  }

  /// Until every warp has released what is in the place of the tile's K.
  FLASHCUTE_DEVICE void await_place_of_k() const { barrier_wait(smem_.k_empty[k_place()], k_parity() ^ 1); }

  FLASHCUTE_DEVICE AnnouncedTile<Tile>& announced() const { return smem_.tiles[place()]; }
  FLASHCUTE_DEVICE Tile const& tile() const { return announced().tile; }
  /// Of mbarriers that change phase once for each tile.
  FLASHCUTE_DEVICE uint32_t parity() const { return number_ % 2; }
  /// Where the tile's K is, and the parity of that place's mbarriers.
  FLASHCUTE_DEVICE uint32_t k_place() const { return number_ % L::k_places; }
  FLASHCUTE_DEVICE uint32_t k_parity() const { return number_ / L::k_places % 2; }

 private:
  /// Waits for the next tile; false if there is none.
  FLASHCUTE_DEVICE bool next() {
    ++number_;
    barrier_wait(smem_.tile_full[place()], number_ / Storage::places % 2);
    return uniform(announced().exists);
  }
  FLASHCUTE_DEVICE uint32_t place() const { return number_ % Storage::places; }

  Storage& smem_;
  uint32_t number_ = ~uint32_t{0};  // before the first
};

}  // namespace flashcute::sm90
