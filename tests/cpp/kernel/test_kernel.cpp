// The forward kernel itself, run on the host by emulated thread blocks: what it computes.
#include <gtest/gtest.h>

#include "kernel/kernel_run.hpp"

#include <numbers>

namespace flashcute {
namespace {

// Small tiles, for the tests that need many problems.
constexpr ForwardKernelId small_causal =
    causal({.dtype = bf16, .head_dim = 64, .block_m = 32, .block_n = 16, .num_warps = 2});
constexpr ForwardKernelId small_band =
    band({.dtype = bf16, .head_dim = 64, .block_m = 32, .block_n = 16, .num_warps = 2, .stages = 2});
constexpr ForwardKernelId serial_band =
    band({.dtype = f16, .head_dim = 64, .block_m = 32, .block_n = 16, .num_warps = 2, .eager_load_blocks = false});
// With one stage and with two, whose places in shared memory depend on how many blocks came before; blocks that are
// parts of a cell, as large, and several cells of which some lie in two words.
constexpr ForwardKernelId small_mapped =
    mapped({.dtype = bf16, .head_dim = 64, .block_m = 32, .block_n = 16, .num_warps = 2, .stages = 2});
constexpr ForwardKernelId serial_mapped =
    mapped({.dtype = f16, .head_dim = 64, .block_m = 32, .block_n = 64, .num_warps = 2, .eager_load_blocks = false});
constexpr ForwardKernelId wide_mapped =
    mapped({.dtype = bf16, .head_dim = 64, .block_m = 128, .block_n = 96, .num_warps = 4});
constexpr ForwardKernelId small_full =
    full({.dtype = f16, .head_dim = 128, .block_m = 64, .block_n = 32, .num_warps = 2, .q_in_registers = true});

// Zero and one keys, rows without keys, lengths beside every tile boundary.
TEST(ForwardKernel, Lengths) {
  for (int sq : {0, 1, 15, 16, 31, 32, 33, 65}) {
    for (int sk : {0, 1, 7, 15, 16, 17, 33, 64}) check<small_causal>({.sq = sq, .sk = sk, .d = 64});
  }
  for (int sq : {0, 1, 63, 65}) {
    for (int sk : {0, 1, 31, 32, 33, 64}) check<small_full>({.sq = sq, .sk = sk, .d = 128});
  }
}

// Head dims below the compiled width, with other heads or NaN in the columns beyond.
TEST(ForwardKernel, HeadDims) {
  for (Order order : {Order::bshd, Order::bhsd, Order::padded}) {
    for (int d : {8, 16, 40, 56}) check<small_causal>({.sq = 35, .sk = 37, .d = d, .heads = 2, .order = order});
    for (int d : {8, 64, 72, 104}) check<small_full>({.sq = 35, .sk = 37, .d = d, .heads = 2, .order = order});
  }
}

// Guards against the wrong head, batch or stride, which equal sizes would hide.
TEST(ForwardKernel, GroupedHeadsAndStrides) {
  for (Order order : {Order::bshd, Order::bhsd, Order::padded}) {
    check<small_causal>({.sq = 37, .sk = 21, .d = 48, .batch = 3, .heads = 6, .kv_heads = 2, .order = order});
  }
}

// Guards against offsets that are taken for bottom-right: also of rows that see none or all.
TEST(ForwardKernel, CausalOffsets) {
  for (int offset : {-100, -40, -33, -1, 0, 5, 30, 100}) {
    check<small_causal>({.sq = 40, .sk = 45, .d = 64, .causal_offset = offset});
  }
}

// Windows that end at one or the other side of a tile's and a block's edges; queries that see no key, at either end.
TEST(ForwardKernel, Windows) {
  for (int first : {-80, -33, -16, -5, 0, 3}) {
    for (int size : {0, 1, 15, 16, 31, 47, 70}) {
      check<small_band>({.sq = 70, .sk = 75, .d = 64, .causal_offset = first + size, .window_offset = first});
    }
  }
  // Several full blocks between two partial ones.
  for (int size : {64, 99, 120}) {
    check<small_band>({.sq = 40, .sk = 200, .d = 64, .causal_offset = 150, .window_offset = 150 - size});
    check<serial_band>({.sq = 40, .sk = 200, .d = 64, .causal_offset = 150, .window_offset = 150 - size});
  }
}

// A value that a window hides, before or after the keys that a row sees, in a block that other rows of the tile see.
TEST(ForwardKernel, NanBesideAWindow) {
  for (double poison : {nan, inf, -inf}) {
    Problem problem(small_band, {.sq = 40, .sk = 90, .d = 64, .causal_offset = 30, .window_offset = 5});
    for (int j : {0, 20, 21, 50, 89}) problem.v.set(0, j, 0, 3, poison);
    problem.v.set(0, 35, 0, 3, inf);
    for (int j : {3, 60}) problem.k.set_row(0, j, 0, nan);
    check<small_band>(problem, 2);
  }
}

// Guards against a block that is visited though its cells are empty, or left out though one is not; bits of another
// row, cell, head or batch entry; rows without a key; and the place of a block that does not follow the one before it.
TEST(ForwardKernel, BlockMaps) {
  for (auto const& [sq, sk] : {std::pair{1, 1}, {70, 75}, {130, 200}, {64, 300}}) {
    for (int seed : {1, 2, 3}) {
      Shape s{.sq = sq, .sk = sk, .d = 64, .causal_offset = sk, .window_offset = -sq};
      s.map = MapProblem::random(1, 1, sq, sk, static_cast<uint64_t>(seed));
      check<small_mapped>(s, 2);
      check<serial_mapped>(s);
      check<wide_mapped>(s, 2);
    }
  }
}

TEST(ForwardKernel, BlockMapsOfBatchEntriesAndHeads) {
  for (auto const& [batch, heads] : {std::pair{2, 1}, {1, 4}, {2, 4}}) {
    Shape s{.sq = 100, .sk = 140, .d = 64, .batch = 2, .heads = 4, .kv_heads = 2};
    s.causal_offset = 140, s.window_offset = -100;
    s.map = MapProblem::random(batch, heads, s.sq, s.sk, 5);
    check<small_mapped>(s);
    check<wide_mapped>(s);
  }
}

// All masks AND: a map beside a window, lengths, a prefix and a sink.
TEST(ForwardKernel, BlockMapsBesideABand) {
  for (bool from_end : {false, true}) {
    Shape s{.sq = 130, .sk = 200, .d = 64, .d_v = 48, .batch = 3, .heads = 2, .kv_heads = 1};
    s.causal_offset = 60, s.window_offset = -40, s.from_end = from_end;
    s.seqlens_q = {130, 65, 0}, s.seqlens_k = {200, 130, 64};
    s.sink = {0.5f, -1};
    s.map = MapProblem::random(3, 1, s.sq, s.sk, 7);
    Problem problem(small_mapped, s);
    problem.poison_absent();
    check<small_mapped>(problem, 2);
    check<wide_mapped>(s);
    s.prefix = 90;
    check<serial_mapped>(s);
  }
}

// Guards against a NaN that a map hides and a product spreads.
TEST(ForwardKernel, NanThatAMapHides) {
  Shape s{.sq = 100, .sk = 200, .d = 64, .causal_offset = 200, .window_offset = -100};
  s.map = MapProblem::of(1, 1, s.sq, s.sk, [](int, int, int i, int j) { return j % 3 != 0 && (j < 64 || i > 70); });
  Problem problem(wide_mapped, s);
  for (int j : {0, 3, 63, 66, 150}) problem.k.set_row(0, j, 0, nan), problem.v.set_row(0, j, 0, nan);
  problem.v.set(0, 100, 0, 5, inf);  // some rows see it
  check<wide_mapped>(problem);
}

// A map without room for its partial cells is wrong, and nobody may take its results for right.
TEST(ForwardKernel, BlockMapsThatOverflow) {
  Shape s{.sq = 100, .sk = 200, .d = 64, .causal_offset = 200, .window_offset = -100};
  s.map = MapProblem::random(1, 1, s.sq, s.sk, 2);
  s.map.build(1);
  Problem problem(wide_mapped, s);
  ASSERT_NO_FATAL_FAILURE(run<wide_mapped>(problem, 1));
  for (int i = 0; i < s.sq; ++i) {
    ASSERT_TRUE(std::isnan(problem.out.at(0, i, 0, 7)) && std::isnan(problem.lse_at(0, 0, i))) << "row " << i;
  }
}

// Guards against rows and keys beyond the end of a sequence that is shorter than its tensors: read, multiplied, seen,
// left out of the results, or counted as queries that the mask is aligned to.
TEST(ForwardKernel, ShortSequences) {
  for (bool from_end : {false, true}) {
    for (int first : {-200, 0}) {
      Shape const s{.sq = 70,
                    .sk = 75,
                    .d = 64,
                    .d_v = 48,
                    .batch = 6,
                    .heads = 2,
                    .kv_heads = 1,
                    .causal_offset = 5,
                    .window_offset = first,
                    .seqlens_q = {70, 33, 1, 0, 64, 20},
                    .seqlens_k = {75, 75, 40, 9, 0, 1},
                    .from_end = from_end};
      Problem problem(small_band, s);
      problem.poison_absent();
      check<small_band>(problem, 2);
    }
  }
}

// Guards against NaN in rows that do not exist that sends a whole tile to the exact products, whose sums have another
// order.
TEST(ForwardKernel, AbsentRowsChangeNoBit) {
  constexpr ForwardKernelId f32_band =
      kernel_of(ForwardConfig{.dtype = f32, .head_dim = 32, .block_m = 64, .block_n = 32, .math = Math::tf32x3},
                {.mask = MaskKind::band, .count_blocks = true});
  Shape const s{.sq = 50, .sk = 60, .d = 32, .causal_offset = 10, .window_offset = -40, .seqlens_q = {30}};
  Problem clean(f32_band, s), poisoned(f32_band, s);
  poisoned.poison_absent();
  check<f32_band>(clean);
  check<f32_band>(poisoned);
  EXPECT_EQ(clean.out.bytes(), poisoned.out.bytes());
}

// Guards against packed sequences that see each other, a NaN that leaks from one to the next, rows of no sequence that
// nobody writes, and tiles that are lost where sequences are empty, short, or many.
TEST(ForwardKernel, PackedSequences) {
  for (bool from_end : {false, true}) {
    for (int first : {-200, 0}) {
      Shape s{.sq = 210, .sk = 190, .d = 64, .d_v = 48, .heads = 2, .kv_heads = 1, .window_offset = first};
      s.causal_offset = from_end ? s.sk - s.sq : 5;
      if (from_end) s.window_offset = *s.causal_offset + first;
      s.from_end = from_end;
      s.cu_seqlens_q = {3, 73, 73, 74, 106, 170, 200};
      s.cu_seqlens_k = {2, 60, 75, 75, 108, 172, 185};
      s.sink = {0.5f, -1};
      for (bool gaps : {false, true}) {
        if (gaps) s.seqlens_q = {69, 3, 1, 20, 64, 0}, s.seqlens_k = {58, 15, 9, 7, 63, 13};
        Problem problem(small_band, s);
        problem.poison_absent();
        check<small_band>(problem, 2);
        check<serial_band>(s);
      }
    }
  }
}

TEST(ForwardKernel, PackedSequencesOfAnyLengths) {
  std::mt19937 random(11);
  auto const below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int i = 0; i < 30; ++i) {
    Shape s{.sq = 0, .sk = 0, .d = 64, .heads = 2, .kv_heads = 2, .causal_offset = 0, .window_offset = -below(60)};
    s.cu_seqlens_q = {below(3)}, s.cu_seqlens_k = {below(3)};
    for (int left = below(12); left > 0; --left) {
      s.cu_seqlens_q.push_back(s.cu_seqlens_q.back() + below(2) * below(70));
      s.cu_seqlens_k.push_back(s.cu_seqlens_k.back() + below(2) * below(70));
    }
    s.sq = s.cu_seqlens_q.back() + below(3);
    s.sk = s.cu_seqlens_k.back() + below(3);
    SCOPED_TRACE(testing::PrintToString(s.cu_seqlens_q) + testing::PrintToString(s.cu_seqlens_k));
    Problem problem(small_band, s);
    problem.poison_absent();
    check<small_band>(problem);
  }
}

TEST(ForwardKernel, PrefixesAndSinks) {
  for (int prefix : {0, 1, 40, 100}) {
    check<small_band>({.sq = 70,
                       .sk = 75,
                       .d = 64,
                       .causal_offset = 1000,
                       .window_offset = -1000,
                       .prefix = prefix,
                       .prefix_offset = 5});
    check<small_band>(
        {.sq = 70, .sk = 75, .d = 64, .causal_offset = 15, .window_offset = -25, .prefix = prefix, .prefix_offset = 5});
  }
  float const inf32 = std::numeric_limits<float>::infinity();
  Shape const s{.sq = 40,
                .sk = 50,
                .d = 64,
                .batch = 2,
                .heads = 8,
                .kv_heads = 8,
                .causal_offset = -20,
                .window_offset = -30,
                .seqlens_q = {40, 30},
                .seqlens_k = {50, 0},
                .sink = {0, 100, -100, -inf32, 3, -3, 88, -88}};
  check<small_band>(s);
  check<serial_band>(s);
}

// Guards against what nobody thought of: combinations of everything above.
TEST(ForwardKernel, RandomProblems) {
  std::mt19937 random(7);
  auto const below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int i = 0; i < 60; ++i) {
    Shape s{.sq = below(90), .sk = below(90), .d = 8 + 8 * below(8), .batch = 1 + below(2)};
    s.kv_heads = 1 + below(2);
    s.heads = s.kv_heads * (1 + below(2));
    s.order = static_cast<Order>(below(3));
    if (below(2) == 0) s.causal_offset = below(140) - 70;
    check<small_causal>(s, 2);
    s.window_offset = s.causal_offset.value_or(s.sk - s.sq) - below(90);
    check<small_band>(s, 2);
    s.d += 8 * below(9);
    check<small_full>(s, 2);
  }
}

