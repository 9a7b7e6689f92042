// The consumer warpgroups of Hopper's forward: each computes 64 query rows of every tile of its thread block. Its
// products are asynchronous (WGMMA); the options of the configuration say which work overlaps which product.
#pragma once

#include "flashcute/device/apply.hpp"
#include "flashcute/device/softmax.hpp"
#include "flashcute/policy/block_counter.hpp"
#include "flashcute/sm90/gemm.hpp"
#include "flashcute/sm90/pipeline.hpp"
#include "flashcute/sm90/store.hpp"

namespace flashcute::sm90 {

/// Stores how the tile treated its blocks of keys, if the kernel counts them.
template <ForwardKernelId Id, class Tile>
FLASHCUTE_DEVICE void store_counts(BlockCounter<Id.features.count_blocks> const& counter, ForwardParams const& p,
                                   Tile const& tile) {
  if constexpr (Id.features.count_blocks) {
    global_store(p.block_counts + tile.block_counts_offset(p, tile_rows(Id.config)),
                 counter.counts(tile.sequence(p), Id.config.block_n));
  }
}

/// As a range of blocks, where blocks do not follow each other: those that the loading warp announces, of which the
/// warpgroup knows the one that it has waited for last. Numbers of blocks are only asked for whether there is one.
class AwaitedBlocks {
 public:
  static constexpr bool contiguous = false;

  AwaitedBlocks() = default;
  /// Of a tile that has any, or none.
  FLASHCUTE_DEVICE AwaitedBlocks(bool any) : any_(any) {}

  FLASHCUTE_DEVICE void set(AnnouncedBlock const& block) {
    number_ = uniform(block.number);
    full_after_ = uniform(block.full_after);
    partial_ = uniform(block.partial);
    last_ = uniform(block.last);
  }

  FLASHCUTE_DEVICE int first() const { return any_ ? 0 : -1; }
  FLASHCUTE_DEVICE int next(int) const { return last_ ? -1 : 0; }
  FLASHCUTE_DEVICE int left(int n) const { return n + 1; }
  FLASHCUTE_DEVICE bool is_last(int) const { return last_; }
  FLASHCUTE_DEVICE bool is_partial(int) const { return partial_; }
  FLASHCUTE_DEVICE int number(int) const { return number_; }
  /// How many full blocks come next, if the last one that was waited for is not among them, and if it is.
  FLASHCUTE_DEVICE int full_left(int) const { return full_after_; }
  FLASHCUTE_DEVICE int full_left_from(int) const { return full_after_ + 1; }

  static constexpr int full_end = std_::numeric_limits<int>::max(), begin = 0, end = 0;

 private:
  int number_, full_after_;
  bool any_, partial_, last_;
};

/// One consumer warpgroup.
template <ForwardKernelId Id>
class Consumer {
  static constexpr ForwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Range = std_::conditional_t<Mask::Range::contiguous, typename Mask::Range, AwaitedBlocks>;
  using Tile = QueryTile<typename Mask::Sequence>;
  using L = ForwardLayout<C, Mask>;
  using P = Products<C>;
  using Softmax =
      OnlineSoftmax<L::rows_per_thread, C.optimized_softmax, C.rescale_threshold, takes_sink(Id.features.mask)>;
  using Storage = typename L::SharedStorage;

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
  /// The running results of a tile's rows beside the output.
  struct Sums {
    Softmax softmax;
    BlockCounter<Id.features.count_blocks> counter;

    FLASHCUTE_DEVICE explicit Sums(ForwardParams const& p) : softmax(p) {}
  };

  // attend_pairs takes two blocks per iteration, which saves copying the probabilities between registers but is more
  // code: only for tiles with more blocks left than this (docs/kernels/sm90_forward.md).
  static constexpr int pairs_from = L::warpgroups < 3 || C.scores_ahead ? 4 : 12;

  using Scores = decltype(L::template accumulator<typename L::BlockN>());
  using Output = decltype(L::template accumulator<typename L::HeadDimV>());
  using Probabilities = decltype(P::probabilities(Scores{}));

