// FlashAttention forward on Hopper: one warp loads tiles with the copy engine, one to three warpgroups compute, each
// 64 query rows with asynchronous products. A thread block computes one tile of query rows of one head after another.
// Source: Shah et al., "FlashAttention-3", arXiv 2407.08608, algorithms 1 and 2.
#pragma once

#include "flashcute/block_counter.hpp"
#include "flashcute/sm90/gemm.hpp"
#include "flashcute/sm90/loader.hpp"
#include "flashcute/sm90/schedule.hpp"
#include "flashcute/sm90/store.hpp"
#include "flashcute/softmax.hpp"

namespace flashcute::sm90 {

template <ForwardKernelId Id>
struct ForwardPass {
  static constexpr ForwardConfig C = Id.config;
#define FLASHCUTE_RULE(id, sentence) static_assert(check(C, compiled_arch) != ForwardConfigError::id, sentence);
  FLASHCUTE_FORWARD_CONFIG_RULES(FLASHCUTE_RULE)
#undef FLASHCUTE_RULE

  using L = ForwardLayout<C>;
  using P = Products<C>;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Softmax = OnlineSoftmax<L::rows_per_thread, C.optimized_softmax, C.rescale_threshold>;
  using Counter = BlockCounter<Id.features.count_blocks>;
  using Storage = typename L::SharedStorage;
  static constexpr WarpgroupRegisters registers = registers_of(C);

  FLASHCUTE_DEVICE static void run(HopperForwardParams const& p, Storage& smem_symbol) {
    Storage& smem = hidden(smem_symbol);
    if (thread_index() == 0) Tiles<C>::init(smem);
    block_sync();  // the barriers are there

    // Before the registers change hands: it needs more than the loading warpgroup will have.
    if (Mask::empty_row(0, p.forward) && thread_index() < 32) store_empty_tiles(p.forward);

    // One if/else, each branch with its own number of registers: the compiler wants to see no more than that.
    int const warpgroup = warpgroup_index();
    if (warpgroup == 0) {
      release_registers<registers.loader>();
      if (warp_of_warpgroup() == 0 && elected_lane()) load(p, smem);
    } else {
      claim_registers<registers.consumer>();
      Consumer{p.forward, smem, warpgroup - 1}.run();
    }
  }

 private:
  FLASHCUTE_DEVICE static void load(HopperForwardParams const& p, Storage& smem) {
    Loader<C> loader{p, smem};
    TileSchedule<C> schedule{p.forward};
    for (QueryTile tile; schedule.next(tile);) {
      auto const range = Mask::kv_range(tile, p.forward, C.block_n);
      if (!range.empty()) loader.load(tile, range);
    }
    loader.finish();
  }

  /// Tiles that see no key are not announced. If the first row sees one, there are none.
  FLASHCUTE_DEVICE static void store_empty_tiles(ForwardParams const& p) {
    TileSchedule<C> schedule{p};
    for (QueryTile tile; schedule.next(tile);) {
      if (!Mask::kv_range(tile, p, C.block_n).empty()) continue;
      store_empty<C>(p, tile);
      store_counts(Counter{}, p, tile);
    }
  }

  /// By the first thread of those that call.
  FLASHCUTE_DEVICE static void store_counts(Counter const& counter, ForwardParams const& p, QueryTile const& tile) {
    if constexpr (Id.features.count_blocks) {
      if (thread_of_warpgroup() != 0) return;
      global_store(p.block_counts + tile.block_counts_offset(p, C.block_m), counter.counts(p, C.block_n));
    }
  }

  /// What becomes of a tile's rows.
  struct Sums {
    Softmax softmax;
    Counter counter;

    FLASHCUTE_DEVICE explicit Sums(ForwardParams const& p) : softmax(p) {}
  };

  /// A warpgroup that computes: 64 rows of every tile.
  class Consumer {
   public:
    FLASHCUTE_DEVICE Consumer(ForwardParams const& p, Storage& smem, int warpgroup)
        : p_(p), warpgroup_(warpgroup), tiles_(smem, warpgroup), turns_(warpgroup), sums_(p) {}

    FLASHCUTE_DEVICE void run() {
      if constexpr (C.overlap) {
        run_overlapped();
      } else {
        run_serially();
      }
    }

