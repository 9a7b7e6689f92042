// Stands in for include/flashcute/sm90/instructions.hpp: the same names, executed by the emulated thread block.
// Products are written from the PTX ISA (section "Register Fragments and Shared Memory Matrix Layouts" of wgmma): where
// operands lie in shared memory is what the kernel's own layouts say, not what descriptors made of them say.
#pragma once

#include "flashcute/device/instructions.hpp"
#include "flashcute/sm90/params.hpp"
// As the header that it stands for.
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include <cstring>

namespace flashcute::sm90 {

inline constexpr Arch sm90_arch = 90;
inline constexpr int warpgroup_size = 128;

/// All lanes of the warp must come here, with the same number.
FLASHCUTE_DEVICE int uniform(int x) {
  struct Lane {
    int value;
    bool same;
  };
  Lane own{x, false};
  emulation::warp_instruction("uniform", &own, [](void* const* lanes) {
    bool same = true;
    for (int i = 1; i < 32; ++i) {
      same = same && static_cast<Lane*>(lanes[i])->value == static_cast<Lane*>(lanes[0])->value;
    }
    for (int i = 0; i < 32; ++i) static_cast<Lane*>(lanes[i])->same = same;
  });
  if (!own.same) throw emulation::Violation("a number that is taken for uniform differs between the lanes of a warp");
  return x;
}

FLASHCUTE_DEVICE uint32_t moved(uint32_t word) { return word; }
FLASHCUTE_DEVICE int opaque(int x) { return uniform(x); }
FLASHCUTE_DEVICE uint32_t low_bits(int count) { return count >= 32 ? ~0u : (1u << max_of(count, 0)) - 1; }

FLASHCUTE_DEVICE void reconverge() {
  emulation::warp_instruction("reconverge", nullptr, [](void* const*) {});
}

struct EqualLanes {
  int before, all;
};
FLASHCUTE_DEVICE EqualLanes equals_in_warp(uint32_t word) {
  struct Lane {
    uint32_t word;
    EqualLanes equal;
  };
  Lane own{word, {0, 0}};
  emulation::warp_instruction("equals_in_warp", &own, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto& [word, equal] = *static_cast<Lane*>(lanes[i]);
      for (int j = 0; j < 32; ++j) {
        if (static_cast<Lane const*>(lanes[j])->word != word) continue;
        ++equal.all;
        if (j < i) ++equal.before;
      }
    }
  });
  return own.equal;
}

template <class Storage>
FLASHCUTE_DEVICE Storage& hidden(Storage& smem) {
  return smem;
}

FLASHCUTE_DEVICE int warpgroup_index() { return uniform(thread_index() / warpgroup_size); }
FLASHCUTE_DEVICE int warp_of_warpgroup() { return uniform(thread_index() / 32 % (warpgroup_size / 32)); }
FLASHCUTE_DEVICE int thread_of_warpgroup() { return thread_index() % warpgroup_size; }

FLASHCUTE_DEVICE uint32_t block_count() { return emulation::block_count(); }

// Clusters are not emulated: these are called by nobody, and compiled all the same.
FLASHCUTE_DEVICE int rank_in_cluster() { throw emulation::Violation("rank_in_cluster"); }
FLASHCUTE_DEVICE void cluster_sync() { throw emulation::Violation("cluster_sync"); }

FLASHCUTE_DEVICE bool elected_lane() {
  reconverge();
  return thread_index() % 32 == 0;
}

FLASHCUTE_DEVICE void global_store_if(bool exists, float* to, float x) {
  if (exists) global_store(to, x);
}
FLASHCUTE_DEVICE void global_store_if(bool exists, void* to, uint4 const& words) {
  if (exists) global_store(to, words);
}

template <int Count>
FLASHCUTE_DEVICE void release_registers() {}
template <int Count>
FLASHCUTE_DEVICE void claim_registers() {}

// ---- barriers ------------------------------------------------------------------------------------

using Barrier = uint64_t;
using emulation::Site;

FLASHCUTE_DEVICE void barrier_init(Barrier& barrier, int arrivals) { emulation::barrier_init(&barrier, arrivals); }
FLASHCUTE_DEVICE void publish_barriers() {}

