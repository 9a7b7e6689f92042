// Layouts, evaluated on the host: every element has a place in shared memory, no access has a bank conflict where the
// configuration is swizzled, and what the kernels spell is what CuTe's partitions derive.
// All of CuTe, which the kernels' headers do not include; its atoms need its tensor first.
#include <cute/tensor.hpp>

#include <gtest/gtest.h>
#include <cute/atom/copy_atom.hpp>
#include <cute/atom/mma_atom.hpp>

#include <algorithm>
#include <array>
#include <set>
#include <vector>

#include "flashcute/sm80/loader.hpp"

namespace flashcute {
namespace {

using namespace cute;

constexpr int bank_bytes = 4, banks = 32;

/// How many passes shared memory needs for one group of simultaneous accesses of `width` bytes each.
int passes(std::vector<int> const& byte_addresses, int width) {
  std::array<std::set<int>, banks> lines;  // distinct 128-byte lines touched in each bank
  for (int address : byte_addresses) {
    for (int b = 0; b < width; b += bank_bytes) {
      lines[static_cast<size_t>((address + b) / bank_bytes % banks)].insert((address + b) / (bank_bytes * banks));
    }
  }
  size_t worst = 0;
  for (auto const& l : lines) worst = std::max(worst, l.size());
  return static_cast<int>(worst);
}

/// What CuTe derives the kernels' layouts from: a product whose columns WarpsN warps share, 16 at a time,
template <ForwardConfig C, int WarpsN = 1>
using TiledMma =
    TiledMMA<MMA_Atom<typename TensorCore<C.dtype>::Mma>, Layout<Shape<Int<C.num_warps / WarpsN>, Int<WarpsN>, _1>>,
             Tile<Int<16 * C.num_warps / WarpsN>, Layout<Shape<_8, Int<WarpsN>, _2>, Stride<_1, _16, _8>>,
                  Int<TileLayout<tile_of(C)>::k_step>>>;

/// a tile of shared memory made of swizzled atoms of 8 rows,
template <class Smem>
using TiledSmem = decltype(tile_to_shape(
    composition(typename Smem::Swizzle{}, Layout<Shape<_8, typename Smem::Chunk>, Stride<typename Smem::Chunk, _1>>{}),
    Shape<typename Smem::TileRows, typename Smem::TileColumns>{}));

/// and a copy to it: threads_per_row threads along a row, `vector` columns each.
template <class Smem>
auto tiled_copy() {
  constexpr CopyShape shape = Smem::shape;
  return make_tiled_copy(
      Copy_Atom<UniversalCopy<typename Smem::Element>, typename Smem::Element>{},
      Layout<Shape<Int<shape.rows_per_pass>, Int<shape.threads_per_row>>, Stride<Int<shape.threads_per_row>, _1>>{},
      Layout<Shape<_1, Int<shape.vector>>>{});
}

/// Where a layout puts the elements of a tile: how many bytes behind the first.
struct Tile {
  int rows, columns, bytes;
  std::vector<int> offsets;  // of column after column

  int at(int row, int column) const { return offsets[static_cast<size_t>(row + rows * column)]; }
};

template <class Element, class Layout>
Tile shared_tile(Layout const& layout) {
  constexpr int bytes = sizeof(Element);
  Tile tile{size<0>(layout), size<1>(layout), bytes * static_cast<int>(cosize(layout)), {}};
  for (int i = 0; i < size(layout); ++i) tile.offsets.push_back(bytes * layout(i));
  return tile;
}

template <class Smem>
Tile shared_tile() {
  return shared_tile<typename Smem::Element>(typename Smem::Layout{});
}

/// Each element of a tile has a place of its own, and the tile is exactly as large as it must be.
void expect_bijective(Tile const& tile, int element_bytes) {
  EXPECT_EQ(tile.bytes, tile.rows * tile.columns * element_bytes);
  EXPECT_EQ(std::set<int>(tile.offsets.begin(), tile.offsets.end()).size(), tile.offsets.size());
}

/// Byte offsets in a tile, of every access that a thread or lane makes to it; of every thread.
struct Accesses {
  std::vector<std::vector<int>> of_thread;

  /// Begins the next thread's.
  void next_thread() { of_thread.emplace_back(); }

