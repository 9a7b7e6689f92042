// Moves tiles from global to shared memory and owns all synchronisation between the warp that loads, the warps that
// look at what came, and the warpgroups that compute.
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

  FLASHCUTE_DEVICE RingPosition after() const {
    RingPosition position = *this;
    position.advance();
    return position;
  }
};

/// The loading warp's side. One lane of it calls.
template <ForwardConfig C, class Mask>
class Loader {
  using L = ForwardLayout<C>;
  using Storage = typename L::SharedStorage;
  static constexpr bool inspected = Mask::rows_differ;

 public:
  FLASHCUTE_DEVICE Loader(HopperForwardParams const& p, Storage& smem)
      : p_(p), smem_(smem), rank_(C.cluster > 1 ? rank_in_cluster() : 0) {
    prefetch(p.q);
    prefetch(p.k);
    prefetch(p.v);
  }

  /// A tile's Q, K and V, in the order in which they are needed: V(n) after the K that comes after K(n), which may be
  /// the next tile's first.
  FLASHCUTE_DEVICE void load(QueryTile const& tile, KvRange const& range) {
    for (int w = 0; w < L::warpgroups; ++w) {  // long before there is a place for it
      int const row = rows_of(tile, w).row0;
      for_each_page<C.head_dim>([&](int column) { prefetch_box(p_.q, column, row, tile.head, tile.batch); });
    }
    for (int n = range.first(); range.left(n) > 0; n += KvRange::step) {
      load_key(tile, n);
      load_value_left();
      if (n == range.first()) announce(tile, range);
      left_ = {tile, n, n >= range.full_end, true};
    }
  }

  /// The last V, and that there are no more tiles.
  FLASHCUTE_DEVICE void finish() {
    load_value_left();
    for (int w = 0; w < L::warpgroups; ++w) {
      await_place_for_query(w);
      work(w).exists = false;
      barrier_arrive(smem_.q_full[w]);
    }
    if constexpr (inspected) {
      await_place_for_value();  // so that there is one for the inspection too
      smem_.inspections[inspection_.place].place = -1;
      barrier_arrive(smem_.v_landed[inspection_.place]);
    }
  }

 private:
  /// Tells the warpgroups what comes next, and loads its Q.
  FLASHCUTE_DEVICE void announce(QueryTile const& tile, KvRange const& range) {
    smem_.dropped[tile_ % L::tiles] = false;
    for (int w = 0; w < L::warpgroups; ++w) {
      Work& next = work(w);
      next = part(tile, range, w);
      await_place_for_query(w);
      auto* const q = smem_.q[w];
      Barrier& full = smem_.q_full[w];
      expect_tile<warpgroup_rows, C.head_dim>(full);
      for_each_page<C.head_dim>([&](int column) {
        copy_box(p_.q, column, next.rows.row0, tile.head, tile.batch, q + warpgroup_rows * column, full,
                 L2Hint::evict_first);
      });
    }
    ++tile_;
  }

  FLASHCUTE_DEVICE Work& work(int warpgroup) { return smem_.work[tile_ % L::tiles][warpgroup]; }

  FLASHCUTE_DEVICE void await_place_for_query(int warpgroup) { barrier_wait(smem_.q_empty[warpgroup], tile_ % 2 ^ 1); }

  /// A warpgroup's rows of a tile. Under a mask some have less to do: each gets all of them in turn.
  FLASHCUTE_DEVICE QueryTile rows_of(QueryTile const& tile, int warpgroup) const {
    auto const turn = static_cast<uint32_t>(rank_ * L::warpgroups + warpgroup) + tile_;
    return tile.part_from_end(static_cast<int>(turn % (L::warpgroups * C.cluster)), warpgroup_rows);
  }

  FLASHCUTE_DEVICE Work part(QueryTile const& tile, KvRange const& range, int warpgroup) const {
    Work part{rows_of(tile, warpgroup), range, range, true};
    if (inspected && part.rows.rows > 0) {
      part.range = Mask::kv_range(part.rows, p_.forward, C.block_n);
      // A block at least, so that there is one loop for all. And no more keys are passed over than have a place while
      // the last V of the tile before keeps its own.
      part.range.end = max_of(max_of(part.range.end, range.begin + 1), range.end - (C.stages - 1));
    }
    return part;
  }