FLASHCUTE_DEVICE void barrier_arrive(Barrier& barrier, int times = 1, char const* file = __builtin_FILE(),
                                     int line = __builtin_LINE()) {
  emulation::barrier_arrive(&barrier, times, 0, {file, line});
}
FLASHCUTE_DEVICE void barrier_arrive_at(Barrier&, int) { throw emulation::Violation("barrier_arrive_at"); }
FLASHCUTE_DEVICE void barrier_arrive_expecting(Barrier& barrier, int bytes, char const* file = __builtin_FILE(),
                                               int line = __builtin_LINE()) {
  emulation::barrier_arrive(&barrier, 1, bytes, {file, line});
}
FLASHCUTE_DEVICE void barrier_wait(Barrier& barrier, uint32_t parity, char const* file = __builtin_FILE(),
                                   int line = __builtin_LINE()) {
  emulation::barrier_wait(&barrier, parity, {file, line});
}
FLASHCUTE_DEVICE uint32_t barrier_passed(Barrier& barrier, uint32_t parity, char const* file = __builtin_FILE(),
                                         int line = __builtin_LINE()) {
  return emulation::barrier_passed(&barrier, parity, {file, line});
}
FLASHCUTE_DEVICE void barrier_wait_unless(uint32_t passed, Barrier& barrier, uint32_t parity,
                                          char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (passed == 0) emulation::barrier_wait(&barrier, parity, {file, line});
}
FLASHCUTE_DEVICE void barrier_wait_unless(uint32_t passed, Barrier& barrier, uint32_t parity, float (&)[2],
                                          char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (passed == 0) emulation::barrier_wait(&barrier, parity, {file, line});
}

template <int Threads>
FLASHCUTE_DEVICE void named_sync(int id, char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::named_sync(id, Threads, {file, line});
}
template <int Threads>
FLASHCUTE_DEVICE void named_arrive(int id, char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::named_arrive(id, Threads, {file, line});
}

FLASHCUTE_DEVICE void publish_to_products() {}
FLASHCUTE_DEVICE void publish_to_copies() {}

// ---- shared memory -------------------------------------------------------------------------------

/// Lane i % 4 of row i / 4 of each tile has two neighbours, which become neighbours in a column.
FLASHCUTE_DEVICE void stmatrix_transposed(void* row, uint32_t d0, uint32_t d1, uint32_t d2, uint32_t d3) {
  struct Lane {
    void* row;
    uint32_t registers[4];
  };
  Lane own{row, {d0, d1, d2, d3}};
  emulation::warp_instruction("stmatrix.trans", &own, [](void* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int lane = 0; lane < 32; ++lane) {
        uint32_t const word = static_cast<Lane*>(lanes[lane])->registers[matrix];
        int const i = lane / 4, j = 2 * (lane % 4);
        element[j][i] = static_cast<uint16_t>(word);
        element[j + 1][i] = static_cast<uint16_t>(word >> 16);
      }
      for (int i = 0; i < 8; ++i) std::memcpy(static_cast<Lane*>(lanes[8 * matrix + i])->row, element[i], 16);
    }
  });
}

// ---- products of a warpgroup ---------------------------------------------------------------------

/// The operand itself, at the place where the layout says that it lies.
template <class Descriptor, class Operand, class Element>
FLASHCUTE_DEVICE auto described(Element* tile) {
  return cute::make_tensor(cute::make_smem_ptr(tile), Operand{});
}
template <class Operand>
FLASHCUTE_DEVICE void described_anew(Operand&) {}
template <class Operand>
FLASHCUTE_DEVICE void described_here(Operand const&) {}

FLASHCUTE_DEVICE void begin_products() {}

/// 64 rows of a in shared memory (64 x 16), or 16 rows a warp in registers; b (columns x 16) in shared memory.
template <class Mma, class Sums, class A, class B>
FLASHCUTE_DEVICE void multiply(Mma const& mma, Sums& sums, A const& a, B const& b) {
  constexpr int count = decltype(cute::size(sums))::value, columns = 2 * count;  // 64 x columns, by 128 threads
  constexpr bool in_registers = decltype(cute::size(a))::value == 8;
  struct Part {
    A a;
    B b;
    bool accumulate;
  };
  auto part = std::make_shared<Part>(Part{a, b, mma.accumulate_ == cute::GMMA::ScaleOut::One});
  emulation::issue_product(
      std::move(part), &sums(0), count, [](std::shared_ptr<void> const* parts, float* const* accumulators) {
        auto const part_of = [&](int thread) -> Part const& { return *static_cast<Part const*>(parts[thread].get()); };
        static float left[64][16], right[16][columns];
        for (int k = 0; k < 16; ++k) {
          for (int n = 0; n < columns; ++n) right[k][n] = static_cast<float>(part_of(0).b(n + columns * k));
          for (int m = 0; m < 64 && !in_registers; ++m) left[m][k] = static_cast<float>(part_of(0).a(m + 64 * k));
        }
        for (int thread = 0; thread < 128 && in_registers; ++thread) {
          for (int i = 0; i < 8; ++i) {  // (2 neighbours in k, 2 rows 8 apart, 2 halves of k)
            int const row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
            left[row][thread % 4 * 2 + i % 2 + i / 4 * 8] = static_cast<float>(part_of(thread).a(i));
          }
        }
        for (int thread = 0; thread < 128; ++thread) {
          for (int i = 0; i < count; ++i) {  // (2 neighbours, 2 rows 8 apart, columns / 8)
            int const row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
            int const column = thread % 4 * 2 + i % 2 + i / 4 * 8;
            float sum = part_of(thread).accumulate ? accumulators[thread][i] : 0.f;
            for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
            accumulators[thread][i] = sum;
          }
        }
      });
}