  /// Adds one of this thread's. (Not in the templates that call it, where g++ would compile the expectation anew.)
  void add(int offset, int of_layout) {
    EXPECT_EQ(offset, of_layout) << "access " << of_thread.back().size() << " of thread " << of_thread.size() - 1;
    of_thread.back().push_back(offset);
  }

  /// Every `width` bytes of a tile are accessed once.
  void expect_whole(Tile const& tile, int width) const {
    std::set<int> offsets;
    size_t count = 0;
    for (auto const& own : of_thread) offsets.insert(own.begin(), own.end()), count += own.size();
    EXPECT_EQ(count * static_cast<size_t>(width), static_cast<size_t>(tile.bytes));
    EXPECT_EQ(offsets.size(), count);
  }

  /// The worst number of passes over all accesses: in each, `group` consecutive threads touch `width` bytes each.
  int worst_passes(size_t group, int width) const {
    int worst = 0;
    for (size_t first = 0; first < of_thread.size(); first += group) {
      for (size_t access = 0; access < of_thread[first].size(); ++access) {
        std::vector<int> addresses;
        for (size_t t = first; t < first + group; ++t) addresses.push_back(of_thread[t][access]);
        worst = std::max(worst, passes(addresses, width));
      }
    }
    return worst;
  }
};

/// A fragment's layout as numbers: the sizes of the modes that kernels look at, and each element's place.
template <class Layout>
std::vector<int> numbers_of(Layout const& layout) {
  std::vector<int> numbers{size<0>(layout), size<1>(layout), size<2>(layout)};
  for (int i = 0; i < size(layout); ++i) numbers.push_back(layout(i));
  return numbers;
}

/// Row and column of each element of a tensor of coordinates.
template <class Tensor>
std::vector<int> coordinates_of(Tensor const& tensor) {
  std::vector<int> coordinates;
  for (int i = 0; i < size(tensor); ++i) {
    auto const at = tensor(i);
    coordinates.insert(coordinates.end(), {static_cast<int>(get<0>(at)), static_cast<int>(get<1>(at))});
  }
  return coordinates;
}

/// What tiles lie in. Nothing is stored there.
alignas(1024) char memory[1 << 17];

int offset_of(void const* place) { return static_cast<int>(static_cast<char const*>(place) - memory); }

template <ForwardConfig C>
struct Layouts {
  using L = TileLayout<tile_of(C)>;
  using Element = typename L::Element;
  static constexpr int element_bytes = sizeof(Element);
  static_assert(smem_bytes(C) <= sizeof(memory));

  static Element* first() { return reinterpret_cast<Element*>(memory); }

  // The accesses to a tile. Every address must be the one that the layout gives, and together they make the tile.

  /// All ldmatrix, whose lanes take the rows and halves of a piece as `row_of` and `half_of` say.
  template <class Smem>
  static Accesses ldmatrices(Tile const& tile, int (*row_of)(int lane), int (*half_of)(int lane)) {
    Accesses accesses;
    for (int lane = 0; lane < 32; ++lane) {
      accesses.next_thread();
      int const row = row_of(lane), half = half_of(lane);
      Pieces<Smem> const pieces{memory, row, half};
      for (int down = 0; down < tile.rows; down += 16) {
        for (int across = 0; across < tile.columns; across += 2 * Smem::unit) {
          accesses.add(static_cast<int>(pieces.at(down, across / (2 * Smem::unit)) - shared_address(memory)),
                       tile.at(down + row, across + half * Smem::unit));
        }
      }
    }
    accesses.expect_whole(tile, 16);
    return accesses;
  }

  /// What the threads copy to or from the tile.
  template <class Smem>
  static Accesses copies(Tile const& tile) {
    constexpr CopyShape shape = Smem::shape;
    Accesses accesses;
    for (int thread = 0; thread < num_threads(C); ++thread) {
      accesses.next_thread();
      auto const part = TileCopy<tile_of(C), Smem>::part(first(), thread);  // (COPY, COPY_rows, COPY_columns)
      int const row = thread / shape.threads_per_row, column = thread % shape.threads_per_row * shape.vector;
      for (int j = 0; j < size<2>(part); ++j) {
        for (int i = 0; i < size<1>(part); ++i) {
          accesses.add(offset_of(&part(0, i, j)),
                       tile.at(row + i * shape.rows_per_pass, column + j * shape.threads_per_row * shape.vector));
        }
      }
    }
    accesses.expect_whole(tile, C.copy_bytes);
    return accesses;
  }

