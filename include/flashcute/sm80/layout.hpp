// From a configuration to CuTe types: the layout of tiles in shared memory, and how warps multiply them.
#pragma once

#include "flashcute/device/instructions.hpp"

namespace flashcute {

/// The arch that a device translation unit is compiled for, for the rules that depend on it.
#if defined(__CUDA_ARCH__)
inline constexpr Arch compiled_arch = __CUDA_ARCH__ / 10;
#else
inline constexpr Arch compiled_arch = 80;
#endif

template <TileConfig C>
struct TileLayout {
  using Element = typename TensorCore<C.dtype>::Element;
  using Operand = std_::conditional_t<C.math == Math::tf32x3, Element, typename TensorCore<C.dtype>::Operand>;
  using BlockM = cute::Int<C.block_m>;
  using BlockN = cute::Int<C.block_n>;
  using HeadDim = cute::Int<C.head_dim>;
  using HeadDimV = cute::Int<C.head_dim_v>;

  // ---- shared memory ----
  /// A tile of Rows x Columns, cut into chunks whose rows are at most 128 bytes, one word for each of the 32 banks. The
  /// swizzle XORs the index of a 16-byte unit with the row: without it, the eight rows of one ldmatrix phase would
  /// begin in the same few banks.
  template <class Rows, class Columns>
  struct Smem {
    using Element = typename TileLayout::Element;
    using TileRows = Rows;
    using TileColumns = Columns;
    static constexpr int rows = Rows::value;
    static constexpr CopyShape shape = CopyShape::of(C, Columns::value);
    static constexpr int unit = 16 / sizeof(Element);  // 16 bytes of elements, which stay together
    static constexpr int swizzle_bits = C.swizzled ? cute::log_2(static_cast<unsigned>(shape.chunk / unit)) : 0;
    using Chunk = cute::Int<shape.chunk>;
    using Swizzle = cute::Swizzle<swizzle_bits, cute::log_2(static_cast<unsigned>(unit)), 3>;
    // The same as CuTe's tile_to_shape of a swizzled atom of 8 rows of a chunk.
    using Layout = cute::ComposedLayout<  // (rows, columns)
        Swizzle, cute::_0,
        cute::Layout<cute::Shape<cute::Shape<cute::_8, cute::Int<rows / 8>>,
                                 cute::Shape<Chunk, cute::Int<Columns::value / shape.chunk>>>,
                     cute::Stride<cute::Stride<Chunk, cute::Int<8 * shape.chunk>>,
                                  cute::Stride<cute::_1, cute::Int<rows * shape.chunk>>>>>;
    /// The number that the swizzle XORs with the index of a unit within a row of a chunk.
    FLASHCUTE_DEVICE static constexpr int mask(int row) { return row % 8 >> (3 - swizzle_bits); }
  };
  using SmemQ = Smem<BlockM, HeadDim>;
  using SmemK = Smem<BlockN, HeadDim>;
  using SmemV = Smem<BlockN, HeadDimV>;
  using SmemO = Smem<BlockM, HeadDimV>;

  struct SharedStorage {
    alignas(128) Element q[C.block_m * max_of(C.head_dim, C.head_dim_v)];  // the output tile reuses it
    alignas(128) Element k[C.stages][C.block_n * C.head_dim];
    alignas(128) Element v[C.stages][C.block_n * C.head_dim_v];
  };

  // ---- tensor cores ----
  // (The CUDA cores compute the elements that the tensor cores would.)
  // The columns of a product are shared by WarpsN warps, 16 at a time, and its rows by the others. Usually all warps
  // share the rows, so that a row of scores lives in one quad of lanes.
  using Mma = cute::MMA_Traits<typename TensorCore<C.dtype>::Mma>;
  static constexpr int k_step = cute::size<2>(typename Mma::Shape_MNK{});

  static constexpr int threads = num_threads(C);
  static constexpr int rows_per_thread = 2 * C.block_m / (16 * C.num_warps);
  static constexpr bool masks_by_bits = false;  // one comparison with a constant per element is as cheap here

