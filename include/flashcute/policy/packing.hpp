// Packed sequences: rows of one tensor, one sequence after the other. Where each begins lies in memory that the host
// does not read, so it cannot know how many tiles each needs. It reserves places for tiles, called slots, that suffice
// whatever the lengths are: if tiles have m rows, the sequence with number s and first row r has the slots from
// floor(r / m) + s on. A slot beyond the end of its sequence has no rows.
#pragma once

#include "flashcute/core/forward_params.hpp"

namespace flashcute {

/// The sequences in `rows` rows, and the rows that belong to none: those before the first sequence and those after the
/// last count as the sequences 0 and count + 1. `starts` has `count` + 1 numbers, as cu_seqlens; no number in it, nor
/// their order, leads to a row outside the tensor.
struct Packing {
  int32_t const* starts;
  int32_t count;
  int32_t rows;

  FLASHCUTE_HD static Packing of_queries(ForwardParams const& p) {
    return {p.sequences.cu_seqlens_q, p.sequences.count, p.seqlen_q};
  }
  FLASHCUTE_HD static Packing of_keys(ForwardParams const& p) {
    return {p.sequences.cu_seqlens_k, p.sequences.count, p.seqlen_k};
  }

  FLASHCUTE_HD int32_t first_row(int32_t sequence) const {
    if (sequence == 0) return 0;
    if (sequence > count + 1) return rows;
    return max_of(0, min_of(starts[sequence - 1], rows));
  }
  FLASHCUTE_HD int32_t length(int32_t sequence) const {
    return max_of(0, first_row(sequence + 1) - first_row(sequence));
  }
  /// Whether it is one of the caller's.
  FLASHCUTE_HD bool is_real(int32_t sequence) const { return (sequence > 0) & (sequence <= count); }

  /// For tiles of `block` rows. (Where there is no row, nothing is to be computed.)
  FLASHCUTE_HD static int32_t slots(int32_t rows, int32_t count, int32_t block) {
    return rows == 0 ? 0 : rows / block + count + 2;
  }
  FLASHCUTE_HD int32_t first_slot(int32_t sequence, int32_t block) const {
    return first_row(sequence) / block + sequence;
  }
  /// `near`: a sequence that is not far before it, where the search begins.
  FLASHCUTE_HD int32_t sequence_of_slot(int32_t slot, int32_t block, int32_t near = 0) const {
    return last_of(near, [&](int32_t sequence) { return first_slot(sequence, block) <= slot; });
  }
  FLASHCUTE_HD int32_t sequence_of_row(int32_t row) const {
    return last_of(0, [&](int32_t sequence) { return first_row(sequence) <= row; });
  }

 private:
  /// The last sequence that `begins`, which is true of the first.
  template <class Begins>
  FLASHCUTE_HD int32_t last_of(int32_t near, Begins const& begins) const {
    int32_t found = begins(near) ? near : 0, end = count + 2;
    for (int32_t step = 1; near > 0 && found + step < end; step *= 2) {
      if (!begins(found + step)) {
        end = found + step;
      } else {
        found += step;
      }
    }
    while (end - found > 1) {
      int32_t const middle = found + (end - found) / 2;
      if (begins(middle)) {
        found = middle;
      } else {
        end = middle;
      }
    }
    return found;
  }
};

/// How many blocks of `block` query rows a head has; packed, how many slots.
FLASHCUTE_HD int32_t query_blocks(ForwardParams const& p, int32_t block) {
  if (!p.sequences.packed()) return ceil_div(p.seqlen_q, block);
  return Packing::slots(p.seqlen_q, p.sequences.count, block);
}

/// The same of keys.
FLASHCUTE_HD int32_t key_blocks(ForwardParams const& p, int32_t block) {
  if (!p.sequences.packed()) return ceil_div(p.seqlen_k, block);
  return Packing::slots(p.seqlen_k, p.sequences.count, block);
}

}  // namespace flashcute
