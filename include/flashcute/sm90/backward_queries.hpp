// The pass `queries` of Hopper's gradients of wide heads: dQ. A thread block owns 128 queries of one head, 64 for each
// computing warpgroup, and blocks of 64 keys pass by. For each block
//
//     S = Q K^T    dP = dO V^T    P = exp(S - LSE)    dS = P * (dP - delta)    dQ += dS K
//
// dS is an operand in registers. The pass also writes what the pass `keys` needs of the queries: LSE and delta.
#pragma once

#include "flashcute/device/apply.hpp"
#include "flashcute/device/delta.hpp"
#include "flashcute/device/nonfinite.hpp"
#include "flashcute/sm90/row_statistics.hpp"
#include "flashcute/sm90/split_layout.hpp"
#include "flashcute/sm90/store_rows.hpp"

namespace flashcute::sm90 {

template <BackwardConfig C>
struct QueriesLayout : SplitLayout<C> {
  using Base = SplitLayout<C>;
  using typename Base::Element;
  static constexpr int warpgroups = C.num_warps / 4;
  static_assert(C.block_m == warpgroups * Base::tile_rows && C.block_n == Base::tile_rows);

  // Registers per thread of the warpgroup that loads, and of those that compute.
  static constexpr int loading_registers = 24, computing_registers = 240;

  static constexpr int v_places = 1;
  struct SharedStorage {
    alignas(1024) Element q[warpgroups][Base::template tile_elements<C.head_dim>];
    alignas(1024) Element dout[warpgroups][Base::template tile_elements<C.head_dim_v>];
    alignas(1024) Element k[C.stages][Base::template tile_elements<C.head_dim>];
    alignas(1024) Element v[v_places][Base::template tile_elements<C.head_dim_v>];
    float lse[C.block_m], delta[C.block_m];
    Barrier q_full, dout_full;
    Barrier k_full[C.stages], k_empty[C.stages];
    Barrier v_full[v_places], v_empty[v_places];
    bool dropped;  // whether non-finite values were replaced by 0 in a partial block of K
  };
  static_assert(sizeof(SharedStorage) <= sm90_queries_smem_bytes(C));

  /// Initialises the mbarriers. One thread calls it, before all others synchronise with it.
  FLASHCUTE_DEVICE static void init(SharedStorage& smem) {
    barrier_init(smem.q_full, 1);
    barrier_init(smem.dout_full, 1);
    for (int i = 0; i < C.stages; ++i) {
      barrier_init(smem.k_full[i], 1);
      barrier_init(smem.k_empty[i], warpgroups);
    }
    for (int i = 0; i < v_places; ++i) {
      barrier_init(smem.v_full[i], 1);
      barrier_init(smem.v_empty[i], warpgroups);
    }
    smem.dropped = false;
    publish_barriers();
  }
};

/// The blocks of keys that pass a tile of queries, from the first to the last.
template <class Mask, class Tile>
FLASHCUTE_DEVICE PassingBlocks passing_keys(ForwardParams const& p, Tile const& tile, int block_n) {
  return PassingBlocks::of(Mask::kv_range(tile, p, block_n), tile.kv_head);
}

/// Run by one lane of the loading warp.
template <BackwardKernelId Id>
class QueriesLoader {
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = QueryTile<typename Mask::Sequence>;
  using L = QueriesLayout<C>;
  using Storage = typename L::SharedStorage;

 public:
  FLASHCUTE_DEVICE static void run(Sm90BackwardParams const& p, Storage& smem, Tile const& tile) {
    RingPosition<C.stages> k;
    RingPosition<L::v_places> v;
    load_own<C.head_dim>(p.q, tile, smem.q[0], smem.q_full);
    bool first = true;
    for (auto at = passing_keys<Mask>(p.backward.forward, tile, C.block_n); at.left > 0; at = at.after()) {
      barrier_wait(smem.k_empty[k.place], k.parity ^ 1);
      load_block<C.head_dim>(p.k, tile, at.block, smem.k[k.place], smem.k_full[k.place]);
      if (first) load_own<C.head_dim_v>(p.dout, tile, smem.dout[0], smem.dout_full);
      first = false;
      barrier_wait(smem.v_empty[v.place], v.parity ^ 1);
      load_block<C.head_dim_v>(p.v, tile, at.block, smem.v[v.place], smem.v_full[v.place]);
      k.advance();
      v.advance();
    }
  }