// Guards against results that depend on which warp is ahead, or when a copy arrives.
TEST(ForwardKernel, SchedulesChangeNothing) {
  check<small_causal>({.sq = 64, .sk = 70, .d = 64}, 40);
  check<small_full>({.sq = 64, .sk = 100, .d = 120}, 20);
}

// Guards against storing an LSE that nobody asked for.
TEST(ForwardKernel, WithoutLse) {
  Problem problem(small_causal, {.sq = 33, .sk = 40, .d = 64});
  problem.wants_lse = false;
  check<small_causal>(problem);
}

// Guards against NaN and inf that maximum or selection swallow. What a row sees must reach it, and only it.
TEST(ForwardKernel, VisibleNanPropagates) {
  Shape const s{.sq = 40, .sk = 40, .d = 64};
  for (double poison : {nan, inf}) {
    Problem problem(small_causal, s);
    problem.q.set(0, 20, 0, 3, poison);
    check<small_causal>(problem);
  }
  Problem key(small_causal, s);
  key.k.set(0, 25, 0, 3, nan);
  check<small_causal>(key);
  Problem value(small_full, {.sq = 40, .sk = 40, .d = 64});
  value.v.set(0, 25, 0, 3, nan);
  check<small_full>(value);
}

// Keys that a mask hides, in blocks that are visited and in blocks that are not.
TEST(ForwardKernel, MaskedNanDoesNotLeak) {
  // Rows 0 to 39 see no key beyond 19: not in the block of keys 16 to 31, nor in later ones.
  Problem problem(small_causal, {.sq = 40, .sk = 50, .d = 64, .causal_offset = -20});
  for (int j = 20; j < 50; ++j) problem.k.set_row(0, j, 0, nan);
  check<small_causal>(problem);
}