  /// One block of keys after the other.
  FLASHCUTE_DEVICE void run_serially() {
    while (next_tile()) {
      if (!attends_) {
        skip_tile();
        continue;
      }
      sums_ = Sums{p_};
      skip_keys();
      skip_values(skipped_);
      fresh_ = true;
      for (int n = range_.first(); range_.left(n) > 0; n = range_.next(n)) {
        begin_scores(s_);
        P::template finish<0>(s_);
        scores_ready(n, s_);
        sums_.softmax.update(s_, o_);
        auto probabilities = P::probabilities(s_);
        tiles_.await_value();
        begin_output(probabilities);  // O += P V
        P::template finish<0>(o_);
        tiles_.release_value();
      }
      for (int n = range_.begin - 1; n >= range_.begin - left_over(); --n) {
        skip_key(n);
        skip_value();
      }
      store(0, sums_);
    }
  }

  /// The softmax of a block overlaps P V of the block before, also when that block was the last of the previous tile.
  FLASHCUTE_DEVICE void run_overlapped() {
    Probabilities probabilities, next;
    bool any = next_tile();
    while (uniform(any)) {
      if (!uniform(attends_)) {
        skip_tile();
        any = next_tile();
        continue;
      }
      sums_ = Sums{p_};
      skip_keys();
      begin_scores(s_);
      P::template finish<0>(s_);
      Sums finished = sums_;
      int due = 0;  // whether the output of the tile before is still to be written
      while (true) {
        first_softmax(next);
        skip_values(skipped_);
        if constexpr (!C.late_store) await_first_value();
        replace(probabilities, next);
        int n = range_.next(range_.first());
        if constexpr (C.late_store) {
          if (range_.left(n) > 0) {
            attend_second<Mask::rows_differ>(n, probabilities, next, [&] { store_if(due, finished); });
            replace(probabilities, next);
            n = range_.next(n);
          } else {
            store_if(due, finished);
            await_first_value();
          }
        }
        for (; range_.left(n) > 0; n = range_.next(n)) {
          if (C.stale_max && n < range_.full_end && range_.full_left(n) > pairs_from) {
            n = attend_pairs(n, probabilities, next);
            if (range_.left(n) <= 0) break;
          }
          attend<Mask::rows_differ>(n, probabilities, next);
          replace(probabilities, next);
        }
        // The last product needs no Q: meanwhile the next tile's Q arrives, and its first scores are multiplied while
        // the output is written. If there is no next tile, or this warpgroup has no rows in it, they are multiplied too
        // and discarded: with a branch around them nvcc would serialise all WGMMA of the loop. In that case they read a
        // stage of the ring without having waited for it: a TMA copy of the next tile's keys to it may be in flight.
        int const left_over = this->left_over();
        skip_keys_after(left_over);
        finished = sums_;
        P::begin_output(o_, probabilities, tiles_.arrived_value(), fresh_);
        any = next_tile();
        int const goes_on = opaque(attends_);
        sums_ = Sums{p_};
        if (goes_on != 0) {
          skip_keys();
          await_key();
          turns_.wait();
        }
        P::begin_scores(s_, tiles_.query(), tiles_.arrived_key());
        if (goes_on != 0) turns_.pass();
        P::template finish<1>(o_);
        tiles_.release_value();
        skip_values(left_over);
        due = C.late_store ? goes_on : 0;
        if (!C.late_store || goes_on == 0) store(1, finished);
        P::template finish<0>(s_);
        if (goes_on == 0) break;
      }
    }
  }

  FLASHCUTE_DEVICE void await_first_value() {
    tiles_.await_value();
    fresh_ = true;
  }

  /// Writes the output of the tile before, if it is `due`.
  FLASHCUTE_DEVICE void store_if(int due, Sums& finished) {
    if (due != 0) store(1, finished);
  }

  /// As `attend` for the second block of a tile: `meanwhile` runs while its scores are multiplied, before the product
  /// that overwrites the output of the tile before.
  template <bool Partial, class Meanwhile>
  FLASHCUTE_DEVICE void attend_second(int n, Probabilities& probabilities, Probabilities& next,
                                      Meanwhile const& meanwhile) {
    begin_scores(s_);
    meanwhile();
    await_first_value();
    begin_output(probabilities);
    finish_attend<Partial>(n, next);
  }