 private:
  /// The tile's rows of Q or dO, a tile in shared memory for each warpgroup.
  template <int Columns>
  FLASHCUTE_DEVICE static void load_own(TensorMap const& map, Tile const& tile, typename L::Element* to,
                                        Barrier& full) {
    barrier_arrive_expecting(full, C.block_m * Columns * sizeof(typename L::Element));
    for (int row = 0; row < C.block_m; row += L::tile_rows) {
      load_tile<Columns>(map, tile.row0 + row, tile.head, tile.entry.batch, to + row * Columns, full,
                         L2Hint::evict_first);
    }
  }

  template <int Columns>
  FLASHCUTE_DEVICE static void load_block(TensorMap const& map, Tile const& tile, int block, typename L::Element* to,
                                          Barrier& full) {
    barrier_arrive_expecting(full, L::template tile_elements<Columns> * sizeof(typename L::Element));
    load_tile<Columns>(map, block * C.block_n, tile.kv_head, tile.entry.batch, to, full, L2Hint::evict_last);
  }

  template <int Columns>
  FLASHCUTE_DEVICE static void load_tile(TensorMap const& map, int row, int head, int batch, typename L::Element* to,
                                         Barrier& full, L2Hint hint) {
    for (int column = 0; column < Columns; column += L::page) {
      copy_box(map, column, row, head, batch, to + L::tile_rows * column, full, hint);
    }
  }
};

/// One computing warpgroup.
template <BackwardKernelId Id>
class QueriesConsumer {
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = QueryTile<typename Mask::Sequence>;
  using L = QueriesLayout<C>;
  using P = SplitProducts<C>;
  using Element = typename L::Element;
  using Storage = typename L::SharedStorage;
  using Scores = typename L::Scores;

 public:
  FLASHCUTE_DEVICE QueriesConsumer(BackwardParams const& p, Storage& smem, Tile const& tile, int warpgroup)
      : p_(p), smem_(smem), tile_(tile), warpgroup_(warpgroup), at_(passing_keys<Mask>(p.forward, tile, C.block_n)) {
    cute::clear(weights_);
    cute::clear(dq_);
  }

  /// Of a tile that sees some key.
  FLASHCUTE_DEVICE void run() {
    RowStatistics<Id>::compute(p_, tile_, smem_.lse, smem_.delta, thread());
    meet_all();  // the statistics are in shared memory
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) {
      lse_[i] = shared_load<float>(smem_.lse + row(i));
      delta_[i] = shared_load<float>(smem_.delta + row(i));
    }
    barrier_wait(smem_.q_full, 0);
    do {  // (of a loop that may end before its first iteration nvcc serialises all WGMMA)
      add_block();
    } while (at_.left > 0);
    finish_products<0>(dq_);
    store();
  }

 private:
  FLASHCUTE_DEVICE void add_block() {
    Scores s, dp;
    barrier_wait(smem_.k_full[k_.place], k_.parity);
    P::template begin_scores<C.head_dim, C.stages>(s, smem_.q[warpgroup_], {smem_.k[0], k_.place});
    // dQ of the block before has been in flight until now. Its K is released before V is waited for.
    finish_products<1>(dq_);
    if (any_) arrive(smem_.k_empty[before_.place]);
    barrier_wait(smem_.dout_full, 0);  // for the first block; later it passes at once
    barrier_wait(smem_.v_full[v_.place], v_.parity);
    P::template begin_scores<C.head_dim_v, L::v_places>(dp, smem_.dout[warpgroup_], {smem_.v[0], v_.place});
    finish_products<1>(s);
    to_probabilities(s);
    // Passes at once: it keeps the compiler from moving exponentials behind the wait for dP.
    barrier_wait(smem_.dout_full, 0);
    finish_products<0>(dp);
    arrive(smem_.v_empty[v_.place]);
    to_score_gradients(dp, s);
    if (uniform(at_.partial())) hide(dp);
    weights_ = convert<Element>(dp);
    P::template begin_sums<C.head_dim, C.stages>(dq_, weights_, {smem_.k[0], k_.place});
    any_ = true;
    before_ = k_;
    k_.advance();
    v_.advance();
    at_ = at_.after();
  }

