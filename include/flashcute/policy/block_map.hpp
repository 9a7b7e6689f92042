// What a tile reads of a block map: which blocks it visits, and which elements of a block are visible.
#pragma once

#include "flashcute/core/bits.hpp"
#include "flashcute/core/block_map.hpp"
#include "flashcute/policy/kv_blocks.hpp"

namespace flashcute {

/// One map in one direction: its rows are queries and its columns keys, or the reverse. Without words, of a call that
/// has no map, everything is visible. It refers to the parameters: addresses are computed where words are read.
class CellMap {
 public:
  FLASHCUTE_HD static CellMap by_query(ForwardParams const& p, int32_t batch, int32_t head) {
    return {p.map, p.map.by_query, p.map.number(batch, head)};
  }
  FLASHCUTE_HD static CellMap by_key(ForwardParams const& p, int32_t batch, int32_t head) {
    return {p.map, p.map.by_key, p.map.number(batch, head)};
  }
  FLASHCUTE_HD CellMap() {}
  FLASHCUTE_HD CellMap(BlockMapParams const& map, CellPlanes const& planes, int64_t number)
      : map_(&map), planes_(&planes), number_(number) {}

  /// Whether there was no room for the elements of all partial cells: then the map is wrong.
  FLASHCUTE_HD static bool overflowed(ForwardParams const& p) {
    uint32_t const* const counts = p.map.words;
    return counts != nullptr && static_cast<int64_t>(max_of(counts[0], counts[1])) > p.map.capacity;
  }

  FLASHCUTE_HD bool exists() const { return map_->words != nullptr; }
  FLASHCUTE_HD int32_t words() const { return static_cast<int32_t>(planes_->words); }  // of a row of cells

  /// The map of the next query head.
  FLASHCUTE_HD void move_to_next_head() { number_ += map_->head_stride; }

  /// Word `w` of row `r` of cells: in which of the 32 cells some row sees some column, and in which all do.
  FLASHCUTE_HD uint32_t some(int32_t r, int32_t w) const { return map_->words[planes_->some + place(r, w)]; }
  FLASHCUTE_HD uint32_t whole(int32_t r, int32_t w) const { return map_->words[planes_->whole + place(r, w)]; }

  /// Which of the 64 columns of a cell a row sees, as bits. Cells that do not exist have none.
  FLASHCUTE_HD uint64_t columns_of_cell(int32_t row, int32_t cell) const {
    int32_t const r = row / cell_size, w = cell / cells_of_word;
    if (w >= words()) return 0;
    uint32_t const bit = 1u << cell % cells_of_word, some_bits = some(r, w), partial = some_bits & ~whole(r, w);
    if (!(partial & bit)) return some_bits & bit ? ~uint64_t{0} : 0;
    int64_t const number = int64_t{map_->words[planes_->first + place(r, w)]} + count_bits(partial & (bit - 1));
    if (number >= map_->capacity) return 0;
    return reinterpret_cast<uint64_t const*>(map_->words + planes_->bits)[number * cell_size + row % cell_size];
  }

  /// The same of the 64 columns from any on. `aligned`: the caller looks at none beyond the cell of the first.
  FLASHCUTE_HD uint64_t columns_from(int32_t row, int32_t column, bool aligned) const {
    if (!exists()) return ~uint64_t{0};
    int32_t const cell = column / cell_size, before = column % cell_size;
    uint64_t const bits = columns_of_cell(row, cell) >> before;
    if (aligned || before == 0) return bits;
    return bits | columns_of_cell(row, cell + 1) << (cell_size - before);
  }

  FLASHCUTE_HD bool sees(int32_t row, int32_t column) const {
    return !exists() || (columns_of_cell(row, column / cell_size) >> column % cell_size & 1) != 0;
  }

  /// Whether a row sees any of some columns.
  FLASHCUTE_HD bool sees_any(int32_t row, RowRange const& columns) const {
    for (int32_t column = columns.begin; column < columns.end;) {
      int32_t cell = column / cell_size;
      uint32_t const rest = some(row / cell_size, cell / cells_of_word) >> cell % cells_of_word;
      if (!(rest & 1)) {  // to the next cell of the word that any row of cells sees, or to the next word
        cell += rest == 0 ? cells_of_word - cell % cells_of_word : lowest_bit(rest);
        column = cell * cell_size;
        continue;
      }
      int32_t const end = min_of(columns.end, (cell + 1) * cell_size);
      uint64_t const bits = columns_of_cell(row, cell) >> column % cell_size;
      if ((bits & low_bits64(end - column)) != 0) return true;
      column = end;
    }
    return false;
  }

