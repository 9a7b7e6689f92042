// The warpgroups that compute Hopper's gradients: each owns 64 keys of the tile, whose dK and dV stay in its registers
// while blocks of Q and dO pass by. For each block
//
//     S^T = K Q^T    dP^T = V dO^T    P = exp(S - LSE)    dS = P * (dP - delta)
//     dV += P^T dO   dK += dS^T Q     dQ = dS K
//
// The products are asynchronous. `late_dq`: dQ of a block needs dS of both warpgroups. It is multiplied one iteration
// later, when the other's dS has long been there: so the two never wait for each other, and one computes exponentials
// while the other multiplies. With a second place for K, and more than one tile for a thread block, that of a tile's
// last block is multiplied in the next tile's first one.
//
// `early_reads`: instructions that read shared memory and products pass through one queue of a scheduler, in order.
// What is read once products were begun waits until the tensor cores have taken these, so it is read before.
#pragma once

#include "flashcute/sm90/backward_gemm.hpp"
#include "flashcute/sm90/key_rows.hpp"
#include "flashcute/sm90/key_tiles.hpp"
#include "flashcute/sm90/transposed_scores.hpp"

namespace flashcute::sm90 {

template <BackwardKernelId Id>
class GradientConsumer {
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Sequence = typename Mask::Sequence;
  using Tile = KeyTile<Sequence>;
  using L = BackwardLayout<C>;
  /// With blocks of 128 queries ptxas keeps more descriptors, and the kernels of bands and maps would spill.
  static constexpr bool long_steps =
      C.block_m == warpgroup_rows || Id.features.mask == MaskKind::full || Id.features.mask == MaskKind::causal;
  using P = BackwardProducts<C, long_steps>;
  using Element = typename L::Element;
  using Flag = typename L::Flag;
  using Storage = StorageWithTiles<L, Sequence>;
  using Scores = decltype(L::template accumulator<typename L::BlockM>());
  using Sums = decltype(L::template accumulator<typename L::HeadDim>());
  using Seeing = SeeingQueries<L, Mask>;
  /// Beside the bits of a map there are no registers for them.
  static constexpr bool reads_statistics_early = C.early_reads && !Seeing::in_memory;
  using Statistics = std_::conditional_t<reads_statistics_early, StatisticsInRegisters<L>, StatisticsInMemory<L>>;
  using Dq = decltype(L::template accumulator<typename L::DqColumns>());
  /// Whether the last dQ of a tile is multiplied in the first block of the next one, while K of both is there.
  static constexpr bool dq_outlives_tile = C.late_dq && L::k_places > 1 && is_persistent(Id);

 public:
  FLASHCUTE_DEVICE GradientConsumer(BackwardParams const& p, Storage& smem, int warpgroup)
      : p_(p), smem_(smem), warpgroup_(warpgroup), tiles_(smem) {}

  FLASHCUTE_DEVICE void run() {
    tiles_.for_each([&] { compute(); }, [&] { pass_over(); });
    if constexpr (dq_outlives_tile) add_late_dq();
  }

 private:
  /// Of a tile that no query sees.
  FLASHCUTE_DEVICE void pass_over() {
    constexpr int threads = 32 * C.num_warps;
    int const thread = thread_index() - warpgroup_size;
    clear_key_rows<threads, Element>(tile(), p_.dk, p_.dk_stride, p_.forward.head_dim, thread);
    clear_key_rows<threads, Element>(tile(), p_.dv, p_.dv_stride, p_.forward.head_dim_v, thread);
    if constexpr (dq_outlives_tile) add_late_dq();
    meet();  // before one thread arrives for the warpgroup
    arrive(smem_.v_empty);
    arrive(smem_.k_empty[tiles_.k_place()]);
  }

  /// Of a tile that some query sees.
  FLASHCUTE_DEVICE void compute() {
    cute::clear(dk_);
    cute::clear(dv_);
    if constexpr (!dq_outlives_tile) late_ = false;
    k_place_ = L::k_places > 1 ? uniform(tiles_.k_place()) : 0;
    first_key_ = uniform(tile().row0) + warpgroup_ * warpgroup_rows;
    if (PassingQueries<Id>::has_foreign_keys(p_, tile())) {
      barrier_wait(smem_.k_inspected[k_place_], tiles_.k_parity());
    }
    bool last;
    do {  // (of a loop that may end before its first iteration nvcc serialises all WGMMA)
      last = add_block();
    } while (!last);
    if constexpr (!C.late_dq) {
      arrive(smem_.k_empty[k_place_]);
    } else if constexpr (!dq_outlives_tile) {
      add_late_dq();
    }
    store();
  }

