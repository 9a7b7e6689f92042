// The lengths of one sequence of queries and keys, and how they are aligned. Everything that depends on a length or on
// the alignment (masks, loads, stores) takes it from the sequence of its tile, not from the parameters of the launch:
// those describe tensors, of which a sequence may fill a part.
//
// A sequence type has an `Entry`, what a tile keeps of its batch entry, and is made of one and the parameters. Each mask
// says which type its kernels use.
#pragma once

#include "flashcute/core/forward_params.hpp"

namespace flashcute {

/// The sequence of every batch entry if all have the same lengths, those of the tensors: a view of the parameters. Each
/// number is read where it is used, in a kernel from constant memory. Copies made at the start of a kernel would occupy
/// registers throughout, and nvcc would spill more; even their order changes the machine code.
class UniformSequence {
 public:
  static constexpr bool fills_tensors = true;  // as long as the tensors
  struct Entry {
    int32_t batch;

    FLASHCUTE_HD static Entry of(ForwardParams const&, int32_t batch) { return {batch}; }
  };

  FLASHCUTE_HD UniformSequence(ForwardParams const& p, Entry const&) : p_(p) {}

  FLASHCUTE_HD int32_t rows() const { return p_.seqlen_q; }  // of queries
  FLASHCUTE_HD int32_t keys() const { return p_.seqlen_k; }
  /// Query i sees no key after i + diagonal.
  FLASHCUTE_HD int32_t diagonal() const { return p_.causal_offset; }

 private:
  ForwardParams const& p_;
};

/// The sequence of one batch entry, whose lengths may lie in memory: a tile reads them once.
class BatchSequence {
 public:
  static constexpr bool fills_tensors = false;
  struct Entry {
    int32_t batch;
    int32_t queries, keys;  // that exist
    int32_t shift;          // from the offsets in the parameters to those of this sequence
    int32_t prefix;

    FLASHCUTE_HD static Entry of(ForwardParams const& p, int32_t batch) {
      SequenceParams const& s = p.sequences;
      Entry e{batch, existing(s.seqlens_q, batch, p.seqlen_q), existing(s.seqlens_k, batch, p.seqlen_k), 0, s.prefix};
      if (s.from_end) e.shift = (p.seqlen_q - e.queries) - (p.seqlen_k - e.keys);
      if (s.prefixes != nullptr) e.prefix = s.prefixes[batch];
      return e;
    }

   private:
    FLASHCUTE_HD static int32_t existing(int32_t const* lengths, int32_t batch, int32_t all) {
      return lengths != nullptr ? min_of(max_of(lengths[batch], 0), all) : all;
    }
  };

  FLASHCUTE_HD BatchSequence(ForwardParams const& p, Entry const& entry) : p_(p), entry_(entry) {}

  FLASHCUTE_HD int32_t rows() const { return entry_.queries; }
  FLASHCUTE_HD int32_t keys() const { return entry_.keys; }
  FLASHCUTE_HD int64_t diagonal() const { return int64_t{p_.causal_offset} + entry_.shift; }
  /// Query i sees no key before i + first_diagonal.
  FLASHCUTE_HD int64_t first_diagonal() const { return int64_t{p_.window_offset} + entry_.shift; }
  /// Nor, if it is not before `prefix`, any after i + prefix_diagonal.
  FLASHCUTE_HD int32_t prefix() const { return entry_.prefix; }
  FLASHCUTE_HD int64_t prefix_diagonal() const { return int64_t{p_.sequences.prefix_offset} + entry_.shift; }

 private:
  ForwardParams const& p_;
  Entry const entry_;
};

}  // namespace flashcute