 private:
  FLASHCUTE_HD int64_t place(int32_t r, int32_t w) const { return (number_ * planes_->rows + r) * planes_->words + w; }

  BlockMapParams const* map_ = nullptr;
  CellPlanes const* planes_ = nullptr;
  int64_t number_ = 0;
};

/// The sequence of a batch entry whose queries see what a map shows. They are not packed.
class MappedSequence : public BatchSequence {
 public:
  FLASHCUTE_HD static constexpr bool is_packed(ForwardParams const&) { return false; }

  FLASHCUTE_HD MappedSequence(ForwardParams const& p, Entry const& entry, int32_t head)
      : BatchSequence(p, entry, head), p_(p), batch_(entry.batch), head_(head) {}

  FLASHCUTE_HD bool has_map() const { return p_.map.words != nullptr; }
  FLASHCUTE_HD CellMap by_query() const { return CellMap::by_query(p_, batch_, head_); }
  FLASHCUTE_HD CellMap by_key() const { return CellMap::by_key(p_, batch_, head_); }

 private:
  ForwardParams const& p_;
  int32_t batch_, head_;
};

/// Which columns of a block of `count` a row sees, from one of the first `spread` columns on: those that both a map and
/// a range of columns show. Asked of are columns that lie a multiple of 8 from the first, and their right neighbours.
template <int32_t count, int32_t spread = 8>
struct SeenBits {
  /// Whether what is asked of a word lies in one cell.
  static constexpr bool aligned = cell_size % count == 0 || (count % cell_size == 0 && spread <= 8);
  static constexpr int32_t words = ceil_div(count, cell_size);

  uint64_t word[words];  // bit d % 64 of word d / 64: whether it sees the column at distance d

  FLASHCUTE_HD static SeenBits of(CellMap const& map, RowRange const& shown, int32_t row, int32_t column) {
    SeenBits seen;
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#pragma unroll
#endif
    for (int32_t i = 0; i < words; ++i) {
      int32_t const first = column + i * cell_size;
      uint64_t const in_range = low_bits64(shown.end - first) & ~low_bits64(shown.begin - first);
      seen.word[i] = in_range == 0 ? 0 : in_range & map.columns_from(row, first, aligned);
    }
    return seen;
  }

  FLASHCUTE_HD bool at(int32_t distance) const { return word[distance / cell_size] >> distance % cell_size & 1; }

  /// The same for 32 of a thread's columns, from its `first`-th on, as bits: pairs of columns, 8 apart.
  template <class Columns>
  FLASHCUTE_HD uint32_t bits(int32_t first) const {
    static_assert(Columns::column_distance(1) == 1 && Columns::column_distance(2) == 8);
    uint32_t found = 0;
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#pragma unroll
#endif
    for (int32_t i = 0; i < 2; ++i) {
      int32_t const place = first / 16 + i;
      if (place < words) found |= pairs(word[place]) << 16 * i;
    }
    return found;
  }

 private:
  /// The 16 bits of a word at 0, 1, 8, 9, ..., 57.
  FLASHCUTE_HD static uint32_t pairs(uint64_t x) {
    x &= 0x0303030303030303;
    x = (x | x >> 6) & 0x000f000f000f000f;
    x = (x | x >> 12) & 0x000000ff000000ff;
    return static_cast<uint32_t>(x | x >> 24) & 0xffff;
  }
};

/// A block of columns that a tile visits. `partial`: some element of it may be hidden from some row.
struct MapBlock {
  int32_t number;
  bool partial;
};

/// The blocks of a tile of rows that a map shows within a band: those in whose cells some row of the tile's sees some
/// column. They are found 32 at a time, a page, by two bits each.
class MapPages {
 public:
  static constexpr int32_t blocks_of_page = 32;

  /// None.
  FLASHCUTE_HD MapPages() {}