// The same of values: by 0 they must not be multiplied (0 * NaN), also where other rows of the tile see them.
TEST(ForwardKernel, MaskedNanValueDoesNotLeak) {
  Problem problem(small_causal, {.sq = 40, .sk = 50, .d = 64, .causal_offset = -20});
  for (int j = 20; j < 50; ++j) problem.v.set_row(0, j, 0, nan);
  check<small_causal>(problem);
  for (double poison : {nan, inf, -inf}) {
    Problem diagonal(small_causal, {.sq = 40, .sk = 40, .d = 64});
    diagonal.v.set(0, 25, 0, 3, poison);
    diagonal.v.set(0, 27, 0, 3, inf);  // inf - inf to those who see both
    check<small_causal>(diagonal, 3);
  }
}

// Guards against taking a row whose scores are all -inf for one that sees no key, and against blocks whose
// scores are all -inf, first or last.
TEST(ForwardKernel, ScoresOfMinusInfinity) {
  Shape const s{.sq = 40, .sk = 50, .d = 64};
  auto const with_minus_infinity = [&](int first, int last) {
    Problem problem(small_causal, s);
    for (int i = 0; i < s.sq; ++i) problem.q.set(0, i, 0, 0, 1);
    for (int j = first; j < last; ++j) problem.k.set(0, j, 0, 0, -inf);
    return problem;
  };
  for (auto [first, last] : {std::pair(0, 50), {0, 16}, {32, 50}, {16, 32}, {7, 8}}) {
    Problem problem = with_minus_infinity(first, last);
    check<small_causal>(problem);
  }
}

