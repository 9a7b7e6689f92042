// The warps that serve Hopper's gradients: one loads by TMA, one for each computing warpgroup adds its half of dQ to
// the sums, and one looks for NaN and infinity in partial blocks.
#pragma once

#include "flashcute/device/nonfinite.hpp"
#include "flashcute/sm90/key_tiles.hpp"
#include "flashcute/sm90/row_statistics.hpp"

namespace flashcute::sm90 {

/// Run by one lane of the loading warp. L: the layout of a tile of keys.
template <BackwardKernelId Id, class L = BackwardLayout<Id.config>>
class GradientLoader {
  static constexpr BackwardConfig C = Id.config;
  using Blocks = PassingQueries<Id, L::queries>;
  using Passing = typename Blocks::Passing;
  using Tile = typename Blocks::Tile;
  using Storage = StorageWithTiles<L, typename Blocks::Sequence>;
  using Workspace = typename Blocks::Workspace;

 public:
  FLASHCUTE_DEVICE static void run(Sm90BackwardParams const& p, Storage& smem) {
    GradientLoader loader{p, smem};
    KeyTiles<Id> tiles(p.backward);
    for (Tile tile; tiles.next(tile);) {
      Passing const first = Blocks::of(p.backward, tile);
      bool const seen = first.left > 0;
      loader.tiles_.announce({.tile = tile, .exists = true, .seen = seen, .keys_finite = true, .dropped = false});
      HeldTile<typename Blocks::Sequence> announced = loader.tiles_.tile();  // or a copy of it
      loader.load(announced, first);
      if constexpr (!KeyTiles<Id>::persistent) return;
    }
    loader.tiles_.announce({.tile = {}, .exists = false, .seen = false, .keys_finite = true, .dropped = false});
  }

 private:
  FLASHCUTE_DEVICE GradientLoader(Sm90BackwardParams const& p, Storage& smem) : p_(p), smem_(smem), tiles_(smem) {
    if (p.backward.forward.seqlen_q == 0) return;  // without queries there are no maps
    prefetch(p.q);
    prefetch(p.v);
    prefetch(p.dout);
    prefetch(p.k);
  }

  /// What the tile that was announced last needs. It begins while warps still have the tile before. With one place for
  /// K V of that is free first: K is needed for dQ of the last block.
  FLASHCUTE_DEVICE void load(Tile const& tile, Passing at) {
    if (at.left == 0) return pass_over();
    if constexpr (KeyTiles<Id>::persistent) {
      prefetch_keys<C.head_dim>(p_.k, tile);
      prefetch_keys<C.head_dim_v>(p_.v, tile);
    }
    for (bool first = true;; first = false) {
      if (first && L::k_places > 1) load_k(tile);  // its place is free
      load_queries(tile, at);
      // V comes with the first dO: K and the first Q are enough to begin, and no later block waits for it.
      if (first) barrier_wait(smem_.v_empty, tiles_.parity() ^ 1);
      load_dout(tile, at, first);
      if (first && L::k_places == 1) load_k(tile);
      if (at.left == 1) return;
      at = at.after();
    }
  }

  /// A tile that no query sees.
  FLASHCUTE_DEVICE void pass_over() {
    barrier_wait(smem_.v_empty, tiles_.parity() ^ 1);
    tiles_.await_place_of_k();
    barrier_arrive(smem_.k_full[tiles_.k_place()]);
  }

  FLASHCUTE_DEVICE void load_k(Tile const& tile) {
    tiles_.await_place_of_k();
    auto const place = tiles_.k_place();
    barrier_arrive_expecting(smem_.k_full[place], bytes_of_keys<C.head_dim>);
    load_keys<C.head_dim>(p_.k, tile, smem_.k[place], smem_.k_full[place]);
  }

  template <int Columns>
  static constexpr uint32_t bytes_of_keys = L::keys * Columns * sizeof(typename L::Element);
  static constexpr uint32_t bytes_of_numbers = L::queries * sizeof(float);
  template <int Columns>
  static constexpr uint32_t bytes_of_block = L::queries * Columns * sizeof(typename L::Element) + bytes_of_numbers;

