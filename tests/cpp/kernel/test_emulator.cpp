// The emulated thread block that test_kernel runs kernels in: that it computes what the hardware does,
// and that it can fail. A checker which accepts everything would make every other test of a kernel empty.
#include <gtest/gtest.h>

#include <set>

#include "flashcute/device/instructions.hpp"
// Of CuTe, also its description of ldmatrix, which the kernels' headers do not include. It needs CuTe's tensor first.
#include <cute/atom/copy_traits_sm75.hpp>

namespace flashcute {
namespace {

using emulation::GlobalMemory;
using emulation::Violation;
using Use = GlobalMemory::Use;

constexpr uint64_t schedules = 20;

/// 16 bytes per thread, in global memory: `in` to read, `out` to write.
struct Memory {
  alignas(16) uint16_t in[64][8], out[64][8];
  GlobalMemory global;

  Memory() {
    for (int i = 0; i < 64 * 8; ++i) in[i / 8][i % 8] = static_cast<uint16_t>(i), out[i / 8][i % 8] = 0xffff;
    global.add(in, sizeof(in));
    global.add(out, sizeof(out));
    global.allow(in, sizeof(in), Use::input);
    global.allow(out, sizeof(out), Use::output);
  }
};

constexpr size_t shared_bytes = 64 * 16;

char* place(void* shared, int i) { return static_cast<char*>(shared) + 16 * i; }

/// What the threads of a block do. (A plain function: each type of lambda would make g++ compile its callers anew.)
using Body = void (*)(Memory& m, void* shared);

/// What a block of two warps violates, under one schedule; "" if nothing.
std::string violation(uint64_t seed, Body body, int threads = 64) {
  Memory m;
  try {
    emulation::run_block(0, threads, shared_bytes, seed, m.global, [&](void* shared) { body(m, shared); });
  } catch (Violation const& v) {
    return v.what();
  }
  return "";
}

/// Under every schedule the body violates something that is described so.
void expect_violation(char const* described, Body body, int threads = 64) {
  for (uint64_t seed = 0; seed < schedules; ++seed) {
    std::string const found = violation(seed, body, threads);
    ASSERT_NE(found.find(described), std::string::npos) << "expected " << described << ", found \"" << found << '"';
  }
}

void expect_none(Body body, int threads = 64) {
  for (uint64_t seed = 0; seed < schedules; ++seed) ASSERT_EQ(violation(seed, body, threads), "");
}

/// Hands each thread's input to its neighbour through shared memory: right with both flags, else a race.
template <bool Wait, bool Sync, bool SyncFirst = false>
void exchange(Memory& m, void* shared) {
  int const t = thread_index(), other = (t + 33) % 64;
  cute::uint128_t const old{};
  emulation::store_shared(place(shared, t), &old, 16);
  block_sync();
  emulation::start_copy(m.in[t], place(shared, t), 16, true);
  if (SyncFirst) block_sync();
  if (Wait) copies_wait();
  if (Sync) block_sync();
  uint16_t words[8];
  emulation::load_shared(words, place(shared, other), 16);
  emulation::store_global(m.out[t], words, 16);
  copies_wait();
}

// Guards against an emulator that reports races which are none, or that loses or mixes up data.
TEST(Emulator, RunsWhatIsRight) {
  for (uint64_t seed = 0; seed < schedules; ++seed) {
    Memory m;
    emulation::run_block(0, 64, shared_bytes, seed, m.global, [&](void* shared) { exchange<true, true>(m, shared); });
    EXPECT_EQ(m.global.count(Use::output), 0u);
    for (int t = 0; t < 64; ++t)
      for (int i = 0; i < 8; ++i) ASSERT_EQ(m.out[t][i], m.in[(t + 33) % 64][i]);
  }
}

// Guards against an emulator that only one schedule is ever tried in.
TEST(Emulator, SchedulesDiffer) {
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 0; seed < schedules; ++seed) {
    Memory m;
    std::vector<int> order;
    emulation::run_block(0, 64, shared_bytes, seed, m.global, [&](void*) { order.push_back(thread_index()); });
    EXPECT_EQ(std::set<int>(order.begin(), order.end()).size(), 64u);
    orders.insert(order);
  }
  EXPECT_EQ(orders.size(), schedules);
}

// Guards against a race detector that misses what a missing wait or barrier does.
TEST(Emulator, FindsRaces) {
  expect_violation("race", exchange<true, false>);
  expect_violation("in flight", exchange<false, true>);
  // A barrier before the wait orders nothing: each thread waits for its own copies only.
  expect_violation("race", exchange<true, false, true>);

  // The same place twice, by different threads.
  expect_violation("store by thread", [](Memory&, void* shared) {
    uint32_t const word = 0;
    emulation::store_shared(place(shared, thread_index() / 2), &word, 4);
  });
  // A buffer that is refilled while others still read it.
  expect_violation("race", [](Memory& m, void* shared) {
    int const t = thread_index();
    uint16_t words[8];
    emulation::start_copy(m.in[t], place(shared, t), 16, true);
    copies_wait();
    block_sync();
    emulation::load_shared(words, place(shared, (t + 33) % 64), 16);
    emulation::start_copy(m.in[t], place(shared, t), 16, true);
    copies_wait();
  });
  // A thread that does not wait for its own copy.
  expect_violation("in flight", [](Memory& m, void* shared) {
    uint16_t words[8];
    emulation::start_copy(m.in[thread_index()], place(shared, thread_index()), 16, true);
    emulation::load_shared(words, place(shared, thread_index()), 16);
  });
  // Warps execute together, but only block_sync makes lanes see each other's stores.
  expect_violation("ldmatrix by warp", [](Memory&, void* shared) {
    cute::uint128_t const zero{};
    emulation::store_shared(place(shared, thread_index()), &zero, 16);
    uint32_t d[4];
    ldmatrix<false>(shared_address(place(shared, thread_index())), d[0], d[1], d[2], d[3]);
  });
  expect_violation("nobody has written", [](Memory&, void* shared) {
    uint16_t words[8];
    emulation::load_shared(words, shared, 16);
  });
  expect_violation("exits with asynchronous copies", [](Memory& m, void* shared) {
    emulation::start_copy(m.in[thread_index()], place(shared, thread_index()), 16, true);
  });
}

// Guards against reports of races where a thread uses alone what it wrote.
TEST(Emulator, ThreadsMayUseTheirOwnPlaces) {
  expect_none([](Memory& m, void* shared) {
    int const t = thread_index();
    uint16_t words[8];
    for (int round = 0; round < 3; ++round) {
      emulation::start_copy(m.in[t], place(shared, t), 16, true);
      copies_wait();
      emulation::load_shared(words, place(shared, t), 16);
      emulation::store_shared(place(shared, t), words, 16);
    }
    for (int i = 0; i < 8; ++i) EXPECT_EQ(words[i], m.in[t][i]);
  });
}

// Guards against hanging, or passing, where threads do not meet.
TEST(Emulator, FindsDivergence) {
  expect_violation("deadlock", [](Memory&, void*) {
    if (thread_index() != 17) block_sync();
  });
  expect_violation("divergence", [](Memory&, void*) {
    if (thread_index() < 40) {
      block_sync();
    } else {
      block_sync();
    }
  });
  expect_violation("deadlock", [](Memory&, void*) {
    if (thread_index() < 40) block_sync();
    shuffle_xor(0.f, 1);
    if (thread_index() >= 40) block_sync();
  });
  expect_violation("divergence", [](Memory&, void* shared) {
    uint32_t d[4];
    if (thread_index() % 2 == 0) {
      shuffle_xor(0.f, 1);
    } else {
      ldmatrix<false>(shared_address(shared), d[0], d[1], d[2], d[3]);
    }
  });
  expect_none([](Memory&, void*) {
    for (int i = 0; i < 3; ++i) {
      if (thread_index() < 32) shuffle_xor(0.f, 1);
      block_sync();
    }
  });
}

// Guards against a vote that mixes with the one before or after it, or that is no barrier.
TEST(Emulator, BlockAnyIsOneVoteAndABarrier) {
  expect_none([](Memory&, void* shared) {
    int const t = thread_index();
    for (uint32_t round = 0; round < 4; ++round) {
      shared_store(place(shared, t), round);
      EXPECT_TRUE(block_any(t == 17 * static_cast<int>(round)));
      EXPECT_EQ(shared_load<uint32_t>(place(shared, (t + 33) % 64)), round);
      EXPECT_FALSE(block_any(false));
    }
  });
}

// Guards against accesses outside tensors that happen to be harmless on the host.
TEST(Emulator, FindsAccessesOutOfBounds) {
  expect_violation("no element of an input", [](Memory& m, void* shared) {
    if (thread_index() == 0) m.global.allow(&m.in[5][7], 2, Use::none);
    block_sync();
    emulation::start_copy(m.in[thread_index()], place(shared, thread_index()), 16, true);
    copies_wait();
  });
  expect_violation("no tensor's memory", [](Memory& m, void* shared) {
    emulation::start_copy(m.in + 64 + 64 * 100, place(shared, thread_index()), 16, true);
  });
  expect_violation("misaligned read", [](Memory& m, void* shared) {
    emulation::start_copy(&m.in[0][4], place(shared, thread_index()), 16, true);
  });
  expect_violation("misaligned access",
                   [](Memory& m, void* shared) { emulation::start_copy(m.in, place(shared, 0) + 8, 16, true); });
  expect_violation("not in shared memory",
                   [](Memory& m, void* shared) { emulation::start_copy(m.in, place(shared, 64), 16, true); });
  expect_violation("second store", [](Memory& m, void*) { emulation::store_global(m.out, m.in, 16); });
  expect_violation("no element of an output", [](Memory& m, void*) { emulation::store_global(m.in, m.out, 16); });
  // A copy whose predicate is false reads nothing, and makes zeros.
  expect_none([](Memory&, void* shared) {
    uint64_t words[2];
    emulation::start_copy(nullptr, place(shared, thread_index()), 16, false);
    copies_wait();
    emulation::load_shared(words, place(shared, thread_index()), 16);
    EXPECT_EQ(words[0] | words[1], 0u);
  });
}

/// The element of the lane's register `i / 2`, lower half first.
uint16_t half_of(uint32_t const* registers, int i) { return static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2)); }