  /// The next block of a tile: O += P V with the probabilities of the block before, while the softmax writes those of
  /// this block to `next`.
  template <bool Partial>
  FLASHCUTE_DEVICE void attend(int n, Probabilities& probabilities, Probabilities& next) {
    begin_products(probabilities);
    finish_attend<Partial>(n, next);
  }

  /// The rest, after both products have begun.
  template <bool Partial>
  FLASHCUTE_DEVICE void finish_attend(int n, Probabilities& next) {
    tiles_.look_for_value_after();
    tiles_.look_for_key_after();
    P::template finish<1>(s_);
    scores_ready<Partial>(n, s_);
    auto const correction = next_softmax(next);
    // The next V arrived long ago. Waiting for it here keeps the compiler from moving exponentials behind the wait for
    // the product.
    tiles_.await_value_after();
    finish_block(correction);
  }

  /// Visits blocks n, n - 1, ..., two at a time, until at most one is left; returns the number of the next.
  FLASHCUTE_DEVICE int attend_pairs(int n, Probabilities& probabilities, Probabilities& next) {
    if constexpr (C.scores_ahead) {
      Scores even, odd;
      begin_scores(even);
      P::template finish<0>(even);
      scores_ready<false>(n, even);
      do {
        attend_ahead(n, even, odd, probabilities, next);
        n = range_.next(n);
        attend_ahead(n, odd, even, next, probabilities);
        n = range_.next(n);
      } while (range_.full_left_from(n) > 2);
      begin_output(probabilities);
      auto const correction = sums_.softmax.update_by_stale_max(next, even);
      tiles_.await_value_after();
      finish_block(correction);
      P::move(next, probabilities);
      return range_.next(n);
    } else {
      do {
        attend<false>(n, probabilities, next);
        n = range_.next(n);
        attend<false>(n, next, probabilities);
        n = range_.next(n);
      } while (range_.full_left(n) > 1);
      return n;
    }
  }

  /// As `attend`, but this block's scores are ready; those of the next block are multiplied during the softmax.
  FLASHCUTE_DEVICE void attend_ahead(int n, Scores const& scores, Scores& after, Probabilities& probabilities,
                                     Probabilities& next) {
    await_key();
    tiles_.look_for_value_after();
    turns_.wait();
    P::begin_scores(after, tiles_.query(), tiles_.arrived_key());
    begin_output(probabilities);
    turns_.pass();
    // Without hold_until the compiler computes exponentials before it begins the products.
    sums_.softmax.hold_until([&](auto& maxima) { tiles_.await_value_after(maxima); });
    tiles_.look_for_key_after();
    auto const correction = sums_.softmax.update_by_stale_max(next, scores);
    finish_block(correction, after);
    scores_ready<false>(range_.next(n), after);
  }

  // With stale_max the scores are kept, because their exponentials may have to be computed again, and probabilities go
  // to other registers; without it they overwrite the scores.

  FLASHCUTE_DEVICE void first_softmax(Probabilities& next) {
    // The same as a call of scores_ready, with which nvcc 13.0 orders instructions differently.
    release_operands(range_.first());
    apply(range_.first(), s_);
    if constexpr (C.stale_max) {
      sums_.softmax.update_into(next, s_);
    } else {
      sums_.softmax.update(s_);
    }
  }

  FLASHCUTE_DEVICE auto next_softmax(Probabilities& next) {
    if constexpr (C.stale_max) {
      return sums_.softmax.update_by_stale_max(next, s_);
    } else {
      return sums_.softmax.update(s_);
    }
  }

  /// Makes the latest probabilities the operand of the next product.
  FLASHCUTE_DEVICE void replace(Probabilities& probabilities, Probabilities const& next) {
    if constexpr (C.stale_max) {
      P::move(next, probabilities);
    } else {
      probabilities = P::probabilities(s_);
    }
  }