// Guards against overflow: exponentials are relative to the row's maximum, wherever it is.
TEST(ForwardKernel, LargeScores) {
  for (double size : {-30., 30.}) {
    Problem problem(small_causal, {.sq = 40, .sk = 60, .d = 64});
    for (int i = 0; i < 40; ++i) problem.q.set(0, i, 0, 0, 40);
    for (int j = 0; j < 60; ++j) problem.k.set(0, j, 0, 0, size + (j % 3));
    check<small_causal>(problem);
  }
  Problem flat(small_full, {.sq = 10, .sk = 60, .d = 64});
  flat.scale = 0;
  check<small_full>(flat);
}

// Guards against a row that is rescaled although it kept its maximum, or kept it although others were rescaled: the
// maxima of rows rise from block to block by less than the threshold, by just as much, and by more.
template <ForwardKernelId Id>
void check_rising_maxima() {
  constexpr int blocks = 6;
  Problem problem(Id, {.sq = 40, .sk = blocks * Id.config.block_n, .d = 64});
  problem.scale = std::numbers::ln2;  // so that a score counts powers of 2
  for (int i = 0; i < 40; ++i) {
    problem.q.set_row(0, i, 0, 0);
    problem.q.set(0, i, 0, 0, 0.25 * (1 << i % 5));  // a rise by 1, 2, 4, 8 or 16 a block
  }
  for (int j = 0; j < blocks * Id.config.block_n; ++j) {
    int const later_blocks = blocks - 1 - j / Id.config.block_n;  // which come first
    problem.k.set(0, j, 0, 0, 4 * later_blocks - j % 3);
  }
  check<Id>(problem);
}

TEST(ForwardKernel, RisingMaxima) {
  constexpr auto with_threshold = [](int threshold) {
    ForwardConfig config = small_full.config;
    config.rescale_threshold = threshold;
    return full(config);
  };
  check_rising_maxima<with_threshold(0)>();
  check_rising_maxima<with_threshold(1)>();
  check_rising_maxima<with_threshold(8)>();
}

}  // namespace
}  // namespace flashcute