// Guards against a wrong emulation of ldmatrix: CuTe's description of the instruction, which comes from
// elsewhere, must agree element by element.
template <bool Transposed, class Instruction>
void check_ldmatrix() {
  expect_none(
      [](Memory& m, void* shared) {
        using Traits = cute::Copy_Traits<Instruction>;
        int const lane = thread_index();
        emulation::start_copy(m.in[lane], place(shared, lane), 16, true);
        copies_wait();
        block_sync();
        uint32_t d[4];
        ldmatrix<Transposed>(shared_address(place(shared, lane)), d[0], d[1], d[2], d[3]);
        for (int i = 0; i < 8; ++i) {
          // Bits of all rows one after the other; the value in m.in is the element's number.
          int const bit = typename Traits::DstLayout{}(lane, 16 * i);
          EXPECT_EQ(half_of(d, i), bit / 16) << "lane " << lane << " element " << i;
        }
      },
      32);
}

TEST(Emulator, LdmatrixIsWhatCuteBelieves) {
  check_ldmatrix<false, cute::SM75_U32x4_LDSM_N>();
  check_ldmatrix<true, cute::SM75_U16x8_LDSM_T>();
}

// Guards against a wrong emulation of mma, in the same way, and against wrong conversions.
template <DType T>
void check_mma() {
  using Element = typename TensorCore<T>::Element;
  using Instruction = typename TensorCore<T>::Mma;
  expect_none(
      [](Memory&, void*) {
        using Traits = cute::MMA_Traits<Instruction>;
        // Small integers, so that every sum is exact.
        auto const a = [](int m, int k) { return (3 * m + 5 * k) % 7 - 3; };
        auto const b = [](int n, int k) { return (2 * n + 3 * k) % 5 - 2; };
        auto const c = [](int m, int n) { return m - 2 * n; };
        int const lane = thread_index();
        uint32_t ra[4] = {}, rb[2] = {};
        float rc[4];
        for (int i = 0; i < 8; ++i) {
          int const at = typename Traits::ALayout{}(lane, i);
          ra[i / 2] |= static_cast<uint32_t>(Element(a(at % 16, at / 16)).raw()) << 16 * (i % 2);
        }
        for (int i = 0; i < 4; ++i) {
          int const at = typename Traits::BLayout{}(lane, i);
          rb[i / 2] |= static_cast<uint32_t>(Element(b(at % 8, at / 8)).raw()) << 16 * (i % 2);
        }
        for (int i = 0; i < 4; ++i) {
          int const at = typename Traits::CLayout{}(lane, i);
          rc[i] = static_cast<float>(c(at % 16, at / 16));
        }
        Instruction::fma(rc[0], rc[1], rc[2], rc[3], ra[0], ra[1], ra[2], ra[3], rb[0], rb[1], rc[0], rc[1], rc[2],
                         rc[3]);
        for (int i = 0; i < 4; ++i) {
          int const at = typename Traits::CLayout{}(lane, i), m = at % 16, n = at / 16;
          int expected = c(m, n);
          for (int k = 0; k < 16; ++k) expected += a(m, k) * b(n, k);
          EXPECT_EQ(rc[i], static_cast<float>(expected));
        }
      },
      32);
}