  FLASHCUTE_DEVICE void to_probabilities(Scores& scores) const {
    auto s = by_row_and_column(scores);  // (query, key)
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(s); ++j) {
      CUTE_UNROLL
      for (int i = 0; i < L::rows_per_thread; ++i) {
        s(i, j) = exp2_approx(s(i, j) * p_.forward.scale_log2 - lse_[i]);
      }
    }
  }

  FLASHCUTE_DEVICE void to_score_gradients(Scores& gradients, Scores const& probabilities) const {
    auto ds = by_row_and_column(gradients);           // (query, key)
    auto const p = by_row_and_column(probabilities);  // (query, key)
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(ds); ++j) {
      CUTE_UNROLL
      for (int i = 0; i < L::rows_per_thread; ++i) ds(i, j) = p(i, j) * (ds(i, j) - delta_[i]);
    }
  }

  /// Sets dS of what a query does not see to 0, and what is not finite in K, which would multiply it: 0 * NaN is NaN.
  /// No product reads K meanwhile: S of this block is done, and dQ not begun.
  FLASHCUTE_DEVICE void hide(Scores& ds) const {
    int const query = tile_.row0 + warpgroup_ * warpgroup_rows;
    apply_mask<L, Mask>(
        ds, [&](int i) { return query + L::row(i); }, at_.block * C.block_n + L::first_column(),
        tile_.sequence(p_.forward), 0.f);
    if constexpr (Mask::rows_differ) {
      meet_all();  // S of both warpgroups is done
      Element* const k = smem_.k[k_.place];
      constexpr int vector = 16 / sizeof(Element), threads = L::warpgroups * warpgroup_size;
      bool finite = true;
#pragma unroll 1
      for (int i = vector * thread(); i < L::template tile_elements<C.head_dim>; i += vector * threads) {
        FiniteCheck<Element> check;
        check.template look_at<16>(k + i);
        if (check.all_finite()) continue;
        zero_nonfinite(k + i);
        finite = false;
      }
      if (!finite) {
        smem_.dropped = true;
        publish_to_products();
      }
      meet_all();  // K is finite
    }
  }

  FLASHCUTE_DEVICE void store() {
    auto const scale = static_cast<float>(p_.forward.scale);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dq_); ++i) dq_(i) *= scale;
    int const first = warpgroup_ * warpgroup_rows;
    auto* const to = static_cast<Element*>(p_.dq) + row_offset(p_.dq_stride, tile_.entry.batch, tile_.head,
                                                               tile_.entry.first_query + tile_.row0 + first);
    store_rows<C.head_dim>(dq_, to, p_.dq_stride.row, tile_.rows - first, p_.forward.head_dim);
    if (Mask::rows_differ && smem_.dropped) spoil(to, tile_.rows - first);
  }

  /// What is not finite in K and was replaced by 0 makes NaN of dQ in its column, where the query sees the key: P is
  /// NaN there, or 0. Slow, but rare.
  FLASHCUTE_DEVICE void spoil(Element* to, int rows) const {
    ForwardParams const& f = p_.forward;
    auto const sequence = tile_.sequence(f);
    RowRange const keys = Mask::kv_range(tile_, f, C.block_n).keys(true, C.block_n, sequence);
    auto const* const k = static_cast<Element const*>(f.k) + tile_.k_offset(f);
#pragma unroll 1
    for (int i = 0; i < L::rows_per_thread; ++i) {
      if (L::row(i) >= rows) continue;
      int const query = tile_.row0 + warpgroup_ * warpgroup_rows + L::row(i);
#pragma unroll 1
      for (int block = 8 * (thread_index() % 4); block < f.head_dim; block += 32) {
#pragma unroll 1
        for (int column = block; column < block + 8; ++column) {
          bool seen = false;
#pragma unroll 1
          for (int key = keys.begin; key < keys.end; ++key) {
            auto const x = static_cast<float>(global_load<Element>(k + key * f.k_stride.row + column));
            seen = seen || (!is_finite(x) && Mask::visible(query, key, sequence));
          }
          if (seen) {
            global_store(to + L::row(i) * p_.dq_stride.row + column, static_cast<Element>(infinity - infinity));
          }
        }
      }
    }
  }

  /// Among the threads that compute.
  FLASHCUTE_DEVICE static int thread() { return thread_index() - warpgroup_size; }
  /// The thread's i-th row in the tile.
  FLASHCUTE_DEVICE int row(int i) const { return warpgroup_ * warpgroup_rows + L::row(i); }

  FLASHCUTE_DEVICE static void meet_all() { named_sync<L::warpgroups * warpgroup_size>(1); }
  FLASHCUTE_DEVICE static void arrive(Barrier& barrier) {
    if (thread_of_warpgroup() == 0) barrier_arrive(barrier);
  }

  BackwardParams const& p_;
  Storage& smem_;
  Tile const& tile_;
  int const warpgroup_;
  PassingBlocks at_;
  RingPosition<C.stages> k_, before_;
  RingPosition<L::v_places> v_;
  bool any_ = false;  // blocks before this one
  float lse_[L::rows_per_thread], delta_[L::rows_per_thread];
  typename L::Weights weights_;
  typename L::template Sums<C.head_dim> dq_;
};

