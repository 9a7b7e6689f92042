// How a thread block that makes a block map reads booleans: as bits, cell after cell. What lies side by side in memory
// is read by neighbouring lanes, be it keys or queries.
#pragma once

#include "flashcute/core/bits.hpp"
#include "flashcute/core/block_map.hpp"
#include "flashcute/device/instructions.hpp"

namespace flashcute {

/// Transposes a square of 32 x 32 bits: bit c of lane r becomes bit r of lane c.
FLASHCUTE_DEVICE uint32_t transposed(uint32_t word) {
  uint32_t mask = 0x0000ffff;
  CUTE_UNROLL
  for (int32_t half = 16; half > 0; half /= 2, mask ^= mask << half) {
    uint32_t const other = shuffle_xor_word(word, half);
    bool const is_lower = (thread_index() & half) == 0;
    word = is_lower ? (word & mask) | (other & mask) << half : (word & ~mask) | (other >> half & mask);
  }
  return word;
}

/// The booleans of a row of cells, from one cell on. Lines are rows, or columns if the booleans of a column are side by
/// side in memory.
class BooleanCells {
 public:
  /// Of `rows` rows and `columns` columns. Column c of row r is at from[r * down + c * across].
  FLASHCUTE_DEVICE BooleanCells(uint8_t const* from, int64_t down, int64_t across, int32_t rows, int32_t columns)
      : from_(from), down_(down), across_(across), rows_(rows), columns_(columns) {}

  FLASHCUTE_DEVICE bool by_columns() const { return down_ == 1 && across_ != 1; }

  /// A warp reads a cell: word i becomes line i, whose bit j is the line's j-th boolean; what does not exist is 0. Four
  /// lanes read a line.
  FLASHCUTE_DEVICE void read(int32_t cell, uint64_t* words) const {
    bool const turned = by_columns();
    int32_t const columns = columns_ - cell * cell_size;
    int32_t const lines = turned ? columns : rows_, length = turned ? rows_ : columns;
    int64_t const apart = turned ? across_ : down_, near = turned ? 1 : across_;
    int32_t const lane = thread_index() % 32, part = lane % 4, left = length - part * part_size;
    uint8_t const* const first = from_ + cell * cell_size * across_;
    uint8_t const* const own = first + part * part_size * near;
    auto const store = [&](int32_t line, uint32_t bits) {
      shared_store(reinterpret_cast<uint16_t*>(words + line) + part, static_cast<uint16_t>(bits));
    };
    bool const aligned = near == 1 && (reinterpret_cast<size_t>(first) | static_cast<size_t>(apart)) % part_size == 0;
    if (aligned && lines >= cell_size && length >= cell_size) {
      uint4 bytes[cell_size / 8];  // all are requested before the first is used
      CUTE_UNROLL
      for (int32_t i = 0; i < cell_size / 8; ++i) bytes[i] = booleans_at(own + (i * 8 + lane / 4) * apart);
      CUTE_UNROLL
      for (int32_t i = 0; i < cell_size / 8; ++i) store(i * 8 + lane / 4, bits_of(bytes[i]));
      return;
    }
    CUTE_NO_UNROLL
    for (int32_t line = lane / 4; line < cell_size; line += 8) {
      store(line, line < lines ? bits_of(own + line * apart, near, left) : 0);
    }
  }

  /// A warp transposes a cell, after all have read: word i becomes row i.
  FLASHCUTE_DEVICE static void turn(uint64_t* words) {
    uint64_t* const own = words + thread_index() % 32;
    auto const first = shared_load<uint64_t>(own), second = shared_load<uint64_t>(own + 32);
    auto const row = [&](int32_t shift) {
      uint64_t const low = transposed(static_cast<uint32_t>(first >> shift));
      return low | uint64_t{transposed(static_cast<uint32_t>(second >> shift))} << 32;
    };
    shared_store(own, row(0));
    shared_store(own + 32, row(32));
  }

 private:
  static constexpr int32_t part_size = cell_size / 4;

  FLASHCUTE_DEVICE static uint4 booleans_at(uint8_t const* from) { return *reinterpret_cast<uint4 const*>(from); }

  /// Which of 16 booleans are true.
  FLASHCUTE_DEVICE static uint32_t bits_of(uint4 const& bytes) {
    return nonzero_bytes(bytes.x) | nonzero_bytes(bytes.y) << 4 | nonzero_bytes(bytes.z) << 8 |
           nonzero_bytes(bytes.w) << 12;
  }

  /// The same of booleans in memory, of which `left` exist.
  FLASHCUTE_DEVICE static uint32_t bits_of(uint8_t const* from, int64_t near, int32_t left) {
    if (near == 1 && left >= part_size && reinterpret_cast<size_t>(from) % part_size == 0) {
      return bits_of(booleans_at(from));
    }
    uint32_t bits = 0;
    CUTE_NO_UNROLL
    for (int32_t i = 0; i < min_of(left, part_size); ++i) bits |= uint32_t{from[i * near] != 0} << i;
    return bits;
  }

  uint8_t const* from_;
  int64_t down_, across_;
  int32_t rows_, columns_;
};

}  // namespace flashcute
