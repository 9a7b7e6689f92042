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

/// Both layouts are of one shape, as far as kernels look at it, and give equal places.
template <class Spelled, class Derived>
void expect_same(Spelled const& spelled, Derived const& derived) {
  ASSERT_EQ(static_cast<int>(size(spelled)), static_cast<int>(size(derived)));
  EXPECT_EQ(static_cast<int>(size<0>(spelled)), static_cast<int>(size<0>(derived)));
  EXPECT_EQ(static_cast<int>(size<1>(spelled)), static_cast<int>(size<1>(derived)));
  for (int i = 0; i < size(spelled); ++i) ASSERT_EQ(spelled(i), derived(i)) << i;
}

/// The worst number of passes over all accesses that the warps make to `tile`: in each access, `group`
/// consecutive threads each touch `width` bytes at the start of their part of the tile.
template <class TiledCopy, class Tile>
int worst_passes(TiledCopy const& copy, Tile const& tile, int threads, int group, int width, bool source) {
  auto const* const base = raw_pointer_cast(tile.data());
  auto const parts = [&](int thread) {
    auto const slice = copy.get_thread_slice(thread);
    std::vector<int> addresses;
    auto const collect = [&](auto const& part) {  // (COPY, COPY_rows, COPY_columns)
      for (int j = 0; j < size<2>(part); ++j)
        for (int i = 0; i < size<1>(part); ++i)
          addresses.push_back(static_cast<int>(&part(0, i, j) - base) * static_cast<int>(sizeof(*base)));
    };
    if (source) {
      collect(slice.partition_S(tile));
    } else {
      collect(slice.partition_D(tile));
    }
    return addresses;
  };
  int worst = 0;
  for (int first = 0; first < threads; first += group) {
    std::vector<std::vector<int>> of_thread;
    for (int t = first; t < first + group; ++t) of_thread.push_back(parts(t));
    for (size_t access = 0; access < of_thread[0].size(); ++access) {
      std::vector<int> addresses;
      for (auto const& a : of_thread) addresses.push_back(a[access]);
      worst = std::max(worst, passes(addresses, width));
    }
  }
  return worst;
}

template <ForwardConfig C>
struct Layouts {
  using L = TileLayout<tile_of(C)>;
  using Element = typename L::Element;

  struct alignas(1024) Unit {
    Element elements[1024 / sizeof(Element)];
  };
  std::vector<Unit> memory = std::vector<Unit>(ceil_div<size_t>(smem_bytes(C), sizeof(Unit)));

  template <class Layout>
  auto tile(Layout const& layout) {
    return make_tensor(make_smem_ptr(memory[0].elements), layout);
  }

  /// The worst number of passes over all ldmatrix of a tile, whose lanes take the rows and halves of a piece as
  /// `row_of` and `half_of` say. Every address must be the one that the layout gives.
  template <class Smem, class RowOf, class HalfOf>
  int ldmatrix_passes(RowOf const& row_of, HalfOf const& half_of) {
    auto const s = tile(typename Smem::Layout{});
    int worst = 0;
    for (int row = 0; row < size<0>(s); row += 16) {
      for (int column = 0; column < size<1>(s); column += 2 * Smem::unit) {
        std::vector<int> addresses;
        for (int lane = 0; lane < 32; ++lane) {
          Pieces<Smem> const pieces{raw_pointer_cast(s.data()), row_of(lane), half_of(lane)};
          SharedAddress const at = pieces.at(row, column / (2 * Smem::unit));
          EXPECT_EQ(at, shared_address(&s(row + row_of(lane), column + half_of(lane) * Smem::unit)));
          addresses.push_back(static_cast<int>(at - shared_address(raw_pointer_cast(s.data()))));
          if (lane % 8 == 7) {
            worst = std::max(worst, passes(addresses, 16));
            addresses.clear();
          }
        }
      }
    }
    return worst;
  }

  /// Each element of a tile has a place of its own, and the tile is exactly as large as it must be.
  template <class Layout>
  void expect_bijective(Layout const& layout) {
    std::set<int> places;
    for (int i = 0; i < size(layout); ++i) places.insert(static_cast<int>(layout(i)));
    EXPECT_EQ(static_cast<int>(places.size()), static_cast<int>(size(layout)));
    EXPECT_EQ(static_cast<int>(cosize(layout)), static_cast<int>(size(layout)));
  }