  /// Waits for the next K.
  FLASHCUTE_DEVICE void await_key() {
    tiles_.await_key();
    if constexpr (!Range::contiguous) range_.set(tiles_.key_block());
  }

  /// Begins S = Q K^T with the next K.
  FLASHCUTE_DEVICE void begin_scores(Scores& s) {
    await_key();
    turns_.wait();
    P::begin_scores(s, tiles_.query(), tiles_.arrived_key());
    turns_.pass();
  }

  /// Begins S(n) = Q K(n)^T and O += P V of the block before.
  FLASHCUTE_DEVICE void begin_products(Probabilities& probabilities) {
    await_key();
    turns_.wait();
    P::begin_scores(s_, tiles_.query(), tiles_.arrived_key());
    begin_output(probabilities);
    turns_.pass();
  }

  FLASHCUTE_DEVICE void begin_output(Probabilities& probabilities) {
    P::begin_output(o_, probabilities, tiles_.arrived_value(), fresh_);
    fresh_ = false;
  }

  /// Waits for O += P V of the block before, which overlapped the softmax of S(n), and rescales O.
  template <class... Ahead>
  FLASHCUTE_DEVICE void finish_block(typename Softmax::Correction const& correction, Ahead&... ahead) {
    P::template finish<0>(o_, ahead...);
    tiles_.release_value();
    if (correction.any) Softmax::rescale(o_, correction);
  }

  /// After the product S(n) is done, before the softmax: releases its operands and masks its scores.
  template <bool MayBePartial = true>
  FLASHCUTE_DEVICE void scores_ready(int n, Scores& s) {
    release_operands(n);
    if constexpr (MayBePartial) apply(n, s);
  }

  /// No product reads K(n) any more, nor Q after the last block.
  FLASHCUTE_DEVICE void release_operands(int n) {
    count_block(n);
    tiles_.release_key();
    if (range_.is_last(n)) tiles_.release_query();
  }

  /// Masks the scores of a partial block.
  FLASHCUTE_DEVICE void apply(int n, Scores& s) {
    if (!range_.is_partial(n)) return;
    Tile const& rows = tiles_.work(0).rows;
    int const key = range_.number(n) * C.block_n + L::first_column(), row0 = rows.row0;
    flashcute::apply_mask<L, Mask>(s, [&](int i) { return row0 + L::row(i); }, key, rows.sequence(p_));
  }

  // For blocks of keys that only rows of other warpgroups see: their stages are waited for and released unused. Without
  // the wait the arrival at the `empty` mbarrier could count for the wrong phase.

  FLASHCUTE_DEVICE void skip_keys() {
#pragma unroll 1
    for (int i = 1; i <= skipped_; ++i) skip_key(range_.end + skipped_ - i);
  }

  FLASHCUTE_DEVICE void skip_values(int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) skip_value();
  }

  // The same of the blocks after the warpgroup's own.

  FLASHCUTE_DEVICE int left_over() const { return Mask::two_edges ? left_over_ : 0; }

  FLASHCUTE_DEVICE void skip_keys_after(int count) {
#pragma unroll 1
    for (int i = 1; i <= count; ++i) skip_key(range_.begin - i);
  }

  /// Passes over a tile in which this warpgroup has no rows, or which sees no key.
  FLASHCUTE_DEVICE void skip_tile() {
    sums_ = Sums{p_};
#pragma unroll 1
    for (int n = range_.first(); range_.left(n) > 0; n = range_.next(n)) {
      skip_key(n);
      skip_value();
    }
    if constexpr (Mask::two_edges) {
      Tile const rows = tiles_.work(0).rows;
      if (rows.rows > 0) store_empty<C, Mask>(p_, rows, thread_of_warpgroup(), warpgroup_size);
      tiles_.meet();  // no key was passed: a warp may still wait for the announcement of this tile
    }
    tiles_.release_query();
    if (counts()) store_counts<Id>(sums_.counter, p_, tiles_.work(0).rows);
  }

  FLASHCUTE_DEVICE void skip_key(int n) {
    await_key();
    turns_.wait();
    turns_.pass();
    count_block(n);
    tiles_.pass_key();
  }

