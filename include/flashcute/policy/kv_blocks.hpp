// Which blocks a tile visits, and in which order. Loaders and loops ask a range for its first block, for the block
// after another one and for how many are left.
#pragma once

#include "flashcute/policy/sequence.hpp"

namespace flashcute {

/// Rows [begin, end) of a tensor.
struct RowRange {
  int32_t begin, end;

  FLASHCUTE_HD bool empty() const { return begin >= end; }
  FLASHCUTE_HD bool has(int32_t row) const { return (begin <= row) & (row < end); }
};

/// The blocks of keys that a tile of query rows visits, from the last to the first: blocks [begin, end) hold at least
/// one visible element. Blocks [begin, full_end) hold only visible elements, so they need no test; the others are
/// partial.
struct KvRange {
  int32_t begin, full_end, end;

  /// From a block to the next one. `next` adds it; loaders that move a pointer along add it themselves.
  static constexpr int32_t step = -1;
  static constexpr bool contiguous = true;  // whether blocks follow each other

  FLASHCUTE_HD bool empty() const { return begin >= end; }
  FLASHCUTE_HD int32_t first() const { return end - 1; }
  /// The block to visit after block `n`, if any is left.
  FLASHCUTE_HD int32_t next(int32_t n) const { return n + step; }
  FLASHCUTE_HD bool is_last(int32_t n) const { return n == begin; }
  /// How many blocks are left to visit, block `n` included. `n` is `first()` or what `next` returned.
  FLASHCUTE_HD int32_t left(int32_t n) const { return n - begin + 1; }
  FLASHCUTE_HD bool is_partial(int32_t n) const { return n >= full_end; }
  /// How many full blocks follow each other from the full block `n` on.
  FLASHCUTE_HD int32_t visits() const { return end - begin; }  // how many blocks there are
  FLASHCUTE_HD int32_t full_left(int32_t n) const { return left(n); }
  FLASHCUTE_HD int32_t full_left_from(int32_t n) const { return full_left(n); }
  FLASHCUTE_HD int32_t number(int32_t n) const { return n; }
  FLASHCUTE_HD int32_t first_partial() const { return full_end; }

  /// The keys of all blocks, or of the partial ones only, as far as the sequence has them.
  template <class Sequence>
  FLASHCUTE_HD RowRange keys(bool only_partial, int32_t block_n, Sequence const& sequence) const {
    return {(only_partial ? full_end : begin) * block_n, min_of(end * block_n, sequence.keys())};
  }

  /// Calls body(n, partial) for each block; `partial` is a bool_constant, so that full blocks run code without tests.
  template <class Body>
  FLASHCUTE_HD void for_each_backward(Body&& body) const {
    // Written out: with `next`, or a function for the conditions, nvcc 13.0 allocates registers differently.
    int32_t n = end - 1;
    for (; n >= full_end; --n) body(n, std_::true_type{});
    for (; n >= begin; --n) body(n, std_::false_type{});
  }
};

/// The same under a mask that hides keys on both sides: of blocks [begin, end), [full_begin, full_end) hold only
/// visible elements.
struct BandRange {
  int32_t begin, full_begin, full_end, end;

  static constexpr int32_t step = KvRange::step;
  static constexpr bool contiguous = true;

  /// Of the keys [first.begin, last.end), as the first and the last row of a tile see them. What a row sees begins and
  /// ends no earlier than what the row before sees, and no key between them is hidden from all.
  FLASHCUTE_HD static BandRange of(RowRange const& first, RowRange const& last, int32_t block) {
    if (first.begin >= last.end) return {0, 0, 0, 0};
    int32_t const begin = first.begin / block, end = ceil_div(last.end, block);
    int32_t const full_end = min_of(max_of(first.end / block, begin), end);
    return {begin, min_of(max_of(ceil_div(last.begin, block), begin), full_end), full_end, end};
  }

  FLASHCUTE_HD bool empty() const { return begin >= end; }
  FLASHCUTE_HD int32_t first() const { return end - 1; }
  FLASHCUTE_HD int32_t next(int32_t n) const { return n + step; }
  FLASHCUTE_HD bool is_last(int32_t n) const { return n == begin; }
  FLASHCUTE_HD int32_t left(int32_t n) const { return n - begin + 1; }
  FLASHCUTE_HD bool is_partial(int32_t n) const { return (n < full_begin) | (n >= full_end); }
  FLASHCUTE_HD int32_t full_left(int32_t n) const { return n - full_begin + 1; }
  FLASHCUTE_HD int32_t full_left_from(int32_t n) const { return full_left(n); }
  FLASHCUTE_HD int32_t number(int32_t n) const { return n; }
  FLASHCUTE_HD int32_t visits() const { return end - begin; }  // how many blocks there are
  FLASHCUTE_HD int32_t first_partial() const { return begin; }

