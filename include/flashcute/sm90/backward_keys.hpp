// The pass `keys` of Hopper's gradients of wide heads. A tile has 64 keys, and blocks of 64 queries pass by.
// The accumulators of dK and dV are too large for one warpgroup, so two share the products of a block:
//
//     the first     S^T = K Q^T      P = exp(S - LSE)        dV += P^T dO
//     the second    dP^T = V dO^T    dS = P * (dP - delta)   dK += dS^T Q
//
// P passes from the first to the second through shared memory, in fp32: thread t writes what thread t reads.
#pragma once

#include "flashcute/sm90/backward_loader.hpp"
#include "flashcute/sm90/key_rows.hpp"
#include "flashcute/sm90/split_layout.hpp"
#include "flashcute/sm90/transposed_scores.hpp"

namespace flashcute::sm90 {

template <BackwardConfig C>
struct KeysLayout : SplitLayout<C> {
  using typename SplitLayout<C>::Element;
  static constexpr int queries = SplitLayout<C>::tile_rows, keys = C.block_n;
  static_assert(keys == SplitLayout<C>::tile_rows);
  static constexpr int q_elements = queries * C.head_dim, dout_elements = queries * C.head_dim_v;
  static constexpr int k_elements = keys * C.head_dim, v_elements = keys * C.head_dim_v;
  static constexpr bool inspects_keys = false;  // no product sums over keys
  static constexpr int k_places = 1, p_places = 2;
  static constexpr int warps = 4;  // of a warpgroup

  struct SharedStorage {
    alignas(1024) Element k[k_places][k_elements];
    alignas(1024) Element v[v_elements];
    alignas(1024) Element q[C.stages][q_elements];
    alignas(1024) Element dout[C.dout_stages][dout_elements];
    alignas(128) float p[p_places][queries * keys];  // in the order in which threads hold it
    alignas(16) float lse[C.stages][queries];        // to base 2
    alignas(16) float delta[C.dout_stages][queries];
    AnnouncedQueries<bool> blocks[C.stages];
    Barrier k_full[k_places], k_empty[k_places], v_empty;
    Barrier q_full[C.stages], q_empty[C.stages];
    Barrier dout_full[C.dout_stages], dout_empty[C.dout_stages];
    Barrier p_full[p_places], p_empty[p_places];
    Barrier q_landed[C.stages], dout_landed[C.dout_stages];  // arrived, its inspection may begin
  };
  static_assert(sizeof(SharedStorage) <= sm90_keys_smem_bytes(C));

  /// `inspected`: whether a warp inspects what is loaded.
  FLASHCUTE_DEVICE static void init(SharedStorage& smem, bool inspected) {
    barrier_init(smem.k_full[0], 1);
    barrier_init(smem.k_empty[0], warps + (inspected ? 1 : 0));
    barrier_init(smem.v_empty, warps);
    for (int i = 0; i < C.stages; ++i) {
      barrier_init(smem.q_full[i], 1);
      barrier_init(smem.q_landed[i], 1);
      barrier_init(smem.q_empty[i], 2 * warps);
    }
    for (int i = 0; i < C.dout_stages; ++i) {
      barrier_init(smem.dout_full[i], 1);
      barrier_init(smem.dout_landed[i], 1);
      barrier_init(smem.dout_empty[i], 2 * warps);
    }
    for (int i = 0; i < p_places; ++i) {
      barrier_init(smem.p_full[i], warps);
      barrier_init(smem.p_empty[i], warps);
    }
  }
};

/// What both warpgroups have.
template <BackwardKernelId Id>
class KeysConsumer {
 protected:
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using L = KeysLayout<C>;
  using P = SplitProducts<C>;
  using Element = typename L::Element;
  using Storage = StorageWithTiles<L, typename Mask::Sequence>;
  using Scores = typename L::Scores;

  FLASHCUTE_DEVICE KeysConsumer(BackwardParams const& p, Storage& smem) : p_(p), smem_(smem), tiles_(smem) {}

  FLASHCUTE_DEVICE void hide(Scores& scores, AnnouncedQueries<bool> const& block) const {
    hide_unseen<L, Mask>(scores, block.row0 + L::first_column(), tiles_.tile().row0,
                         tiles_.tile().sequence(p_.forward, block.head));
  }

  /// The warp's arrival: all its lanes have done what they did before.
  FLASHCUTE_DEVICE static void arrive(Barrier& barrier) {
    reconverge();
    if (thread_index() % 32 == 0) barrier_arrive(barrier);
  }

