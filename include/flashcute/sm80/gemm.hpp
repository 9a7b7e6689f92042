// Matrix products by the tensor cores. An operand is a set of register fragments and the place that they are loaded
// from; the product loads the next fragments while the tensor cores work on the current ones.
#pragma once

#include "flashcute/device/fragment.hpp"
#include "flashcute/sm80/layout.hpp"

namespace flashcute {

/// The two products of attention as C.math computes them: operands for S = Q K^T and O += P V, and `gemm`.
template <TileConfig C, Math = C.math>
struct Products;

/// A tile in shared memory that has arrived: all threads may read it.
template <class Element>
struct ArrivedTile {
  Element const* tile;
  bool finite;  // whether all of it is; only computed if Products::wants_finite

  FLASHCUTE_DEVICE operator Element const*() const { return tile; }
};

/// Rounds a fragment in fp32, of 23 bits of fraction, to the 10 of TF32: the tensor cores would truncate it.
template <class Fragment>
FLASHCUTE_DEVICE void round_operand(Fragment&& fragment) {
  if constexpr (std_::is_same_v<typename std_::remove_reference_t<Fragment>::value_type, cute::tfloat32_t>) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(fragment); ++i) fragment(i) = round_tf32(static_cast<float>(fragment(i)));
  }
}

/// The pieces of a tile that one ldmatrix loads, 16 rows by 32 bytes: the addresses of their rows. They are CuTe's,
/// split by hand: 16 rows further the swizzle is the same, and 32 bytes further it differs by an XOR, so that one
/// register and constants give all addresses.
template <class Smem>
class Pieces {
  static constexpr int chunk_bytes = Smem::shape.chunk * sizeof(typename Smem::Element);
  static constexpr int per_chunk = chunk_bytes / 32;

 public:
  /// `tile` is aligned to 128 bytes. This lane passes to ldmatrix the address of row `row` of the tile: of the 16-byte
  /// half `half` of the piece that begins 32 * `column` bytes into the row.
  FLASHCUTE_DEVICE Pieces(void const* tile, int row, int half, int column = 0)
      : first_(shared_address(tile) + (column / per_chunk * Smem::rows + row) * chunk_bytes +
               16 * ((2 * (column % per_chunk) + half) ^ Smem::mask(row))) {}

  /// The same of the piece `rows` rows (a multiple of 16) and 32 * `column` bytes further. `column` must be a multiple
  /// of a power of 2 that is larger than the `column` of the constructor, so that the XOR adds.
  FLASHCUTE_DEVICE SharedAddress at(int rows, int column) const {
    return (computed_here(first_) ^ 32 * (column % per_chunk)) + (column / per_chunk * Smem::rows + rows) * chunk_bytes;
  }

 private:
  SharedAddress first_;
};

/// Fragments of A, whose rows Warps warps share: rows of a tile or, with Transposed, its columns.
template <class Fragment, class Smem, bool Transposed, int Warps>
struct OperandA {
  Fragment fragment;  // (MMA, MMA_M, MMA_K)
  Pieces<Smem> pieces;

  /// All rows of K-step k.
  FLASHCUTE_DEVICE void fetch(int k) {
    CUTE_UNROLL
    for (int m = 0; m < cute::size<1>(fragment); ++m) {
      auto a = fragment(cute::_, m, k);
      auto r = words_of(a);
      ldmatrix<Transposed>(Transposed ? pieces.at(16 * k, Warps * m) : pieces.at(16 * Warps * m, k), r(0), r(1), r(2),
                           r(3));
      round_operand(a);
    }
  }
};

/// Fragments of B, whose columns Warps warps share: rows of a tile (K) or, with Transposed, its columns (V).
template <class Fragment, class Smem, bool Transposed, int Warps>
struct OperandB {
  Fragment fragment;  // (MMA, MMA_N, MMA_K)
  Pieces<Smem> pieces;

  /// This warp's i-th 16 columns of K-step k.
  FLASHCUTE_DEVICE void fetch(int k, int i) {
    auto b = fragment(cute::_, 2 * i, k), next_b = fragment(cute::_, 2 * i + 1, k);
    auto r = words_of(b), next_r = words_of(next_b);
    ldmatrix<Transposed>(Transposed ? pieces.at(16 * k, Warps * i) : pieces.at(16 * Warps * i, k), r(0), r(1),
                         next_r(0), next_r(1));
    round_operand(b);
    round_operand(next_b);
  }
};