  FLASHCUTE_DEVICE void load_value_left() {
    if (left_.any) load_value(left_.tile, left_.n, left_.partial);
  }

  FLASHCUTE_DEVICE void load_key(QueryTile const& tile, int n) {
    barrier_wait(smem_.k_empty[k_.place], k_.parity ^ 1);
    load_block<C.head_dim>(p_.k, n, tile, smem_.k[k_.place], smem_.k_full[k_.place]);
    k_.advance();
  }

  FLASHCUTE_DEVICE void load_value(QueryTile const& tile, int n, bool partial) {
    await_place_for_value();
    Barrier* landed = &smem_.v_full[v_.place];
    if constexpr (inspected) {
      if (partial) {
        smem_.inspections[inspection_.place] = {v_.place, static_cast<int>((tile_ - 1) % L::tiles)};
        landed = &smem_.v_landed[inspection_.place];
        inspection_.advance();
      } else {
        barrier_arrive(*landed, inspecting_warps - 1);  // in place of those who would have looked
      }
    }
    load_block<C.head_dim_v>(p_.v, n, tile, smem_.v[v_.place], *landed);
    v_.advance();
  }

  FLASHCUTE_DEVICE void await_place_for_value() { barrier_wait(smem_.v_empty[v_.place], v_.parity ^ 1); }

  /// Block `n` of K or V. Of a cluster, each thread block loads its share of the keys, for all.
  template <int Columns>
  FLASHCUTE_DEVICE void load_block(TensorMap const& map, int n, QueryTile const& tile, typename L::Element* place,
                                   Barrier& full) {
    expect_tile<C.block_n, Columns>(full);
    int const first = rank_ * L::keys_per_load;
    for_each_page<Columns>([&](int column) {
      auto* const to = place + C.block_n * column + first * L::page;
      int const key = n * C.block_n + first;
      if constexpr (C.cluster > 1) {
        copy_box_to_all(map, column, key, tile.kv_head, tile.batch, to, full, L2Hint::evict_last, C.cluster);
      } else {
        copy_box(map, column, key, tile.kv_head, tile.batch, to, full, L2Hint::evict_last);
      }
    });
  }

  template <int Rows, int Columns>
  FLASHCUTE_DEVICE static void expect_tile(Barrier& full) {
    barrier_arrive_expecting(full, Rows * Columns * static_cast<int>(sizeof(typename L::Element)));
  }

  template <int Columns, class F>
  FLASHCUTE_DEVICE static void for_each_page(F const& f) {
    CUTE_UNROLL
    for (int column = 0; column < Columns; column += L::page) f(column);
  }

  HopperForwardParams const& p_;
  Storage& smem_;
  int const rank_;  // of the thread block in its cluster
  RingPosition<C.stages> k_, v_;
  RingPosition<C.stages> inspection_;  // as many as V has places: when one of those is free, so is one of these
  uint32_t tile_ = 0;
  struct {
    QueryTile tile;
    int n;
    bool partial, any;
  } left_ = {{}, 0, false, false};  // the V to load next
};

/// The side of the loading warpgroup's other warps. A row that does not see a key multiplies its value by 0, and 0 *
/// NaN is NaN: what is not finite in a partial block of V becomes 0 before it is multiplied, and is remembered with the
/// tile.
template <ForwardConfig C>
class Inspector {
  using L = ForwardLayout<C>;
  using Storage = typename L::SharedStorage;
  using Element = typename L::Element;

 public:
  FLASHCUTE_DEVICE static void run(Storage& smem) {
    for (RingPosition<C.stages> position;; position.advance()) {
      barrier_wait(smem.v_landed[position.place], position.parity);
      auto const [place, tile] = smem.inspections[position.place];
      if (place < 0) return;
      Element* const v = smem.v[place];
      FiniteCheck<Element> check;
      for_each_part(v, [&](Element* words) { check.template look_at<16>(words); });
      if (warp_any(!check.all_finite())) {
        smem.dropped[tile] = true;
        for_each_part(v, [](Element* words) { zero_nonfinite(words); });
        publish_to_products();
      }
      reconverge();  // one lane speaks for all: they have read what to look at, and written
      if (thread_index() % 32 == 0) barrier_arrive(smem.v_full[place]);
    }
  }