  /// Of rows [row0, row0 + rows) of the map, in blocks of `block` columns.
  FLASHCUTE_HD MapPages(BandRange const& band, CellMap const& map, int32_t row0, int32_t rows, int32_t block)
      : band_(band),
        map_(map),
        row0_(row0 / cell_size),
        rows_(ceil_div(row0 + rows, cell_size) - row0_),
        block_(block) {}

  FLASHCUTE_HD BandRange const& band() const { return band_; }

  // Pages [first_page, end_page) have all blocks.
  FLASHCUTE_HD int32_t first_page() const { return band_.begin / blocks_of_page; }
  FLASHCUTE_HD int32_t end_page() const { return band_.empty() ? first_page() : ceil_div(band_.end, blocks_of_page); }

  /// Which blocks of a page are visited, and which of these are partial.
  struct Page {
    uint32_t visited, partial;

    /// The last of its blocks, which is no longer among them; its number is that in the page.
    FLASHCUTE_HD MapBlock take_last() {
      int32_t const bit = highest_bit(visited);
      visited &= ~(1u << bit);
      return {bit, (partial >> bit & 1) != 0};
    }
    /// How many of its blocks come after the last partial one.
    FLASHCUTE_HD int32_t full_at_end() const {
      uint32_t const left = partial & visited;
      return count_bits(visited & ~low_bits(left == 0 ? 0 : highest_bit(left) + 1));
    }
  };
  FLASHCUTE_HD Page read(int32_t page) const {
    Cells const cells = map_.exists() ? cells_of_page(page) : Cells{~0u, ~0u};
    int32_t const first = page * blocks_of_page;
    uint32_t const visited = cells.some & low_bits(band_.end - first) & ~low_bits(band_.begin - first);
    uint32_t const full = cells.whole & low_bits(band_.full_end - first) & ~low_bits(band_.full_begin - first);
    return {visited, visited & ~full};
  }

  /// How many blocks there are.
  FLASHCUTE_HD int32_t count() const {
    int32_t count = 0;
    for (int32_t page = first_page(); page < end_page(); ++page) count += count_bits(read(page).visited);
    return count;
  }

  /// The map of the next query head takes the place of this one's.
  FLASHCUTE_HD void move_to_next_head() { map_.move_to_next_head(); }

 private:
  /// Of some cells, or blocks: which are seen by some row of the tile, and which of all rows whole.
  struct Cells {
    uint32_t some, whole;
  };

  /// Of the cells of word `w`.
  FLASHCUTE_HD Cells cells_of(int32_t w) const {
    Cells cells{0, ~0u};
    if (w >= map_.words()) return cells;
    constexpr int32_t at_once = 4;  // loads in flight together; the last row may be read again
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#pragma unroll 1
#endif
    for (int32_t r = 0; r < rows_; r += at_once) {
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#pragma unroll
#endif
      for (int32_t i = 0; i < at_once; ++i) {
        int32_t const row = row0_ + min_of(r + i, rows_ - 1);
        cells.some |= map_.some(row, w);
        cells.whole &= map_.whole(row, w);
      }
    }
    return cells;
  }

  /// Of the blocks of a page.
  FLASHCUTE_HD Cells cells_of_page(int32_t page) const {
    static_assert(blocks_of_page == cells_of_word);
    if (block_ == cell_size) return cells_of(page);
    if (block_ == 2 * cell_size) {
      Cells const low = cells_of(2 * page), high = cells_of(2 * page + 1);
      auto const pairs = [](uint32_t a, uint32_t b) { return every_other(a) | every_other(b) << 16; };
      return {pairs(low.some | low.some >> 1, high.some | high.some >> 1),
              pairs(low.whole & low.whole >> 1, high.whole & high.whole >> 1)};
    }
    // Blocks of other sizes, one by one.
    Cells blocks{0, ~0u};
    for (int32_t b = 0; b < blocks_of_page; ++b) {
      int32_t const n = page * blocks_of_page + b;
      int32_t const from = n * block_ / cell_size, to = ((n + 1) * block_ - 1) / cell_size;
      for (int32_t w = from / cells_of_word; w <= to / cells_of_word; ++w) {
        Cells const cells = cells_of(w);
        uint32_t const own = low_bits(to + 1 - w * cells_of_word) & ~low_bits(from - w * cells_of_word);
        if ((cells.some & own) != 0) blocks.some |= 1u << b;
        if ((cells.whole & own) != own) blocks.whole &= ~(1u << b);
      }
    }
    return blocks;
  }

