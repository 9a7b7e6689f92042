// Hopper's forward, run on the host by emulated thread blocks: copies, products, warpgroups and all barriers between
// them, under random schedules.
#include "flashcute/sm90/forward.hpp"

#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <random>
#include <set>
#include <vector>

#include "flashcute/core/defaults.hpp"
#include "kernel/emulated_map.hpp"
#include "launch/tile_deal.hpp"

namespace flashcute {
namespace {

using emulation::Site;
using emulation::Sm90Block;

/// How a launch is run: `blocks` thread blocks, one after the other.
struct Run {
  int blocks = 2;
  uint64_t seed = 1;
  Site const* broken = nullptr;
  std::set<Site>* seen = nullptr;
};

template <ForwardKernelId Id>
void run(Problem& problem, Run const& how) {
  using Pass = sm90::ForwardPass<Id>;
  using Storage = typename Pass::L::SharedStorage;
  Shape const& s = problem.s_;
  ForwardParams const p = problem.prepare();
  ForwardConfig const& c = Id.config;
  Sm90ForwardParams all{
      .q = opaque(map_of(problem.q, s.sq, s.heads, s.batch, s.d, c.head_dim, warpgroup_rows)),
      .k = opaque(map_of(problem.k, s.sk, s.kv_heads, s.batch, s.d, c.head_dim, keys_per_load(c))),
      .v = opaque(map_of(problem.v, s.sk, s.kv_heads, s.batch, s.d_v, c.head_dim_v, keys_per_load(c))),
      .forward = p,
      .deal = deal_tiles(Id, p, how.blocks)};
  GlobalMemory memory;
  for (int b = 0; b < s.batch; ++b) {
    for (int h = 0; h < s.heads; ++h) {
      problem.q.allow(memory, b, h, 0, s.sq, Use::input);
      problem.out.allow(memory, b, h, 0, s.sq, Use::result);
    }
    for (int h = 0; h < s.kv_heads; ++h) {
      problem.k.allow(memory, b, h, 0, s.sk, Use::input);
      problem.v.allow(memory, b, h, 0, s.sk, Use::input);
    }
  }
  problem.allow_sink(memory);
  if (problem.wants_lse) problem.allow_all(memory, problem.lse);
  using Tile = QueryTile<BatchSequence>;
  int32_t const slots = Tile::blocks_of_head(p, tile_rows(Id.config));
  for (int32_t i = 0; s.packed() && i < s.heads * slots; ++i) {  // a slot without rows has no counts
    auto const tile = Tile::from_end(p, i / slots, i % slots, tile_rows(Id.config));
    if (tile.rows == 0) continue;
    problem.allow_items(memory, problem.block_counts, tile.block_counts_offset(p, tile_rows(Id.config)), 1);
  }
  if (!s.packed()) problem.allow_all(memory, problem.block_counts);
  for (int block = 0; block < how.blocks; ++block) {
    Sm90Block const hopper{static_cast<uint32_t>(block),
                           static_cast<uint32_t>(how.blocks),
                           num_threads(Id.config),
                           sizeof(Storage),
                           how.seed + static_cast<uint64_t>(block),
                           how.broken,
                           how.seen};
    hopper.run(memory, [&](void* shared) { Pass::run(all, *static_cast<Storage*>(shared)); });
  }
  ASSERT_EQ(memory.count(Use::output) + memory.count(Use::result), 0u) << "bytes of the outputs that were never stored";
}

template <ForwardKernelId Id>
void check_sm90(Problem& problem, int schedules = 2, int blocks = 2) {
  if (testing::Test::HasFailure()) return;
  try {
    for (int seed = 1; seed <= schedules; ++seed) {
      ASSERT_NO_FATAL_FAILURE(run<Id>(problem, {blocks, static_cast<uint64_t>(seed) << 32}));
      problem.expect_right();
      problem.expect_counts(true);
    }
  } catch (emulation::Violation const& e) {
    FAIL() << name(Id).text << ": " << e.what();
  }
}

template <ForwardKernelId Id>
void check_sm90(Shape const& s, int schedules = 2, int blocks = 2) {
  Problem problem(Id, s);
  check_sm90<Id>(problem, schedules, blocks);
}

constexpr ForwardConfig hopper(ForwardConfig c) {
  c.kernel = Kernel::sm90;
  c.head_dim_v = c.head_dim;
  return c;
}

// Two warpgroups that compute; a ring shorter than the range of keys; turns, stale maxima, pairs of blocks.
constexpr ForwardConfig narrow =
    hopper({.dtype = bf16, .head_dim = 64, .block_m = 128, .block_n = 64, .num_warps = 8, .stages = 3});
// As the default of d 64: three warpgroups, scores of a block ahead.
constexpr ForwardConfig ahead = [] {
  ForwardConfig c = hopper({.dtype = f16, .head_dim = 64, .block_m = 192, .block_n = 64, .num_warps = 12, .stages = 4});
  c.pingpong = false;
  c.scores_ahead = true;
  return c;
}();
constexpr ForwardConfig wide =
    hopper({.dtype = bf16, .head_dim = 128, .block_m = 128, .block_n = 64, .num_warps = 8, .stages = 2});
constexpr ForwardConfig widest = [] {
  ForwardConfig c =
      hopper({.dtype = bf16, .head_dim = 256, .block_m = 128, .block_n = 64, .num_warps = 8, .stages = 2});
  c.pingpong = false;
  return c;
}();
// The output of a tile is written during the next one.
constexpr ForwardConfig late = [] {
  ForwardConfig c = narrow;
  c.late_store = true;
  return c;
}();
// One block after the other.
constexpr ForwardConfig serial = [] {
  ForwardConfig c = narrow;
  c.overlap = false;
  c.pingpong = false;
  c.stale_max = false;
  return c;
}();
constexpr ForwardConfig single = hopper(
    {.dtype = bf16, .head_dim = 64, .block_m = 64, .block_n = 32, .num_warps = 4, .stages = 2, .pingpong = false});

// Widths that are no power of two: pages of half the width, three and five; three pages; and V of another width than Q
// and K.
constexpr ForwardConfig d96 =
    hopper({.dtype = f16, .head_dim = 96, .block_m = 128, .block_n = 64, .num_warps = 8, .stages = 3});
constexpr ForwardConfig d160 =
    hopper({.dtype = bf16, .head_dim = 160, .block_m = 128, .block_n = 64, .num_warps = 8, .stages = 2});
constexpr ForwardConfig d192 =
    hopper({.dtype = bf16, .head_dim = 192, .block_m = 128, .block_n = 48, .num_warps = 8, .stages = 2});
constexpr ForwardConfig d192_128 = [] {
  ForwardConfig c = d192;
  c.head_dim_v = 128, c.block_n = 64;
  return c;
}();
// Pages of Q and K, and those of V, of different widths.
constexpr ForwardConfig d64_96 = [] {
  ForwardConfig c = narrow;
  c.head_dim_v = 96, c.scores_ahead = true;
  return c;
}();

// Lengths beside the tiles' boundaries, and several tiles a block, of which some have nothing to do.
TEST(Sm90Kernel, Lengths) {
  for (auto const& [sq, sk] : {std::pair{1, 1}, {64, 64}, {65, 63}, {128, 200}, {130, 129}, {300, 300}, {70, 600}}) {
    check_sm90<causal(narrow)>({.sq = sq, .sk = sk, .d = 64});
    check_sm90<full(narrow)>({.sq = sq, .sk = sk, .d = 64});
    check_sm90<causal(late)>({.sq = sq, .sk = sk, .d = 64});
    check_sm90<full(late)>({.sq = sq, .sk = sk, .d = 64});
  }
  check_sm90<full(narrow)>({.sq = 10, .sk = 0, .d = 64});
  check_sm90<causal(narrow)>({.sq = 200, .sk = 0, .d = 64});
}

TEST(Sm90Kernel, EveryFormOfTheLoop) {
  for (auto const& [sq, sk] : {std::pair{200, 470}, {390, 390}}) {
    check_sm90<causal(ahead)>({.sq = sq, .sk = sk, .d = 64}, 1);
    check_sm90<full(ahead)>({.sq = sq, .sk = sk, .d = 64}, 1);
    check_sm90<causal(serial)>({.sq = sq, .sk = sk, .d = 64}, 1);
    check_sm90<full(serial)>({.sq = sq, .sk = sk, .d = 64}, 1);
    check_sm90<causal(single)>({.sq = sq, .sk = sk, .d = 64}, 1);
  }
  check_sm90<causal(wide)>({.sq = 200, .sk = 300, .d = 128}, 1);
  check_sm90<full(wide)>({.sq = 130, .sk = 300, .d = 128}, 1);
  check_sm90<causal(widest)>({.sq = 150, .sk = 200, .d = 256}, 1);
}

// Guards against the wrong head, batch, stride or column, which equal sizes would hide.
TEST(Sm90Kernel, HeadsStridesAndWidths) {
  for (Order order : {Order::bshd, Order::bhsd, Order::padded}) {
    check_sm90<causal(narrow)>(
        {.sq = 70, .sk = 90, .d = 48, .d_v = 40, .batch = 2, .heads = 4, .kv_heads = 2, .order = order}, 1, 3);
  }
}

// Rows that see no key, or all; warpgroups whose rows see fewer than others'.
TEST(Sm90Kernel, Diagonals) {
  for (int offset : {-400, -150, -100, -64, -1, 0, 5, 100, 400}) {
    check_sm90<causal(narrow)>({.sq = 150, .sk = 200, .d = 64, .causal_offset = offset}, 1);
    check_sm90<causal(ahead)>({.sq = 200, .sk = 200, .d = 64, .causal_offset = offset}, 1);
    check_sm90<causal(late)>({.sq = 200, .sk = 200, .d = 64, .causal_offset = offset}, 1);
  }
}

// Windows: rows that see no key, at either end; warpgroups whose rows see blocks that others do not, first or last;
// pairs of full blocks between partial ones.
TEST(Sm90Kernel, Windows) {
  for (int first : {-260, -130, -64, -1, 0, 70}) {
    for (int size : {0, 1, 63, 64, 130, 300}) {
      Shape const s{.sq = 150, .sk = 200, .d = 64, .causal_offset = first + size, .window_offset = first};
      check_sm90<band(narrow)>(s, 1);
    }
  }
  for (int size : {0, 100, 330, 600}) {
    check_sm90<band(narrow)>({.sq = 260, .sk = 700, .d = 64, .causal_offset = 440, .window_offset = 440 - size}, 2);
    check_sm90<band(ahead)>({.sq = 260, .sk = 700, .d = 64, .causal_offset = 440, .window_offset = 440 - size}, 2);
    check_sm90<band(late)>({.sq = 260, .sk = 700, .d = 64, .causal_offset = 440, .window_offset = 440 - size}, 2);
    check_sm90<band(serial)>({.sq = 130, .sk = 500, .d = 64, .causal_offset = 370, .window_offset = 370 - size}, 1);
    check_sm90<band(wide)>({.sq = 130, .sk = 500, .d = 128, .causal_offset = 370, .window_offset = 370 - size}, 1);
  }
  check_sm90<band(single)>({.sq = 100, .sk = 300, .d = 64, .causal_offset = 200, .window_offset = 150}, 1);
}

// Guards against a block of a map that the loading warp visits and the others do not, or in another order; tiles that
// see nothing; bits of another row, head or batch entry; and rows that see no key.
TEST(Sm90Kernel, BlockMaps) {
  for (auto const& [sq, sk] : {std::pair{1, 1}, {130, 200}, {260, 700}}) {
    for (uint64_t seed : {1, 2}) {
      Shape s{.sq = sq, .sk = sk, .d = 64, .causal_offset = sk, .window_offset = -sq};
      s.map = MapProblem::random(1, 1, sq, sk, seed);
      check_sm90<mapped(narrow)>(s, 1);
      check_sm90<mapped(ahead)>(s, 1);
      check_sm90<mapped(late)>(s, 1);
      check_sm90<mapped(serial)>(s, 1);
    }
  }
  Shape s{.sq = 130, .sk = 500, .d = 128, .causal_offset = 500, .window_offset = -130};
  s.map = MapProblem::random(1, 1, s.sq, s.sk, 3);
  check_sm90<mapped(wide)>(s, 1);
  s.d = s.d_v = 64;
  check_sm90<mapped(single)>(s, 1);
}

// Many whole cells, which warpgroups take in pairs, between others.
TEST(Sm90Kernel, BlockMapsThatShowMuch) {
  Shape s{.sq = 70, .sk = 3000, .d = 64, .causal_offset = 3000, .window_offset = -70};
  s.map = MapProblem::of(1, 1, s.sq, s.sk, [](int, int, int i, int j) { return j / 64 % 15 != 0 || i % 3 == 0; });
  check_sm90<mapped(narrow)>(s, 1);
  check_sm90<mapped(ahead)>(s, 1);
}

// More blocks than the scouting warp reads at once, of which few are visited: also none in its first lanes' pages, or
// in the last ones.
TEST(Sm90Kernel, BlockMapsOfLongRows) {
  constexpr int keys = 70'000, keys_of_32_pages = 32 * 32 * 64;
  for (int const from : {0, 3, 3000, keys_of_32_pages - 64, keys_of_32_pages, keys - 100}) {
    Shape s{.sq = 5, .sk = keys, .d = 64, .causal_offset = keys, .window_offset = -5};
    s.map = MapProblem::of(1, 1, s.sq, s.sk, [&](int, int, int i, int j) {
      return (j >= from && j < from + 70) || (j == 20 && i == 0 && from != keys_of_32_pages);
    });
    check_sm90<mapped(narrow)>(s, 1);
  }
}

TEST(Sm90Kernel, BlockMapsOfBatchEntriesAndHeads) {
  Shape s{.sq = 200, .sk = 300, .d = 64, .batch = 2, .heads = 4, .kv_heads = 2};
  s.causal_offset = 300, s.window_offset = -200;
  for (auto const& [batch, heads] : {std::pair{2, 1}, {1, 4}, {2, 4}}) {
    s.map = MapProblem::random(batch, heads, s.sq, s.sk, 5);
    check_sm90<mapped(narrow)>(s, 1);
  }
}

// All masks AND; rows of long tiles that see nothing, and whole tiles.
TEST(Sm90Kernel, BlockMapsBesideABand) {
  Shape s{.sq = 300, .sk = 400, .d = 64, .batch = 2, .heads = 2, .kv_heads = 1, .causal_offset = 60};
  s.window_offset = -130, s.from_end = true;
  s.seqlens_q = {300, 130}, s.seqlens_k = {400, 210};
  s.sink = {0.5f, -1};
  s.map = MapProblem::of(1, 2, s.sq, s.sk, [](int, int h, int i, int j) {
    return (i < 64 || i > 200) && (h == 0 || i % 7 != 0) && (j / 64 % 2 == 0 || j % 5 == 0);
  });
  Problem problem(mapped(narrow), s);
  problem.poison_absent();
  check_sm90<mapped(narrow)>(problem);
  check_sm90<mapped(ahead)>(s, 1);
}

TEST(Sm90Kernel, NanThatAMapHides) {
  Shape s{.sq = 140, .sk = 300, .d = 64, .causal_offset = 300, .window_offset = -140};
  s.map = MapProblem::of(1, 1, s.sq, s.sk, [](int, int, int i, int j) { return j % 3 != 0 && (j < 64 || i > 70); });
  Problem problem(mapped(narrow), s);
  for (int j : {0, 3, 63, 66, 150}) problem.k.set_row(0, j, 0, nan), problem.v.set_row(0, j, 0, nan);
  problem.v.set(0, 100, 0, 5, inf);  // some rows see it
  check_sm90<mapped(narrow)>(problem);
}

template <ForwardConfig C>
void check_nan_beside_a_window() {
  for (double poison : {nan, inf, -inf}) {
    Problem problem(band(C), {.sq = 140, .sk = 300, .d = 64, .causal_offset = 120, .window_offset = 20});
    for (int j : {0, 30, 100, 200, 270, 299}) problem.v.set(0, j, 0, 3, poison);
    for (int j : {5, 280}) problem.k.set_row(0, j, 0, nan);
    check_sm90<band(C)>(problem, 2, 1);  // one thread block has all tiles
  }
}

TEST(Sm90Kernel, NanBesideAWindow) {
  check_nan_beside_a_window<narrow>();
  check_nan_beside_a_window<late>();
}

// Guards against rows and keys beyond the end of a sequence, of which there may be whole tiles, one after the other: a
// ring that waits for a tile that nobody loads, results that nobody writes, NaN in what does not exist.
template <ForwardConfig C>
void check_short_sequences() {
  for (int first : {-500, -170}) {
    Shape const s{.sq = 300,
                  .sk = 200,
                  .d = C.head_dim,
                  .d_v = C.head_dim_v,
                  .batch = 7,
                  .heads = 2,
                  .kv_heads = 1,
                  .causal_offset = -100,
                  .window_offset = first,
                  .seqlens_q = {300, 0, 130, 0, 1, 64, 200},
                  .seqlens_k = {200, 200, 100, 5, 65, 0, 1},
                  .from_end = true,
                  .sink = {0.5f, -100}};
    Problem problem(band(C), s);
    problem.poison_absent();
    check_sm90<band(C)>(problem, 2, 3);
  }
}

// The same of packed sequences, of which there may be many that are short or empty: a slot that no sequence needs, or a
// box of TMA that reaches into the next sequence, where all is NaN.
template <ForwardConfig C>
void check_packed_sequences() {
  for (int blocks : {1, 3}) {
    Shape s{.sq = 610, .sk = 600, .d = C.head_dim, .d_v = C.head_dim_v, .heads = 2, .kv_heads = 1};
    s.causal_offset = -10, s.window_offset = blocks == 1 ? -80 : -500;
    s.from_end = true;
    s.cu_seqlens_q = {3, 273, 273, 274, 406, 470, 470, 470, 600};
    s.cu_seqlens_k = {2, 280, 285, 285, 408, 412, 530, 535, 598};
    s.sink = {0.5f, -100};
    if (blocks == 3) s.seqlens_q = {200, 3, 1, 20, 64, 0, 0, 99}, s.seqlens_k = {258, 5, 9, 100, 4, 13, 1, 0};
    Problem problem(band(C), s);
    problem.poison_absent();
    check_sm90<band(C)>(problem, 2, blocks);
  }
}

TEST(Sm90Kernel, PackedSequences) {
  check_packed_sequences<narrow>();
  check_packed_sequences<ahead>();
  check_packed_sequences<late>();
  check_packed_sequences<serial>();
  check_packed_sequences<wide>();
}

// Guards against tiles that are computed twice or never where they are sorted: many rounds, of lengths that differ
// much. And where they are not: in a single round, and where they do not fit the memory.
template <ForwardConfig C>
void check_many_packed_tiles(int heads, int blocks) {
  Shape s{.sq = 0, .sk = 0, .d = C.head_dim, .heads = heads, .kv_heads = 1, .causal_offset = 0, .window_offset = -5000};
  s.from_end = true;
  s.cu_seqlens_q = {0};
  for (int i = 0; i < 30; ++i) {
    bool const is_long = i == 11 || i == 20;
    s.cu_seqlens_q.push_back(s.cu_seqlens_q.back() + (is_long ? 350 : i % 4 == 0 ? 0 : 1 + 7 * i % 13));
  }
  s.cu_seqlens_k = s.cu_seqlens_q;
  s.sq = s.sk = s.cu_seqlens_q.back() + 3;
  check_sm90<band(C)>(s, 1, blocks);
}

TEST(Sm90Kernel, ManyPackedTiles) {
  check_many_packed_tiles<narrow>(2, 3);
  check_many_packed_tiles<ahead>(1, 2);
  check_many_packed_tiles<single>(1, 60);
  check_many_packed_tiles<single>(16, 1);
}

// Guards against NaN of a neighbour in the same tile of keys, or of queries, that reaches a sequence.
TEST(Sm90Kernel, PackedNeighboursDoNotLeak) {
  Shape s{.sq = 300, .sk = 300, .d = 64, .causal_offset = 1000, .window_offset = -1000};
  s.cu_seqlens_q = s.cu_seqlens_k = {0, 90, 170, 300};
  Problem problem(band(narrow), s);
  for (int i = 90; i < 170; ++i) problem.q.set_rows(0, i, nan), problem.k.set_rows(0, i, nan);
  for (int i = 90; i < 170; ++i) problem.v.set_rows(0, i, nan);
  check_sm90<band(narrow)>(problem);
}

TEST(Sm90Kernel, ShortSequences) {
  check_short_sequences<narrow>();
  check_short_sequences<ahead>();
  check_short_sequences<late>();
  check_short_sequences<serial>();
  check_short_sequences<wide>();
}

// Guards against rings that block: a warpgroup that passes over the last blocks of a tile and the first of the next
// waits for its turn, and the warpgroup before it for a V that has no place. Rings of an even number of stages, one
// thread block, so that such tiles follow each other.
TEST(Sm90Kernel, WindowsWhereWarpgroupsTakeTurns) {
  constexpr ForwardConfig two =
      hopper({.dtype = bf16, .head_dim = 64, .block_m = 128, .block_n = 64, .num_warps = 8, .stages = 2});
  constexpr ForwardConfig late_two = [] {
    ForwardConfig c = late;
    c.stages = 2;
    return c;
  }();
  constexpr ForwardConfig late_ahead = [] {
    ForwardConfig c = ahead;
    c.late_store = true;
    return c;
  }();
  constexpr ForwardConfig four =
      hopper({.dtype = bf16, .head_dim = 64, .block_m = 128, .block_n = 32, .num_warps = 8, .stages = 4});
  constexpr ForwardConfig three_warpgroups =
      hopper({.dtype = bf16, .head_dim = 64, .block_m = 192, .block_n = 32, .num_warps = 12, .stages = 2});
  for (int left : {70, 130}) {
    Shape const s{.sq = 640, .sk = 640, .d = 64, .causal_offset = 0, .window_offset = -left};
    check_sm90<band(two)>(s, 3, 1);
    check_sm90<band(four)>(s, 3, 1);
    check_sm90<band(late_two)>(s, 3, 1);
    check_sm90<band(late_ahead)>(s, 3, 1);
    check_sm90<band(three_warpgroups)>(s, 3, 1);
  }
  check_sm90<band(wide)>({.sq = 704, .sk = 704, .d = 128, .causal_offset = 0, .window_offset = -70}, 2, 1);
}

TEST(Sm90Kernel, PrefixesAndSinks) {
  for (int prefix : {0, 1, 100, 300}) {
    check_sm90<band(narrow)>({.sq = 260,
                              .sk = 270,
                              .d = 64,
                              .causal_offset = 1000,
                              .window_offset = -1000,
                              .prefix = prefix,
                              .prefix_offset = 10},
                             1);
    check_sm90<band(ahead)>({.sq = 260,
                             .sk = 270,
                             .d = 64,
                             .causal_offset = 75,
                             .window_offset = -60,
                             .prefix = prefix,
                             .prefix_offset = 10},
                            1);
  }
  float const inf32 = std::numeric_limits<float>::infinity();
  Shape const s{.sq = 140,
                .sk = 90,
                .d = 64,
                .heads = 8,
                .kv_heads = 8,
                .causal_offset = -50,
                .window_offset = -70,
                .sink = {0, 100, -100, -inf32, 3, -3, 88, -88}};
  check_sm90<band(narrow)>(s, 1);
  check_sm90<band(ahead)>(s, 1);
}

// Guards against pages of a width that is not that of the boxes or of the operands, steps of a product that skip a
// page, and columns of the output that nobody writes; under every mask, in tensors as wide as the tile and narrower.
template <ForwardConfig C>
void check_width() {
  std::mt19937 random(C.head_dim);
  auto const up_to = [&](uint32_t most) { return static_cast<int>(1 + random() % most); };
  for (int i = 0; i < 4; ++i) {
    Shape s{.sq = up_to(300), .sk = up_to(400), .d = C.head_dim, .d_v = C.head_dim_v, .heads = 2, .kv_heads = 1};
    if (i % 2 == 1) s.d -= 8 * up_to(3), s.d_v -= 8 * up_to(3);
    s.order = i < 2 ? Order::bshd : Order::padded;
    check_sm90<full(C)>(s, 1);
    check_sm90<causal(C)>(s, 1);
    s.causal_offset = up_to(400), s.window_offset = *s.causal_offset - up_to(200);
    check_sm90<band(C)>(s, 1);
    s.map = MapProblem::random(1, 1, s.sq, s.sk, static_cast<uint64_t>(i));
    check_sm90<mapped(C)>(s, 1);
  }
  Problem poisoned(causal(C), {.sq = 150, .sk = 170, .d = C.head_dim, .d_v = C.head_dim_v});
  for (int c = 0; c < C.head_dim_v; c += 31) {
    poisoned.v.set(0, 40 + c / 2, 0, c, c % 2 == 0 ? nan : inf);
    poisoned.v.set(0, 168 - c / 8, 0, C.head_dim_v - 1 - c, -inf);
  }
  check_sm90<causal(C)>(poisoned);
}

TEST(Sm90Widths, D96) { check_width<d96>(); }
TEST(Sm90Widths, D160) { check_width<d160>(); }
TEST(Sm90Widths, D192) { check_width<d192>(); }
TEST(Sm90Widths, D192AndV128) { check_width<d192_128>(); }
TEST(Sm90Widths, D64AndV96) { check_width<d64_96>(); }

TEST(Sm90Widths, SequencesOfOtherLengthsThanTheTensors) {
  check_short_sequences<d96>();
  check_short_sequences<d192_128>();
  check_packed_sequences<d96>();
  check_packed_sequences<d192_128>();
}

// Guards against 0 * NaN: a value that a row does not see must not reach it, and one that it sees must.
TEST(Sm90Kernel, NanInValues) {
  for (double poison : {nan, inf, -inf}) {
    Problem problem(causal(narrow), {.sq = 140, .sk = 140, .d = 64});
    problem.v.set(0, 25, 0, 3, poison);
    problem.v.set(0, 70, 0, 5, inf);
    problem.v.set(0, 131, 0, 5, nan);
    check_sm90<causal(narrow)>(problem);
  }
  Problem hidden(causal(ahead), {.sq = 100, .sk = 200, .d = 64, .causal_offset = 0});
  for (int j = 100; j < 200; ++j) hidden.v.set_row(0, j, 0, nan), hidden.k.set_row(0, j, 0, nan);
  check_sm90<causal(ahead)>(hidden);
}

// Guards against results that depend on who is ahead, and on when copies and products are done.
TEST(Sm90Kernel, SchedulesChangeNothing) {
  check_sm90<causal(narrow)>({.sq = 260, .sk = 260, .d = 64, .heads = 2}, 8);
  check_sm90<causal(ahead)>({.sq = 400, .sk = 400, .d = 64}, 4);
}

// ---- is every wait, and every arrival, needed, and would a test notice if one were missing? ----------

/// Whether something goes wrong: a violation, a deadlock, a wrong result.
template <ForwardKernelId Id>
bool fails(Shape const& shape, Run const& how, double poison = 0) {
  Problem problem(Id, shape);
  if (poison != 0) problem.v.set(0, shape.sk - 3, 0, 3, poison);
  testing::TestPartResultArray failures;
  bool violated = false;
  {
    testing::ScopedFakeTestPartResultReporter const reporter(
        testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &failures);
    try {
      run<Id>(problem, how);
      problem.expect_right();
      problem.expect_counts(true);
    } catch (emulation::Violation const&) {
      violated = true;
    }
  }
  return violated || failures.size() > 0;
}

template <ForwardKernelId Id>
bool fails_somewhere(Site const* broken, std::set<Site>* seen, int schedules) {
  for (int seed = 1; seed <= schedules; ++seed) {
    auto const s = static_cast<uint64_t>(seed) << 32;
    if (Id.features.mask == MaskKind::mapped) {  // several pages of a tile, several tiles, and some that see nothing
      Shape pages{.sq = 300, .sk = 4500, .d = 64, .causal_offset = 4500, .window_offset = -300};
      pages.map = MapProblem::of(1, 1, pages.sq, pages.sk, [](int, int, int i, int j) {
        return (i < 128 || i >= 256) && (j % 2048 < 70 || j > 4400) && (i + j) % 7 != 0;
      });
      if (fails<Id>(pages, {1, s, broken, seen}, nan)) return true;
      continue;
    }
    if (Id.features.mask == MaskKind::band) {  // blocks passed over at both ends of a tile, and whole tiles
      Shape const windows{.sq = 390, .sk = 390, .d = 64, .causal_offset = 0, .window_offset = -70};
      if (fails<Id>(windows, {1, s, broken, seen}, nan)) return true;
      Shape lengths{.sq = 140, .sk = 200, .d = 64, .batch = 5, .seqlens_q = {140, 0, 0, 70, 140}};
      lengths.window_offset = -200;
      if (fails<Id>(lengths, {2, s, broken, seen})) return true;
      continue;
    }
    if (fails<Id>({.sq = 200, .sk = 330, .d = 64, .heads = 2}, {2, s, broken, seen})) return true;
    if (fails<Id>({.sq = 390, .sk = 390, .d = 64}, {1, s, broken, seen}, nan)) return true;
  }
  return false;
}

/// `files`: where the sites are; by default anywhere.
template <ForwardKernelId Id>
void expect_every_site_needed(std::set<std::filesystem::path> const& files = {}, size_t least = 15) {
  std::set<Site> sites;
  ASSERT_FALSE(fails_somewhere<Id>(nullptr, &sites, 5));
  std::erase_if(sites, [&](Site const& site) {
    return !files.empty() && !files.contains(std::filesystem::path(site.file).filename());
  });
  EXPECT_GE(sites.size(), least);
  for (Site const& site : sites) {
    EXPECT_TRUE(fails_somewhere<Id>(&site, nullptr, 60))
        << "nothing fails without " << std::filesystem::path(site.file).filename() << ":" << site.line;
  }
}

TEST(Sm90Barriers, NoneCanBeLeftOutWhereWarpgroupsTakeTurns) { expect_every_site_needed<causal(narrow)>(); }
TEST(Sm90Barriers, NoneCanBeLeftOutWhereScoresAreAhead) { expect_every_site_needed<causal(ahead)>(); }
TEST(Sm90Barriers, NoneCanBeLeftOutWhereOutputIsStoredLate) { expect_every_site_needed<causal(late)>(); }
TEST(Sm90Barriers, NoneCanBeLeftOutOfTheSerialLoop) { expect_every_site_needed<causal(serial)>(); }
TEST(Sm90Barriers, NoneCanBeLeftOutBesideAWindow) { expect_every_site_needed<band(serial)>(); }
TEST(Sm90Barriers, NoneCanBeLeftOutBetweenScoutAndLoaderUnderABlockMap) {
  expect_every_site_needed<mapped(narrow)>({"scout.hpp", "forward.hpp"}, 4);
}
TEST(Sm90Barriers, NoneCanBeLeftOutBesideAWindowWhereWarpgroupsTakeTurns) { expect_every_site_needed<band(narrow)>(); }

}  // namespace
}  // namespace flashcute