  /// The next block; returns whether it was the last.
  FLASHCUTE_DEVICE bool add_block() {
    Scores s, dp;
    int const late_k_place = dq_outlives_tile ? uniform(late_k_place_) : 0;
    auto const of_s = P::template operands_of_scores<C.stages>(own(smem_.k[k_place_]), {smem_.q[0], q_.place});
    barrier_wait(smem_.q_full[q_.place], q_.parity);
    auto const& block = smem_.blocks[q_.place];
    auto const partial_early = C.early_reads ? block.partial : Flag{}, last_early = C.early_reads ? block.last : Flag{};
    Statistics const lse(smem_.lse[q_.place] + first_query());
    P::begin_scores(s, of_s);
    auto const of_dp = P::template operands_of_scores<C.dout_stages>(own(smem_.v), {smem_.dout[0], dout_.place});
    barrier_wait(smem_.dout_full[dout_.place], dout_.parity);
    P::begin_scores(dp, of_dp);
    bool const partial = uniform(C.early_reads ? partial_early : block.partial);
    bool const last = uniform(C.early_reads ? last_early : block.last);
    Seeing seeing;
    if (Seeing::in_memory && partial)
      seeing.load(block.row0 + first_query(), first_key_, tile().sequence(p_.forward, block.head));
    finish_products<1>(s);
    Statistics const delta(smem_.delta[dout_.place] + first_query());
    to_probabilities<L>(s, lse, p_.forward.scale_log2);
    if (partial) hide(s, block, seeing);
    finish_products<0>(dp);
    to_score_gradients<L>(dp, s, delta);
    if (partial) hide(dp, block, seeing);
    // P is rounded after dS, which takes it in fp32: rounded before, both would be in registers at once.
    auto ds = convert<Element>(dp);
    auto probabilities = convert<Element>(s);
    hold_at_one<Element>(probabilities);
    barrier_wait(smem_.ds_empty[ds_.place], ds_.parity ^ 1);
    store_ds(ds);
    publish_to_products();
    P::template begin_sums<C.dout_stages>(dv_, probabilities, {smem_.dout[0], dout_.place});
    // With late_dq that of the block before this one. If none is late, dS and K are of others, which the other
    // warpgroup or the copy engine may be writing: the result is discarded.
    auto const of_dq = C.late_dq ? operands_of_dq(ds_.before(), late_k_place) : operands_of_dq(ds_, k_place_);
    meet();  // the warpgroup's dS is in shared memory
    arrive(smem_.ds_full[ds_.place]);

    Dq dq;
    begin_dq(dq, C.late_dq ? ds_.before() : ds_, of_dq);
    P::template begin_sums<C.stages>(dk_, ds, {smem_.q[0], q_.place});
    finish_products<2>(dv_);
    arrive(smem_.dout_empty[dout_.place]);
    if (last) arrive(smem_.v_empty);
    finish_products<1>(dq);
    if (dq_outlives_tile && late_ && late_k_place != k_place_) arrive(smem_.k_empty[late_k_place]);
    // Before the first block there is none: what was multiplied is nothing.
    pass_on(dq, !C.late_dq || late_);
    finish_products<0>(dk_);
    arrive(smem_.q_empty[q_.place]);
    late_ = true;
    late_k_place_ = k_place_;
    q_.advance();
    dout_.advance();
    ds_.advance();
    return last;
  }

  /// What is late when no block follows.
  FLASHCUTE_DEVICE void add_late_dq() {
    if (!late_) return;
    Dq dq;
    int const k_place = uniform(late_k_place_);
    begin_dq(dq, ds_.before(), operands_of_dq(ds_.before(), k_place));
    finish_products<0>(dq);
    arrive(smem_.k_empty[k_place]);
    pass_on(dq, true);
    late_ = false;
  }

  FLASHCUTE_DEVICE auto operands_of_dq(RingPosition<L::ds_places> const& ds, int k_place) const {
    return P::operands_of_dq(ds_ring(ds.place), key_columns(k_place));
  }

  /// Waits for the dS of both warpgroups.
  template <class Operands>
  FLASHCUTE_DEVICE void begin_dq(Dq& dq, RingPosition<L::ds_places> const& ds, Operands const& of) const {
    barrier_wait(smem_.ds_full[ds.place], ds.parity);
    P::begin_dq(dq, of);
  }

  FLASHCUTE_DEVICE void hide(Scores& scores, AnnouncedQueries<Flag> const& block, Seeing const& seeing) const {
    hide_unseen<L, Mask>(scores, block.row0 + first_query(), first_key_, tile().sequence(p_.forward, block.head),
                         seeing);
  }

