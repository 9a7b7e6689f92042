// Moves tiles from global to shared memory and owns all synchronisation between the warp that loads and the
// warpgroups that compute: both name a tile, and each waits only for the other.
#pragma once

#include "flashcute/nonfinite.hpp"
#include "flashcute/sm90/layout.hpp"

namespace flashcute::sm90 {

/// Where one side is in a ring of `Stages` places. A place's barriers change phase once each time around.
template <int Stages>
struct RingPosition {
  int place = 0;
  uint32_t parity = 0;

  FLASHCUTE_DEVICE void advance() {
    if (++place == Stages) {
      place = 0;
      parity ^= 1;
    }
  }
};

/// The loading warp's side. One lane of it calls.
template <ForwardConfig C>
class Loader {
  using L = ForwardLayout<C>;
  using Storage = typename L::SharedStorage;

 public:
  FLASHCUTE_DEVICE Loader(HopperForwardParams const& p, Storage& smem) : p_(p), smem_(smem) {
    prefetch(p.q);
    prefetch(p.k);
    prefetch(p.v);
  }

  /// A tile's Q, K and V, in the order in which they are needed: V(n) after the K that comes after K(n), which may be
  /// the next tile's first.
  FLASHCUTE_DEVICE void load(QueryTile const& tile, KvRange const& range) {
    for (int n = range.end - 1; n >= range.begin; --n) {
      load_key(tile, n);
      load_value_left();
      if (n == range.end - 1) announce({tile, range, true, false});
      left_ = {tile, n, true};
    }
  }

  /// The last V, and that there are no more tiles.
  FLASHCUTE_DEVICE void finish() {
    load_value_left();
    announce({{}, {}, false, false});
  }

 private:
  /// Tells the warpgroups what comes next, and loads its Q.
  FLASHCUTE_DEVICE void announce(Work const& work) {
    smem_.work[tile_ % L::works] = work;
    for (int w = 0; w < L::warpgroups; ++w) {
      barrier_wait(smem_.q_empty[w], tile_ % 2 ^ 1);
      if (work.exists) {
        load_tile<warpgroup_rows, C.head_dim>(p_.q, work.tile.row0 + w * warpgroup_rows, work.tile.head,
                                              work.tile.batch, smem_.q[w], smem_.q_full[w], L2Hint::evict_first);
      } else {
        barrier_arrive(smem_.q_full[w]);
      }
    }
    ++tile_;
  }

  FLASHCUTE_DEVICE void load_value_left() {
    if (left_.any) load_value(left_.tile, left_.n);
  }

  FLASHCUTE_DEVICE void load_key(QueryTile const& tile, int n) {
    barrier_wait(smem_.k_empty[k_.place], k_.parity ^ 1);
    load_tile<C.block_n, C.head_dim>(p_.k, n * C.block_n, tile.kv_head, tile.batch, smem_.k[k_.place],
                                     smem_.k_full[k_.place], L2Hint::evict_last);
    k_.advance();
  }

  FLASHCUTE_DEVICE void load_value(QueryTile const& tile, int n) {
    barrier_wait(smem_.v_empty[v_.place], v_.parity ^ 1);
    load_tile<C.block_n, C.head_dim_v>(p_.v, n * C.block_n, tile.kv_head, tile.batch, smem_.v[v_.place],
                                       smem_.v_full[v_.place], L2Hint::evict_last);
    v_.advance();
  }

  template <int Rows, int Columns>
  FLASHCUTE_DEVICE static void load_tile(TensorMap const& map, int row, int head, int batch, typename L::Element* place,
                                         Barrier& full, L2Hint hint) {
    barrier_arrive_expecting(full, Rows * Columns * static_cast<int>(sizeof(typename L::Element)));
    CUTE_UNROLL
    for (int column = 0; column < Columns; column += L::page) {
      copy_box(map, column, row, head, batch, place + Rows * column, full, hint);
    }
  }

  HopperForwardParams const& p_;
  Storage& smem_;
  RingPosition<C.stages> k_, v_;
  uint32_t tile_ = 0;
  struct {
    QueryTile tile;
    int n;
    bool any;
  } left_ = {{}, 0, false};  // the V to load next
};

/// A computing warpgroup's side: waits for tiles, and gives their places back.
template <ForwardConfig C>
class Tiles {
  using L = ForwardLayout<C>;
  using Storage = typename L::SharedStorage;
  using Element = typename L::Element;

