// delta = rowsum(dO * O) - dLSE of query rows: with the LSE, all that the backward needs of the forward's softmax.
#pragma once

#include "flashcute/core/backward_params.hpp"
#include "flashcute/device/rows.hpp"

namespace flashcute {

/// Lanes that share a row: enough to read it with one load each, at most a warp.
constexpr int lanes_of_row(int columns, int columns_of_lane) {
  int count = 1;
  while (count < 32 && count * columns_of_lane < columns) count *= 2;
  return count;
}

/// delta of tiles of TileRows query rows, by `Threads` threads that read `CopyBytes` at once of rows of at most
/// `Columns` columns.
template <class Element, int TileRows, int Columns, int CopyBytes, int Threads>
class Delta {
  static constexpr int vector = CopyBytes / sizeof(Element);
  using Word = cute::uint_bit_t<8 * CopyBytes>;
  static constexpr int lanes = lanes_of_row(Columns, vector);
  static constexpr int rows_per_pass = Threads / lanes;

 public:
  /// Calls result(row, delta) for each row of the tile that exists, once, in one thread of the block.
  template <class Tile, class Result>
  FLASHCUTE_DEVICE static void compute(BackwardParams const& p, Tile const& tile, Result const& result) {
    ForwardParams const& f = p.forward;
    int const lane = thread_index() % lanes;
    auto const& entry = tile.entry;
    auto const out = Rows<Element>::of(f.out, f.out_stride, entry.batch, tile.head, entry.first_query);
    auto const dout = Rows<Element>::of(p.dout, p.dout_stride, entry.batch, tile.head, entry.first_query);
    CUTE_UNROLL
    for (int pass = 0; pass < ceil_div(TileRows, rows_per_pass); ++pass) {
      int const row = pass * rows_per_pass + thread_index() / lanes;
      float sum = 0;
      if (row < tile.rows) {
        for (int c = lane * vector; c < f.head_dim_v; c += lanes * vector) {
          sum += dot(out.first + (tile.row0 + row) * out.stride + c, dout.first + (tile.row0 + row) * dout.stride + c);
        }
      }
      finish(p, tile, row, lane, sum, result);
    }
  }

  /// The same by threads that have no others to hide the latency of memory, with all loads in flight together.
  /// `thread`: the number of this one. Instead of what does not exist something else is loaded: a branch would wait for
  /// the loads before.
  template <class Tile, class Result>
  FLASHCUTE_DEVICE static void compute_at_once(BackwardParams const& p, Tile const& tile, Result const& result,
                                               int thread) {
    constexpr int passes = TileRows / rows_per_pass;
    static_assert(TileRows % rows_per_pass == 0 && lanes * vector >= Columns);
    ForwardParams const& f = p.forward;
    int const lane = thread % lanes, column = min_of(lane * vector, f.head_dim_v - vector);
    auto const& entry = tile.entry;
    auto const out = Rows<Element>::of(f.out, f.out_stride, entry.batch, tile.head, entry.first_query);
    auto const dout = Rows<Element>::of(p.dout, p.dout_stride, entry.batch, tile.head, entry.first_query);
    Word a[passes], b[passes];
    CUTE_UNROLL
    for (int pass = 0; pass < passes; ++pass) {
      int64_t const row = tile.row0 + min_of(pass * rows_per_pass + thread / lanes, tile.rows - 1);
      a[pass] = global_load<Word>(out.first + row * out.stride + column);
      b[pass] = global_load<Word>(dout.first + row * dout.stride + column);
    }
    CUTE_UNROLL
    for (int pass = 0; pass < passes; ++pass) {
      int const row = pass * rows_per_pass + thread / lanes;
      float sum = lane * vector < f.head_dim_v ? dot(a[pass], b[pass]) : 0.f;
      finish(p, tile, row, lane, sum, result);
    }
  }

 private:
  /// The sums of the lanes of a row become its delta.
  template <class Tile, class Result>
  FLASHCUTE_DEVICE static void finish(BackwardParams const& p, Tile const& tile, int row, int lane, float sum,
                                      Result const& result) {
    CUTE_UNROLL
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane != 0 || row >= tile.rows) return;
    if (p.dlse != nullptr) {
      auto const offset =
          row_offset(p.dlse_stride, tile.entry.batch, tile.head, tile.entry.first_query + tile.row0 + row);
      sum -= global_load<float>(static_cast<float const*>(p.dlse) + offset);
    }
    result(row, sum);
  }

  FLASHCUTE_DEVICE static float dot(Element const* a, Element const* b) {
    return dot(global_load<Word>(a), global_load<Word>(b));
  }

  FLASHCUTE_DEVICE static float dot(Word const& a, Word const& b) {
    auto const words = cute::make_tuple(a, b);
    auto const* x = reinterpret_cast<Element const*>(&cute::get<0>(words));
    auto const* y = reinterpret_cast<Element const*>(&cute::get<1>(words));
    float sum = 0;
    CUTE_UNROLL
    for (int i = 0; i < vector; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(y[i]);
    return sum;
  }
};

}  // namespace flashcute
