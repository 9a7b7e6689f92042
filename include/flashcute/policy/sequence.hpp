// The lengths of one sequence of queries and keys, and how they are aligned. Everything that depends on a length or on
// the alignment (masks, loads, stores) takes it from the sequence of its tile, not from the parameters of the launch:
// those describe tensors, of which a sequence may fill a part.
#pragma once

#include "flashcute/core/forward_params.hpp"

namespace flashcute {

/// A view of the parameters: each number is read where it is used, in a kernel from constant memory. Copies made at the
/// start of a kernel would occupy registers throughout, and nvcc would spill more; even their order changes the machine
/// code.
///
/// Packed tensors will also need the row where a sequence begins, and a mask with a prefix will need its length. No
/// code reads them yet, so they are not here.
class Sequence {
 public:
  /// The sequence of every batch entry if all have the same lengths: those of the tensors.
  FLASHCUTE_HD static Sequence uniform(ForwardParams const& p) { return Sequence{p}; }

  FLASHCUTE_HD int32_t rows() const { return p_.seqlen_q; }  // of queries
  FLASHCUTE_HD int32_t keys() const { return p_.seqlen_k; }
  /// Causal and band: query i sees no key after i + diagonal.
  FLASHCUTE_HD int32_t diagonal() const { return p_.causal_offset; }
  /// Band: query i sees no key before i + first_diagonal.
  FLASHCUTE_HD int32_t first_diagonal() const { return p_.window_offset; }

 private:
  FLASHCUTE_HD explicit Sequence(ForwardParams const& p) : p_(p) {}

  ForwardParams const& p_;
};

}  // namespace flashcute