  /// The fragments of a product of Rows x Depth with Columns x Depth, whose columns WarpsN warps share.
  template <class Rows, class Columns, class Depth, int WarpsN>
  void expect_derived_fragments() {
    TiledMma<C, WarpsN> const mma;
    auto const any = [](auto shape) { return make_tensor(static_cast<typename L::Operand*>(nullptr), shape); };
    auto const slice = mma.get_thread_slice(0);
    expect_same(typename L::template FragmentA<Rows, Depth, WarpsN>{},
                slice.partition_fragment_A(any(Shape<Rows, Depth>{})).layout());
    expect_same(typename L::template FragmentB<Columns, Depth, WarpsN>{},
                slice.partition_fragment_B(any(Shape<Columns, Depth>{})).layout());
    expect_same(typename L::template FragmentC<Rows, Columns, WarpsN>{},
                partition_fragment_C(mma, Shape<Rows, Columns>{}).layout());
    for (int thread = 0; thread < 32 * C.num_warps; ++thread) {
      auto const spelled = L::template coordinates<Rows, Columns, WarpsN>(thread);
      auto const derived = mma.get_thread_slice(thread).partition_C(make_identity_tensor(Shape<Rows, Columns>{}));
      ASSERT_EQ(static_cast<int>(size(spelled)), static_cast<int>(size(derived)));
      for (int i = 0; i < size(spelled); ++i) {
        ASSERT_EQ(static_cast<int>(get<0>(spelled(i))), static_cast<int>(get<0>(derived(i)))) << thread << ", " << i;
        ASSERT_EQ(static_cast<int>(get<1>(spelled(i))), static_cast<int>(get<1>(derived(i)))) << thread << ", " << i;
      }
    }
  }

  /// Where threads copy to a tile, and where they store fragments whose columns WarpsN warps share.
  template <class Smem, int WarpsN>
  void expect_derived_places() {
    expect_same(typename Smem::Layout{}, TiledSmem<Smem>{});
    auto const s = tile(typename Smem::Layout{});
    Element* const first = raw_pointer_cast(s.data());
    for (int thread = 0; thread < num_threads(C); ++thread) {
      auto const spelled = TileCopy<tile_of(C), Smem>::part(first, thread);
      auto const derived = tiled_copy<Smem>().get_thread_slice(thread).partition_D(s);
      ASSERT_EQ(static_cast<int>(size<1>(spelled)), static_cast<int>(size<1>(derived)));
      ASSERT_EQ(static_cast<int>(size<2>(spelled)), static_cast<int>(size<2>(derived)));
      for (int j = 0; j < size<2>(spelled); ++j)
        for (int i = 0; i < size<1>(spelled); ++i) ASSERT_EQ(&spelled(0, i, j), &derived(0, i, j)) << thread;

      auto const c = by_row_and_column(
          L::template coordinates<typename Smem::TileRows, typename Smem::TileColumns, WarpsN>(thread));
      Places<Smem> const places{first, get<0>(c(0, 0)), get<1>(c(0, 0))};
      for (int j = 0; j < size<1>(c); j += 2)
        for (int i = 0; i < size<0>(c); ++i)
          ASSERT_EQ(places.at(L::template row_distance<WarpsN>(i), L::template column_distance<WarpsN>(j)),
                    &s(get<0>(c(i, j)), get<1>(c(i, j))))
              << thread << ", " << i << ", " << j;
    }
  }

  template <int WarpsN = 1>
  void check_against_cute() {
    expect_derived_fragments<typename L::BlockM, typename L::BlockN, typename L::HeadDim, WarpsN>();
    expect_derived_fragments<typename L::BlockM, typename L::HeadDimV, typename L::BlockN, WarpsN>();
    expect_derived_places<typename L::SmemQ, WarpsN>();
    expect_derived_places<typename L::SmemO, WarpsN>();
    expect_derived_places<typename L::template Smem<typename L::BlockM, typename L::BlockN>, WarpsN>();
  }