  /// Where the threads store fragments whose columns WarpsN warps share: two columns at a time.
  template <class Smem, int WarpsN = 1>
  static Accesses stores(Tile const& tile) {
    Accesses accesses;
    for (int thread = 0; thread < num_threads(C); ++thread) {
      accesses.next_thread();
      auto const coordinate = L::template first_coordinate<WarpsN>(thread);
      int const row = get<0>(coordinate), column = get<1>(coordinate);
      Places<Smem> const places{first(), row, column};
      for (int j = 0; j < tile.columns / (4 * WarpsN); j += 2) {
        for (int i = 0; i < WarpsN * L::rows_per_thread; ++i) {
          int const down = L::template row_distance<WarpsN>(i), across = L::template column_distance<WarpsN>(j);
          accesses.add(offset_of(places.at(down, across)), tile.at(row + down, column + across));
        }
      }
    }
    accesses.expect_whole(tile, 2 * element_bytes);
    return accesses;
  }

  /// Elements of a fragment by row and column are where the kernels take them to be.
  static void check_distances() {
    for (int thread : {0, 7, num_threads(C) - 1}) {
      auto const c = by_row_and_column(
          L::template coordinates<typename L::BlockM, typename L::BlockN>(thread));  // -> (row, column)
      for (int i = 0; i < size<0>(c); ++i) EXPECT_EQ(get<0>(c(i, 0)) - get<0>(c(0, 0)), L::row_distance(i));
      for (int j = 0; j < size<1>(c); ++j) EXPECT_EQ(get<1>(c(0, j)) - get<1>(c(0, 0)), L::column_distance(j));
    }
  }

  static void check_accesses() {
    Tile const q = shared_tile<typename L::SmemQ>(), k = shared_tile<typename L::SmemK>();
    Tile const v = shared_tile<typename L::SmemV>(), o = shared_tile<typename L::SmemO>();
    for (Tile const* tile : {&q, &k, &v, &o}) expect_bijective(*tile, element_bytes);

    auto const low_row = [](int lane) { return lane % 16; };
    auto const high_half = [](int lane) { return lane / 16; };
    auto const low_half = [](int lane) { return lane / 8 % 2; };
    auto const split_row = [](int lane) { return lane / 16 * 8 + lane % 8; };
    // ldmatrix and the copies of 16 bytes work in groups of 8 threads, those of 8 bytes in groups of 16; a 4-byte
    // store is one access of a warp. The rows that eight threads of an ldmatrix read lie in as many banks as a
    // chunk has units.
    int const group = 32 * 4 / C.copy_bytes;
    int const fragment_store = 2 * element_bytes;
    int const of_qk = L::SmemQ::shape.chunk / L::SmemQ::unit, of_v = L::SmemV::shape.chunk / L::SmemV::unit;
    // An 8-byte store of a half warp takes two units of four rows, which the swizzle exchanges in pairs.
    int const of_store = fragment_store == 8 ? 2 : 1;
    auto const copy_passes = [&](Accesses const& copies) { return copies.worst_passes(group, C.copy_bytes); };
    struct Access {
      char const* what;
      int passes, unswizzled, swizzled = 1;
    };
    Access const accesses[] = {
        {"ldmatrix of Q", ldmatrices<typename L::SmemQ>(q, low_row, high_half).worst_passes(8, 16), of_qk},
        {"ldmatrix of K", ldmatrices<typename L::SmemK>(k, split_row, low_half).worst_passes(8, 16), of_qk},
        {"ldmatrix of V", ldmatrices<typename L::SmemV>(v, low_row, high_half).worst_passes(8, 16), of_v},
        {"copy of Q", copy_passes(copies<typename L::SmemQ>(q)), 1},
        {"copy of K", copy_passes(copies<typename L::SmemK>(k)), 1},
        {"copy of V", copy_passes(copies<typename L::SmemV>(v)), 1},
        {"store of O fragments", stores<typename L::SmemO>(o).worst_passes(32 * 4 / fragment_store, fragment_store),
         of_v / (fragment_store / 4), of_store},
        {"load of the O tile", copy_passes(copies<typename L::SmemO>(o)), 1},
    };
    for (auto const& access : accesses) {
      // Without the swizzle the conflicts must be there, or this test could not see them.
      EXPECT_EQ(access.passes, C.swizzled ? access.swizzled : access.unswizzled)
          << access.what << " of " << name(C).text;
    }
  }