  template <int Columns>
  FLASHCUTE_DEVICE void load_keys(TensorMap const& map, Tile const& tile, typename L::Element* to, Barrier& full) {
    for (int column = 0; column < Columns; column += L::page) {
      copy_box(map, column, tile.entry.first_key + tile.row0, tile.kv_head, tile.entry.batch, to + L::keys * column,
               full, L2Hint::evict_first);
    }
  }

  /// Brings keys to the level 2 cache, before their place in shared memory is free.
  template <int Columns>
  FLASHCUTE_DEVICE void prefetch_keys(TensorMap const& map, Tile const& tile) const {
    for (int column = 0; column < Columns; column += L::page) {
      prefetch_box(map, column, tile.entry.first_key + tile.row0, tile.kv_head, tile.entry.batch);
    }
  }

  FLASHCUTE_DEVICE void load_queries(Tile const& tile, Passing const& at) {
    barrier_wait(smem_.q_empty[q_.place], q_.parity ^ 1);
    smem_.blocks[q_.place] = {at.block * L::queries, at.head, Blocks::partial(p_.backward, at, tile), at.left == 1};
    Barrier& full = Blocks::inspected(at) ? smem_.q_landed[q_landed_.place] : smem_.q_full[q_.place];
    barrier_arrive_expecting(full, bytes_of_block<C.head_dim>);
    load_block<C.head_dim>(p_.q, tile, at, smem_.q[q_.place], Workspace::lse(p_.backward, number(tile, at)),
                           smem_.lse[q_.place], full);
    q_.advance();
    if (Blocks::inspected(at)) q_landed_.advance();
  }

  FLASHCUTE_DEVICE void load_dout(Tile const& tile, Passing const& at, bool with_v) {
    barrier_wait(smem_.dout_empty[dout_.place], dout_.parity ^ 1);
    Barrier& full = Blocks::inspected(at) ? smem_.dout_landed[dout_landed_.place] : smem_.dout_full[dout_.place];
    barrier_arrive_expecting(full, bytes_of_block<C.head_dim_v> + (with_v ? bytes_of_keys<C.head_dim_v> : 0));
    if (with_v) load_keys<C.head_dim_v>(p_.v, tile, smem_.v, full);
    load_block<C.head_dim_v>(p_.dout, tile, at, smem_.dout[dout_.place],
                             Workspace::delta(p_.backward, number(tile, at)), smem_.delta[dout_.place], full);
    dout_.advance();
    if (Blocks::inspected(at)) dout_landed_.advance();
  }

  FLASHCUTE_DEVICE int64_t number(Tile const& tile, Passing const& at) const {
    return Workspace::number(p_.backward.forward, tile.entry, at.head, at.block);
  }

  /// A block of Q or dO, and a number for each of its rows.
  template <int Columns>
  FLASHCUTE_DEVICE void load_block(TensorMap const& map, Tile const& tile, Passing const& at, typename L::Element* to,
                                   float const* numbers, float* numbers_to, Barrier& full) {
    for (int column = 0; column < Columns; column += L::page) {
      copy_box(map, column, tile.entry.first_query + at.block * L::queries, at.head, tile.entry.batch,
               to + L::queries * column, full, L2Hint::evict_last);
    }
    copy_bulk(numbers, numbers_to, bytes_of_numbers, full);
  }

  Sm90BackwardParams const& p_;
  Storage& smem_;
  TilesInTurn<Id, L> tiles_;
  RingPosition<C.stages> q_, q_landed_;
  RingPosition<C.dout_stages> dout_, dout_landed_;
};

/// Run by a warp for each computing warpgroup: adds its half of each block's dQ to the sums.
template <BackwardKernelId Id>
class DqAdder {
  static constexpr BackwardConfig C = Id.config;
  using Blocks = PassingQueries<Id>;
  using Mask = typename Blocks::Mask;
  using Passing = typename Blocks::Passing;
  using Tile = typename Blocks::Tile;
  using L = BackwardLayout<C>;
  using Element = typename L::Element;
  using Storage = StorageWithTiles<L, typename Blocks::Sequence>;
  using Workspace = typename Blocks::Workspace;

