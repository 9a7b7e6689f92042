// The pass `keys` of Hopper's gradients of wide heads. A thread block owns 64 keys, and blocks of 64 queries pass by.
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
  static constexpr int p_places = 2;
  static constexpr int warps = 4;  // of a warpgroup

  struct SharedStorage {
    alignas(1024) Element k[k_elements];
    alignas(1024) Element v[v_elements];
    alignas(1024) Element q[C.stages][q_elements];
    alignas(1024) Element dout[C.dout_stages][dout_elements];
    alignas(128) float p[p_places][queries * keys];  // in the order in which threads hold it
    alignas(16) float lse[C.stages][queries];        // to base 2
    alignas(16) float delta[C.dout_stages][queries];
    AnnouncedQueries blocks[C.stages];
    Barrier k_full;
    Barrier q_full[C.stages], q_empty[C.stages];
    Barrier dout_full[C.dout_stages], dout_empty[C.dout_stages];
    Barrier p_full[p_places], p_empty[p_places];
    Barrier q_landed[C.stages], dout_landed[C.dout_stages];  // arrived, its inspection may begin
    bool dropped;  // whether non-finite values were replaced by 0 in a partial block of Q or dO
  };
  static_assert(sizeof(SharedStorage) <= sm90_keys_smem_bytes(C));

  /// Initialises the mbarriers. One thread calls it, before all others synchronise with it.
  FLASHCUTE_DEVICE static void init(SharedStorage& smem) {
    barrier_init(smem.k_full, 1);
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
    smem.dropped = false;
    publish_barriers();
  }
};

/// What both warpgroups have.
template <BackwardKernelId Id>
class KeysConsumer {
 protected:
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = KeyTile<typename Mask::Sequence>;
  using L = KeysLayout<C>;
  using P = SplitProducts<C>;
  using Element = typename L::Element;
  using Storage = typename L::SharedStorage;
  using Scores = typename L::Scores;

  FLASHCUTE_DEVICE KeysConsumer(BackwardParams const& p, Storage& smem, Tile const& tile)
      : p_(p), smem_(smem), tile_(tile) {}

  FLASHCUTE_DEVICE void hide(Scores& scores, AnnouncedQueries const& block) const {
    hide_unseen<L, Mask>(scores, block, tile_.row0, tile_.sequence(p_.forward, block.head));
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
    store_key_rows<Columns, Element>(sums, tile_, 0, gradient, stride, columns);
    if (Mask::rows_differ && smem_.dropped) {
      add_dropped<L, Mask>(p_.forward, tile_, 0, gradient, stride, queries, from, columns);
    }
  }

  BackwardParams const& p_;
  Storage& smem_;
  Tile const& tile_;
  RingPosition<C.stages> q_;
  RingPosition<C.dout_stages> dout_;
  RingPosition<L::p_places> passed_;  // of P
};

/// The first warpgroup. It multiplies dV of a block during the exponentials of the next one.
template <BackwardKernelId Id>
class DvConsumer : KeysConsumer<Id> {
  using Base = KeysConsumer<Id>;
  using Base::C, Base::p_, Base::smem_, Base::q_, Base::dout_, Base::passed_;
  using typename Base::L, typename Base::P, typename Base::Element, typename Base::Scores;

 public:
  FLASHCUTE_DEVICE DvConsumer(BackwardParams const& p, typename Base::Storage& smem, typename Base::Tile const& tile)
      : Base(p, smem, tile) {
    cute::clear(weights_);
    cute::clear(dv_);
  }

  /// Of a tile that some query sees.
  FLASHCUTE_DEVICE void run() {
    barrier_wait(smem_.k_full, 0);
    bool last;
    do {  // (of a loop that may end before its first iteration nvcc serialises all WGMMA)
      last = add_block();
    } while (!last);
    begin_sums();
    finish_products<0>(dv_);
    Base::template store<C.head_dim_v>(dv_, p_.dv, p_.dv_stride, p_.forward.head_dim_v, p_.dout, p_.dout_stride);
  }