  /// Bits 0, 2, 4, ... side by side.
  FLASHCUTE_HD static uint32_t every_other(uint32_t x) {
    x &= 0x55555555;
    x = (x | x >> 1) & 0x33333333;
    x = (x | x >> 2) & 0x0f0f0f0f;
    x = (x | x >> 4) & 0x00ff00ff;
    return (x | x >> 8) & 0xffff;
  }

  BandRange band_ = {0, 0, 0, 0};
  CellMap map_;
  int32_t row0_ = 0, rows_ = 0;  // of cells
  int32_t block_ = 1;
};

/// Takes the blocks of MapPages one after the other, from the last to the first or the reverse.
template <bool backward>
class MapWalk {
 public:
  FLASHCUTE_HD MapWalk() {}
  FLASHCUTE_HD explicit MapWalk(MapPages const& pages) : page_(backward ? pages.end_page() : pages.first_page() - 1) {}

  /// Sets `block` to the next one; false if there is none.
  FLASHCUTE_HD bool next(MapPages const& pages, MapBlock& block) {
    while (rest_.visited == 0) {
      if (backward ? page_ <= pages.first_page() : page_ + 1 >= pages.end_page()) return false;
      page_ += backward ? -1 : 1;
      rest_ = pages.read(page_);
    }
    int32_t const bit = backward ? highest_bit(rest_.visited) : lowest_bit(rest_.visited);
    block = {page_ * MapPages::blocks_of_page + bit, (rest_.partial >> bit & 1) != 0};
    rest_.visited &= ~(1u << bit);
    return true;
  }

 private:
  int32_t page_ = 0;
  MapPages::Page rest_ = {0, 0};  // blocks of the page that were not taken yet
};

/// As KvRange: the blocks of keys that a tile of query rows visits under a map, from the last to the first; and the
/// blocks of query rows that a tile of keys visits, from the first to the last. A loop over the blocks knows the one
/// ahead, for which a loader may ask.
class MapBlocks {
 public:
  static constexpr int32_t step = KvRange::step;
  static constexpr bool contiguous = false;

  /// None.
  FLASHCUTE_HD MapBlocks() {}
  FLASHCUTE_HD explicit MapBlocks(MapPages const& pages) : pages_(pages), walk_(pages) {
    any_ = walk_.next(pages_, ahead_);
  }

  FLASHCUTE_HD MapPages const& pages() const { return pages_; }
  FLASHCUTE_HD int32_t visits() const { return pages_.count(); }

  // Before the loop, `ahead` is the first block; in the loop's body, the block after the current one.
  FLASHCUTE_HD bool empty() const { return !any_; }
  FLASHCUTE_HD int32_t first() const { return ahead_.number; }
  FLASHCUTE_HD int32_t next(int32_t /*n*/) const { return ahead_.number; }
  FLASHCUTE_HD int32_t left(int32_t /*n*/) const { return any_ ? 2 : 1; }

  /// Takes the block ahead.
  FLASHCUTE_HD MapBlock take() const {
    MapBlock const block = ahead_;
    any_ = walk_.next(pages_, ahead_);
    return block;
  }

  /// The columns between the first and the last block.
  template <class Sequence>
  FLASHCUTE_HD RowRange keys(bool /*only_partial*/, int32_t block_n, Sequence const& sequence) const {
    return {pages_.band().begin * block_n, min_of(pages_.band().end * block_n, sequence.keys())};
  }

  template <class Body>
  FLASHCUTE_HD void for_each_backward(Body&& body) const {
    while (any_) visit(take(), body);
  }

  template <class Body>
  FLASHCUTE_HD static void visit(MapBlock const& block, Body&& body) {
    if (block.partial) {
      body(block.number, std_::true_type{});
    } else {
      body(block.number, std_::false_type{});
    }
  }

