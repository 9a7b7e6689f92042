// Shared-memory layouts, evaluated on the host: every element has a place, and no access has a bank
// conflict where the configuration is swizzled.
#include "flashcute/gemm.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <set>
#include <vector>

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
  using L = ForwardLayout<C>;
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

  void check() {
    constexpr int threads = num_threads(C);
    typename L::TiledMma const mma;
    expect_bijective(typename L::SmemQ::Layout{});
    expect_bijective(typename L::SmemK::Layout{});
    expect_bijective(typename L::SmemV::Layout{});
    expect_bijective(typename L::SmemO::Layout{});
    for (int thread : {0, 7, threads - 1}) {
      auto const c = by_row_and_column(L::template coordinates<C.block_n>(thread));  // -> (row, column)
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
    auto const store_o = make_tiled_copy_C(typename L::FragmentStoreAtom{}, mma);
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
        {"copy of Q", worst_passes(typename L::SmemQ::Copy{}, sQ, threads, group, C.copy_bytes, false), 1},
        {"copy of K", worst_passes(typename L::SmemK::Copy{}, sK, threads, group, C.copy_bytes, false), 1},
        {"copy of V", worst_passes(typename L::SmemV::Copy{}, sV, threads, group, C.copy_bytes, false), 1},
        {"store of O fragments", worst_passes(store_o, sO, threads, 32 * 4 / fragment_store, fragment_store, false),
         of_v / (fragment_store / 4), of_store},
        {"load of the O tile", worst_passes(typename L::SmemO::Copy{}, sO, threads, group, C.copy_bytes, true), 1},
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

}  // namespace
}  // namespace flashcute
