// The lengths of one sequence of queries and keys, and how they are aligned. Everything that depends on a length or on
// the alignment (masks, loads, stores) takes it from the sequence of its tile, not from the parameters of the launch:
// those describe tensors, of which a sequence may fill a part.
//
// A sequence type has an `Entry`, what a tile keeps of its batch entry, and is made of one, the parameters and a query
// head: who sees whom may depend on it. Each mask says which type its kernels use.
#pragma once

#include "flashcute/policy/packing.hpp"

namespace flashcute {

/// The sequence of every batch entry if all have the same lengths, those of the tensors: a view of the parameters. Each
/// number is read where it is used, in a kernel from constant memory. Copies made at the start of a kernel would occupy
/// registers throughout, and nvcc would spill more; even their order changes the machine code.
class UniformSequence {
 public:
  static constexpr bool fills_tensors = true;  // as long as the tensors
  FLASHCUTE_HD static constexpr bool is_packed(ForwardParams const&) { return false; }

  struct Entry {
    int32_t batch;

    FLASHCUTE_HD static Entry of(ForwardParams const&, int32_t batch) { return {batch}; }

    // As of BatchSequence.
    static constexpr int32_t number = 0, first_query = 0, first_key = 0;
    FLASHCUTE_HD static Entry of_row(ForwardParams const&, int32_t batch, int32_t /*row*/) { return {batch}; }
    FLASHCUTE_HD static constexpr int32_t first_query_block(int32_t /*block*/) { return 0; }
  };

  FLASHCUTE_HD UniformSequence(ForwardParams const& p, Entry const&, int32_t /*head*/) : p_(p) {}

  FLASHCUTE_HD int32_t rows() const { return p_.seqlen_q; }  // of queries
  FLASHCUTE_HD int32_t keys() const { return p_.seqlen_k; }
  /// Query i sees no key after i + diagonal.
  FLASHCUTE_HD int32_t diagonal() const { return p_.causal_offset; }

 private:
  ForwardParams const& p_;
};

/// The sequence of one batch entry, whose place and lengths may lie in memory, and the band of keys that its queries
/// see: i + first <= j <= i + last, without those that are neither before `prefix` nor up to i + prefix_last. A tile
/// reads them once.
class BatchSequence {
 public:
  static constexpr bool fills_tensors = false;
  FLASHCUTE_HD static bool is_packed(ForwardParams const& p) { return p.sequences.packed(); }

  struct Entry {
    int32_t batch;                   // of the tensors; packed: 0
    int32_t number;                  // of a packed sequence, as Packing counts; else 0
    int32_t first_query, first_key;  // the rows of the tensors that it begins with
    int32_t queries, keys;           // that exist
    int32_t first, last, prefix_last;
    int32_t prefix;

    FLASHCUTE_HD static Entry of(ForwardParams const& p, int32_t batch) {
      SequenceParams const& s = p.sequences;
      Entry e{batch, 0, 0, 0, existing(s.seqlens_q, batch, p.seqlen_q), existing(s.seqlens_k, batch, p.seqlen_k),
              0,     0, 0, 0};
      e.set_band(p, batch);
      return e;
    }

    /// Of the packed sequence `number`.
    FLASHCUTE_HD static Entry of_packed(ForwardParams const& p, int32_t number) {
      SequenceParams const& s = p.sequences;
      Packing const queries = Packing::of_queries(p), keys = Packing::of_keys(p);
      Entry e{0, number, queries.first_row(number), keys.first_row(number), 0, 0, 0, 0, 0, 0};
      if (!queries.is_real(number)) return e;
      e.queries = existing(s.seqlens_q, number - 1, queries.length(number));
      e.keys = existing(s.seqlens_k, number - 1, keys.length(number));
      e.set_band(p, number - 1);
      return e;
    }

    /// Of the batch entry, or the packed sequence, that query row `row` of the tensor belongs to.
    FLASHCUTE_HD static Entry of_row(ForwardParams const& p, int32_t batch, int32_t row) {
      return p.sequences.packed() ? of_packed(p, Packing::of_queries(p).sequence_of_row(row)) : of(p, batch);
    }

    /// The first of its blocks of query rows among all of a head.
    FLASHCUTE_HD int32_t first_query_block(int32_t block) const { return first_query / block + number; }

   private:
    FLASHCUTE_HD void set_band(ForwardParams const& p, int32_t entry) {
      SequenceParams const& s = p.sequences;
      Entry& e = *this;
      int32_t const shift = s.from_end ? (p.seqlen_q - e.queries) - (p.seqlen_k - e.keys) : 0;
      e.first = e.held(int64_t{p.window_offset} + shift);
      e.last = e.held(int64_t{p.causal_offset} + shift);
      e.prefix_last = e.held(int64_t{s.prefix_offset} + shift);
      e.prefix = s.prefixes != nullptr ? s.prefixes[entry] : s.prefix;
    }

    FLASHCUTE_HD static int32_t existing(int32_t const* lengths, int32_t entry, int32_t all) {
      return lengths != nullptr ? min_of(max_of(lengths[entry], 0), all) : all;
    }

    /// Beyond these limits a diagonal shows or hides nothing more. Within them its sum with the number of a query fits
    /// 32 bits: the host has checked that queries and keys together do.
    FLASHCUTE_HD int32_t held(int64_t diagonal) const {
      return static_cast<int32_t>(max_of<int64_t>(-int64_t{queries}, min_of<int64_t>(diagonal, keys)));
    }
  };

  FLASHCUTE_HD BatchSequence(ForwardParams const&, Entry const& entry, int32_t /*head*/) : entry_(entry) {}

  FLASHCUTE_HD int32_t rows() const { return entry_.queries; }
  FLASHCUTE_HD int32_t keys() const { return entry_.keys; }
  FLASHCUTE_HD int32_t diagonal() const { return entry_.last; }
  FLASHCUTE_HD int32_t first_diagonal() const { return entry_.first; }
  FLASHCUTE_HD int32_t prefix() const { return entry_.prefix; }
  FLASHCUTE_HD int32_t prefix_diagonal() const { return entry_.prefix_last; }

 private:
  Entry const entry_;
};

}  // namespace flashcute
