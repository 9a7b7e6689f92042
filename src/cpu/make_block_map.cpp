#include "cpu/make_block_map.hpp"

#include <atomic>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/thread_pool.hpp"

namespace flashcute::cpu {
namespace {

using Rows = MapRows<false>;  // queries; its columns are keys

/// The least and the greatest document of each cell of keys, of all batch entries: every row of cells asks for them.
class DocumentsOfKeys {
 public:
  explicit DocumentsOfKeys(BlockMapRules const& rules)
      : heads_(rules.heads), cells_(count_cells(rules.sizes.seqlen_k)) {
    if (rules.documents_q == nullptr) return;
    ranges_.resize(ceil_div<int64_t>(rules.sizes.maps, heads_) * cells_);
    parallel_for(static_cast<int64_t>(ranges_.size()), num_threads(), [&](int64_t index) {
      ranges_[index] = Rows(rules, index / cells_ * heads_).of_columns(static_cast<int32_t>(index % cells_));
    });
  }

  Rows::Documents const& of(int64_t map, int32_t cell) const { return ranges_[map / heads_ * cells_ + cell]; }

 private:
  int64_t heads_, cells_;
  std::vector<Rows::Documents> ranges_;
};

/// The elements of the partial cells of a word, from the number on that `count` gives them. Returns the number.
/// elements(c, rows) writes the 64 rows of cell c.
template <class Elements>
uint32_t store(BlockMapRules const& rules, CellPlanes const& planes, uint32_t partial, std::atomic<uint32_t>& count,
               Elements&& elements) {
  if (partial == 0) return 0;
  uint32_t const first = count.fetch_add(static_cast<uint32_t>(count_bits(partial)));
  auto* const bits = reinterpret_cast<uint64_t*>(rules.words + planes.bits);
  for (int64_t number = first; partial != 0 && number < rules.capacity; ++number, partial &= partial - 1) {
    elements(lowest_bit(partial), bits + number * cell_size);
  }
  return first;
}

/// By query: a row of cells after the other.
uint32_t make_by_query(BlockMapRules const& rules, CellPlanes const& planes) {
  std::atomic<uint32_t> count{0};
  DocumentsOfKeys const documents(rules);
  parallel_for(rules.sizes.maps * planes.rows, num_threads(), [&](int64_t index) {
    int64_t const map = index / planes.rows;
    auto const row = static_cast<int32_t>(index % planes.rows);
    Rows const from(rules, map);
    auto const own = from.has_documents() ? from.of_rows(row) : Rows::Documents{};
    uint64_t seen[cells_of_word][cell_size];
    for (int32_t word = 0; word < planes.words; ++word) {
      uint32_t some = 0, whole = 0;
      int32_t const first = word * cells_of_word, end = min_of(first + cells_of_word, count_cells(from.columns()));
      for (int32_t cell = first; cell < end; ++cell) {
        uint32_t const bit = 1u << (cell - first);
        if (from.has_documents()) {
          auto const& others = documents.of(map, cell);
          if (from.hide_all(own, others)) continue;
          if (from.show_all(own, others)) {
            some |= bit;
            whole |= bit;
            continue;
          }
        }
        uint64_t any = 0, all = ~uint64_t{0};
        for (int32_t i = 0; i < cell_size; ++i) {
          uint64_t const columns = from.columns_of_cell(row * cell_size + i, cell);
          seen[cell - first][i] = columns;
          any |= columns;
          if (row * cell_size + i < from.rows()) all &= columns;
        }
        if (any != 0) some |= bit;
        if (all == from.existing(cell)) whole |= bit;
      }
      int64_t const at = index * planes.words + word;
      rules.words[planes.some + at] = some;
      rules.words[planes.whole + at] = whole;
      rules.words[planes.first + at] = store(rules, planes, some & ~whole, count, [&](int32_t c, uint64_t* rows) {
        for (int32_t i = 0; i < cell_size; ++i) rows[i] = seen[c][i];
      });
    }
  });
  return count;
}

/// Transposes a square of bits: bit c of word r becomes bit r of word c.
template <class Word>
void transpose(Word* words) {
  constexpr int32_t size = 8 * sizeof(Word);
  Word mask = ~Word{0} >> size / 2;
  for (int32_t half = size / 2; half > 0; half /= 2, mask ^= mask << half) {
    for (int32_t r = 0; r < size; r = (r + half + 1) & ~half) {
      Word const swapped = (words[r] >> half ^ words[r + half]) & mask;
      words[r] ^= swapped << half;
      words[r + half] ^= swapped;
    }
  }
}

/// A plane by key is that by query transposed, in squares of 32 x 32 cells.
void transpose_plane(BlockMapRules const& rules, CellPlanes const& q, CellPlanes const& k, int64_t from, int64_t to) {
  parallel_for(rules.sizes.maps * q.words * k.words, num_threads(), [&](int64_t index) {
    int64_t const map = index / (q.words * k.words), of_q = index / k.words % q.words, of_k = index % k.words;
    uint32_t square[cells_of_word] = {};
    int64_t const first_q = of_k * cells_of_word, first_k = of_q * cells_of_word;
    for (int64_t i = 0; i < min_of<int64_t>(cells_of_word, q.rows - first_q); ++i) {
      square[i] = rules.words[from + (map * q.rows + first_q + i) * q.words + of_q];
    }
    transpose(square);
    for (int64_t i = 0; i < min_of<int64_t>(cells_of_word, k.rows - first_k); ++i) {
      rules.words[to + (map * k.rows + first_k + i) * k.words + of_k] = square[i];
    }
  });
}

/// By key: the planes and the elements by query, transposed, which is less work than to ask the rules again.
uint32_t make_by_key(BlockMapRules const& rules, BlockMapLayout const& layout) {
  CellPlanes const &q = layout.by_query, &k = layout.by_key;
  transpose_plane(rules, q, k, q.some, k.some);
  transpose_plane(rules, q, k, q.whole, k.whole);
  std::atomic<uint32_t> count{0};
  BlockMapParams const made{rules.words, rules.capacity, 0, 0, q, k, {}};
  parallel_for(rules.sizes.maps * k.rows, num_threads(), [&](int64_t index) {
    CellMap const by_query(made, q, index / k.rows);
    auto const row = static_cast<int32_t>(index % k.rows);
    for (int32_t word = 0; word < k.words; ++word) {
      int64_t const at = index * k.words + word;
      uint32_t const partial = rules.words[k.some + at] & ~rules.words[k.whole + at];
      rules.words[k.first + at] = store(rules, k, partial, count, [&](int32_t c, uint64_t* rows) {
        int32_t const first = (word * cells_of_word + c) * cell_size;
        for (int32_t i = 0; i < cell_size; ++i) rows[i] = by_query.columns_of_cell(first + i, row);
        transpose(rows);
      });
    }
  });
  return count;
}

}  // namespace

void make_block_map(BlockMapRules const& rules) {
  BlockMapLayout const layout = BlockMapLayout::of(rules.sizes, rules.capacity);
  rules.words[0] = make_by_query(rules, layout.by_query);
  rules.words[1] = make_by_key(rules, layout);
  rules.words[2] = rules.words[3] = 0;
}

}  // namespace flashcute::cpu
