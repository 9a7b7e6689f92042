// The warpgroups that compute Hopper's gradients: each owns 64 keys of the tile, whose dK and dV stay in its registers
// while blocks of Q and dO pass by. For each block
//
//     S^T = K Q^T    dP^T = V dO^T    P = exp(S - LSE)    dS = P * (dP - delta)
//     dV += P^T dO   dK += dS^T Q     dQ = dS K
//
// The products are asynchronous. `late_dq`: dQ of a block needs dS of both warpgroups. It is multiplied one iteration
// later, when the other's dS has long been there: so the two never wait for each other, and one computes exponentials
// while the other multiplies.
#pragma once

#include "flashcute/device/nonfinite.hpp"
#include "flashcute/sm90/backward_gemm.hpp"
#include "flashcute/sm90/backward_loader.hpp"
#include "flashcute/sm90/store_rows.hpp"

namespace flashcute::sm90 {

template <BackwardKernelId Id>
class GradientConsumer {
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Sequence = typename Mask::Sequence;
  using Tile = KeyTile<Sequence>;
  using L = BackwardLayout<C>;
  using P = BackwardProducts<C>;
  using Element = typename L::Element;
  using Storage = typename L::SharedStorage;
  using Scores = decltype(L::template accumulator<typename L::BlockM>());
  using Sums = decltype(L::template accumulator<typename L::HeadDim>());
  using Dq = decltype(L::template accumulator<typename L::DqColumns>());

 public:
  FLASHCUTE_DEVICE GradientConsumer(BackwardParams const& p, Storage& smem, Tile const& tile, int warpgroup)
      : p_(p), smem_(smem), tile_(tile), warpgroup_(warpgroup) {
    cute::clear(dk_);
    cute::clear(dv_);
  }

  /// Of a tile that some query sees.
  FLASHCUTE_DEVICE void run() {
    barrier_wait(smem_.k_full, 0);
    if (PassingQueries<Id>::has_foreign_keys(p_, tile_)) barrier_wait(smem_.k_inspected, 0);
    bool last;
    do {  // (of a loop that may end before its first iteration nvcc serialises all WGMMA)
      last = add_block();
    } while (!last);
    if constexpr (C.late_dq) add_last_dq();
    store();
  }

 private:
  /// The next block; returns whether it was the last.
  FLASHCUTE_DEVICE bool add_block() {
    Scores s, dp;
    barrier_wait(smem_.q_full[q_.place], q_.parity);
    P::template begin_scores<C.stages>(s, own(smem_.k), {smem_.q[0], q_.place});
    barrier_wait(smem_.v_full, 0);  // of the first block; later it passes at once
    barrier_wait(smem_.dout_full[dout_.place], dout_.parity);
    P::template begin_scores<C.dout_stages>(dp, own(smem_.v), {smem_.dout[0], dout_.place});
    AnnouncedQueries const& block = smem_.blocks[q_.place];
    bool const partial = uniform(block.partial), last = uniform(block.last);
    SeeingQueries seeing;
    if (is_loaded && partial) seeing = load_seeing(block);
    finish_products<1>(s);
    to_probabilities(s);
    if (partial) hide(s, block, seeing);
    finish_products<0>(dp);
    to_score_gradients(dp, s);
    if (partial) hide(dp, block, seeing);
    // P is rounded after dS, which takes it in fp32: rounded before, both would be in registers at once.
    auto ds = convert<Element>(dp);
    auto probabilities = convert<Element>(s);
    hold_at_one(probabilities);
    barrier_wait(smem_.ds_empty[ds_.place], ds_.parity ^ 1);
    store_ds(ds);
    publish_to_products();
    P::template begin_sums<C.dout_stages>(dv_, probabilities, {smem_.dout[0], dout_.place});
    meet();  // the warpgroup's dS is in shared memory
    arrive(smem_.ds_full[ds_.place]);

    Dq dq;
    if constexpr (C.late_dq) {
      barrier_wait(smem_.ds_full[ds_before_.place], ds_before_.parity);
      P::begin_dq(dq, ds_ring(ds_before_.place), key_columns());
    } else {
      barrier_wait(smem_.ds_full[ds_.place], ds_.parity);
      P::begin_dq(dq, ds_ring(ds_.place), key_columns());
    }
    P::template begin_sums<C.stages>(dk_, ds, {smem_.q[0], q_.place});
    finish_products<2>(dv_);
    arrive(smem_.dout_empty[dout_.place]);
    finish_products<1>(dq);
    // Before the first block there is none: what was multiplied is nothing.
    pass_on(dq, !C.late_dq || any_);
    finish_products<0>(dk_);
    arrive(smem_.q_empty[q_.place]);
    any_ = true;
    q_.advance();
    dout_.advance();
    ds_.advance();
    ds_before_.advance();
    return last;
  }