  /// The thread's first query of a block. Of a signed number: nvcc 13.0 keeps it in a register. That of an unsigned one
  /// it computes anew for each block, before the reads for which the block's first product waits. But beside the bits
  /// of a map that register would be spilled.
  FLASHCUTE_DEVICE static int first_query() { return Seeing::in_memory ? L::first_column() : 2 * (thread_index() % 4); }

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
    barrier_wait(smem_.dq_empty[warpgroup_], dq_parity() ^ 1);
    float* const to = smem_.dq[warpgroup_] + 4 * thread_of_warpgroup();
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dq); i += 4) {
      shared_store(to + i * warpgroup_size, float4{dq(i), dq(i + 1), dq(i + 2), dq(i + 3)});
    }
    publish_to_copies();
    meet();  // the warpgroup's dQ is in shared memory
    if (thread_of_warpgroup() == 0 && exists) barrier_arrive(smem_.dq_full[warpgroup_]);
  }

  /// One dQ is passed on for each block; with `late_dq` that of the block before has not been. What is discarded where
  /// none is late is written too, so it waits until the last one was added.
  FLASHCUTE_DEVICE uint32_t dq_parity() const {
    static_assert(L::ds_places == 2);
    return ds_.place ^ (C.late_dq && late_ ? 1 : 0);
  }

  // ---- results ---------------------------------------------------------------------------------------

  FLASHCUTE_DEVICE void store() {
    auto const scale = static_cast<float>(p_.forward.scale);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dk_); ++i) dk_(i) *= scale;
    if constexpr (!Sequence::fills_tensors) {
      clear_absent<L>(dk_, p_.forward, tile(), warpgroup_);
      clear_absent<L>(dv_, p_.forward, tile(), warpgroup_);
    }
    store(dk_, p_.dk, p_.dk_stride, p_.forward.head_dim);
    store(dv_, p_.dv, p_.dv_stride, p_.forward.head_dim_v);
    if (Mask::rows_differ && tiles_.announced().dropped) {
      add_dropped(p_.dk, p_.dk_stride, p_.forward.q, p_.forward.q_stride, p_.forward.head_dim);
      add_dropped(p_.dv, p_.dv_stride, p_.dout, p_.dout_stride, p_.forward.head_dim_v);
    }
  }

  FLASHCUTE_DEVICE void store(Sums const& sums, void* to, Strides const& stride, int columns) const {
    store_key_rows<C.head_dim, Element>(sums, tile(), warpgroup_, to, stride, columns);
  }

  FLASHCUTE_DEVICE void add_dropped(void* gradient, Strides const& stride, void const* queries, Strides const& from,
                                    int columns) const {
    sm90::add_dropped<L, Mask>(p_.forward, tile(), warpgroup_, gradient, stride, queries, from, columns);
  }

  FLASHCUTE_DEVICE Tile const& tile() const { return tiles_.tile(); }

  // ---- shared memory ---------------------------------------------------------------------------------

  /// The warpgroup's keys of K or V.
  FLASHCUTE_DEVICE Element* own(Element* keys) const { return keys + warpgroup_ * (warpgroup_rows * L::page); }
  /// dS as a left operand: its half of the queries, or all.
  FLASHCUTE_DEVICE InRing<Element> ds_ring(int place) const {
    return {smem_.ds[0] + (L::dq_by_rows ? warpgroup_ * (warpgroup_rows * L::page) : 0), place};
  }
  /// Its half of the columns of K, or all.
  FLASHCUTE_DEVICE Element* key_columns(int place) const {
    return smem_.k[place] + (L::dq_by_rows ? 0 : warpgroup_ * (C.block_n * L::dq_columns));
  }

  FLASHCUTE_DEVICE void meet() const { named_sync<warpgroup_size>(1 + warpgroup_); }
  FLASHCUTE_DEVICE static void arrive(Barrier& barrier) {
    if (thread_of_warpgroup() == 0) barrier_arrive(barrier);
  }

  BackwardParams const& p_;
  Storage& smem_;
  int const warpgroup_;
  TilesInTurn<Id, L> tiles_;
  RingPosition<C.stages> q_;
  RingPosition<C.dout_stages> dout_;
  RingPosition<L::ds_places> ds_;
  bool late_ = false;                   // whether dQ of the block before the present one has still to be multiplied
  int k_place_ = 0, late_k_place_ = 0;  // of this tile's K, and of that of the block before
  int first_key_ = 0;                   // of the warpgroup
  Sums dk_, dv_;
};

}  // namespace flashcute::sm90