 private:
  /// The next block; returns whether it was the last.
  FLASHCUTE_DEVICE bool add_block() {
    Scores s;
    barrier_wait(smem_.q_full[q_.place], q_.parity);
    P::template begin_scores<C.head_dim, C.stages>(s, smem_.k, {smem_.q[0], q_.place});
    begin_sums();
    AnnouncedQueries const& block = smem_.blocks[q_.place];
    bool const partial = uniform(block.partial), last = uniform(block.last);
    finish_products<1>(s);
    to_probabilities<L>(s, StatisticsInMemory<L>(smem_.lse[q_.place]), p_.forward.scale_log2);
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
  int blocks_ = 0;  // before this one
  typename L::Weights weights_;
  typename L::template Sums<C.head_dim_v> dv_;
};

/// The second warpgroup. It waits for dK of a block before it begins the next one, although the dO of that may have
/// arrived: a place of Q that is released late arrives late, and no product hides that.
template <BackwardKernelId Id>
class DkConsumer : KeysConsumer<Id> {
  using Base = KeysConsumer<Id>;
  using Base::C, Base::p_, Base::smem_, Base::q_, Base::dout_, Base::passed_;
  using typename Base::L, typename Base::P, typename Base::Element, typename Base::Scores;

 public:
  FLASHCUTE_DEVICE DkConsumer(BackwardParams const& p, typename Base::Storage& smem, typename Base::Tile const& tile)
      : Base(p, smem, tile) {
    cute::clear(weights_);
    cute::clear(dk_);
  }

  FLASHCUTE_DEVICE void run() {
    bool last;
    do {
      last = add_block();
    } while (!last);
    auto const scale = static_cast<float>(p_.forward.scale);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dk_); ++i) dk_(i) *= scale;
    Base::template store<C.head_dim>(dk_, p_.dk, p_.dk_stride, p_.forward.head_dim, p_.forward.q, p_.forward.q_stride);
  }

 private:
  FLASHCUTE_DEVICE bool add_block() {
    Scores dp, p;
    barrier_wait(smem_.dout_full[dout_.place], dout_.parity);
    P::template begin_scores<C.head_dim_v, C.dout_stages>(dp, smem_.v, {smem_.dout[0], dout_.place});
    barrier_wait(smem_.q_full[q_.place], q_.parity);
    AnnouncedQueries const& block = smem_.blocks[q_.place];
    bool const partial = uniform(block.partial), last = uniform(block.last);
    barrier_wait(smem_.p_full[passed_.place], passed_.parity);
    take(p);
    Base::arrive(smem_.p_empty[passed_.place]);
    finish_products<0>(dp);
    to_score_gradients<L>(dp, p, StatisticsInMemory<L>(smem_.delta[dout_.place]));
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
  using Tile = KeyTile<typename Mask::Sequence>;
  using L = KeysLayout<C>;
  using Storage = typename L::SharedStorage;
  static constexpr int threads = num_threads(Id);

  /// The tile of a thread block.
  template <class AnyTile>
  FLASHCUTE_HD static AnyTile tile_of(ForwardParams const& p, uint32_t block) {
    return AnyTile::at(p, block, C.block_n, sizeof(typename L::Element));
  }

  FLASHCUTE_DEVICE static void run(Sm90BackwardParams const& p, Storage& smem_symbol) {
    Storage& smem = hidden(smem_symbol);
    if (thread_index() == 0) L::init(smem);
    auto const tile = tile_of<Tile>(p.backward.forward, block_index());
    if (PassingQueries<Id, L::queries>::none(p.backward, tile)) {
      return store_nothing<threads, typename L::Element>(p.backward, tile);
    }
    block_sync();  // the mbarriers are initialised

    int const warpgroup = warpgroup_index();
    if (warpgroup == 0) {
      release_registers<serving_registers>();
      int const warp = warp_of_warpgroup();
      if (warp == 0) {
        if (elected_lane()) GradientLoader<Id, L>::run(p, smem, tile);
      } else if (Mask::rows_differ && warp == 1) {
        GradientInspector<Id, L>::run(p.backward, smem, tile);
      }
    } else {
      claim_registers<computing_registers>();
      if (warpgroup == 1) {
        DvConsumer<Id>{p.backward, smem, tile}.run();
      } else {
        DkConsumer<Id>{p.backward, smem, tile}.run();
      }
    }
  }
};

}  // namespace flashcute::sm90