  FLASHCUTE_DEVICE void add_last_dq() {
    Dq dq;
    barrier_wait(smem_.ds_full[ds_before_.place], ds_before_.parity);
    P::begin_dq(dq, ds_ring(ds_before_.place), key_columns());
    finish_products<0>(dq);
    pass_on(dq, true);
  }

  // ---- scores ----------------------------------------------------------------------------------------

  /// S^T becomes P^T, in place.
  FLASHCUTE_DEVICE void to_probabilities(Scores& scores) const {
    auto s = by_row_and_column(scores);  // (key, query)
    float const* const lse = smem_.lse[q_.place] + L::first_column();
    CUTE_UNROLL
    for (int j = 0; j < columns; ++j) {
      float const of_query = shared_load<float>(lse + L::column_distance(j));
      CUTE_UNROLL
      for (int i = 0; i < L::rows_per_thread; ++i) {
        s(i, j) = exp2_approx(s(i, j) * p_.forward.scale_log2 - of_query);
      }
    }
  }

  /// dP^T becomes dS^T, in place.
  FLASHCUTE_DEVICE void to_score_gradients(Scores& gradients, Scores const& probabilities) const {
    auto ds = by_row_and_column(gradients);           // (key, query)
    auto const p = by_row_and_column(probabilities);  // (key, query)
    float const* const delta = smem_.delta[dout_.place] + L::first_column();
    CUTE_UNROLL
    for (int j = 0; j < columns; ++j) {
      float const of_query = shared_load<float>(delta + L::column_distance(j));
      CUTE_UNROLL
      for (int i = 0; i < L::rows_per_thread; ++i) ds(i, j) = p(i, j) * (ds(i, j) - of_query);
    }
  }

  /// Which of the thread's queries of a block see each of its keys, as bits.
  struct SeeingQueries {
    uint32_t of_key[L::rows_per_thread];
  };

  /// The same if they lie in memory.
  FLASHCUTE_DEVICE SeeingQueries load_seeing(AnnouncedQueries const& block) const {
    SeeingQueries seeing;
    Sequence const sequence = tile_.sequence(p_.forward, block.head);
    int const query = block.row0 + L::first_column(), key = tile_.row0 + warpgroup_ * warpgroup_rows;
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) seeing.of_key[i] = queries_seeing(key + L::row(i), query, sequence);
    return seeing;
  }

  FLASHCUTE_DEVICE static uint32_t queries_seeing(int key, int query, Sequence const& sequence) {
    return Mask::template queries_seeing<C.block_m>(key, query, sequence).template bits<L>(0);
  }

