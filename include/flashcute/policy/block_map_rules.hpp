// How block maps are made: the rules that say which query sees which key, and what becomes of them in a row of cells.
// The CPU and the GPU kernel that build maps share these.
#pragma once

#include "flashcute/policy/block_map.hpp"

namespace flashcute {

/// How two maps are combined.
enum class MapOperation : int32_t { both, either, first_only };

/// The parameters of a launch that makes maps. A query sees a key if every rule that is given says so.
struct BlockMapRules {
  BlockMapSizes sizes;
  int32_t heads;     // maps of each batch entry
  int64_t capacity;  // of the maps that are made
  uint32_t* words;

  uint8_t const* dense;     // booleans: true keeps; null: no such rule
  int64_t dense_stride[4];  // of batch entries, heads, queries, keys
  // Numbers of documents: a query sees the keys of its own. Below 0: of none.
  int32_t const *documents_q, *documents_k;
  int64_t documents_stride_q, documents_stride_k;  // of batch entries
  // Maps: both must show, or one of them, or the first and not the second.
  BlockMapParams first, second;
  MapOperation operation;

  // There are fewer than 2^31 maps. A division of 64-bit integers is a call of some hundred instructions on a GPU.
  FLASHCUTE_HD int32_t batch_of(int64_t map) const { return static_cast<int32_t>(map) / heads; }
  FLASHCUTE_HD int32_t head_of(int64_t map) const { return static_cast<int32_t>(map) % heads; }
};

/// The rules as one map sees them in one direction: by query, its rows are queries; by key, they are keys.
template <bool by_key>
class MapRows {
 public:
  FLASHCUTE_HD MapRows(BlockMapRules const& rules, int64_t map)
      : rules_(rules), batch_(rules.batch_of(map)), head_(rules.head_of(map)) {}

  FLASHCUTE_HD int32_t rows() const { return by_key ? rules_.sizes.seqlen_k : rules_.sizes.seqlen_q; }
  FLASHCUTE_HD int32_t columns() const { return by_key ? rules_.sizes.seqlen_q : rules_.sizes.seqlen_k; }

  /// Which columns of a cell there are, as bits.
  FLASHCUTE_HD uint64_t existing(int32_t cell) const { return low_bits64(columns() - cell * cell_size); }

  /// The least and the greatest number of a document among the rows of a row of cells, or the columns of a cell.
  struct Documents {
    int32_t least, greatest;
  };
  FLASHCUTE_HD Documents of_rows(int32_t row_of_cells) const {
    return range(documents_of(by_key), row_of_cells, rows());
  }
  FLASHCUTE_HD Documents of_columns(int32_t cell) const { return range(documents_of(!by_key), cell, columns()); }
  FLASHCUTE_HD int32_t const* documents_of_rows() const { return documents_of(by_key); }
  FLASHCUTE_HD int32_t const* documents_of_columns() const { return documents_of(!by_key); }

  /// Whether documents alone hide all of a cell; and whether there is no other rule, and they show all of it.
  FLASHCUTE_HD static bool hide_all(Documents const& rows, Documents const& columns) {
    return rows.greatest < 0 || rows.greatest < columns.least || rows.least > columns.greatest;
  }
  FLASHCUTE_HD bool show_all(Documents const& rows, Documents const& columns) const {
    return rules_.dense == nullptr && rules_.first.words == nullptr && rows.least >= 0 && rows.least == rows.greatest &&
           rows.least == columns.least && rows.least == columns.greatest;
  }
  FLASHCUTE_HD bool has_documents() const { return rules_.documents_q != nullptr; }

  /// Which columns of a cell a row sees; none if there is no such row.
  FLASHCUTE_HD uint64_t columns_of_cell(int32_t row, int32_t cell) const {
    if (row >= rows()) return 0;
    uint64_t seen = existing(cell) & of_maps(row, cell);
    if (has_documents()) seen &= of_documents(row, cell);
    return has_booleans() ? seen & booleans(row).columns_of_cell(cell, columns()) : seen;
  }

  /// Which columns of a cell the rules' maps show to a row: without maps, all.
  FLASHCUTE_HD uint64_t of_maps(int32_t row, int32_t cell) const {
    if (rules_.first.words == nullptr) return ~uint64_t{0};
    uint64_t const a = of_map(rules_.first, row, cell);
    if (rules_.second.words == nullptr) return a;
    uint64_t const b = of_map(rules_.second, row, cell);
    switch (rules_.operation) {
      case MapOperation::both: return a & b;
      case MapOperation::either: return a | b;
      case MapOperation::first_only: return a & ~b;
    }
    return 0;
  }

  /// Booleans from a row on: column c of r rows further is at from[r * down + c * across].
  struct Booleans {
    uint8_t const* from;
    int64_t down, across;

    FLASHCUTE_HD uint64_t columns_of_cell(int32_t cell, int32_t columns) const {
      int32_t const first = cell * cell_size, count = min_of(cell_size, columns - first);
      uint64_t seen = 0;
      if (across == 1 && count == cell_size && reinterpret_cast<size_t>(from + first) % 8 == 0) {
        auto const* const words = reinterpret_cast<uint64_t const*>(from + first);
        for (int32_t i = 0; i < 8; ++i) seen |= nonzero_bytes(words[i]) << 8 * i;
        return seen;
      }
      for (int32_t c = 0; c < count; ++c) seen |= uint64_t{from[(first + c) * across] != 0} << c;
      return seen;
    }
  };
  FLASHCUTE_HD bool has_booleans() const { return rules_.dense != nullptr; }
  FLASHCUTE_HD Booleans booleans(int32_t row) const {
    int64_t const* const stride = rules_.dense_stride;
    int64_t const down = stride[by_key ? 3 : 2], across = stride[by_key ? 2 : 3];
    return {rules_.dense + batch_ * stride[0] + head_ * stride[1] + row * down, down, across};
  }

 private:
  FLASHCUTE_HD int32_t const* documents_of(bool keys) const {
    return keys ? rules_.documents_k + batch_ * rules_.documents_stride_k
                : rules_.documents_q + batch_ * rules_.documents_stride_q;
  }

  FLASHCUTE_HD static Documents range(int32_t const* numbers, int32_t cell, int32_t length) {
    int32_t const end = min_of(length, (cell + 1) * cell_size);
    Documents found{numbers[cell * cell_size], numbers[cell * cell_size]};
    for (int32_t i = cell * cell_size + 1; i < end; ++i) {
      found.least = min_of(found.least, numbers[i]);
      found.greatest = max_of(found.greatest, numbers[i]);
    }
    return found;
  }

  FLASHCUTE_HD uint64_t of_documents(int32_t row, int32_t cell) const {
    int32_t const own = documents_of_rows()[row];
    if (own < 0) return 0;
    int32_t const* const others = documents_of_columns() + cell * cell_size;
    int32_t const count = min_of(cell_size, columns() - cell * cell_size);
    uint64_t seen = 0;
    for (int32_t c = 0; c < count; ++c) seen |= uint64_t{others[c] == own} << c;
    return seen;
  }

  FLASHCUTE_HD uint64_t of_map(BlockMapParams const& map, int32_t row, int32_t cell) const {
    CellMap const cells(map, by_key ? map.by_key : map.by_query, map.number(batch_, head_));
    return cells.columns_of_cell(row, cell);
  }

  BlockMapRules const& rules_;
  int32_t batch_, head_;
};

}  // namespace flashcute