  FLASHCUTE_DEVICE void skip_value() {
    tiles_.await_value();
    tiles_.pass_value();
  }

  /// Whether this is the one thread that stores the counts of the tile.
  FLASHCUTE_DEVICE bool counts() const {
    return Id.features.count_blocks && warpgroup_ == 0 && thread_of_warpgroup() == 0 &&
           (C.cluster == 1 || rank_in_cluster() == 0);
  }

  /// Counts block n as full or partial for the whole tile, not for this warpgroup's rows.
  FLASHCUTE_DEVICE void count_block(int n) {
    if constexpr (Range::contiguous) {
      sums_.counter.visit(tiles_.work(0).loaded.is_partial(n));
    } else {
      sums_.counter.visit(range_.is_partial(n));
    }
  }

  // The same in all lanes, as the compiler cannot know.
  FLASHCUTE_DEVICE static KvRange uniform_range(KvRange const& r) {
    return {uniform(r.begin), uniform(r.full_end), uniform(r.end)};
  }
  FLASHCUTE_DEVICE static BandRange uniform_range(BandRange const& r) {
    return {uniform(r.begin), uniform(r.full_begin), uniform(r.full_end), uniform(r.end)};
  }

  /// Moves on to the next tile; false if there is none.
  FLASHCUTE_DEVICE bool next_tile() {
    auto const& work = tiles_.next();
    if constexpr (Range::contiguous) {
      range_ = uniform_range(work.range);
      skipped_ = Mask::rows_differ ? uniform(work.loaded.end) - range_.end : 0;
      if constexpr (Mask::two_edges) left_over_ = range_.begin - uniform(work.loaded.begin);
    } else {
      range_ = {work.exists && !work.loaded.empty()};
      skipped_ = 0;
    }
    attends_ = work.attends;
    return uniform(work.exists);
  }

  /// Writes the output of the current tile (`before` 0) or of the one before it (1).
  FLASHCUTE_DEVICE void store(uint32_t before, Sums& sums) {
    auto const& work = tiles_.work(before);
    Tile const tile = work.rows;
    Softmax& softmax = sums.softmax;
    finish_rows<Mask, typename L::Element>(softmax, o_, p_, tile, [](int i) { return L::row(i); });
    if (counts()) store_counts<Id>(sums.counter, p_, tile);
    if (p_.lse != nullptr) {
      float* const lse = static_cast<float*>(p_.lse) + tile.lse_offset(p_);
      bool const writes = thread_index() % 4 == 0;  // one lane of the quad that shares a row
      CUTE_UNROLL
      for (int i = 0; i < L::rows_per_thread; ++i) {
        global_store_if(writes && L::row(i) < tile.rows, lse + L::row(i), softmax.lse(i));
      }
    }
    store_output<C>(o_, p_, tile);
    if (Mask::rows_differ && tiles_.dropped(before)) {
      int const end = min_of(work.loaded.end * C.block_n, tile.sequence(p_).keys());
      add_dropped<C, Mask>(work.loaded.first_partial() * C.block_n, end, p_, tile);
    }
    // Lanes whose rows do not exist may have skipped code above. Without __syncwarp the compiler assumes that the lanes
    // stay diverged in all that follows, and keeps addresses in registers of each lane instead of uniform registers.
    reconverge();
  }

  ForwardParams const& p_;
  int const warpgroup_;
  Tiles<C, Mask> tiles_;
  Turns<L::first_turn_barrier, L::warpgroups, C.pingpong> const turns_;
  Range range_;        // blocks that the warpgroup's rows see
  int skipped_;        // blocks of keys before these that only other rows of the tile see
  int left_over_ = 0;  // and blocks after them; only of a mask with two edges
  bool attends_;       // false: the warpgroup has no rows in the tile, or no row of it sees a key, or there is no tile
  Sums sums_;
  Scores s_;    // (MMA, MMA_M, MMA_N)
  Output o_;    // (MMA, MMA_M, MMA_DV)
  bool fresh_;  // nothing has been added to the output yet
};

}  // namespace flashcute::sm90
