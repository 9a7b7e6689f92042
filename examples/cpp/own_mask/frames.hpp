// A mask for video: a token sees all tokens of its own frame and of the frames before it.
#pragma once

#include "flashcute/policy/mask.hpp"

/// Frames of `frame` tokens. A row sees a prefix of the keys that never shrinks from row to row, so PrefixMask makes
/// the whole mask from two functions that are each other's inverse.
template <int32_t frame>
struct FrameMask : flashcute::PrefixMask<FrameMask<frame>> {
  static constexpr bool rows_differ = true;  // whether a row may see a key that another row does not

  /// How many keys row `q` sees: up to the end of the frame of the key on its diagonal.
  template <class S>
  FLASHCUTE_HD static int32_t visible_keys(int32_t q, S const& s) {
    int64_t const key = static_cast<int64_t>(q) + s.diagonal();
    if (key < 0) return 0;
    int64_t const end = (key / frame + 1) * frame;
    return static_cast<int32_t>(flashcute::min_of<int64_t>(end, s.keys()));
  }

  /// The first row that sees key `k`; s.rows() if none does.
  template <class S>
  FLASHCUTE_HD static int32_t first_query(int32_t k, S const& s) {
    int64_t const row = static_cast<int64_t>(k / frame) * frame - s.diagonal();
    return static_cast<int32_t>(flashcute::max_of<int64_t>(0, flashcute::min_of<int64_t>(row, s.rows())));
  }
};