 public:
  FLASHCUTE_DEVICE static void run(BackwardParams const& p, Storage& smem, int warpgroup) {
    DqAdder adder{p, smem, warpgroup};
    adder.tiles_.for_each([&] { adder.add_tile(); });
  }

 private:
  FLASHCUTE_DEVICE DqAdder(BackwardParams const& p, Storage& smem, int warpgroup)
      : p_(p), smem_(smem), warpgroup_(warpgroup), tiles_(smem) {}

  FLASHCUTE_DEVICE void add_tile() {
    HeldTile<typename Blocks::Sequence> tile = tiles_.tile();
    Passing at = Blocks::of(p_, tile);
    barrier_wait(smem_.k_full[tiles_.k_place()], tiles_.k_parity());
    if (at.left == 0) return release_keys();
    // The copy engine takes requests in order, and additions of dQ are long. So that K of the next tile is requested
    // before the last of them, this one's is released now; if it is not finite, after it was read here.
    bool finite = true;
    if constexpr (Mask::rows_differ) {
      barrier_wait(smem_.k_inspected[tiles_.k_place()], tiles_.k_parity());
      finite = uniform(tiles_.announced().keys_finite);
    }
    if (finite) release_keys();
    DqOrder<Id> order(p_, tile, warpgroup_);
    for (; at.left > 0; at = at.after()) {
      order.look_at(at);
      barrier_wait(smem_.dq_full[warpgroup_], dq_parity_);
      float* const sums =
          Workspace::sums(p_, Workspace::number(p_.forward, tile.entry, at.head, at.block)) + warpgroup_ * L::dq_floats;
      bool const whole = finite || !Blocks::inspected(at);
      if (!whole) add_visible(tile, at, sums, order);
      if (!finite && at.left == 1) release_keys();
      reconverge();
      if (elected_lane()) {
        barrier_arrive(smem_.ds_empty[ds_.place]);
        if (whole) {
          order.await_turn();
          add_whole(sums, order);
          await_bulk_reads();
        }
        barrier_arrive(smem_.dq_empty[warpgroup_]);
        order.pass_on();
      }
      dq_parity_ ^= 1;
      ds_.advance();
    }
  }

  /// In parts, of which at most two are requested: the copy engine takes requests in order, and a load of Q or dO would
  /// wait until all of it was added. Where other tiles wait for the addition, in one piece: the last of several
  /// parts would be done later.
  FLASHCUTE_DEVICE void add_whole(float* sums, DqOrder<Id> const& order) const {
    if (order.others_wait()) return order.add(sums, smem_.dq[warpgroup_], L::dq_floats * sizeof(float));
    constexpr int floats = L::dq_floats / L::dq_parts;
    CUTE_UNROLL
    for (int i = 0; i < L::dq_parts; ++i) {
      order.add(sums + i * floats, smem_.dq[warpgroup_] + i * floats, floats * sizeof(float));
      await_bulk_reads<1>();
    }
  }

  /// After what the warp's lanes may have read of K.
  FLASHCUTE_DEVICE void release_keys() {
    reconverge();
    if (elected_lane()) barrier_arrive(smem_.k_empty[tiles_.k_place()]);
  }

  /// dS K element by element, without what a query does not see: slow, but rare. A lane takes the elements that its
  /// number stands for in each warp of the warpgroup.
  FLASHCUTE_DEVICE void add_visible(Tile const& tile, Passing const& at, float* sums, DqOrder<Id> const& order) const {
    order.await_turn();
    auto const sequence = tile.sequence(p_.forward, at.head);
#pragma unroll 1
    for (int i = thread_index() % 32; i < L::dq_floats; i += 32) {
      int const thread = i / 4 % warpgroup_size, word = i / (4 * warpgroup_size);
      int query = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      int column = word * 8 + 2 * (thread % 4) + i % 2;
      if (L::dq_by_rows) {
        query += warpgroup_ * warpgroup_rows;
      } else {
        column += warpgroup_ * L::dq_columns;
      }
      float sum = 0;
#pragma unroll 1
      for (int key = 0; key < C.block_n; ++key) {
        if (!Mask::visible(at.block * C.block_m + query, tile.row0 + key, sequence)) continue;
        sum += element(smem_.ds[ds_.place], C.block_m, query, key) *
               element(smem_.k[tiles_.k_place()], C.block_n, key, column);
      }
      order.add(sums + i, sum);
    }
  }