  /// Every tile that fragments whose columns WarpsN warps share are stored to.
  template <int WarpsN>
  static void check_shared_stores() {
    using SmemS = typename L::template Smem<typename L::BlockM, typename L::BlockN>;
    stores<typename L::SmemQ, WarpsN>(shared_tile<typename L::SmemQ>());
    stores<SmemS, WarpsN>(shared_tile<SmemS>());
  }

  /// The operands' fragments of a product of Rows x Depth with Columns x Depth, whose columns WarpsN warps share.
  template <int Rows, int Columns, int Depth, int WarpsN>
  static void compare_operands() {
    auto const slice = TiledMma<C, WarpsN>{}.get_thread_slice(0);
    auto const tensor = [](auto rows, auto columns) {
      return make_tensor(static_cast<typename L::Operand*>(nullptr), make_shape(rows, columns));
    };
    EXPECT_EQ(numbers_of(typename L::template FragmentA<Int<Rows>, Int<Depth>, WarpsN>{}),
              numbers_of(slice.partition_fragment_A(tensor(Int<Rows>{}, Int<Depth>{})).layout()));
    EXPECT_EQ(numbers_of(typename L::template FragmentB<Int<Columns>, Int<Depth>, WarpsN>{}),
              numbers_of(slice.partition_fragment_B(tensor(Int<Columns>{}, Int<Depth>{})).layout()));
  }

  /// The accumulator's fragment, which CuTe makes compact, and its coordinates.
  template <int Rows, int Columns, int WarpsN>
  static void compare_accumulator() {
    for (int thread = 0; thread < num_threads(C); ++thread) {
      auto const derived = TiledMma<C, WarpsN>{}.get_thread_slice(thread).partition_C(
          make_identity_tensor(Shape<Int<Rows>, Int<Columns>>{}));
      EXPECT_EQ(coordinates_of(L::template coordinates<Int<Rows>, Int<Columns>, WarpsN>(thread)),
                coordinates_of(derived))
          << thread;
      if (thread == 0) {
        EXPECT_EQ(numbers_of(typename L::template FragmentC<Int<Rows>, Int<Columns>, WarpsN>{}),
                  numbers_of(make_layout(derived.shape())));
      }
    }
  }

  /// The layout of a tile.
  template <int Rows, int Columns>
  static void compare_tile() {
    using Smem = typename L::template Smem<Int<Rows>, Int<Columns>>;
    EXPECT_EQ(shared_tile<Smem>().offsets, shared_tile<Element>(TiledSmem<Smem>{}).offsets) << Rows << " x " << Columns;
  }