 private:
  MapPages pages_;
  mutable MapWalk<true> walk_;
  mutable MapBlock ahead_ = {0, false};
  mutable bool any_ = false;  // whether there is a block ahead
};

/// As QueryRange: the blocks of query rows that a tile of keys visits under a map, from the first to the last.
class MapQueryBlocks {
 public:
  FLASHCUTE_HD explicit MapQueryBlocks(MapPages const& pages) : pages_(pages) {}

  FLASHCUTE_HD MapPages const& pages() const { return pages_; }

  /// The map of the next query head takes the place of this one's.
  FLASHCUTE_HD void move_to_next_head() { pages_.move_to_next_head(); }

  /// The rows between the first and the last block.
  template <class Sequence>
  FLASHCUTE_HD RowRange rows(bool /*only_partial*/, int32_t block_m, Sequence const& sequence) const {
    return {pages_.band().begin * block_m, min_of(pages_.band().end * block_m, sequence.rows())};
  }

  template <class Body>
  FLASHCUTE_HD void for_each(Body&& body) const {
    MapWalk<false> walk(pages_);
    for (MapBlock block; walk.next(pages_, block);) MapBlocks::visit(block, body);
  }

 private:
  MapPages pages_;
};

/// A block of keys of a tile as the loading warp of Hopper's forward announces it.
struct AnnouncedBlock {
  int32_t number;
  int32_t full_after;  // how many of the blocks after it are full before one is not; fewer may be told
  bool partial, last;
};

/// An iterator over the blocks that a tile of the GPU's backward visits, as PassingBlocks: from the first to the last,
/// of one head, then of the next. Each head may have a map of its own.
class PassingCells {
 public:
  int32_t head, block;  // the current one
  int32_t left;         // 0: there is none; 1: it is the last; 2: there are more

  /// Blocks of keys of one K/V head.
  FLASHCUTE_HD static PassingCells of(MapBlocks const& blocks, int32_t kv_head) {
    return PassingCells(blocks.pages(), kv_head, kv_head).after().after();
  }

  /// Blocks of queries of `heads` heads; `blocks` is what the first of them visits.
  FLASHCUTE_HD static PassingCells of(MapQueryBlocks const& blocks, int32_t /*complete*/, int32_t first_head,
                                      int32_t heads) {
    return PassingCells(blocks.pages(), first_head, first_head + heads - 1).after().after();
  }

  FLASHCUTE_HD bool partial() const { return partial_; }
  FLASHCUTE_HD int32_t stage(int32_t stages) const { return index_ % stages; }
  // Blocks do not follow each other: none continues where the one before it ends. And rows may differ in each.
  FLASHCUTE_HD static constexpr bool starts_anew() { return true; }
  FLASHCUTE_HD static constexpr bool before_full() { return true; }

  /// The iterator at the block ahead, which becomes the current one.
  FLASHCUTE_HD PassingCells after() const {
    PassingCells at = *this;
    at.head = ahead_head_;
    at.block = ahead_.number;
    at.partial_ = ahead_.partial;
    at.left = any_ ? 1 : 0;
    at.index_ = index_ + (any_ ? 1 : 0);
    at.any_ = at.find();
    if (at.left > 0 && at.any_) at.left = 2;
    return at;
  }

 private:
  /// Before the first block, with none ahead.
  FLASHCUTE_HD PassingCells(MapPages const& pages, int32_t first_head, int32_t last_head)
      : head(first_head),
        block(0),
        left(0),
        pages_(pages),
        walk_(pages),
        ahead_head_(first_head),
        last_head_(last_head) {}

  /// Sets the block ahead: the next of its head, or the first of the next head that has any.
  FLASHCUTE_HD bool find() {
    while (!walk_.next(pages_, ahead_)) {
      if (ahead_head_ == last_head_) return false;
      ++ahead_head_;
      pages_.move_to_next_head();
      walk_ = MapWalk<false>(pages_);
    }
    return true;
  }

  MapPages pages_;  // of the head ahead
  MapWalk<false> walk_;
  MapBlock ahead_ = {0, false};
  int32_t ahead_head_, last_head_;
  int32_t index_ = -1;  // how many blocks came before the current one
  bool any_ = false;    // whether there is a block ahead
  bool partial_ = false;
};

}  // namespace flashcute
