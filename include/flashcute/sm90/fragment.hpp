// What a thread holds of a product of its warpgroup (WGMMA), and operands of products in shared memory.
#pragma once

#include "flashcute/sm90/instructions.hpp"
// Built on the instructions above.
#include "flashcute/device/fragment.hpp"

namespace flashcute::sm90 {

/// This thread's part of a warpgroup's accumulator of 64 rows.
struct WarpgroupFragment {
  static constexpr int rows_per_thread = 2;
  static constexpr bool masks_by_bits = true;

  /// Of 64 x Columns, in the layout of mma.sync, so that code that reads it by row and column serves both kernels.
  template <class Columns>
  FLASHCUTE_DEVICE static auto accumulator() {
    using namespace cute;
    return make_tensor<float>(Layout<Shape<Shape<_2, _2>, _1, Int<Columns::value / 8>>>{});  // (MMA, MMA_M, MMA_N)
  }

  /// The thread's i-th row, counted from the warpgroup's first.
  FLASHCUTE_DEVICE static int row(int i) { return static_cast<int>(thread() / 32 * 16 + thread() % 32 / 4) + 8 * i; }
  FLASHCUTE_DEVICE static int first_column() { return static_cast<int>(2 * (thread() % 4)); }
  /// Columns from the thread's first to its j-th.
  FLASHCUTE_DEVICE static constexpr int column_distance(int j) { return j % 2 + j / 2 * 8; }
  /// How many of the thread's columns are less than `distance` from its first.
  FLASHCUTE_DEVICE static int columns_before(int distance) {
    int const d = max_of(distance, 0);
    return d / 8 * 2 + min_of(d % 8, 2);
  }

 private:
  /// Of the warpgroup. (Unsigned: of a signed number nvcc 13.0 computes quotients by powers of two in four
  /// instructions.)
  FLASHCUTE_DEVICE static uint32_t thread() { return static_cast<uint32_t>(thread_index()) % warpgroup_size; }
};

/// The accumulator as WGMMA takes it: so many registers. (In the atom's own layout of rows and columns CuTe computes
/// the index of each register of each product, which takes the compiler longer than all the rest.)
template <class Accumulator>
FLASHCUTE_DEVICE auto as_warpgroup_accumulator(Accumulator& acc) {
  using namespace cute;
  return make_tensor(acc.data(), Layout<Int<decltype(size(acc))::value>>{});
}

/// Waits until at most `Pending` of the products that were begun are not done, those of `done` among them.
template <int Pending, class... Accumulators>
FLASHCUTE_DEVICE void finish_products(Accumulators&... done) {
  wait_for_products<Pending>();
  (keep_in_place(done), ...);
}

/// An operand of WGMMA in shared memory, in pages whose rows are 128 or 64 bytes, in the swizzle of that width.
template <int PageBytes, class Shape, class Stride>
using SwizzledOperand = cute::ComposedLayout<cute::Swizzle<PageBytes == 128 ? 3 : 2, 4, 3>,
                                             cute::smem_ptr_flag_bits<16>, cute::Layout<Shape, Stride>>;

}  // namespace flashcute::sm90
