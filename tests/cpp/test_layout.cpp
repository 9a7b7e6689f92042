// Shared-memory layouts, evaluated on the host: every element has a place, and no access has a bank
// conflict where the configuration is swizzled.
#include "flashcute/layout.hpp"

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

  std::vector<Element> memory = std::vector<Element>(cosize_v<typename L::SmemQ> + cosize_v<typename L::SmemKV>);

  template <class Layout>
  auto tile(Layout const& layout) {
    return make_tensor(make_smem_ptr(memory.data()), layout);
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
    expect_bijective(typename L::SmemQ{});
    expect_bijective(typename L::SmemKV{});
    for (int d = 0; d < C.head_dim; ++d)  // V transposed is V
      for (int n = 0; n < C.block_n; ++n)
        ASSERT_EQ(static_cast<int>(typename L::SmemVt{}(d, n)), static_cast<int>(typename L::SmemKV{}(n, d)));

    auto const sQ = tile(typename L::SmemQ{});
    auto const sK = tile(typename L::SmemKV{});
    auto const sVt = tile(typename L::SmemVt{});
    // ldmatrix, cp.async and 16-byte loads work in groups of 8 threads; a 4-byte store is one access of a warp.
    struct Access {
      char const* what;
      int passes, unswizzled;
    };
    Access const accesses[] = {
        {"ldmatrix of Q", worst_passes(make_tiled_copy_A(typename L::LdmatrixAtom{}, mma), sQ, threads, 8, 16, true),
         8},
        {"ldmatrix of K", worst_passes(make_tiled_copy_B(typename L::LdmatrixAtom{}, mma), sK, threads, 8, 16, true),
         8},
        {"ldmatrix of V",
         worst_passes(make_tiled_copy_B(typename L::LdmatrixTransposedAtom{}, mma), sVt, threads, 8, 16, true), 8},
        {"cp.async of Q", worst_passes(typename L::GlobalLoad{}, sQ, threads, 8, 16, false), 1},
        {"cp.async of K and V", worst_passes(typename L::GlobalLoad{}, sK, threads, 8, 16, false), 1},
        {"store of O fragments",
         worst_passes(make_tiled_copy_C(typename L::FragmentStoreAtom{}, mma), sQ, threads, 32, 4, false), 8},
        {"load of the O tile", worst_passes(typename L::GlobalStore{}, sQ, threads, 8, 16, true), 1},
    };
    for (auto const& access : accesses) {
      // Without the swizzle the conflicts must be there, or this test could not see them.
      EXPECT_EQ(access.passes, C.swizzled ? 1 : access.unswizzled) << access.what << " of " << name(C).text;
    }
  }
};

template <int D, int M, int N, int W>
void check_both() {
  Layouts<ForwardConfig{DType::bfloat16, D, M, N, W, true, false}>{}.check();
  Layouts<ForwardConfig{DType::float16, D, M, N, W, false, false}>{}.check();
}

// Guards against bank conflicts, which cost time and nothing else, so that no other test sees them.
TEST(Layout, SwizzledAccessesHaveNoBankConflicts) {
  check_both<64, 128, 128, 4>();
  check_both<128, 128, 64, 4>();
  check_both<64, 64, 32, 4>();
  check_both<128, 64, 64, 2>();
  check_both<128, 128, 128, 8>();
}

}  // namespace
}  // namespace flashcute