   private:
    /// One block of keys after the other.
    FLASHCUTE_DEVICE void run_serially() {
      while (next_tile()) {
        sums_ = Sums{p_};
        cute::clear(o_);
        for (int n = range_.end - 1; n >= range_.begin; --n) {
          auto* const q = tiles_.query();
          auto* const k = tiles_.key();
          turns_.wait();
          P::begin_scores(s_, q, k);  // S = Q K^T
          P::template finish<0>(s_);
          turns_.pass();
          release_operands(n);
          apply_mask(n);
          sums_.softmax.update(s_, o_);
          auto probabilities = P::probabilities(s_);
          tiles_.await_value();
          drop_nonfinite(n, false);
          P::begin_output(o_, probabilities, tiles_.arrived_value());  // O += P V
          P::template finish<0>(o_);
          tiles_.release_value();
        }
        store(0, sums_);
      }
    }

    /// The softmax of a block runs while P V of the block before is multiplied, also when that was the last of another
    /// tile.
    FLASHCUTE_DEVICE void run_overlapped() {
      if (!next_tile()) return;
      begin_first_scores();
      release_operands(range_.end - 1);
      apply_mask(range_.end - 1);
      auto probabilities = P::probabilities(s_);  // (MMA, MMA_M, MMA_N), of the operand's type
      auto next = cute::make_fragment_like(probabilities);
      first_softmax(next);
      tiles_.await_value();
      drop_nonfinite(range_.end - 1, false);
      while (true) {
        cute::clear(o_);
        replace(probabilities, next);
        int n = range_.end - 2;
        if constexpr (Mask::rows_differ) {
          for (; n >= max_of(range_.full_end, range_.begin); --n) attend<true>(n, probabilities, next);
        }
        for (; n >= range_.begin; --n) attend<false>(n, probabilities, next);
        Sums finished = sums_;
        if (!next_tile()) break;
        sums_ = Sums{p_};
        begin_products(probabilities);
        release_operands(range_.end - 1);
        apply_mask(range_.end - 1);
        first_softmax(next);
        finish_output<Mask::rows_differ>(range_.end - 1);
        store(1, finished);
      }
      P::begin_output(o_, probabilities, tiles_.arrived_value());
      P::template finish<0>(o_);
      tiles_.release_value();
      store(1, sums_);
    }

    /// The next block of a tile. Only some of a tile's last blocks are partial.
    template <bool Partial, class Probabilities>
    FLASHCUTE_DEVICE void attend(int n, Probabilities& probabilities, Probabilities& next) {
      begin_products(probabilities);
      release_operands(n);
      if constexpr (Partial) apply_mask(n);
      auto const correction = next_softmax(next);
      finish_output<Partial>(n);
      if (correction.any) Softmax::rescale(o_, correction);
      replace(probabilities, next);
    }

    FLASHCUTE_DEVICE void begin_first_scores() {
      auto* const q = tiles_.query();
      auto* const k = tiles_.key();
      turns_.wait();
      P::begin_scores(s_, q, k);
      turns_.pass();
      P::template finish<0>(s_);
    }

    // With stale maxima the scores stay, in case that their exponentials have to be done again, and probabilities are
    // made beside them; else in their place.

    template <class Probabilities>
    FLASHCUTE_DEVICE void first_softmax(Probabilities& next) {
      if constexpr (C.stale_max) {
        sums_.softmax.update_into(next, s_);
      } else {
        sums_.softmax.update(s_);
      }
    }

    template <class Probabilities>
    FLASHCUTE_DEVICE auto next_softmax(Probabilities& next) {
      if constexpr (C.stale_max) {
        return sums_.softmax.update_by_stale_max(next, s_);
      } else {
        return sums_.softmax.update(s_);
      }
    }

    template <class Probabilities>
    FLASHCUTE_DEVICE void replace(Probabilities& probabilities, Probabilities const& next) {
      if constexpr (C.stale_max) {
        P::move(next, probabilities);
      } else {
        probabilities = P::probabilities(s_);
      }
    }

    /// Begins S(n) = Q K(n)^T and O += P V of the block before, and waits for S.
    template <class Probabilities>
    FLASHCUTE_DEVICE void begin_products(Probabilities& probabilities) {
      auto* const q = tiles_.query();
      auto* const k = tiles_.key();
      turns_.wait();
      P::begin_scores(s_, q, k);
      P::begin_output(o_, probabilities, tiles_.arrived_value());
      turns_.pass();
      P::template finish<1>(s_);
    }