TEST(Emulator, MmaIsWhatCuteBelieves) {
  check_mma<DType::float16>();
  check_mma<DType::bfloat16>();
}

// Guards against wrong special cases of the arithmetic that the softmax relies on.
TEST(Emulator, Arithmetic) {
  EXPECT_EQ(exp2_approx(-infinity), 0.f);
  EXPECT_EQ(exp2_approx(3.f), 8.f);
  EXPECT_EQ(exp2_approx(-140.f), 0.f);  // subnormal: flushed
  EXPECT_TRUE(std::isnan(exp2_approx(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_EQ(reciprocal_approx(0.f), infinity);
  EXPECT_EQ(add_zero_times<cute::half_t>(0x7bffc000u, 0x00003c00u), 0x00003c00u);
  EXPECT_EQ(add_zero_times<cute::half_t>(0xfc003c00u, 0u) & 0x7fff7fffu, 0x7fff0000u);      // -inf, 1
  EXPECT_EQ(add_zero_times<cute::bfloat16_t>(0u, 0x00007fc0u) & 0x7fff7fffu, 0x00007fffu);  // NaN stays
  EXPECT_EQ(round_pair<cute::bfloat16_t>(1.f, -2.f), 0xc0003f80u);
  EXPECT_EQ(round_pair<cute::half_t>(1.f, -2.f), 0xc0003c00u);
  EXPECT_EQ(round_pair<cute::half_t>(1.f + 1.f / 2048, 1.f + 3.f / 2048), 0x3c023c00u);    // ties to even
  EXPECT_EQ(round_pair<cute::bfloat16_t>(1.f + 1.f / 256, 1.f + 3.f / 256), 0x3f823f80u);  // ties to even
}

}  // namespace
}  // namespace flashcute