  /// What the threads copy to a tile, row and column of which the layout turns into places.
  template <int Rows, int Columns>
  static void compare_copy() {
    using Smem = typename L::template Smem<Int<Rows>, Int<Columns>>;
    Tile const tile = shared_tile<Smem>();
    Accesses derived;
    for (int thread = 0; thread < num_threads(C); ++thread) {
      auto const part = tiled_copy<Smem>().get_thread_slice(thread).partition_D(
          make_identity_tensor(Shape<Int<Rows>, Int<Columns>>{}));
      derived.next_thread();
      for (int j = 0; j < size<2>(part); ++j) {
        for (int i = 0; i < size<1>(part); ++i) {
          auto const at = part(0, i, j);
          derived.of_thread.back().push_back(tile.at(get<0>(at), get<1>(at)));
        }
      }
    }
    EXPECT_EQ(copies<Smem>(tile).of_thread, derived.of_thread) << Rows << " x " << Columns;
  }
};

template <ForwardConfig C>
void check_both() {
  constexpr ForwardConfig unswizzled = [] {
    ForwardConfig c = C;
    c.swizzled = false;
    return c;
  }();
  Layouts<C>::check_distances();
  Layouts<C>::check_accesses();
  Layouts<unswizzled>::check_accesses();
}

// Guards against bank conflicts, which cost time and nothing else, so that no other test sees them.
TEST(Layout, SwizzledAccessesHaveNoBankConflicts) {
  check_both<ForwardConfig{.head_dim = 64, .block_n = 128}>();
  check_both<ForwardConfig{.head_dim = 128}>();
  check_both<ForwardConfig{.head_dim = 64, .block_m = 64, .block_n = 32}>();
  check_both<ForwardConfig{.head_dim = 128, .block_m = 64, .num_warps = 2}>();
  check_both<ForwardConfig{.head_dim = 128, .block_n = 128, .num_warps = 8}>();
  check_both<ForwardConfig{.head_dim = 256, .block_m = 64}>();
}

// Rows of 64 and of 32 bytes.
TEST(Layout, NarrowTiles) {
  check_both<ForwardConfig{.head_dim = 96, .block_m = 64}>();
  check_both<ForwardConfig{.head_dim = 48, .block_m = 64}>();
  check_both<ForwardConfig{.head_dim = 192, .head_dim_v = 32, .block_m = 64}>();
}

TEST(Layout, OtherElementsAndCopies) {
  check_both<ForwardConfig{.dtype = DType::float32, .head_dim = 64, .block_n = 32}>();
  check_both<ForwardConfig{.head_dim = 64, .block_n = 64, .copy_bytes = 8}>();
}

// Guards against fragments of warps that share columns being stored where other elements belong.
TEST(Layout, SharedColumnsAreStoredInTheirPlaces) {
  Layouts<ForwardConfig{.head_dim = 128, .block_m = 64, .swizzled = false}>::check_shared_stores<2>();
  Layouts<ForwardConfig{.head_dim = 256, .block_m = 64, .num_warps = 8}>::check_shared_stores<4>();
  Layouts<ForwardConfig{.dtype = DType::float32, .head_dim = 64, .block_n = 32}>::check_shared_stores<2>();
}

// What CuTe derives takes long to compile, so each of the following lists has a case of each kind and no more.
// All three guard against a spelled layout that is not the one that the instruction or the copy means: the kernel would
// compute with other elements.

// What a fragment depends on: how many warps share the columns and how many the rows and, of operands only, how deep an
// instruction multiplies (16 of the 16-bit types, 8 of TF32).
TEST(Layout, FragmentsAreWhatCuteDerives) {
  Layouts<ForwardConfig{.num_warps = 8}>::compare_operands<64, 256, 128, 4>();
  Layouts<ForwardConfig{.dtype = DType::float32}>::compare_operands<128, 32, 64, 1>();
  Layouts<ForwardConfig{}>::compare_accumulator<128, 96, 1>();
  Layouts<ForwardConfig{.dtype = DType::float32}>::compare_accumulator<64, 128, 2>();
  Layouts<ForwardConfig{.num_warps = 8}>::compare_accumulator<64, 256, 4>();
}

// What a tile depends on: the elements' width, the width of a chunk's rows (128, 64, 32 bytes), one chunk or several,
// and the swizzle.
TEST(Layout, TilesAreWhatCuteDerives) {
  Layouts<ForwardConfig{}>::compare_tile<128, 128>();
  Layouts<ForwardConfig{}>::compare_tile<32, 64>();
  Layouts<ForwardConfig{}>::compare_tile<64, 96>();
  Layouts<ForwardConfig{}>::compare_tile<64, 48>();
  Layouts<ForwardConfig{.swizzled = false}>::compare_tile<64, 128>();
  Layouts<ForwardConfig{.dtype = DType::float32}>::compare_tile<128, 64>();
  Layouts<ForwardConfig{.dtype = DType::float32}>::compare_tile<64, 48>();
}

// What a copy depends on: how many threads a row of a chunk takes, whether they need several passes for it, and how
// many rows all threads copy at once. (That a row and column are where the layout says, is checked for all copies
// above.)
TEST(Layout, CopiesAreWhatCuteDerives) {
  Layouts<ForwardConfig{}>::compare_copy<128, 128>();                                         // 8 threads, 16 rows
  Layouts<ForwardConfig{.num_warps = 8}>::compare_copy<64, 96>();                             // 4, 64 rows
  Layouts<ForwardConfig{.copy_bytes = 4}>::compare_copy<64, 128>();                           // 32, 4 rows
  Layouts<ForwardConfig{.copy_bytes = 2, .async_copy = false}>::compare_copy<128, 128>();     // 32, two passes
  Layouts<ForwardConfig{.dtype = DType::float32, .copy_bytes = 4}>::compare_copy<128, 48>();  // 16, wider elements
}

}  // namespace
}  // namespace flashcute