  /// Of a tile of `rows` rows in swizzled pages.
  FLASHCUTE_DEVICE static float element(Element const* tile, int rows, int row, int column) {
    int const piece = column % L::page / 8 ^ row % 8;
    return static_cast<float>(
        shared_load<Element>(tile + (column / L::page * rows + row) * L::page + piece * 8 + column % 8));
  }

  BackwardParams const& p_;
  Storage& smem_;
  int const warpgroup_;
  TilesInTurn<Id, L> tiles_;
  uint32_t dq_parity_ = 0;
  RingPosition<L::ds_places> ds_;
};

/// Run by one warp, where queries see different keys: it looks for NaN and infinity in K, and in blocks of Q and dO of
/// which not every row sees all keys. There it replaces them by 0: a row that does not see a key would multiply it by
/// 0, and 0 * NaN is NaN. (What the row sees still becomes NaN: its LSE is not finite, of which `prepare` makes NaN, or
/// its delta is not.) So of a block whose LSE, or delta, are finite the elements need no look. Rows past the end of a
/// sequence, which may be those of another, become 0 too.
template <BackwardKernelId Id, class L = BackwardLayout<Id.config>>
class GradientInspector {
  static constexpr BackwardConfig C = Id.config;
  using Blocks = PassingQueries<Id, L::queries>;
  using Passing = typename Blocks::Passing;
  using Tile = typename Blocks::Tile;
  using Element = typename L::Element;
  using Storage = StorageWithTiles<L, typename Blocks::Sequence>;
  static constexpr bool has_sink = takes_sink(Id.features.mask);

 public:
  FLASHCUTE_DEVICE static void run(BackwardParams const& p, Storage& smem) {
    GradientInspector inspector{p, smem};
    inspector.tiles_.for_each([&] { inspector.inspect_tile(); });
  }

 private:
  FLASHCUTE_DEVICE GradientInspector(BackwardParams const& p, Storage& smem) : p_(p), smem_(smem), tiles_(smem) {}

  FLASHCUTE_DEVICE void inspect_tile() {
    Passing at = Blocks::of(p_, tile());
    auto const place = tiles_.k_place();
    barrier_wait(smem_.k_full[place], tiles_.k_parity());
    if constexpr (L::inspects_keys) {
      if (at.left > 0) inspect_keys(smem_.k[place]);
      arrive(smem_.k_inspected[place]);
    }
    arrive(smem_.k_empty[place]);
    for (; at.left > 0; at = at.after()) {
      if (Blocks::inspected(at)) {
        inspect_block(at);
      } else {
        pass_over();
      }
    }
  }

  FLASHCUTE_DEVICE void pass_over() {
    q_.advance();
    dout_.advance();
  }

  FLASHCUTE_DEVICE void inspect_block(Passing const& at) {
    // Beside a sink the LSE of a row is finite although all its scores are -infinity.
    bool const lse_tells = !has_sink || p_.forward.sink.logits == nullptr;
    inspect<L::q_elements>(smem_.q[q_.place], at, smem_.q_landed[q_landed_.place], q_landed_.parity,
                           smem_.q_full[q_.place], smem_.lse[q_.place], missing_lse, lse_tells);
    inspect<L::dout_elements>(smem_.dout[dout_.place], at, smem_.dout_landed[dout_landed_.place], dout_landed_.parity,
                              smem_.dout_full[dout_.place], smem_.delta[dout_.place], 0.f, true);
    pass_over();
    q_landed_.advance();
    dout_landed_.advance();
  }