 private:
  /// Calls f(place) for each 16 bytes of a V that are this thread's part.
  template <class F>
  FLASHCUTE_DEVICE static void for_each_part(Element* v, F const& f) {
    constexpr int vector = 16 / sizeof(Element);
    int const thread = thread_of_warpgroup() - 32;  // of those that inspect
#pragma unroll 2
    for (int i = vector * thread; i < C.block_n * C.head_dim_v; i += vector * 32 * inspecting_warps) f(v + i);
  }
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
  FLASHCUTE_DEVICE static void init(Storage& smem, bool inspected) {
    for (int w = 0; w < L::warpgroups; ++w) {
      barrier_init(smem.q_full[w], 1);
      barrier_init(smem.q_empty[w], 1);
    }
    for (int i = 0; i < C.stages; ++i) {
      barrier_init(smem.k_full[i], 1);
      barrier_init(smem.v_landed[i], 1);
      barrier_init(smem.v_full[i], inspected ? inspecting_warps : 1);
      barrier_init(smem.k_empty[i], L::warpgroups * C.cluster);
      barrier_init(smem.v_empty[i], L::warpgroups * C.cluster);
    }
    publish_barriers();
  }

  /// What comes next, once its Q has arrived.
  FLASHCUTE_DEVICE Work const& next() {
    ++tile_;
    barrier_wait(smem_.q_full[warpgroup_], tile_ % 2);
    return work(0);
  }

  /// Of the tile, or of one of those before.
  FLASHCUTE_DEVICE Work const& work(uint32_t before) const {
    return smem_.work[(tile_ - before) % L::tiles][warpgroup_];
  }
  FLASHCUTE_DEVICE bool dropped(uint32_t before) const { return smem_.dropped[(tile_ - before) % L::tiles]; }

  FLASHCUTE_DEVICE Element* query() const { return smem_.q[warpgroup_]; }
  /// All products with Q are done.
  FLASHCUTE_DEVICE void release_query() {
    if (thread_of_warpgroup() == 0) barrier_arrive(smem_.q_empty[warpgroup_]);
  }

  /// The next K.
  FLASHCUTE_DEVICE void await_key() {
    barrier_wait_unless(key_passed_, smem_.k_full[k_.place], k_.parity);
    key_passed_ = 0;
  }
  FLASHCUTE_DEVICE InRing<Element> arrived_key() const { return {smem_.k[0], k_.place}; }
  /// Asks about the K after it, for the time when that is the next.
  FLASHCUTE_DEVICE void look_for_key_after() {
    auto const after = k_.after();
    key_passed_ = barrier_passed(smem_.k_full[after.place], after.parity);
  }
  FLASHCUTE_DEVICE void release_key() {
    release(smem_.k_empty[k_.place]);
    k_.advance();
  }

  /// Gives it back unused. No warp may lag behind: the barrier goes on without it, and nothing else keeps warps
  /// together that multiply nothing.
  FLASHCUTE_DEVICE void pass_key() {
    meet();
    release_key();
  }

  /// The next V, and the one after it: they are waited for before they are needed.
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
  /// `held`: numbers, of which nothing is computed before.
  template <class... Held>
  FLASHCUTE_DEVICE void await_value_after(Held&... held) {
    auto const after = v_.after();
    barrier_wait_unless(value_passed_, smem_.v_full[after.place], after.parity, held...);
    value_passed_ = 0;
  }

 private:
  /// The warpgroup's warps.
  FLASHCUTE_DEVICE void meet() const { named_sync<warpgroup_size>(L::first_own_barrier + warpgroup_); }

  /// The place is given back to all who load into it.
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
  // Answers about the barriers that are waited for next: a key's place is released once between question and wait, a
  // value's not at all.
  uint32_t key_passed_ = 0, value_passed_ = 0;
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
