// The pipeline between loader and consumers: rings of stages in shared memory with an mbarrier for `full` and one for
// `empty`, the consumers' side of them, and the turns that consumer warpgroups take in multiplying.
#pragma once

#include "flashcute/sm90/layout.hpp"
#include "flashcute/sm90/ring.hpp"

namespace flashcute::sm90 {

/// A consumer warpgroup's side: waits for tiles, and releases their stages.
template <ForwardConfig C, class Mask>
class Tiles {
  using L = ForwardLayout<C, Mask>;
  using Storage = typename L::SharedStorage;
  using Element = typename L::Element;

 public:
  FLASHCUTE_DEVICE Tiles(Storage& smem, int warpgroup) : smem_(smem), warpgroup_(warpgroup) {}

  /// Initialises the thread block's mbarriers, before any thread waits at them. One thread calls it.
  FLASHCUTE_DEVICE static void init(Storage& smem, bool inspected) {
    for (int w = 0; w < L::warpgroups; ++w) {
      barrier_init(smem.q_full[w], 1);
      barrier_init(smem.q_empty[w], 1);
    }
    for (int i = 0; i < C.stages; ++i) {
      barrier_init(smem.k_full[i], 1);
      barrier_init(smem.v_landed[i], 1);
      barrier_init(smem.v_full[i], inspected ? L::inspecting_warps : 1);
      barrier_init(smem.k_empty[i], L::warpgroups * C.cluster);
      barrier_init(smem.v_empty[i], L::warpgroups * C.cluster);
    }
    if constexpr (L::scouts) {
      for (int i = 0; i < L::found_places; ++i) {
        barrier_init(smem.scouted.full[i], 1);
        barrier_init(smem.scouted.empty[i], 1);
      }
    }
    publish_barriers();
  }

  /// Waits until the next tile is announced and its Q has arrived.
  FLASHCUTE_DEVICE Work<Mask> const& next() {
    ++tile_;
    barrier_wait(smem_.q_full[warpgroup_], tile_ % 2);
    return work(0);
  }

  /// Of the current tile (`before` 0), or of an earlier one.
  FLASHCUTE_DEVICE Work<Mask> const& work(uint32_t before) const {
    return smem_.work[(tile_ - before) % L::tiles][warpgroup_];
  }
  FLASHCUTE_DEVICE bool dropped(uint32_t before) const { return smem_.dropped[(tile_ - before) % L::tiles]; }

  FLASHCUTE_DEVICE Element* query() const { return smem_.q[warpgroup_]; }
  /// All products with Q are done.
  FLASHCUTE_DEVICE void release_query() {
    if (thread_of_warpgroup() == 0) barrier_arrive(smem_.q_empty[warpgroup_]);
  }

  /// Waits for the next K.
  FLASHCUTE_DEVICE void await_key() {
    barrier_wait_unless(key_passed_, smem_.k_full[k_.place], k_.parity);
    key_passed_ = 0;
  }
  /// What the loading warp said of it.
  FLASHCUTE_DEVICE AnnouncedBlock const& key_block() const { return smem_.key_blocks.of_stage[k_.place]; }
  FLASHCUTE_DEVICE InRing<Element> arrived_key() const { return {smem_.k[0], k_.place}; }
  /// Tests early whether the K after it has arrived, for the wait when that is the next.
  FLASHCUTE_DEVICE void look_for_key_after() {
    auto const after = k_.after();
    key_passed_ = barrier_passed(smem_.k_full[after.place], after.parity);
  }
  FLASHCUTE_DEVICE void release_key() {
    release(smem_.k_empty[k_.place]);
    k_.advance();
  }

  /// Releases the stage unused. First synchronises the warps of the warpgroup: the arrival of one counts for all, and
  /// without WGMMA nothing else keeps a warp from still waiting for the old phase.
  FLASHCUTE_DEVICE void pass_key() {
    meet();
    release_key();
  }

  /// The next V. The functions named `after` concern the V after it, which is waited for before it is needed.
  FLASHCUTE_DEVICE InRing<Element> arrived_value() const { return {smem_.v[0], v_.place}; }
  FLASHCUTE_DEVICE void release_value() {
    release(smem_.v_empty[v_.place]);
    v_.advance();
  }
  FLASHCUTE_DEVICE void pass_value() {
    meet();
    release_value();
  }
  FLASHCUTE_DEVICE void await_value() { barrier_wait(smem_.v_full[v_.place], v_.parity); }
  FLASHCUTE_DEVICE void look_for_value_after() {
    auto const after = v_.after();
    value_passed_ = barrier_passed(smem_.v_full[after.place], after.parity);
  }
  /// `held`: numbers; nothing that depends on them is computed before the wait.
  template <class... Held>
  FLASHCUTE_DEVICE void await_value_after(Held&... held) {
    auto const after = v_.after();
    barrier_wait_unless(value_passed_, smem_.v_full[after.place], after.parity, held...);
    value_passed_ = 0;
  }

  /// Synchronises the warpgroup's warps.
  FLASHCUTE_DEVICE void meet() const { named_sync<warpgroup_size>(L::first_own_barrier + warpgroup_); }

 private:
  /// Releases the stage to every thread block that loads into it.
  FLASHCUTE_DEVICE static void release(Barrier& empty) {
    if constexpr (C.cluster > 1) {
      if (thread_of_warpgroup() < C.cluster) barrier_arrive_at(empty, thread_of_warpgroup());
    } else {
      if (thread_of_warpgroup() == 0) barrier_arrive(empty);
    }
  }

  Storage& smem_;
  int warpgroup_;
  RingPosition<C.stages> k_, v_;
  uint32_t tile_ = ~uint32_t{0};  // before the first
  // Results of the early tests, for the next wait. Between test and wait the ring of K advances once, that of V not at
  // all.
  uint32_t key_passed_ = 0, value_passed_ = 0;
};

/// Warpgroups take turns in beginning their products, so that while one computes its softmax, another uses the tensor
/// cores. Warpgroup w waits at named barrier First + w for its predecessor.
template <int First, int Warpgroups, bool Enabled>
class Turns {
  static constexpr int threads = 2 * warpgroup_size;  // the waiting warpgroup and its predecessor

 public:
  FLASHCUTE_DEVICE explicit Turns(int warpgroup) : warpgroup_(warpgroup) {
    if (Enabled && warpgroup == 0) named_arrive<threads>(First);  // the first turn has no predecessor
  }

  FLASHCUTE_DEVICE void wait() const {
    if constexpr (Enabled) named_sync<threads>(First + warpgroup_);
  }

  FLASHCUTE_DEVICE void pass() const {
    if constexpr (Enabled) named_arrive<threads>(First + (warpgroup_ + 1) % Warpgroups);
  }

 private:
  int warpgroup_;
};

template <int First, int Warpgroups>
class Turns<First, Warpgroups, false> {
 public:
  FLASHCUTE_DEVICE explicit Turns(int) {}
  FLASHCUTE_DEVICE void wait() const {}
  FLASHCUTE_DEVICE void pass() const {}
};

}  // namespace flashcute::sm90