/// The order in which a K-step takes 8 rows of a tile of fp32: both operands must use the same.
enum class KOrder {
  registers,  // as `as_operand_a` numbers the columns of an accumulator; no bank conflicts
  memory,     // as in memory, which is also how ldmatrix loads the columns of the other operand
};

/// The elements of fp32 fragments whose K-steps are rows of a tile. ldmatrix transposes only 16-bit elements, so each
/// lane loads its elements one by one. As with `Pieces`, one register gives all addresses.
template <class Smem, KOrder Order>
class GatheredElements {
  static constexpr int chunk = Smem::shape.chunk, chunk_bytes = chunk * sizeof(float);
  static constexpr int row_step = Order == KOrder::registers ? 2 : 1;   // from lane to lane
  static constexpr int half_step = Order == KOrder::registers ? 1 : 4;  // from the first half of a K-step to the other

 public:
  /// Of the four lanes that share a column, this is number `lane`: it loads that row of each half.
  FLASHCUTE_DEVICE GatheredElements(void const* tile, int lane, int column)
      : first_(shared_address(tile) + (column / chunk * Smem::rows + row_step * lane) * chunk_bytes +
               16 * (column % chunk / 4 ^ Smem::mask(row_step * lane)) + 4 * (column % 4)) {}

  /// The element of half `half` of K-step k, `column` columns further; `column` shares no set bit with the first
  /// column.
  FLASHCUTE_DEVICE float at(int k, int half, int column) const {
    int const row = 8 * k + half_step * half, unit = column % chunk / 4 ^ Smem::mask(row);
    return shared_load_at((computed_here(first_) ^ 16 * unit) + (column / chunk * Smem::rows + row) * chunk_bytes);
  }

 private:
  SharedAddress first_;
};

/// Fragments of A in fp32 whose rows are columns of a tile.
template <class Fragment, class Elements, int Warps>
struct GatheredOperandA {
  Fragment fragment;  // (MMA, MMA_M, MMA_K)
  Elements elements;

  /// All rows of K-step k.
  FLASHCUTE_DEVICE void fetch(int k) {
    CUTE_UNROLL
    for (int m = 0; m < cute::size<1>(fragment); ++m) {
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float const x = elements.at(k, i / 2, 16 * Warps * m + 8 * (i % 2));
        fragment(i, m, k) = to_operand<typename Fragment::value_type>(x);
      }
    }
  }
};

/// Fragments of B in fp32 whose columns are columns of a tile.
template <class Fragment, class Elements, int Warps>
struct GatheredOperandB {
  Fragment fragment;  // (MMA, MMA_N, MMA_K)
  Elements elements;

  /// This warp's i-th 16 columns of K-step k.
  FLASHCUTE_DEVICE void fetch(int k, int i) {
    CUTE_UNROLL
    for (int n = 0; n < 2; ++n) {
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float const x = elements.at(k, half, 16 * Warps * i + 8 * n);
        fragment(half, 2 * i + n, k) = to_operand<typename Fragment::value_type>(x);
      }
    }
  }
};

/// Fragments that are already in registers (or a view of them).
template <class Fragment>
struct RegisterOperand {
  Fragment fragment;  // (MMA, MMA_M or MMA_N, MMA_K)

  FLASHCUTE_DEVICE void fetch(int) const {}
};

/// An A operand, loaded whole into registers.
template <class Operand>
FLASHCUTE_DEVICE auto held(Operand a) {
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(a.fragment); ++k) a.fetch(k);
  return RegisterOperand<decltype(a.fragment)>{a.fragment};
}

/// Products by tensor cores. WarpsN warps share the columns of a result, the others its rows.
template <TileConfig C, int WarpsN = 1>
struct TensorCoreProducts {
  using L = TileLayout<C>;
  using Element = typename L::Element;
  static constexpr int warps_m = C.num_warps / WarpsN;

  static constexpr bool wants_finite = false;

  /// Q as the A operand of S = Q K^T.
  FLASHCUTE_DEVICE static auto query(Element const* tile) { return rows_as_a<typename L::SmemQ>(tile); }

  /// The same, loaded whole into registers.
  FLASHCUTE_DEVICE static auto held_query(Element const* tile) { return held(query(tile)); }

  /// K as the B operand of S = Q K^T.
  FLASHCUTE_DEVICE static auto key(Element const* tile) { return rows_as_b<typename L::SmemK>(tile); }

  /// P as the A operand of O += P V.
  template <class Scores>
  FLASHCUTE_DEVICE static auto probabilities(Scores const& p) {  // (MMA, MMA_M, MMA_N)
    auto rounded = convert<typename L::Operand>(as_operand_a<typename L::Operand>(p));
    return RegisterOperand<decltype(rounded)>{rounded};
  }