  // The layouts of a thread's fragments. CuTe's partition_fragment_A, _B and _C derive the same
  // (tests/cpp/kernel/test_layout.cpp compares), but that takes a third of a kernel's compile time.
  template <int WarpsN>
  static constexpr int warps_m = C.num_warps / WarpsN;
  /// Of a Rows x Columns accumulator: (MMA, MMA_M, MMA_N)
  template <class Rows, class Columns, int WarpsN>
  using FragmentC =
      cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2>, cute::Int<Rows::value / (16 * warps_m<WarpsN>)>,
                               cute::Int<Columns::value / (8 * WarpsN)>>>;
  /// Of a Rows x Depth left operand: (MMA, MMA_M, MMA_K). In TF32 a K-step has half the columns.
  using AtomA =
      std_::conditional_t<k_step == 16, cute::Shape<cute::_2, cute::_2, cute::_2>, cute::Shape<cute::_2, cute::_2>>;
  template <class Rows, class Depth, int WarpsN>
  using FragmentA = cute::Layout<
      cute::Shape<AtomA, cute::Int<Rows::value / (16 * warps_m<WarpsN>)>, cute::Int<Depth::value / k_step>>>;
  /// Of a Columns x Depth right operand: (MMA, MMA_N, MMA_K)
  using AtomB = std_::conditional_t<k_step == 16, cute::Shape<cute::_2, cute::_2>, cute::Shape<cute::_2>>;
  template <class Columns, class Depth, int WarpsN>
  using FragmentB =
      cute::Layout<cute::Shape<AtomB, cute::Int<Columns::value / (8 * WarpsN)>, cute::Int<Depth::value / k_step>>>;

  /// This thread's part of a Rows x Columns accumulator, cleared.
  template <class Rows, class Columns, int WarpsN = 1>
  FLASHCUTE_DEVICE static auto accumulator() {
    auto acc = cute::make_tensor<float>(FragmentC<Rows, Columns, WarpsN>{});  // (MMA, MMA_M, MMA_N)
    cute::clear(acc);
    return acc;
  }

  /// (row, column) of the first element that a thread holds of an accumulator.
  template <int WarpsN = 1>
  FLASHCUTE_DEVICE static auto first_coordinate(int thread) {
    int const lane = thread % 32, warp = thread / 32;
    int const warp_m = WarpsN == 1 ? warp : warp % warps_m<WarpsN>, warp_n = WarpsN == 1 ? 0 : warp / warps_m<WarpsN>;
    return cute::make_arithmetic_tuple(lane / 4 + 16 * warp_m, lane % 4 * 2 + 16 * warp_n);
  }

  /// (row, column) of every element of a Rows x Columns accumulator that a thread holds: a tensor (MMA, MMA_M, MMA_N).
  template <class Rows, class Columns, int WarpsN = 1>
  FLASHCUTE_DEVICE static auto coordinates(int thread) {
    using namespace cute;
    using Elements = Layout<
        Shape<Shape<_2, _2>, Int<Rows::value / (16 * warps_m<WarpsN>)>, Shape<_2, Int<Columns::value / (16 * WarpsN)>>>,
        Stride<Stride<E<1>, ScaledBasis<_8, 0>>, ScaledBasis<Int<16 * warps_m<WarpsN>>, 0>,
               Stride<ScaledBasis<_8, 1>, ScaledBasis<Int<16 * WarpsN>, 1>>>>;
    return make_tensor(make_inttuple_iter(first_coordinate<WarpsN>(thread)), Elements{});
  }
  // The distances between them do not depend on the thread; as constexpr functions they need no analysis by the
  // compiler:
  /// Tile rows from a thread's first row to its i-th: 8 within an m16 slice, then on to the warps' next slices.
  template <int WarpsN = 1>
  FLASHCUTE_DEVICE static constexpr int row_distance(int i) {
    return i % 2 * 8 + i / 2 * 16 * C.num_warps / WarpsN;
  }
  /// Columns from a thread's first column to its j-th: pairs, 8 apart, then on to the warps' next 16.
  template <int WarpsN = 1>
  FLASHCUTE_DEVICE static constexpr int column_distance(int j) {
    return j % 2 + j / 2 % 2 * 8 + j / 4 * 16 * WarpsN;
  }
};

}  // namespace flashcute
