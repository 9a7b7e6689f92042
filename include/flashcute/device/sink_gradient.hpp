// The gradient of a sink, after the other gradients.
#pragma once

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/backward_params.hpp"
#include "flashcute/core/constants.hpp"
#include "flashcute/device/apply.hpp"

namespace flashcute {

/// A query row: the batch entry or packed sequence that has it, and its number there.
template <class Sequence>
struct QueryPlace {
  typename Sequence::Entry entry;
  int query;
};

/// The gradient of a query head's sink: -sum(exp(sink - LSE) delta) over all its queries. One thread block computes it,
/// so that the terms are added in the same order in every run. `Statistics` knows where LSE and delta of the head's
/// rows are.
template <BackwardKernelId Id, class Statistics>
struct SinkGradient {
  static_assert(has_only<&Features::mask>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);
  using Mask = flashcute::Mask<Id.features.mask>;
  using Sequence = typename Mask::Sequence;
  using Element = typename TensorCore<Id.config.dtype>::Element;

  static constexpr int threads = num_threads(Id);
  static constexpr int rows_at_once = 4;  // of a thread: their loads are in flight together

  struct SharedStorage {
    float sum[Id.config.num_warps];
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(Id));

  FLASHCUTE_DEVICE static void run(BackwardParams const& p, SharedStorage& smem) {
    ForwardParams const& f = p.forward;
    auto const head = static_cast<int>(block_index());
    float const sink = sink_of<Element>(f, head);
    float sum = 0;
    for (int batch = 0; batch < f.batch; ++batch) {
      auto const first = Statistics::first(f, batch, head);
      int const rows = Statistics::count(f, batch, head);
      for (int row0 = thread_index(); row0 < rows; row0 += rows_at_once * threads) {
        float lse[rows_at_once], delta[rows_at_once];
        CUTE_UNROLL
        for (int i = 0; i < rows_at_once; ++i) {
          auto const row = first + min_of(row0 + i * threads, rows - 1);  // a branch would wait for the loads before
          lse[i] = global_load<float>(Statistics::lse(p) + row);
          delta[i] = global_load<float>(Statistics::delta(p) + row);
        }
        uint32_t not_numbers = 0;
        CUTE_UNROLL
        for (int i = 0; i < rows_at_once; ++i) {
          // Below every number: the row does not exist, all scores that it sees are so, or the sink is none.
          if (row0 + i * threads >= rows || lse[i] == -infinity || sink == -infinity) continue;
          float const term = Statistics::probability(sink, lse[i]) * delta[i];
          if (term == term) {
            sum -= term;
          } else {
            not_numbers |= 1u << i;
          }
        }
        CUTE_NO_UNROLL
        for (int row = row0; not_numbers != 0; not_numbers >>= 1, row += threads) {
          if (not_numbers & 1) sum -= corrected(sink, p, batch, head, row);
        }
      }
    }
    CUTE_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
    int const warp = thread_index() / 32;
    if (thread_index() % 32 == 0) shared_store(&smem.sum[warp], sum);
    block_sync();  // the sums of all warps are in shared memory
    if (thread_index() != 0) return;
    float total = 0;
    for (int i = 0; i < Id.config.num_warps; ++i) total += shared_load<float>(&smem.sum[i]);
    if (f.sink.float32) {
      global_store(static_cast<float*>(p.dsink) + head, total);
    } else {
      global_store(static_cast<Element*>(p.dsink) + head, static_cast<Element>(total));
    }
  }

 private:
  /// The term of a row, computed as NaN. Where a row does not exist, memory may hold anything; where it sees no key,
  /// delta is -dLSE, whatever dO is.
  FLASHCUTE_DEVICE static float corrected(float sink, BackwardParams const& p, int batch, int head, int row) {
    auto const [entry, query] = Statistics::place(p.forward, batch, head, row);
    Sequence const sequence(p.forward, entry, head);
    if (query >= sequence.rows()) return 0.f;
    auto const offset = Statistics::first(p.forward, batch, head) + row;
    float delta = 0;
    if (!Mask::empty_row(query, sequence)) {
      delta = global_load<float>(Statistics::delta(p) + offset);
    } else if (p.dlse != nullptr) {
      delta = -global_load<float>(static_cast<float const*>(p.dlse) +
                                  row_offset(p.dlse_stride, batch, head, entry.first_query + query));
    }
    // NaN where the sink makes it so
    return Statistics::probability(sink, global_load<float>(Statistics::lse(p) + offset)) * delta;
  }
};

}  // namespace flashcute
