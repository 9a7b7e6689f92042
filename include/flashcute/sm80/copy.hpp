// Copies of tiles between global and shared memory: which thread copies which elements, and where they are.
#pragma once

#include "flashcute/device/nonfinite.hpp"
#include "flashcute/sm80/layout.hpp"

namespace flashcute {

/// The addresses of a thread's elements in a tile: the first depends on the thread, the others follow at constant
/// distances. As with `Pieces` (gemm.hpp), an XOR accounts for the swizzle.
template <class Smem>
class Places {
  using Element = typename Smem::Element;
  static constexpr int chunk = Smem::shape.chunk;
  static constexpr size_t size = sizeof(Element);  // unsigned arithmetic: with int, nvcc spills more

 public:
  FLASHCUTE_DEVICE Places(Element* tile, int row, int column)
      : tile_(reinterpret_cast<char*>(tile)),
        first_(size * ((column / chunk * Smem::rows + row) * chunk + (column % chunk ^ Smem::unit * Smem::mask(row)))) {
  }

  /// The element `down` rows and `across` columns further; `down` is a multiple of 8, and `across` shares no set bit
  /// with the first column.
  FLASHCUTE_DEVICE Element* at(int down, int across) const {
    int const further = size * (across / chunk * Smem::rows + down) * chunk;
    return reinterpret_cast<Element*>(tile_ + (first_ ^ size * (across % chunk)) + further);
  }

 private:
  char* tile_;
  int first_;
};

/// This thread's part of the copy of a tile; `Smem` is a TileLayout::Smem.
template <TileConfig C, class Smem>
class TileCopy {
  using Element = typename TileLayout<C>::Element;
  using Word = cute::uint_bit_t<8 * C.copy_bytes>;
  static constexpr CopyShape shape = Smem::shape;

 public:
  /// This thread's first element of a tile in global memory.
  template <class Pointer>
  FLASHCUTE_DEVICE static Pointer first(Pointer tile, int64_t row_stride) {
    return tile + row() * row_stride + column();
  }

  /// Starts copying a tile to shared memory. Columns from `columns` on, and in a partial tile the rows from
  /// `rows` on, become zeros: nothing beyond the tensor is ever multiplied.
  template <class Partial>
  FLASHCUTE_DEVICE static void load(Element const* from, int64_t row_stride, int rows, int columns, Element* tile,
                                    Partial) {
    auto const places = part(tile, thread_index());  // (COPY, COPY_rows, COPY_columns)
    CUTE_UNROLL
    for (int i = 0; i < row_passes; ++i, from += shape.rows_per_pass * row_stride) {
      bool const row_exists = !Partial::value || i * shape.rows_per_pass + row() < rows;
      auto const exists = [&](int j) { return row_exists && column() + j * columns_per_pass < columns; };
      if constexpr (C.async_copy) {
        CUTE_UNROLL
        for (int j = 0; j < column_passes; ++j) {
          copy_async<Word>(from + j * columns_per_pass, &places(0, i, j), exists(j));
        }
      } else {
        Word words[column_passes];  // so that the loads of a row overlap
        CUTE_UNROLL
        for (int j = 0; j < column_passes; ++j) {
          words[j] = exists(j) ? global_load<Word>(from + j * columns_per_pass) : Word{};
        }
        CUTE_UNROLL
        for (int j = 0; j < column_passes; ++j) shared_store(&places(0, i, j), words[j]);
      }
    }
  }

  /// Whether the part of a tile that this thread copied to shared memory is finite.
  FLASHCUTE_DEVICE static bool is_finite(Element* tile) {
    auto const places = part(tile, thread_index());  // (COPY, COPY_rows, COPY_columns)
    FiniteCheck<Element> check;
    CUTE_UNROLL
    for (int i = 0; i < row_passes; ++i) {
      CUTE_UNROLL
      for (int j = 0; j < column_passes; ++j) check.template look_at<max_of(4, C.copy_bytes)>(&places(0, i, j));
    }
    return check.all_finite();
  }

  /// Copies the elements of a tile that exist to global memory.
  FLASHCUTE_DEVICE static void store(Element* tile, Element* to, int64_t row_stride, int rows, int columns) {
    auto const places = part(tile, thread_index());  // (COPY, COPY_rows, COPY_columns)
    CUTE_UNROLL
    for (int i = 0; i < row_passes; ++i, to += shape.rows_per_pass * row_stride) {
      CUTE_UNROLL
      for (int j = 0; j < column_passes; ++j) {
        if (i * shape.rows_per_pass + row() < rows && column() + j * columns_per_pass < columns) {
          global_store(to + j * columns_per_pass, shared_load<Word>(&places(0, i, j)));
        }
      }
    }
  }

  /// The addresses of a thread's elements in a tile: (COPY, COPY_rows, COPY_columns). The same as partition_D of CuTe's
  /// tiled copy, which takes much longer to compile (tests/cpp/kernel/test_layout.cpp compares).
  FLASHCUTE_DEVICE static auto part(Element* tile, int thread) {
    using namespace cute;
    using Swizzle = typename Smem::Swizzle;
    constexpr int chunk = shape.chunk;
    int const row = thread / shape.threads_per_row, column = thread % shape.threads_per_row * shape.vector;
    if constexpr (shape.rows_per_pass % 8 == 0 && columns_per_pass == chunk) {
      // All passes have the swizzle of the first. Its place is computed in CuTe's steps: with other steps nvcc 13.0
      // spills up to 200 bytes more in the backward.
      using Passes = Layout<Shape<_1, Int<row_passes>, Int<column_passes>>,
                            Stride<_0, Int<shape.rows_per_pass * chunk>, Int<Smem::rows * chunk>>>;
      int const in_8_rows = column + row % 8 * chunk;
      return make_tensor(make_smem_ptr(tile) + (Swizzle::apply(in_8_rows) + row / 8 * (8 * chunk)), Passes{});
    } else {
      using Passes = Layout<
          Shape<_1, Int<row_passes>, Shape<Int<chunk / columns_per_pass>, Int<Smem::TileColumns::value / chunk>>>,
          Stride<_0, Int<shape.rows_per_pass * chunk>, Stride<Int<columns_per_pass>, Int<Smem::rows * chunk>>>>;
      return make_tensor(make_smem_ptr(tile),
                         ComposedLayout<Swizzle, int, Passes>{Swizzle{}, row * chunk + column, Passes{}});
    }
  }

 private:
  static constexpr int columns_per_pass = shape.threads_per_row * shape.vector;
  static constexpr int row_passes = Smem::rows / shape.rows_per_pass;
  static constexpr int column_passes = Smem::TileColumns::value / columns_per_pass;

  FLASHCUTE_DEVICE static int row() { return thread_index() / shape.threads_per_row; }
  FLASHCUTE_DEVICE static int column() { return thread_index() % shape.threads_per_row * shape.vector; }
};

}  // namespace flashcute