    /// While S(n) became probabilities, O += P V of the block before was multiplied; now it is done.
    template <bool Partial>
    FLASHCUTE_DEVICE void finish_output(int n) {
      // Waiting here, for V(n), which has arrived long ago, keeps the compiler from moving exponentials behind the
      // product.
      tiles_.await_value_after();
      if constexpr (Partial) drop_nonfinite(n, true);
      P::template finish<0>(o_);
      tiles_.release_value();
    }

    /// Before O += P V(n): a row that does not see a key multiplies its value by 0, and 0 * NaN is NaN.
    FLASHCUTE_DEVICE void drop_nonfinite(int n, bool after) {
      if (Mask::rows_differ && n >= range_.full_end) tiles_.drop_nonfinite(after);
    }

    /// S(n) is done: nobody reads K(n) any more, and Q if there are no more keys.
    FLASHCUTE_DEVICE void release_operands(int n) {
      sums_.counter.visit(n >= range_.full_end);
      tiles_.release_key();
      if (n == range_.begin) tiles_.release_query();
    }

    /// Goes on to the next tile. False if there are no more.
    FLASHCUTE_DEVICE bool next_tile() {
      Work const& work = tiles_.next();
      range_ = {uniform(work.range.begin), uniform(work.range.full_end), uniform(work.range.end)};
      return uniform(work.exists);
    }

    /// Scores of keys that a query does not see become -inf, by selection: what they were does not matter.
    FLASHCUTE_DEVICE void apply_mask(int n) {
      if (n < range_.full_end) return;
      auto s = by_row_and_column(s_);  // (row, column)
      int const key = n * C.block_n + L::first_column();
      int const row0 = tiles_.work(0).tile.row0;
      CUTE_UNROLL
      for (int i = 0; i < cute::size<0>(s); ++i) {
        auto const seen = Mask::from(row0 + row(i), key, p_);
        CUTE_UNROLL
        for (int j = 0; j < cute::size<1>(s); ++j) {
          if (!seen.at(L::column_distance(j))) s(i, j) = -infinity;
        }
      }
    }

    /// Writes the output of the tile, or of one `before`.
    FLASHCUTE_DEVICE void store(uint32_t before, Sums& sums) {
      Work const& work = tiles_.work(before);
      QueryTile const tile = work.tile;
      Softmax& softmax = sums.softmax;
      softmax.finish(o_, [&](int i) { return Mask::empty_row(tile.row0 + row(i), p_); });
      if (warpgroup_ == 0) store_counts(sums.counter, p_, tile);
      if (p_.lse != nullptr && thread_index() % 4 == 0) {  // one lane of the quad that shares a row
        float* const lse = static_cast<float*>(p_.lse) + tile.lse_offset(p_);
        CUTE_UNROLL
        for (int i = 0; i < L::rows_per_thread; ++i) {
          if (row(i) < tile.rows) global_store(lse + row(i), softmax.lse(i));
        }
      }
      store_output<C>(o_, p_, tile, warpgroup_);
      if (Mask::rows_differ && work.dropped) {
        int const end = min_of(work.range.end * C.block_n, p_.seqlen_k);
        add_dropped<C, Mask>(work.range.full_end * C.block_n, end, p_, tile, warpgroup_);
      }
      // Lanes whose rows do not exist were left behind. The compiler would take all that follows for code that lanes go
      // through apart, with addresses in registers of each.
      reconverge();
    }

    /// Tile row of the thread's i-th row.
    FLASHCUTE_DEVICE int row(int i) const { return warpgroup_ * warpgroup_rows + L::row(i); }

    using Scores = decltype(L::template accumulator<typename L::BlockN>());
    using Output = decltype(L::template accumulator<typename L::HeadDimV>());

    ForwardParams const& p_;
    int const warpgroup_;
    Tiles<C> tiles_;
    Turns<L::first_turn_barrier, L::warpgroups, C.pingpong> const turns_;
    KvRange range_;
    Sums sums_;
    Scores s_;  // (MMA, MMA_M, MMA_N)
    Output o_;  // (MMA, MMA_M, MMA_DV)
  };

  /// The same place, found in a way that the compiler does not see through: else it computes the address of every
  /// barrier and tile anew, each time, from a special register.
  FLASHCUTE_DEVICE static Storage& hidden(Storage& smem) {
    return *static_cast<Storage*>(__cvta_shared_to_generic(__shfl_sync(0xffffffffu, shared_address(&smem), 0)));
  }
};

}  // namespace flashcute::sm90