 public:
  FLASHCUTE_DEVICE Tiles(Storage& smem, int warpgroup) : smem_(smem), warpgroup_(warpgroup) {}

  /// The block's barriers, before anyone waits at them. One thread calls.
  FLASHCUTE_DEVICE static void init(Storage& smem) {
    for (int w = 0; w < L::warpgroups; ++w) {
      barrier_init(smem.q_full[w], 1);
      barrier_init(smem.q_empty[w], 1);
    }
    for (int i = 0; i < C.stages; ++i) {
      barrier_init(smem.k_full[i], 1);
      barrier_init(smem.v_full[i], 1);
      barrier_init(smem.k_empty[i], L::warpgroups);
      barrier_init(smem.v_empty[i], L::warpgroups);
    }
    publish_barriers();
  }

  /// What the next tile is, once its Q has arrived.
  FLASHCUTE_DEVICE Work const& next() {
    ++tile_;
    barrier_wait(smem_.q_full[warpgroup_], tile_ % 2);
    return work(0);
  }

  /// The tile, or one of those before.
  FLASHCUTE_DEVICE Work& work(uint32_t before) const { return smem_.work[(tile_ - before) % L::works]; }

  FLASHCUTE_DEVICE Element* query() const { return smem_.q[warpgroup_]; }
  /// All products with Q are done.
  FLASHCUTE_DEVICE void release_query() { release(smem_.q_empty[warpgroup_]); }

  /// In the next V, or the one after it: what is not finite becomes 0, and is remembered with the tile.
  FLASHCUTE_DEVICE void drop_nonfinite(bool after) {
    auto position = v_;
    if (after) position.advance();
    Element* const v = smem_.v[position.place];
    int const barrier = L::first_own_barrier + warpgroup_;
    FiniteCheck<Element> check;
    for_each_part(v, [&](Element* place) { check.template look_at<16>(place); });
    if (named_any<warpgroup_size>(barrier, !check.all_finite())) {
      // Another warpgroup may look at the place at any time: who finds it finite after this shall find the mark too.
      work(0).dropped = true;
      order_writes();
      for_each_part(v, [](Element* place) { zero_nonfinite(place); });
      publish_to_products();
      named_sync<warpgroup_size>(barrier);  // the whole tile is finite
    }
    reconverge();
  }

  /// The next K.
  FLASHCUTE_DEVICE Element* key() {
    barrier_wait(smem_.k_full[k_.place], k_.parity);
    return smem_.k[k_.place];
  }
  FLASHCUTE_DEVICE void release_key() {
    release(smem_.k_empty[k_.place]);
    k_.advance();
  }

  /// The next V, and the one after it: they are waited for before they are needed.
  FLASHCUTE_DEVICE Element* arrived_value() { return smem_.v[v_.place]; }
  FLASHCUTE_DEVICE void release_value() {
    release(smem_.v_empty[v_.place]);
    v_.advance();
  }
  FLASHCUTE_DEVICE void await_value() { barrier_wait(smem_.v_full[v_.place], v_.parity); }
  FLASHCUTE_DEVICE void await_value_after() {
    auto after = v_;
    after.advance();
    barrier_wait(smem_.v_full[after.place], after.parity);
  }

 private:
  /// Calls f(place) for each 16 bytes of a V that are this thread's part.
  template <class F>
  FLASHCUTE_DEVICE static void for_each_part(Element* v, F const& f) {
    constexpr int vector = 16 / sizeof(Element);
    for (int i = vector * thread_of_warpgroup(); i < C.block_n * C.head_dim_v; i += vector * warpgroup_size) f(v + i);
  }

  FLASHCUTE_DEVICE static void release(Barrier& empty) {
    if (thread_of_warpgroup() == 0) barrier_arrive(empty);
  }

  Storage& smem_;
  int warpgroup_;
  RingPosition<C.stages> k_, v_;
  uint32_t tile_ = ~uint32_t{0};  // before the first
};

/// Warpgroups take turns in beginning their products, so that while one computes its softmax, another has the tensor
/// cores. Warpgroup w waits at barrier First + w for its predecessor.
template <int First, int Warpgroups, bool Enabled>
class Turns {
  static constexpr int threads = 2 * warpgroup_size;  // who waits, and who goes before

 public:
  FLASHCUTE_DEVICE explicit Turns(int warpgroup) : warpgroup_(warpgroup) {
    if (Enabled && warpgroup == 0) named_arrive<threads>(First);  // nobody goes before the first
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