  /// V as the B operand of O += P V.
  FLASHCUTE_DEVICE static auto value(Element const* tile) { return columns_as_b<typename L::SmemV>(tile); }

  /// A rounded accumulator (MMA, MMA_M, MMA_N) as the A operand of the next product.
  template <class Rounded>
  FLASHCUTE_DEVICE static auto operand_a(Rounded const& rounded) {
    auto view = as_operand_a<typename L::Operand>(rounded);
    return RegisterOperand<decltype(view)>{view};
  }

  /// The A operand whose rows are the rows of a tile: sums run over its columns.
  template <class Smem>
  FLASHCUTE_DEVICE static auto rows_as_a(Element const* tile) {
    auto fragment = fragment_a<typename Smem::TileRows, typename Smem::TileColumns>();
    // The order of the piece's four 8x8 tiles: rows 0-7 and 8-15, then the same of the next 16 bytes.
    Pieces<Smem> const pieces{tile, 16 * warp_m() + lane() % 16, lane() / 16};
    return OperandA<decltype(fragment), Smem, false, warps_m>{fragment, pieces};
  }

  /// The A operand whose rows are the columns of a tile: sums run over its rows.
  template <class Smem>
  FLASHCUTE_DEVICE static auto columns_as_a(Element const* tile) {
    auto fragment = fragment_a<typename Smem::TileColumns, typename Smem::TileRows>();
    if constexpr (sizeof(Element) == 2) {
      // The order of the piece's tiles: columns 0-7 and 8-15, then the same of the next 8 rows.
      Pieces<Smem> const pieces{tile, lane() / 16 * 8 + lane() % 8, lane() / 8 % 2, warp_m()};
      return OperandA<decltype(fragment), Smem, true, warps_m>{fragment, pieces};
    } else {
      using Elements = GatheredElements<Smem, KOrder::registers>;
      Elements const elements{tile, lane() % 4, 16 * warp_m() + lane() / 4};
      return GatheredOperandA<decltype(fragment), Elements, warps_m>{fragment, elements};
    }
  }

  /// The B operand whose columns are the rows of a tile: sums run over its columns.
  template <class Smem>
  FLASHCUTE_DEVICE static auto rows_as_b(Element const* tile) {
    auto fragment = fragment_b<typename Smem::TileRows, typename Smem::TileColumns>();
    // The order of the piece's tiles: 32 bytes of rows 0-7, then of rows 8-15.
    Pieces<Smem> const pieces{tile, 16 * warp_n() + lane() / 16 * 8 + lane() % 8, lane() / 8 % 2};
    return OperandB<decltype(fragment), Smem, false, WarpsN>{fragment, pieces};
  }

  /// The B operand whose columns are the columns of a tile: sums run over its rows, in `Order`.
  template <class Smem, KOrder Order = KOrder::registers>
  FLASHCUTE_DEVICE static auto columns_as_b(Element const* tile) {
    auto fragment = fragment_b<typename Smem::TileColumns, typename Smem::TileRows>();
    if constexpr (sizeof(Element) == 2) {
      // The order of the piece's tiles: rows 0-7 and 8-15, then the same of the next 8 columns.
      Pieces<Smem> const pieces{tile, lane() % 16, lane() / 16, warp_n()};
      return OperandB<decltype(fragment), Smem, true, WarpsN>{fragment, pieces};
    } else {
      using Elements = GatheredElements<Smem, Order>;
      Elements const elements{tile, lane() % 4, 16 * warp_n() + lane() / 4};
      return GatheredOperandB<decltype(fragment), Elements, WarpsN>{fragment, elements};
    }
  }

  /// One instruction, which adds to `sums`.
  template <class Sums, class FragmentA, class FragmentB>
  FLASHCUTE_DEVICE static void mma(Sums&& sums, FragmentA const& a, FragmentB const& b) {
    cute::mma_unpack(typename L::Mma{}, sums, a, b, sums);
  }