  void check() {
    constexpr int threads = num_threads(C);
    TiledMma<C> const mma;
    expect_bijective(typename L::SmemQ::Layout{});
    expect_bijective(typename L::SmemK::Layout{});
    expect_bijective(typename L::SmemV::Layout{});
    expect_bijective(typename L::SmemO::Layout{});
    for (int thread : {0, 7, threads - 1}) {
      auto const c = by_row_and_column(
          L::template coordinates<typename L::BlockM, typename L::BlockN>(thread));  // -> (row, column)
      for (int i = 0; i < size<0>(c); ++i) EXPECT_EQ(get<0>(c(i, 0)) - get<0>(c(0, 0)), L::row_distance(i));
      for (int j = 0; j < size<1>(c); ++j) EXPECT_EQ(get<1>(c(0, j)) - get<1>(c(0, 0)), L::column_distance(j));
    }

    auto const sQ = tile(typename L::SmemQ::Layout{});
    auto const sK = tile(typename L::SmemK::Layout{});
    auto const sV = tile(typename L::SmemV::Layout{});
    auto const sO = tile(typename L::SmemO::Layout{});
    auto const low_row = [](int lane) { return lane % 16; };
    auto const high_half = [](int lane) { return lane / 16; };
    auto const low_half = [](int lane) { return lane / 8 % 2; };
    auto const split_row = [](int lane) { return lane / 16 * 8 + lane % 8; };
    using Pair = uint_bit_t<16 * sizeof(Element)>;
    auto const store_o = make_tiled_copy_C(Copy_Atom<UniversalCopy<Pair>, Element>{}, mma);
    // ldmatrix and the copies of 16 bytes work in groups of 8 threads, those of 8 bytes in groups of 16; a 4-byte
    // store is one access of a warp. The rows that eight threads of an ldmatrix read lie in as many banks as a
    // chunk has units.
    int const group = 32 * 4 / C.copy_bytes;
    int const fragment_store = 2 * static_cast<int>(sizeof(Element));
    auto const conflicts = [](auto const& smem) { return smem.shape.chunk / smem.unit; };
    int const of_qk = conflicts(typename L::SmemQ{}), of_v = conflicts(typename L::SmemV{});
    // An 8-byte store of a half warp takes two units of four rows, which the swizzle exchanges in pairs.
    int const of_store = fragment_store == 8 ? 2 : 1;
    struct Access {
      char const* what;
      int passes, unswizzled, swizzled = 1;
    };
    Access const accesses[] = {
        {"ldmatrix of Q", ldmatrix_passes<typename L::SmemQ>(low_row, high_half), of_qk},
        {"ldmatrix of K", ldmatrix_passes<typename L::SmemK>(split_row, low_half), of_qk},
        {"ldmatrix of V", ldmatrix_passes<typename L::SmemV>(low_row, high_half), of_v},
        {"copy of Q", worst_passes(tiled_copy<typename L::SmemQ>(), sQ, threads, group, C.copy_bytes, false), 1},
        {"copy of K", worst_passes(tiled_copy<typename L::SmemK>(), sK, threads, group, C.copy_bytes, false), 1},
        {"copy of V", worst_passes(tiled_copy<typename L::SmemV>(), sV, threads, group, C.copy_bytes, false), 1},
        {"store of O fragments", worst_passes(store_o, sO, threads, 32 * 4 / fragment_store, fragment_store, false),
         of_v / (fragment_store / 4), of_store},
        {"load of the O tile", worst_passes(tiled_copy<typename L::SmemO>(), sO, threads, group, C.copy_bytes, true),
         1},
    };
    for (auto const& access : accesses) {
      // Without the swizzle the conflicts must be there, or this test could not see them.
      EXPECT_EQ(access.passes, C.swizzled ? access.swizzled : access.unswizzled)
          << access.what << " of " << name(C).text;
    }
  }
};

template <ForwardConfig C>
void check_both() {
  constexpr ForwardConfig unswizzled = [] {
    ForwardConfig c = C;
    c.swizzled = false;
    return c;
  }();
  Layouts<C>{}.check();
  Layouts<unswizzled>{}.check();
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

// Guards against a spelled layout that is not the one that the instruction or the copy means: the kernel would compute
// with other elements.
TEST(Layout, WhatIsSpelledIsWhatCuteDerives) {
  Layouts<ForwardConfig{.head_dim = 64, .block_n = 128}>{}.check_against_cute();
  Layouts<ForwardConfig{.head_dim = 128, .block_m = 64, .swizzled = false}>{}.check_against_cute<2>();
  Layouts<ForwardConfig{.head_dim = 256, .block_m = 64, .num_warps = 8}>{}.check_against_cute<4>();
  Layouts<ForwardConfig{.head_dim = 96, .head_dim_v = 32, .block_m = 64}>{}.check_against_cute();
  Layouts<ForwardConfig{.dtype = DType::float32, .head_dim = 64, .block_n = 32}>{}.check_against_cute<2>();
}

// Passes of copies that are narrower than a row of 8 threads are swizzled differently.
TEST(Layout, NarrowCopiesAreWhatCuteDerives) {
  Layouts<ForwardConfig{.head_dim = 64, .block_n = 64, .copy_bytes = 8}>{}.check_against_cute();
  Layouts<ForwardConfig{.head_dim = 64, .block_n = 64, .copy_bytes = 4}>{}.check_against_cute();
  Layouts<ForwardConfig{.head_dim = 96, .block_n = 64, .copy_bytes = 2, .async_copy = false}>{}.check_against_cute();
  Layouts<ForwardConfig{.dtype = DType::float32, .head_dim = 48, .block_n = 32, .copy_bytes = 4}>{}
      .check_against_cute();
}

}  // namespace
}  // namespace flashcute