template <BackwardKernelId Id>
struct QueriesPass {
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = QueryTile<typename Mask::Sequence>;
  using L = QueriesLayout<C>;
  using Storage = typename L::SharedStorage;
  static constexpr int threads = num_threads(Id);

  /// The tile of a thread block. (A template for the tests, which have tiles of another sequence type.)
  template <class AnyTile>
  FLASHCUTE_HD static AnyTile tile_of(ForwardParams const& p, uint32_t block) {
    if constexpr (Mask::rows_differ) return AnyTile::in_turn(p, block, C.block_m, sizeof(typename L::Element));
    return AnyTile::at(p, block, C.block_m);
  }

  FLASHCUTE_DEVICE static void run(Sm90BackwardParams const& p, Storage& smem_symbol) {
    Storage& smem = hidden(smem_symbol);
    if (thread_index() == 0) L::init(smem);
    auto const tile = tile_of<Tile>(p.backward.forward, block_index());
    if (Mask::kv_range(tile, p.backward.forward, C.block_n).empty()) return store_nothing(p.backward, tile);
    block_sync();  // the mbarriers are initialised

    int const warpgroup = warpgroup_index();
    if (warpgroup == 0) {
      release_registers<L::loading_registers>();
      if (warp_of_warpgroup() == 0 && elected_lane()) QueriesLoader<Id>::run(p, smem, tile);
    } else {
      claim_registers<L::computing_registers>();
      QueriesConsumer<Id>{p.backward, smem, tile, warpgroup - 1}.run();
    }
  }

 private:
  /// Of queries that see no key. (No tile of keys asks for their statistics.)
  FLASHCUTE_DEVICE static void store_nothing(BackwardParams const& p, Tile const& tile) {
    auto const offset = row_offset(p.dq_stride, tile.entry.batch, tile.head, tile.entry.first_query + tile.row0);
    clear_rows<threads, typename L::Element>(tile, p.dq, offset, p.dq_stride, p.forward.head_dim);
  }
};

}  // namespace flashcute::sm90