  /// acc += A B^T over all K-steps. The B operand is loaded in pieces of 16 columns of one K-step: one ldmatrix, which
  /// feeds 2 * MMA_M tensor-core instructions. k_tiles_per_load says how many pieces one fetch loads; with
  /// mma_double_buffer a fetch is in flight while the pieces before it are multiplied. Single pieces are fetched two
  /// ahead: that hides the latency of shared memory, and larger fetches only cost registers. The compiler would move
  /// loads up to this best order by itself, so every other order is fixed by keep_loads_behind.
  template <class Accumulator, class A, class B>
  FLASHCUTE_DEVICE static void gemm(Accumulator& acc, A&& a, B&& b) {
    using namespace cute;
    constexpr int groups = decltype(size<1>(b.fragment))::value / 2;  // pieces of a K-step
    constexpr int k_steps = decltype(size<2>(b.fragment))::value;
    constexpr int pieces = k_steps * groups;
    constexpr int per_fetch = C.k_tiles_per_load == 0 ? 1 : C.k_tiles_per_load * groups;
    constexpr int ahead = !C.mma_double_buffer ? 0 : C.k_tiles_per_load == 0 ? 2 : 1;  // fetches
    constexpr int a_ahead = C.mma_double_buffer ? 1 : 0;                               // K-steps
    constexpr bool in_place = C.k_tiles_per_load != 0 || !C.mma_double_buffer;
    auto const fetch = [&](int first) {
      CUTE_UNROLL
      for (int t = first; t < first + per_fetch; ++t) {
        if (t < pieces) b.fetch(t / groups, t % groups);
      }
    };
    if constexpr (a_ahead > 0) a.fetch(0);
    CUTE_UNROLL
    for (int f = 0; f < ahead; ++f) fetch(f * per_fetch);
    CUTE_UNROLL
    for (int t = 0; t < pieces; ++t) {
      int const k = t / groups, group = t % groups;
      if (in_place && t % per_fetch == 0) keep_loads_behind();
      if (group == 0 && k + a_ahead < k_steps) a.fetch(k + a_ahead);
      if (t % per_fetch == 0) fetch(t + ahead * per_fetch);
      CUTE_UNROLL
      for (int n = 2 * group; n < 2 * group + 2; ++n) {
        CUTE_UNROLL
        for (int m = 0; m < size<1>(acc); ++m) {
          mma(acc(_, m, n), a.fragment(_, m, k), b.fragment(_, n, k));
        }
      }
    }
  }

  /// A B^T without an accumulator for all columns: take(n, sums) gets 16 columns at a time, those of this warp's n-th
  /// piece. All of A is in registers.
  template <class A, class B, class Take>
  FLASHCUTE_DEVICE static void gemm_by_columns(A const& a, B& b, Take const& take) {
    using namespace cute;
    constexpr int groups = decltype(size<1>(b.fragment))::value / 2;
    constexpr int k_steps = decltype(size<2>(b.fragment))::value;
    constexpr int ahead = C.mma_double_buffer ? 2 : 0;
    auto const fetch = [&](int t) {
      if (t < groups * k_steps) b.fetch(t % k_steps, t / k_steps);
    };
    CUTE_UNROLL
    for (int t = 0; t < ahead; ++t) fetch(t);
    CUTE_UNROLL
    for (int group = 0; group < groups; ++group) {
      auto sums = make_tensor<float>(make_shape(_4{}, size<1>(a.fragment), _2{}));  // (MMA, MMA_M, 2)
      clear(sums);
      CUTE_UNROLL
      for (int k = 0; k < k_steps; ++k) {
        fetch(group * k_steps + k + ahead);
        CUTE_UNROLL
        for (int n = 0; n < 2; ++n) {
          CUTE_UNROLL
          for (int m = 0; m < size<1>(a.fragment); ++m) {
            mma(sums(_, m, n), a.fragment(_, m, k), b.fragment(_, 2 * group + n, k));
          }
        }
      }
      take(group, sums);
    }
  }

 private:
  FLASHCUTE_DEVICE static int lane() { return thread_index() % 32; }

  FLASHCUTE_DEVICE static int warp_m() { return WarpsN == 1 ? thread_index() / 32 : thread_index() / 32 % warps_m; }
  FLASHCUTE_DEVICE static int warp_n() { return WarpsN == 1 ? 0 : thread_index() / 32 / warps_m; }

  template <class Rows, class Depth>
  FLASHCUTE_DEVICE static auto fragment_a() {  // (MMA, MMA_M, MMA_K)
    return cute::make_tensor<typename L::Operand>(typename L::template FragmentA<Rows, Depth, WarpsN>{});
  }

  template <class Columns, class Depth>
  FLASHCUTE_DEVICE static auto fragment_b() {  // (MMA, MMA_N, MMA_K)
    return cute::make_tensor<typename L::Operand>(typename L::template FragmentB<Columns, Depth, WarpsN>{});
  }
};

template <TileConfig C>
struct Products<C, Math::tensor_core> : TensorCoreProducts<C> {};

}  // namespace flashcute