  /// This thread's words of P in its place: float4 number i.
  FLASHCUTE_DEVICE float* words_of_p(int i) const {
    return smem_.p[passed_.place] + 4 * (i * warpgroup_size + thread_of_warpgroup());
  }

  template <int Columns, class Sums>
  FLASHCUTE_DEVICE void store(Sums const& sums, void* gradient, Strides const& stride, int columns, void const* queries,
                              Strides const& from) const {
    store_key_rows<Columns, Element>(sums, tiles_.tile(), 0, gradient, stride, columns);
    if (Mask::rows_differ && tiles_.announced().dropped) {
      add_dropped<L, Mask>(p_.forward, tiles_.tile(), 0, gradient, stride, queries, from, columns);
    }
  }

  /// Of keys that no query sees.
  FLASHCUTE_DEVICE void clear(void* gradient, Strides const& stride, int columns) const {
    clear_key_rows<warpgroup_size, Element>(tiles_.tile(), gradient, stride, columns, thread_of_warpgroup());
  }

  BackwardParams const& p_;
  Storage& smem_;
  TilesInTurn<Id, L> tiles_;
  RingPosition<C.stages> q_;
  RingPosition<C.dout_stages> dout_;
  RingPosition<L::p_places> passed_;  // of P
};

/// The first warpgroup. It multiplies dV of a block during the exponentials of the next one.
template <BackwardKernelId Id>
class DvConsumer : KeysConsumer<Id> {
  using Base = KeysConsumer<Id>;
  using Base::C, Base::p_, Base::smem_, Base::tiles_, Base::q_, Base::dout_, Base::passed_;
  using typename Base::L, typename Base::P, typename Base::Element, typename Base::Scores;

 public:
  FLASHCUTE_DEVICE DvConsumer(BackwardParams const& p, typename Base::Storage& smem) : Base(p, smem) {}

  FLASHCUTE_DEVICE void run() {
    tiles_.for_each([&] { compute(); },
                    [&] {
                      Base::clear(p_.dv, p_.dv_stride, p_.forward.head_dim_v);
                      Base::arrive(smem_.k_empty[0]);
                    });
  }

 private:
  /// Of a tile that some query sees.
  FLASHCUTE_DEVICE void compute() {
    cute::clear(weights_);
    cute::clear(dv_);
    blocks_ = 0;
    bool last;
    do {  // (of a loop that may end before its first iteration nvcc serialises all WGMMA)
      last = add_block();
    } while (!last);
    Base::arrive(smem_.k_empty[0]);
    begin_sums();
    finish_products<0>(dv_);
    Base::arrive(smem_.dout_empty[dout_.place]);
    dout_.advance();
    Base::template store<C.head_dim_v>(dv_, p_.dv, p_.dv_stride, p_.forward.head_dim_v, p_.dout, p_.dout_stride);
  }

  /// The next block; returns whether it was the last.
  FLASHCUTE_DEVICE bool add_block() {
    Scores s;
    barrier_wait(smem_.q_full[q_.place], q_.parity);
    P::template begin_scores<C.head_dim, C.stages>(s, smem_.k[0], {smem_.q[0], q_.place});
    begin_sums();
    auto const& block = smem_.blocks[q_.place];
    bool const partial = uniform(block.partial), last = uniform(block.last);
    finish_products<1>(s);
    to_probabilities<L>(s, StatisticsInMemory<L>(smem_.lse[q_.place] + L::first_column()), p_.forward.scale_log2);
    if (partial) Base::hide(s, block);
    barrier_wait(smem_.p_empty[passed_.place], passed_.parity ^ 1);
    pass_on(s);
    Base::arrive(smem_.q_empty[q_.place]);
    finish_products<0>(dv_);
    if (blocks_ > 0) Base::arrive(smem_.dout_empty[dout_.place]);
    weights_ = convert<Element>(s);
    hold_at_one<Element>(weights_);
    q_.advance();
    passed_.advance();
    if (blocks_ > 0) dout_.advance();
    ++blocks_;
    return last;
  }

  /// Begins dV += P^T dO of the block before. Before the first there is none: what is multiplied then is overwritten.
  FLASHCUTE_DEVICE void begin_sums() {
    barrier_wait_unless(blocks_ == 0, smem_.dout_full[dout_.place], dout_.parity);
    P::template begin_sums<C.head_dim_v, C.dout_stages>(dv_, weights_, {smem_.dout[0], dout_.place}, blocks_ <= 1);
  }