FLASHCUTE_DEVICE void commit_products() { emulation::commit_products(); }

template <int Pending>
FLASHCUTE_DEVICE void wait_for_products() {
  emulation::wait_for_products(Pending);
}

template <class Registers>
FLASHCUTE_DEVICE void keep_in_place(Registers&) {}

// ---- bulk copies ---------------------------------------------------------------------------------

enum class L2Hint : uint64_t { evict_first, evict_last };

/// What the test writes into a TensorMap: 16-bit elements (columns, rows, heads, batch), the rows of a box, and their
/// bytes.
struct EmulatedMap {
  char const* base;
  int32_t columns, rows, heads, batch, box_rows, box_row_bytes;
  int64_t row_stride, head_stride, batch_stride;  // bytes

  static EmulatedMap of(TensorMap const& map) {
    EmulatedMap own;
    std::memcpy(&own, &map, sizeof(own));
    return own;
  }
};
static_assert(sizeof(EmulatedMap) <= sizeof(TensorMap));

FLASHCUTE_DEVICE void prefetch(TensorMap const&) {}
FLASHCUTE_DEVICE void prefetch_box(TensorMap const&, int, int, int, int) {}

/// The engine swizzles as the tensor cores expect it: the pieces of 16 bytes of a row change places by the number of
/// the 128 bytes, among those of shared memory, in which it lies.
FLASHCUTE_DEVICE void copy_box(TensorMap const& map, int column, int row, int head, int batch, void* to,
                               Barrier& barrier, L2Hint) {
  EmulatedMap const t = EmulatedMap::of(map);
  size_t const bytes = static_cast<size_t>(t.box_rows) * static_cast<size_t>(t.box_row_bytes);
  if (reinterpret_cast<uintptr_t>(to) % 1024 != 0) throw emulation::Violation("a box that is not aligned");
  std::memset(to, 0xff, bytes);  // whoever reads it before it has arrived, or still, gets NaN
  auto const copy = [=] {
    for (int r = 0; r < t.box_rows; ++r) {
      int const pieces = t.box_row_bytes / 16;
      for (int piece = 0; piece < pieces; ++piece) {
        auto* const place =
            static_cast<char*>(to) + r * t.box_row_bytes + (piece ^ r * t.box_row_bytes / 128 % pieces) * 16;
        std::memset(place, 0, 16);
        if (row + r >= t.rows || column + 8 * piece >= t.columns) continue;
        char const* const from = t.base + batch * t.batch_stride + head * t.head_stride + (row + r) * t.row_stride +
                                 2 * (column + 8 * piece);
        emulation::check_global_read(from, 16);
        std::memcpy(place, from, 16);
      }
    }
  };
  emulation::start_bulk_copy(copy, &barrier, static_cast<int>(bytes));
}
FLASHCUTE_DEVICE void copy_bulk(void const* from, void* to, int bytes, Barrier& barrier) {
  auto const size = static_cast<size_t>(bytes);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) {
    throw emulation::Violation("a bulk copy that is not aligned");
  }
  std::memset(to, 0xff, size);
  auto const copy = [=] {
    for (size_t i = 0; i < size; i += 16) emulation::check_global_read(static_cast<char const*>(from) + i, 16);
    std::memcpy(to, from, size);
  };
  emulation::start_bulk_copy(copy, &barrier, bytes);
}

/// At once: what is read too late is not found.
FLASHCUTE_DEVICE void add_bulk(float* to, float const* from, int bytes) {
  for (int i = 0; i < bytes / static_cast<int>(sizeof(float)); ++i) emulation::add_global(to + i, from[i]);
}
FLASHCUTE_DEVICE void store_bulk(float* to, float const* from, int bytes) {
  for (int i = 0; i < bytes / static_cast<int>(sizeof(float)); ++i) global_store(to + i, from[i]);
}
template <int Pending = 0>
FLASHCUTE_DEVICE void await_bulk_reads() {}
FLASHCUTE_DEVICE void await_bulk() {}
FLASHCUTE_DEVICE void keep_bulk_behind() {}

FLASHCUTE_DEVICE void release_count(uint32_t* number) { ++*number; }
FLASHCUTE_DEVICE uint32_t acquire_count(uint32_t const* number) { return *number; }
FLASHCUTE_DEVICE uint32_t peek_at_count(uint32_t const* number) { return *number; }
/// Of a block that runs alone, after those that started before it: who waits would wait for one that starts later.
FLASHCUTE_DEVICE void await_count(uint32_t const* number, uint32_t count) {
  if (*number != count) throw emulation::Violation("a wait for a thread block that has not been started");
}

FLASHCUTE_DEVICE void copy_box_to_all(TensorMap const&, int, int, int, int, void*, Barrier&, L2Hint, int) {
  throw emulation::Violation("copy_box_to_all");
}

}  // namespace flashcute::sm90