  /// Sets what a query does not see to 0: by selection, because it may be NaN. Bits that are not loaded are computed
  /// here: kept in between they would be registers.
  FLASHCUTE_DEVICE void hide(Scores& scores, AnnouncedQueries const& block, SeeingQueries const& loaded) const {
    auto s = by_row_and_column(scores);  // (key, query)
    Sequence const sequence = tile_.sequence(p_.forward, block.head);
    int const query = block.row0 + L::first_column(), key = tile_.row0 + warpgroup_ * warpgroup_rows;
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) {
      uint32_t const bits = is_loaded ? loaded.of_key[i] : queries_seeing(key + L::row(i), query, sequence);
      CUTE_UNROLL
      for (int j = 0; j < columns; ++j) {
        if (!(bits & 1u << j)) s(i, j) = 0.f;
      }
    }
  }

  /// Limits P to 1: where scores are large, their rounding errors can make it exceed 1.
  template <class Probabilities>
  FLASHCUTE_DEVICE static void hold_at_one(Probabilities& probabilities) {
    auto words = words_of(probabilities);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(words); ++i) words(i) = at_most_one<Element>(words(i));
  }

  // ---- dS and dQ through shared memory ---------------------------------------------------------------

  /// Writes dS to the warpgroup's page of its place: a row for each query, in the swizzle that WGMMA reads.
  template <class Ds>
  FLASHCUTE_DEVICE void store_ds(Ds const& ds) const {
    auto const words = words_of(ds);
    int const lane = thread_index() % 32, warp = thread_of_warpgroup() / 32;
    int const query = lane % 8 + (lane & 16) / 2;  // of 16
    int const piece = (2 * warp + lane / 8 % 2) ^ (query % 8);
    Element* const row = smem_.ds[ds_.place] + warpgroup_ * (C.block_m * L::page) + query * L::page + piece * 8;
    CUTE_UNROLL
    for (int i = 0; i < C.block_m / 16; ++i) {
      stmatrix_transposed(row + i * 16 * L::page, words(4 * i), words(4 * i + 1), words(4 * i + 2), words(4 * i + 3));
    }
  }

  /// Passes the warpgroup's half of a block's dQ on to the warp that adds it, and the place of its dS.
  FLASHCUTE_DEVICE void pass_on(Dq const& dq, bool exists) {
    barrier_wait(smem_.dq_empty[warpgroup_], dq_parity_ ^ 1);
    float* const to = smem_.dq[warpgroup_] + 4 * thread_of_warpgroup();
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dq); i += 4) {
      shared_store(to + i * warpgroup_size, float4{dq(i), dq(i + 1), dq(i + 2), dq(i + 3)});
    }
    publish_to_copies();
    meet();  // the warpgroup's dQ is in shared memory
    if (thread_of_warpgroup() == 0 && exists) barrier_arrive(smem_.dq_full[warpgroup_]);
    dq_parity_ ^= exists;
  }

  // ---- results ---------------------------------------------------------------------------------------

  FLASHCUTE_DEVICE void store() {
    auto const scale = static_cast<float>(p_.forward.scale);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dk_); ++i) dk_(i) *= scale;
    if constexpr (!Sequence::fills_tensors) {
      clear_absent(dk_);
      clear_absent(dv_);
    }
    store(dk_, p_.dk, p_.dk_stride, p_.forward.head_dim);
    store(dv_, p_.dv, p_.dv_stride, p_.forward.head_dim_v);
    if (Mask::rows_differ && smem_.dropped) {
      add_dropped(p_.dk, p_.dk_stride, p_.forward.q, p_.forward.q_stride, p_.forward.head_dim);
      add_dropped(p_.dv, p_.dv_stride, p_.dout, p_.dout_stride, p_.forward.head_dim_v);
    }
  }

  /// Gradients of keys that do not exist are 0.
  FLASHCUTE_DEVICE void clear_absent(Sums& sums) const {
    auto x = by_row_and_column(sums);  // (key, column)
    int const existing = tile_.existing(p_.forward) - warpgroup_ * warpgroup_rows;
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) {
      bool const exists = L::row(i) < existing;
      CUTE_UNROLL
      for (int j = 0; j < cute::size<1>(x); ++j) x(i, j) = exists ? x(i, j) : 0.f;
    }
  }

  FLASHCUTE_DEVICE void store(Sums const& sums, void* to, Strides const& stride, int columns) const {
    int const first = warpgroup_ * warpgroup_rows;
    auto const offset =
        row_offset(stride, tile_.entry.batch, tile_.kv_head, tile_.entry.first_key + tile_.row0 + first);
    store_rows<C.head_dim>(sums, static_cast<Element*>(to) + offset, stride.row, tile_.rows - first, columns);
  }

  /// Adds to the elements of a gradient that this thread has stored the non-finite values of Q or dO that were replaced
  /// by 0, where their queries see the key. Slow, but rare.
  FLASHCUTE_DEVICE void add_dropped(void* gradient, Strides const& stride, void const* queries, Strides const& from,
                                    int columns) const {
    ForwardParams const& f = p_.forward;
    int const group = f.heads / f.kv_heads, batch = tile_.entry.batch;
    RowRange const rows = Mask::query_range(tile_, f, C.block_m).rows(true, C.block_m, tile_.sequence(f));
    auto const* const all = static_cast<Element const*>(queries);
#pragma unroll 1
    for (int i = 0; i < L::rows_per_thread; ++i) {
      int const key = warpgroup_ * warpgroup_rows + L::row(i);
      if (key >= tile_.rows) continue;
      auto* const to = static_cast<Element*>(gradient) +
                       row_offset(stride, batch, tile_.kv_head, tile_.entry.first_key + tile_.row0 + key);
#pragma unroll 1
      for (int block = 8 * (thread_index() % 4); block < columns; block += 32) {
#pragma unroll 1
        for (int column = block; column < block + 8; ++column) {
          float sum = 0;
#pragma unroll 1
          for (int head = tile_.kv_head * group; head < (tile_.kv_head + 1) * group; ++head) {
#pragma unroll 1
            for (int query = rows.begin; query < rows.end; ++query) {
              auto const x = static_cast<float>(
                  global_load<Element>(all + row_offset(from, batch, head, tile_.entry.first_query + query) + column));
              if (!is_finite(x) && Mask::visible(query, tile_.row0 + key, tile_.sequence(f, head))) sum += x;
            }
          }
          if (sum == 0) continue;
          global_store(to + column, static_cast<Element>(static_cast<float>(global_load<Element>(to + column)) + sum));
        }
      }
    }
  }

  // ---- shared memory ---------------------------------------------------------------------------------

  /// The warpgroup's keys of K or V.
  FLASHCUTE_DEVICE Element* own(Element* keys) const { return keys + warpgroup_ * (warpgroup_rows * L::page); }
  /// dS as a left operand: its half of the queries, or all.
  FLASHCUTE_DEVICE InRing<Element> ds_ring(int place) const {
    return {smem_.ds[0] + (L::dq_by_rows ? warpgroup_ * (warpgroup_rows * L::page) : 0), place};
  }
  /// Its half of the columns of K, or all.
  FLASHCUTE_DEVICE Element* key_columns() const {
    return smem_.k + (L::dq_by_rows ? 0 : warpgroup_ * (C.block_n * L::dq_columns));
  }

  FLASHCUTE_DEVICE void meet() const { named_sync<warpgroup_size>(1 + warpgroup_); }
  FLASHCUTE_DEVICE static void arrive(Barrier& barrier) {
    if (thread_of_warpgroup() == 0) barrier_arrive(barrier);
  }

  static constexpr int columns = C.block_m / 4;                // queries of a thread
  static constexpr bool is_loaded = !Mask::Range::contiguous;  // whether memory says who sees whom

  BackwardParams const& p_;
  Storage& smem_;
  Tile const& tile_;
  int const warpgroup_;
  RingPosition<C.stages> q_;
  RingPosition<C.dout_stages> dout_;
  RingPosition<L::ds_places> ds_, ds_before_{L::ds_places - 1, 1};  // of this block and of the one before
  uint32_t dq_parity_ = 0;
  bool any_ = false;  // blocks before this one
  Sums dk_, dv_;
};

}  // namespace flashcute::sm90
