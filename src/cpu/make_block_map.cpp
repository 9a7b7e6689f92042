#include "cpu/make_block_map.hpp"

#include <atomic>

#include "cpu/dispatch.hpp"
#include "cpu/thread_pool.hpp"

namespace flashcute::cpu {
namespace {

/// 64 rows of 32 cells: a word of each plane, and the elements of the partial cells among them.
template <bool by_key>
class WordOfCells {
 public:
  WordOfCells(BlockMapRules const& rules, CellPlanes const& planes) : rules_(rules), planes_(planes) {}

  void make(int64_t map, int32_t row, int32_t word, std::atomic<uint32_t>& count) {
    MapRows<by_key> const from(rules_, map);
    uint32_t some = 0, whole = 0;
    int32_t const first = word * cells_of_word, end = min_of(first + cells_of_word, count_cells(from.columns()));
    auto const documents = from.has_documents() ? from.of_rows(row) : typename MapRows<by_key>::Documents{};
    for (int32_t cell = first; cell < end; ++cell) {
      uint32_t const bit = 1u << (cell - first);
      if (from.has_documents()) {
        auto const others = from.of_columns(cell);
        if (from.hide_all(documents, others)) continue;
        if (from.show_all(documents, others)) {
          some |= bit;
          whole |= bit;
          continue;
        }
      }
      uint64_t any = 0, all = ~uint64_t{0};
      for (int32_t i = 0; i < cell_size; ++i) {
        uint64_t const seen = from.columns_of_cell(row * cell_size + i, cell);
        seen_[cell - first][i] = seen;
        any |= seen;
        if (row * cell_size + i < from.rows()) all &= seen;
      }
      if (any != 0) some |= bit;
      if (all == from.existing(cell)) whole |= bit;
    }
    int64_t const at = (map * planes_.rows + row) * planes_.words + word;
    rules_.words[planes_.some + at] = some;
    rules_.words[planes_.whole + at] = whole;
    uint32_t const partial = some & ~whole;
    uint32_t number = partial == 0 ? 0 : count.fetch_add(static_cast<uint32_t>(count_bits(partial)));
    rules_.words[planes_.first + at] = number;
    auto* const bits = reinterpret_cast<uint64_t*>(rules_.words + planes_.bits);
    for (int32_t c = 0; c < cells_of_word; ++c) {
      if (!(partial >> c & 1)) continue;
      if (int64_t{number} < rules_.capacity) {
        for (int32_t i = 0; i < cell_size; ++i) bits[int64_t{number} * cell_size + i] = seen_[c][i];
      }
      ++number;
    }
  }

 private:
  BlockMapRules const& rules_;
  CellPlanes const& planes_;
  uint64_t seen_[cells_of_word][cell_size];
};

template <bool by_key>
uint32_t make(BlockMapRules const& rules, CellPlanes const& planes) {
  std::atomic<uint32_t> count{0};
  parallel_for(rules.sizes.maps * planes.rows, num_threads(), [&](int64_t index) {
    WordOfCells<by_key> cells(rules, planes);
    for (int32_t word = 0; word < planes.words; ++word) {
      cells.make(index / planes.rows, static_cast<int32_t>(index % planes.rows), word, count);
    }
  });
  return count;
}

}  // namespace

void make_block_map(BlockMapRules const& rules) {
  BlockMapLayout const layout = BlockMapLayout::of(rules.sizes, rules.capacity);
  rules.words[0] = make<false>(rules, layout.by_query);
  rules.words[1] = make<true>(rules, layout.by_key);
  rules.words[2] = rules.words[3] = 0;
}

}  // namespace flashcute::cpu