  /// The keys of all blocks: what holds the partial ones at both ends holds the full ones between them.
  template <class Sequence>
  FLASHCUTE_HD RowRange keys(bool /*only_partial*/, int32_t block_n, Sequence const& sequence) const {
    return {begin * block_n, min_of(end * block_n, sequence.keys())};
  }

  template <class Body>
  FLASHCUTE_HD void for_each_backward(Body&& body) const {
    int32_t n = end - 1;
    for (int32_t stop = full_end;; stop = begin) {  // twice, with each body written once
      for (; n >= stop; --n) body(n, std_::true_type{});
      for (; n >= full_begin; --n) body(n, std_::false_type{});
      if (n < begin) return;
    }
  }
};

/// The blocks of query rows that a tile of keys visits, from the first to the last: blocks [begin, end) hold at least
/// one row that sees one of the keys. Blocks [full_begin, end) hold only rows that see all of them; the others are
/// partial.
struct QueryRange {
  int32_t begin, full_begin, end;

  FLASHCUTE_HD bool empty() const { return begin >= end; }

  /// The rows of all blocks, or of the partial ones only, as far as the sequence has them; of a range that is not
  /// empty.
  template <class Sequence>
  FLASHCUTE_HD RowRange rows(bool only_partial, int32_t block_m, Sequence const& sequence) const {
    return {begin * block_m, min_of((only_partial ? full_begin : end) * block_m, sequence.rows())};
  }

  /// Calls body(m, partial) for each block, as KvRange does.
  template <class Body>
  FLASHCUTE_HD void for_each(Body&& body) const {
    int32_t m = begin;
    for (; m < min_of(full_begin, end); ++m) body(m, std_::true_type{});
    for (; m < end; ++m) body(m, std_::false_type{});
  }
};

/// The same under a mask that hides queries on both sides: of blocks [begin, end), [full_begin, full_end) hold only
/// rows that see all of the keys. Blocks with rows that do not exist are partial.
struct QueryBandRange {
  int32_t begin, full_begin, full_end, end;

  FLASHCUTE_HD bool empty() const { return begin >= end; }

  template <class Sequence>
  FLASHCUTE_HD RowRange rows(bool /*only_partial*/, int32_t block_m, Sequence const& sequence) const {
    return {begin * block_m, min_of(end * block_m, sequence.rows())};
  }

  template <class Body>
  FLASHCUTE_HD void for_each(Body&& body) const {
    int32_t m = begin;
    for (int32_t stop = full_begin;; stop = end) {
      for (; m < stop; ++m) body(m, std_::true_type{});
      for (; m < full_end; ++m) body(m, std_::false_type{});
      if (m >= end) return;
    }
  }
};

/// An iterator over the blocks that a tile of the GPU's backward visits, from the first to the last: [begin, end) of
/// one head, then of the next head. Blocks [full_begin, full_end) need no test; in the others rows see different keys,
/// or do not exist. (Iterators that derive from it may have another order.)
struct PassingBlocks {
  int32_t begin, end, full_begin, full_end;
  int32_t head, block, left;  // the current block, and how many are left, this one included

  /// Blocks of keys of one K/V head.
  FLASHCUTE_HD static PassingBlocks of(KvRange const& r, int32_t kv_head) {
    return {r.begin, r.end, r.begin, r.full_end, kv_head, r.begin, max_of(0, r.end - r.begin)};
  }
  FLASHCUTE_HD static PassingBlocks of(BandRange const& r, int32_t kv_head) {
    return {r.begin, r.end, r.full_begin, r.full_end, kv_head, r.begin, max_of(0, r.end - r.begin)};
  }

  /// Blocks of queries of `heads` heads. Of the blocks of a head, `complete` have all their rows.
  FLASHCUTE_HD static PassingBlocks of(QueryRange const& r, int32_t complete, int32_t first_head, int32_t heads) {
    return {r.begin, r.end, r.full_begin, complete, first_head, r.begin, heads * max_of(0, r.end - r.begin)};
  }
  FLASHCUTE_HD static PassingBlocks of(QueryBandRange const& r, int32_t /*complete*/, int32_t first_head,
                                       int32_t heads) {
    return {r.begin, r.end, r.full_begin, r.full_end, first_head, r.begin, heads * max_of(0, r.end - r.begin)};
  }

  FLASHCUTE_HD bool partial() const { return block < full_begin || block >= full_end; }
  FLASHCUTE_HD int32_t stage(int32_t stages) const { return left % stages; }
  /// Whether the block does not follow the one before it: it is the first of a head.
  FLASHCUTE_HD bool starts_anew() const { return block == begin; }
  FLASHCUTE_HD bool before_full() const { return block < full_begin; }

  FLASHCUTE_HD PassingBlocks after() const {
    PassingBlocks next = *this;
    next.left = left - 1;
    next.block = block + 1;
    if (next.block == end) next.block = begin, next.head = head + 1;
    return next;
  }
};

}  // namespace flashcute