  /// `statistics`: of the rows of Q the LSE, of dO delta; `missing`: those of a row that does not exist. `they_tell`:
  /// where an element of a row is not finite, they are not.
  template <int Elements>
  FLASHCUTE_DEVICE void inspect(Element* block, Passing const& at, Barrier& landed, uint32_t parity, Barrier& full,
                                float* statistics, float missing, bool they_tell) {
    barrier_wait(landed, parity);
    if constexpr (!Blocks::Sequence::fills_tensors) {
      clear_from<Elements, L::queries>(tile().sequence(p_.forward).rows() - at.block * L::queries, block);
    }
    if ((!they_tell || any_unusual(statistics, missing)) && !finite(block, Elements)) {
      tiles_.announced().dropped = true;
      if constexpr (has_sink) {
        if (!they_tell) drop_probabilities(block, statistics);
      }
      for_each_part(block, Elements, [](Element* words) { zero_nonfinite(words); });
      publish_to_products();
    }
    arrive(full);
  }

  /// Beside a sink the LSE of a row is finite although all its scores are -infinity. Its P is 0, also where Q becomes 0
  /// and the scores are finite.
  FLASHCUTE_DEVICE static void drop_probabilities(Element* q, float* lse) {
    for_each_part(q, L::q_elements, [&](Element* words) {
      FiniteCheck<Element> check;
      check.template look_at<16>(words);
      float* const of_row = lse + static_cast<int>(words - q) / L::page % L::queries;
      if (!check.all_finite() && is_finite(shared_load<float>(of_row))) shared_store(of_row, float{infinity});
    });
  }

  FLASHCUTE_DEVICE void inspect_keys(Element* keys) {
    if (Blocks::has_foreign_keys(p_, tile())) {
      clear_from<L::k_elements, L::keys>(tile().existing(p_.forward), keys);
    }
    if (!finite(keys, L::k_elements)) tiles_.announced().keys_finite = false;
  }

  /// One lane arrives for the warp: all its lanes have read and written what they had to.
  FLASHCUTE_DEVICE static void arrive(Barrier& barrier) {
    reconverge();
    if (thread_index() % 32 == 0) barrier_arrive(barrier);
  }

  FLASHCUTE_DEVICE Tile const& tile() const { return tiles_.tile(); }

  /// Clears the rows from `first` on of a tile of `Rows` rows in pages.
  template <int Elements, int Rows>
  FLASHCUTE_DEVICE static void clear_from(int first, Element* tile) {
    if (first >= Rows) return;
    for_each_part(tile, Elements, [&](Element* words) {
      int const row = static_cast<int>(words - tile) / L::page % Rows;
      if (row >= first) shared_store(words, uint4{});
    });
    publish_to_products();
  }

  FLASHCUTE_DEVICE static bool any_unusual(float const* statistics, float missing) {
    bool found = false;
    CUTE_UNROLL
    for (int i = 0; i < L::queries; i += 32) {
      float const x = shared_load<float>(statistics + i + thread_index() % 32);
      found |= !is_finite(x) && x != missing;
    }
    return warp_any(found);
  }

  FLASHCUTE_DEVICE static bool finite(Element* elements, int count) {
    FiniteCheck<Element> check;
    for_each_part(elements, count, [&](Element* words) { check.template look_at<16>(words); });
    return !warp_any(!check.all_finite());
  }

  /// Calls f(place) for each 16 bytes that are this lane's part.
  template <class F>
  FLASHCUTE_DEVICE static void for_each_part(Element* elements, int count, F const& f) {
    constexpr int vector = 16 / sizeof(Element);
#pragma unroll 4
    for (int i = vector * (thread_index() % 32); i < count; i += vector * 32) f(elements + i);
  }

  BackwardParams const& p_;
  Storage& smem_;
  TilesInTurn<Id, L> tiles_;
  RingPosition<C.stages> q_, q_landed_;
  RingPosition<C.dout_stages> dout_, dout_landed_;
};

}  // namespace flashcute::sm90