  FLASHCUTE_DEVICE void pass_on(Scores const& p) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(p); i += 4) {
      shared_store(Base::words_of_p(i / 4), float4{p(i), p(i + 1), p(i + 2), p(i + 3)});
    }
    Base::arrive(smem_.p_full[passed_.place]);
  }

  // `dout_` is that of the block before.
  int blocks_ = 0;  // of this tile that came before the present one
  typename L::Weights weights_;
  typename L::template Sums<C.head_dim_v> dv_;
};

/// The second warpgroup. It waits for dK of a block before it begins the next one, although the dO of that may have
/// arrived: a place of Q that is released late arrives late, and no product hides that.
template <BackwardKernelId Id>
class DkConsumer : KeysConsumer<Id> {
  using Base = KeysConsumer<Id>;
  using Base::C, Base::p_, Base::smem_, Base::tiles_, Base::q_, Base::dout_, Base::passed_;
  using typename Base::L, typename Base::P, typename Base::Element, typename Base::Scores;

 public:
  FLASHCUTE_DEVICE DkConsumer(BackwardParams const& p, typename Base::Storage& smem) : Base(p, smem) {}

  FLASHCUTE_DEVICE void run() {
    tiles_.for_each([&] { compute(); },
                    [&] {
                      Base::clear(p_.dk, p_.dk_stride, p_.forward.head_dim);
                      Base::arrive(smem_.v_empty);
                    });
  }

 private:
  FLASHCUTE_DEVICE void compute() {
    cute::clear(weights_);
    cute::clear(dk_);
    bool last;
    do {
      last = add_block();
    } while (!last);
    Base::arrive(smem_.v_empty);
    auto const scale = static_cast<float>(p_.forward.scale);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dk_); ++i) dk_(i) *= scale;
    Base::template store<C.head_dim>(dk_, p_.dk, p_.dk_stride, p_.forward.head_dim, p_.forward.q, p_.forward.q_stride);
  }

  FLASHCUTE_DEVICE bool add_block() {
    Scores dp, p;
    barrier_wait(smem_.dout_full[dout_.place], dout_.parity);
    P::template begin_scores<C.head_dim_v, C.dout_stages>(dp, smem_.v, {smem_.dout[0], dout_.place});
    barrier_wait(smem_.q_full[q_.place], q_.parity);
    auto const& block = smem_.blocks[q_.place];
    bool const partial = uniform(block.partial), last = uniform(block.last);
    barrier_wait(smem_.p_full[passed_.place], passed_.parity);
    take(p);
    Base::arrive(smem_.p_empty[passed_.place]);
    finish_products<0>(dp);
    to_score_gradients<L>(dp, p, StatisticsInMemory<L>(smem_.delta[dout_.place] + L::first_column()));
    Base::arrive(smem_.dout_empty[dout_.place]);
    if (partial) Base::hide(dp, block);
    weights_ = convert<Element>(dp);
    P::template begin_sums<C.head_dim, C.stages>(dk_, weights_, {smem_.q[0], q_.place});
    finish_products<0>(dk_);
    Base::arrive(smem_.q_empty[q_.place]);
    q_.advance();
    dout_.advance();
    passed_.advance();
    return last;
  }

  FLASHCUTE_DEVICE void take(Scores& p) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(p); i += 4) {
      auto const word = shared_load<float4>(Base::words_of_p(i / 4));
      p(i) = word.x, p(i + 1) = word.y, p(i + 2) = word.z, p(i + 3) = word.w;
    }
  }

  typename L::Weights weights_;
  typename L::template Sums<C.head_dim> dk_;
};

template <BackwardKernelId Id>
struct KeysPass {
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using L = KeysLayout<C>;
  using Storage = StorageWithTiles<L, typename Mask::Sequence>;
  static_assert(sizeof(Storage) <= sm90_keys_smem_bytes(C));

  FLASHCUTE_DEVICE static void run(Sm90BackwardParams const& p, Storage& smem_symbol) {
    Storage& smem = hidden(smem_symbol);
    if (thread_index() == 0) smem.init(Mask::rows_differ);
    block_sync();  // the mbarriers are initialised

    int const warpgroup = warpgroup_index();
    if (warpgroup == 0) {
      release_registers<serving_registers>();
      int const warp = warp_of_warpgroup();
      if (warp == 0) {
        if (elected_lane()) GradientLoader<Id, L>::run(p, smem);
      } else if (Mask::rows_differ && warp == 1) {
        GradientInspector<Id, L>::run(p.backward, smem);
      }
    } else {
      claim_registers<computing_registers>();
      if (warpgroup == 1) {
        DvConsumer<Id>{p.backward, smem}.run();
      } else {
        DkConsumer<Id>{p.backward, smem}.run();
      }
    }
  }
};

}  // namespace flashcute::sm90
