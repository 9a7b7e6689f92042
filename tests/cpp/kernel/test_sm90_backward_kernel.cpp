// Hopper's gradients, run on the host by emulated thread blocks, under random schedules: all passes of a call, against
// gradients in fp64.
#include "flashcute/sm90/backward_passes.hpp"

#include <algorithm>
#include <numeric>
#include <random>

#include "kernel/backward_problem.hpp"
#include "kernel/emulated_map.hpp"

namespace flashcute {
namespace {

using emulation::Sm90Block;

template <BackwardConfig B, MaskKind Kind>
class Sm90BackwardProblem : public BackwardCall<B, Kind> {
  using Call = BackwardCall<B, Kind>;

 public:
  using Call::Call;
  using Call::problem;
  using Call::s_;

  uint32_t most_blocks = ~uint32_t{0};  // of persistent kernels

  /// The output and LSE of the inputs as they are, then all passes.
  void run(uint64_t seed) {
    Call::compute_forward();
    constexpr int rows = splits_dq(B) ? warpgroup_rows : B.block_m;
    Sm90BackwardParams const all{
        .q = opaque(map_of(problem.q, s_.sq, s_.heads, s_.batch, s_.d, B.head_dim, rows)),
        .k = opaque(map_of(problem.k, s_.sk, s_.kv_heads, s_.batch, s_.d, B.head_dim, B.block_n)),
        .v = opaque(map_of(problem.v, s_.sk, s_.kv_heads, s_.batch, s_.d_v, B.head_dim, B.block_n)),
        .dout = opaque(map_of(Call::dout, s_.sq, s_.heads, s_.batch, s_.d_v, B.head_dim, rows)),
        .backward = Call::params()};
    if constexpr (splits_dq(B)) {
      run_pass<BackwardPass::queries>(all, seed);
      run_pass<BackwardPass::keys>(all, seed + 1);
    } else {
      run_pass<BackwardPass::prepare>(all, seed);
      run_pass<BackwardPass::gradients>(all, seed + 1);
      run_pass<BackwardPass::finish>(all, seed + 2);
    }
    if constexpr (takes_sink(Kind)) {
      if (!s_.sink.empty()) run_pass<BackwardPass::sink>(all, seed + 3);
    }
  }

  std::vector<double> all_of_dq() const {
    std::vector<double> all;
    for (int b = 0; b < s_.batch; ++b) {
      for (int row = 0; row < s_.sq; ++row) {
        for (int h = 0; h < s_.heads; ++h) {
          for (int column = 0; column < s_.d; ++column) all.push_back(Call::dq.at(b, row, h, column));
        }
      }
    }
    return all;
  }

 private:
  template <BackwardPass Pass>
  void run_pass(Sm90BackwardParams const& all, uint64_t seed) {
    constexpr BackwardKernelId id = kernel_of(B, Pass, {Kind});
    BackwardParams const& p = all.backward;
    auto const tiles = static_cast<uint32_t>(Pass == BackwardPass::sink ? s_.heads
                                             : keys_stay(Pass)          ? count_key_tiles(p.forward, B.block_n)
                                                                        : count_query_tiles(p.forward, B.block_m));
    uint32_t const blocks = is_persistent(id) ? std::min(tiles, most_blocks) : tiles;
    std::vector<uint32_t> order(blocks);  // of a GPU any
    std::iota(order.begin(), order.end(), 0u);
    if (B.deterministic) std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
    for (uint32_t i = 0; i < blocks; ++i) {
      uint32_t const block = order[i];
      GlobalMemory memory;
      constexpr int threads = num_threads(id);
      Sm90Block hopper{block, blocks, threads, 0, seed + block};
      if constexpr (multiplies(Pass)) {
        using Kernel = sm90::GradientPass<id>;
        using Storage = typename Kernel::Storage;
        if constexpr (Pass == BackwardPass::queries) {
          auto const tile = Kernel::template tile_of<typename Call::Queries>(p.forward, block);
          Call::allow_queries(memory, Pass, tile);
          auto const same = Kernel::template tile_of<typename Kernel::Tile>(p.forward, block);
          bool const empty = Kernel::Mask::kv_range(same, p.forward, B.block_n).empty();
          if (!empty) allow_statistics(memory, tile);
        } else {
          // The first thread block computes all tiles that are counted: no other takes them meanwhile.
          bool const in_order = B.deterministic && !splits_dq(B), all_counted = in_order && is_persistent(id);
          std::vector<typename Call::Keys> own;
          for (uint32_t tile = 0; tile < tiles; ++tile) {
            bool const counted = all_counted || tile >= blocks;
            if (counted ? i != 0 : tile != (in_order ? i : block)) continue;
            using Tiles = sm90::KeyTiles<id>;
            own.push_back(Tiles::template at<typename Call::Keys>(p.forward, in_order ? tiles - 1 - tile : tile));
          }
          for (auto const& tile : own) allow_key_tile(memory, tile);
          if (in_order) {
            for (auto const& tile : own) allow_first_sums(memory, tile, own.size() > 1 ? Use::unset_sum : Use::output);
          }
        }
        hopper.shared_bytes = sizeof(Storage);
        hopper.run(memory, [&](void* shared) { Kernel::run(all, *static_cast<Storage*>(shared)); });
      } else {
        using Kernel = sm90::SmallPass<id>;
        using Storage = typename Kernel::SharedStorage;
        if constexpr (Pass == BackwardPass::sink) {
          Call::allow_sink(memory, static_cast<int>(block));
        } else {
          auto const tile = Call::Queries::at(p.forward, block, B.block_m);
          Call::allow_queries(memory, Pass, tile);
          allow_counters(memory, tile, block == 0, Pass == BackwardPass::prepare ? Use::output : Use::input);
          if (Pass == BackwardPass::prepare) {
            allow_statistics(memory, tile);
            int const first = tile.entry.first_query + tile.row0;
            Call::allow(memory, Call::lse, Call::row(tile.entry.batch, tile.head, first), tile.rows, Use::input);
          }
        }
        hopper.shared_bytes = sizeof(Storage);
        hopper.run(memory, [&](void* shared) { Kernel::run(p, *static_cast<Storage*>(shared)); });
      }
      ASSERT_EQ(memory.count(Use::output) + memory.count(Use::result) + memory.count(Use::unset_sum), 0u)
          << "bytes of the results that were never stored";
    }
  }

  void allow_key_tile(GlobalMemory& memory, typename Call::Keys const& tile) {
    allow_boxes(memory, tile);
    Call::allow_keys(memory, tile);
    allow_statistics(memory, tile);
  }

  /// Of the first thread block the counter of tiles. Of deterministic kernels those of a block of queries too:
  /// `prepare` clears them, and no sums.
  void allow_counters(GlobalMemory& memory, typename Call::Queries const& tile, bool first, Use use) {
    int const block = tile.row0 / B.block_m, head = tile.entry.batch * s_.heads + tile.head;
    int const blocks = s_.row_blocks(B.block_m), number = head * blocks + block, warpgroups = B.num_warps / 4;
    size_t const counters = Call::dq_sums.size() - Call::counters;
    if (first) Call::allow(memory, Call::dq_sums, counters, 1, use);
    if (!B.deterministic) return;
    if (use == Use::output) Call::allow_sums(memory, tile.entry.batch, tile.head, block, block + 1, Use::none);
    Call::allow(memory, Call::dq_sums, counters + 1 + static_cast<size_t>(number * warpgroups), warpgroups, use);
  }

  /// Of blocks that see no later keys than the tile's: it stores their sums, once, and adds to nothing.
  void allow_first_sums(GlobalMemory& memory, typename Call::Keys const& tile, Use use) {
    int const group = s_.heads / s_.kv_heads, b = tile.entry.batch;
    for (int h = tile.kv_head * group; h < (tile.kv_head + 1) * group; ++h) {
      for (int block = 0; block < s_.row_blocks(B.block_m); ++block) {
        int last = -1;
        for (int row = block * B.block_m; row < std::min((block + 1) * B.block_m, s_.sq); ++row) {
          for (int key = last + 1; key < s_.sk; ++key) {
            if (problem.visible(b, h, row, key)) last = key;
          }
        }
        if (last >= tile.row0 && last < tile.row0 + B.block_n) {
          Call::allow_sums(memory, b, h, block, block + 1, use);
        }
      }
    }
  }

  /// A box that TMA copies may hold rows of the next sequence.
  void allow_boxes(GlobalMemory& memory, typename Call::Keys const& tile) {
    int const group = s_.heads / s_.kv_heads, batch = tile.entry.batch;
    for (int h = tile.kv_head * group; h < (tile.kv_head + 1) * group; ++h) {
      problem.q.allow(memory, batch, h, 0, s_.sq, Use::input);
      Call::dout.allow(memory, batch, h, 0, s_.sq, Use::input);
    }
    problem.k.allow(memory, batch, tile.kv_head, 0, s_.sk, Use::input);
    problem.v.allow(memory, batch, tile.kv_head, 0, s_.sk, Use::input);
  }

  /// LSE and delta of a block of queries, or of all blocks of the sequence and the heads of a tile of keys.
  void allow_statistics(GlobalMemory& memory, typename Call::Queries const& tile) {
    allow_statistics(memory, tile.entry, tile.head, tile.row0 / B.block_m, 1, Use::output);
  }
  void allow_statistics(GlobalMemory& memory, typename Call::Keys const& tile) {
    int const group = s_.heads / s_.kv_heads, count = ceil_div(tile.entry.queries, B.block_m);
    for (int h = tile.kv_head * group; h < (tile.kv_head + 1) * group; ++h) {
      allow_statistics(memory, tile.entry, h, 0, count, Use::input);
    }
  }
  void allow_statistics(GlobalMemory& memory, BatchSequence::Entry const& entry, int h, int first, int count, Use use) {
    int const block = entry.first_query_block(B.block_m) + first;
    auto const number = static_cast<size_t>((entry.batch * s_.heads + h) * s_.row_blocks(B.block_m) + block);
    for (size_t start : {size_t{0}, Call::delta.size() / 2}) {
      Call::allow(memory, Call::delta, start + number * B.block_m, count * B.block_m, use);
    }
  }
};

template <BackwardConfig B, MaskKind Kind>
void check_gradients(Sm90BackwardProblem<B, Kind>& problem, int schedules = 1) {
  if (testing::Test::HasFailure()) return;
  try {
    for (int seed = 1; seed <= schedules; ++seed) {
      ASSERT_NO_FATAL_FAILURE(problem.run(static_cast<uint64_t>(seed) << 32));
      problem.expect_right();
    }
  } catch (emulation::Violation const& e) {
    FAIL() << name(B).text << ": " << e.what();
  }
}

constexpr BackwardConfig narrow = {.dtype = bf16,
                                   .head_dim = 64,
                                   .head_dim_v = 64,
                                   .block_m = 128,
                                   .block_n = 128,
                                   .num_warps = 8,
                                   .kernel = Kernel::sm90,
                                   .stages = 3,
                                   .k_stages = 2};
constexpr BackwardConfig wide = {.dtype = f16,
                                 .head_dim = 128,
                                 .head_dim_v = 128,
                                 .block_m = 64,
                                 .block_n = 128,
                                 .num_warps = 8,
                                 .kernel = Kernel::sm90,
                                 .stages = 3,
                                 .early_reads = true};

constexpr BackwardConfig widest = {.dtype = bf16,
                                   .head_dim = 256,
                                   .head_dim_v = 256,
                                   .block_m = 128,
                                   .block_n = 64,
                                   .num_warps = 8,
                                   .kernel = Kernel::sm90,
                                   .deterministic = true};
constexpr BackwardConfig unequal = {.dtype = f16,
                                    .head_dim = 192,
                                    .head_dim_v = 128,
                                    .block_m = 128,
                                    .block_n = 64,
                                    .num_warps = 8,
                                    .kernel = Kernel::sm90,
                                    .stages = 3,
                                    .dout_stages = 3,
                                    .deterministic = true};

template <class Change>
constexpr BackwardConfig with(BackwardConfig c, Change const& change) {
  change(c);
  return c;
}

constexpr BackwardConfig two_keys = with(wide, [](BackwardConfig& c) { c.stages = 2, c.k_stages = 2; });

constexpr BackwardConfig one_key = with(narrow, [](BackwardConfig& c) { c.k_stages = 1; });

template <BackwardConfig B>
constexpr BackwardConfig deterministic = with(B, [](BackwardConfig& c) { c.deterministic = true; });

// Their heads add in two orders, of however few tiles. (`late_dq` tells them from others.)
constexpr BackwardConfig two_orders = with(deterministic<one_key>, [](BackwardConfig& c) { c.late_dq = false; });
constexpr BackwardConfig wide_in_two_orders = with(deterministic<wide>, [](BackwardConfig& c) { c.late_dq = false; });
template <BackwardConfig B>
constexpr BackwardKernelId causal_gradients = kernel_of(B, BackwardPass::gradients, {MaskKind::causal});

}  // namespace

template <>
inline constexpr uint32_t sm90::least_tiles_of_two_orders<causal_gradients<two_orders>> = 2;
template <>
inline constexpr uint32_t sm90::least_tiles_of_two_orders<causal_gradients<wide_in_two_orders>> = 2;

namespace {

template <BackwardConfig B>
void check_shapes() {
  for (Shape const& s : {Shape{.sq = B.block_m + 5, .sk = B.block_n + 7, .d = B.head_dim, .d_v = B.head_dim_v},
                         Shape{.sq = 2 * B.block_m, .sk = B.block_n, .d = B.head_dim - 8, .d_v = 8},
                         Shape{.sq = 3, .sk = 20, .d = 8, .d_v = B.head_dim_v, .heads = 2, .order = Order::padded},
                         Shape{.sq = 200, .sk = 41, .d = 16, .batch = 2, .heads = 4, .kv_heads = 2}}) {
    Sm90BackwardProblem<B, MaskKind::causal> causal(s, true);
    check_gradients(causal);
    Sm90BackwardProblem<B, MaskKind::full> full(s);
    check_gradients(full);
  }
}

// Guards against gradients that are wrong at a tile's edge, on the diagonal, for narrow or grouped heads.
TEST(Sm90BackwardKernel, Shapes) {
  check_shapes<narrow>();
  check_shapes<wide>();
  check_shapes<two_keys>();
  check_shapes<widest>();
  check_shapes<unequal>();
  check_shapes<deterministic<one_key>>();
  check_shapes<deterministic<wide>>();
}

template <BackwardConfig B>
void check_options() {
  SCOPED_TRACE(name(B).text);
  Sm90BackwardProblem<B, MaskKind::causal> problem({.sq = 330, .sk = 300, .d = B.head_dim, .d_v = B.head_dim_v});
  check_gradients(problem, 2);
  // The inspecting warp takes the first blocks and the last, and passes over those between; and K before all.
  if constexpr (serves(B, MaskKind::band)) {
    Sm90BackwardProblem<B, MaskKind::band> band(
        {.sq = 450, .sk = 300, .d = 32, .causal_offset = 20, .window_offset = -250, .seqlens_k = {290}});
    check_gradients(band, 2);
  }
}

// Guards against a ring of places that is entered before it is empty, or read before it is full: rings shorter and
// longer than the default's, and every order of the products.
TEST(Sm90BackwardKernel, Options) {
  check_options<with(wide, [](BackwardConfig& c) { c.stages = 1, c.dout_stages = 1; })>();
  check_options<with(wide, [](BackwardConfig& c) { c.stages = 2, c.dout_stages = 3; })>();
  check_options<with(wide, [](BackwardConfig& c) { c.late_dq = false; })>();
  check_options<with(narrow, [](BackwardConfig& c) { c.late_dq = false, c.stages = 2; })>();
  check_options<with(wide, [](BackwardConfig& c) { c.early_reads = false; })>();
  check_options<one_key>();
  check_options<deterministic<narrow>>();
  check_options<two_keys>();
}

// The same of wide heads.
TEST(Sm90BackwardKernel, OptionsOfWideHeads) {
  check_options<widest>();
  check_options<with(widest, [](BackwardConfig& c) { c.dout_stages = 1; })>();
  check_options<with(unequal, [](BackwardConfig& c) { c.stages = 2, c.dout_stages = 4; })>();
}

// NaN in all rows that do not exist, or belong to no sequence.
template <BackwardConfig B>
void poison_absent(Sm90BackwardProblem<B, MaskKind::band>& problem) {
  problem.problem.poison_absent();
  for (int b = 0; b < problem.s_.batch; ++b) {
    for (int i = 0; i < problem.s_.sq; ++i) {
      if (!problem.s_.row_exists(b, i)) problem.dout.set_rows(b, i, nan);
    }
  }
}

// Guards against what a tile leaves for the next one of its thread block: places that are not empty, a mbarrier in
// another phase, dQ of its last block; with rings of one place, which the next tile's first block takes over at once,
// among tiles that no query sees, and where K is not finite, which the adding warps then release late.
template <BackwardConfig B>
void check_many_tiles(uint32_t blocks) {
  SCOPED_TRACE(name(B).text);
  for (int offset : {150, -70}) {
    Shape s{.sq = 2 * B.block_m - 9, .sk = 400, .d = 24, .d_v = 16, .heads = 2, .causal_offset = offset};
    Sm90BackwardProblem<B, MaskKind::causal> causal(s);
    causal.most_blocks = blocks;
    causal.problem.q.set_row(0, 90, 1, nan);
    causal.problem.k.set_row(0, 140, 0, inf);
    check_gradients(causal);
  }
  if constexpr (serves(B, MaskKind::band)) {
    Shape packed{.sq = 270, .sk = 340, .d = 32, .causal_offset = 10, .window_offset = -90, .from_end = true};
    packed.cu_seqlens_q = {3, 133, 133, 134, 260};
    packed.cu_seqlens_k = {2, 60, 75, 75, 335};
    Sm90BackwardProblem<B, MaskKind::band> band(packed);
    poison_absent(band);
    band.most_blocks = blocks;
    check_gradients(band);
  }
}

TEST(Sm90BackwardKernel, ManyTilesOfAThreadBlock) {
  check_many_tiles<narrow>(1);
  check_many_tiles<wide>(2);
  check_many_tiles<with(wide, [](BackwardConfig& c) { c.stages = 1, c.dout_stages = 1; })>(1);
  check_many_tiles<with(narrow, [](BackwardConfig& c) { c.late_dq = false; })>(2);
  check_many_tiles<with(narrow, [](BackwardConfig& c) { c.late_dq = false, c.k_stages = 1; })>(1);
  check_many_tiles<with(two_keys, [](BackwardConfig& c) { c.stages = 1, c.dout_stages = 1; })>(1);
  check_many_tiles<deterministic<narrow>>(1);
  check_many_tiles<deterministic<one_key>>(1);
  check_many_tiles<two_keys>(1);
  check_many_tiles<deterministic<wide>>(1);
  Sm90BackwardProblem<wide, MaskKind::full> full(
      {.sq = 70, .sk = 300, .d = 128, .d_v = 128, .batch = 2, .heads = 2, .kv_heads = 1});
  full.most_blocks = 1;
  check_gradients(full, 2);
}

TEST(Sm90BackwardKernel, OneTileOfAThreadBlock) {
  check_options<with(wide, [](BackwardConfig& c) { c.persistent = false; })>();
  check_options<with(deterministic<one_key>, [](BackwardConfig& c) { c.persistent = false; })>();
}

// Guards against gradients of keys that no query sees, and of queries that see no key, which the loop leaves out.
TEST(Sm90BackwardKernel, NothingToSee) {
  for (int offset : {-300, -130, -40}) {
    Sm90BackwardProblem<narrow, MaskKind::causal> problem({.sq = 200, .sk = 270, .d = 64, .causal_offset = offset});
    check_gradients(problem);
    Sm90BackwardProblem<widest, MaskKind::causal> wide_problem(
        {.sq = 200, .sk = 270, .d = 200, .d_v = 136, .heads = 2, .causal_offset = offset});
    check_gradients(wide_problem);
    Sm90BackwardProblem<deterministic<one_key>, MaskKind::causal> same_bits(
        {.sq = 200, .sk = 270, .d = 64, .causal_offset = offset});
    check_gradients(same_bits);
  }
  // Without queries there is no counter from which tiles could be taken.
  Sm90BackwardProblem<narrow, MaskKind::full> no_queries({.sq = 0, .sk = 270, .d = 64});
  check_gradients(no_queries);
}

// Guards against a deadlock, and bits that depend on who comes first: the tiles that add to a block of queries have the
// turns 0, 1, 2, ..., each once, and whoever waits has been started after all that it waits for.
template <BackwardConfig B, MaskKind Kind>
void check_turns(int sq, int sk, int offset, int batch = 2, int kv_heads = 2) {
  constexpr BackwardKernelId id = kernel_of(B, BackwardPass::gradients, {Kind});
  using Order = sm90::FixedOrder<id>;
  ForwardParams p{};
  p.batch = batch, p.heads = 4, p.kv_heads = kv_heads, p.head_dim = p.head_dim_v = B.head_dim;
  p.seqlen_q = sq, p.seqlen_k = sk, p.causal_offset = offset;
  auto const blocks = static_cast<std::size_t>(ceil_div(sq, B.block_m));
  std::vector<int> turns(blocks * static_cast<std::size_t>(4 * batch));
  auto const tiles = static_cast<uint32_t>(count_key_tiles(p, B.block_n));
  for (uint32_t started = 0; started < tiles; ++started) {
    auto const tile = Order::tile(p, started, tiles);
    for (auto at = sm90::PassingQueries<id>::of({.forward = p}, tile); at.left > 0; at = at.after()) {
      int& turn =
          turns[static_cast<std::size_t>(tile.entry.batch * 4 + at.head) * blocks + static_cast<std::size_t>(at.block)];
      EXPECT_EQ(turn++, Order::tiles_before(tile, Order::place(tile, p), at.head, at.block, p))
          << sq << " x " << sk << " at " << offset;
    }
  }
}

TEST(Sm90BackwardKernel, NobodyWaitsForATileThatIsStartedLater) {
  for (int sq : {1, 63, 64, 65, 128, 129, 300, 1000}) {
    for (int sk : {1, 127, 128, 129, 500, 1111}) {
      check_turns<deterministic<one_key>, MaskKind::full>(sq, sk, 0);
      check_turns<deterministic<wide>, MaskKind::full>(sq, sk, 0);
      for (int offset : {sk - sq, 0, -sq - 200, -70, -1, 1, 130, sk}) {
        check_turns<deterministic<one_key>, MaskKind::causal>(sq, sk, offset);
        check_turns<deterministic<wide>, MaskKind::causal>(sq, sk, offset);
      }
    }
  }
  // More heads' tiles than a cache holds: the heads are taken in groups.
  check_turns<deterministic<wide>, MaskKind::causal>(30000, 30000, 0);
  // Tiles enough that some heads, or many, add from the first keys on.
  for (auto const& [sq, sk, batch] : {std::tuple{1000, 1111, 17}, {300, 500, 40}, {100, 127, 200}, {9000, 9100, 3}}) {
    for (int offset : {0, sk - sq, -70, 130}) {
      check_turns<deterministic<one_key>, MaskKind::causal>(sq, sk, offset, batch, 4);
      check_turns<deterministic<wide>, MaskKind::causal>(sq, sk, offset, batch, 4);
      check_turns<deterministic<wide>, MaskKind::full>(sq, sk, offset, batch, 4);
    }
  }
}

TEST(Sm90BackwardKernel, SomeHeadsAddFromTheFirstKeysOn) {
  constexpr BackwardKernelId causal = causal_gradients<deterministic<wide>>;
  constexpr BackwardKernelId full = kernel_of(deterministic<wide>, BackwardPass::gradients, {MaskKind::full});
  auto const heads_of = [](auto id, int batch, int kv_heads, int sk) {
    ForwardParams p{};
    p.batch = batch, p.heads = 16, p.kv_heads = kv_heads, p.seqlen_k = sk;
    return static_cast<int>(sm90::FixedOrder<decltype(id)::value>::heads_from_first(p));
  };
  std::integral_constant<BackwardKernelId, causal> const under_the_mask;
  std::integral_constant<BackwardKernelId, full> const without;
  EXPECT_EQ(heads_of(under_the_mask, 4, 16, 4096), 13);     // 400 tiles
  EXPECT_EQ(heads_of(under_the_mask, 1, 16, 50 * 128), 8);  // 800 tiles
  EXPECT_EQ(heads_of(under_the_mask, 75, 16, 8), 400);      // of 1,200
  EXPECT_EQ(heads_of(under_the_mask, 1, 16, 37 * 128), 0);  // too few tiles
  EXPECT_EQ(heads_of(under_the_mask, 4, 4, 4096), 0);       // heads share keys
  EXPECT_EQ(heads_of(without, 4, 16, 4096), 0);
}

// Guards against additions to dQ in an order that depends on which thread blocks come first, and a workspace that is
// not cleared: the second run has the counters of the first. (The emulator refuses a wait for a tile that is started
// later, whatever the order in which thread blocks are.)
template <BackwardConfig B, MaskKind Kind>
void check_same_bits(Shape const& s) {
  Sm90BackwardProblem<B, Kind> problem(s);
  check_gradients(problem);
  std::vector<double> const first = problem.all_of_dq();
  problem.run(100);
  EXPECT_EQ(problem.all_of_dq(), first);
}

TEST(Sm90BackwardKernel, SameBits) {
  Shape const many_keys{.sq = 150, .sk = 700, .d = 64, .d_v = 64, .batch = 2, .heads = 2, .kv_heads = 1};
  check_same_bits<deterministic<one_key>, MaskKind::full>(many_keys);
  check_same_bits<deterministic<one_key>, MaskKind::causal>({.sq = 500, .sk = 520, .d = 64, .d_v = 64, .heads = 2});
  check_same_bits<deterministic<wide>, MaskKind::full>({.sq = 70, .sk = 500, .d = 128, .d_v = 128});
  check_same_bits<deterministic<wide>, MaskKind::causal>({.sq = 330, .sk = 300, .d = 128, .d_v = 128});
  // Of persistent thread blocks the first takes all tiles here. These take one each, in a random order.
  constexpr BackwardConfig one_tile = with(deterministic<one_key>, [](BackwardConfig& c) { c.persistent = false; });
  check_same_bits<one_tile, MaskKind::full>(many_keys);
  check_same_bits<one_tile, MaskKind::causal>({.sq = 300, .sk = 420, .d = 64, .d_v = 64, .heads = 2});
}

// Some heads add from the first keys on, and others from the last.
TEST(Sm90BackwardKernel, SameBitsInTwoOrders) {
  check_same_bits<two_orders, MaskKind::causal>({.sq = 300, .sk = 420, .d = 64, .d_v = 64, .heads = 3});
  check_same_bits<wide_in_two_orders, MaskKind::causal>({.sq = 200, .sk = 300, .d = 128, .d_v = 128, .heads = 2});
}

// Guards against NaN and infinity of a row that reach rows which do not see it, by products with 0; and against any
// that is lost where it is seen.
template <BackwardConfig B>
void check_poison() {
  for (double poison : {nan, inf}) {
    for (char const* where : {"q", "k", "v", "dout"}) {
      Sm90BackwardProblem<B, MaskKind::causal> problem(
          {.sq = 200, .sk = 200, .d = B.head_dim, .d_v = B.head_dim_v, .heads = 2, .kv_heads = 1});
      for (int row : {3, 70, 131, 199}) {
        if (*where == 'q') problem.problem.q.set_row(0, row, 1, poison);
        if (*where == 'k') problem.problem.k.set_row(0, row, 0, poison);
        if (*where == 'v') problem.problem.v.set_row(0, row, 0, poison);
        if (*where == 'd') problem.dout.set_row(0, row, 1, poison);
      }
      SCOPED_TRACE(std::string(where) + (poison == inf ? ", infinity" : ", NaN"));
      check_gradients(problem);
    }
  }
}

TEST(Sm90BackwardKernel, PoisonReachesWhatSeesIt) {
  check_poison<narrow>();
  check_poison<two_keys>();
  check_poison<wide>();
  check_poison<deterministic<one_key>>();
}

TEST(Sm90BackwardKernel, PoisonOfWideHeadsReachesWhatSeesIt) { check_poison<widest>(); }

// Guards against infinity in one element of a query, all of whose scores are -infinity: its LSE is -infinity, as if it
// saw no key, and its P would be finite once the element is replaced by 0.
TEST(Sm90BackwardKernel, ScoresThatAreAllMinusInfinity) {
  for (int row : {0, 70, 199}) {
    Sm90BackwardProblem<wide, MaskKind::causal> problem({.sq = 200, .sk = 200, .d = 128, .d_v = 128});
    for (int key = 0; key < 200; ++key) problem.problem.k.set(0, key, 0, 5, -0.5 - key * 0x1p-10);
    problem.problem.q.set(0, row, 0, 5, inf);
    SCOPED_TRACE(row);
    check_gradients(problem);
  }
}

// Guards against infinity in one element of dO, whose row's delta is infinite and not NaN.
TEST(Sm90BackwardKernel, InfinityInOneElementOfDout) {
  for (int row : {0, 70, 199}) {
    Sm90BackwardProblem<wide, MaskKind::causal> problem({.sq = 200, .sk = 200, .d = 128, .d_v = 128});
    problem.dout.set(0, row, 0, 5, inf);
    problem.any_nonfinite = true;
    SCOPED_TRACE(row);
    check_gradients(problem);
  }
}

// Guards against windows that end at one or the other side of a tile's and a block's edges, queries without a key and
// keys without a query, in blocks that are partial on both sides.
template <BackwardConfig B>
void check_windows() {
  for (auto const& [first, size] : {std::pair(-140, 0), {-80, 33}, {-40, 190}, {0, 127}, {5, 260}, {120, 128}}) {
    Sm90BackwardProblem<B, MaskKind::band> problem(
        Shape{.sq = 300, .sk = 280, .d = 32, .causal_offset = first + size, .window_offset = first});
    SCOPED_TRACE("keys from " + std::to_string(first) + " on, " + std::to_string(size));
    check_gradients(problem);
  }
  Sm90BackwardProblem<B, MaskKind::band> grouped(Shape{
      .sq = 190, .sk = 300, .d = 16, .batch = 2, .heads = 4, .kv_heads = 2, .causal_offset = 110, .window_offset = 30});
  check_gradients(grouped);
  // Tiles 1 and 2 go round their ranges: partial blocks come in the middle.
  Sm90BackwardProblem<B, MaskKind::band> round(
      Shape{.sq = 900, .sk = 600, .d = 16, .heads = 2, .kv_heads = 1, .causal_offset = 0, .window_offset = -200});
  check_gradients(round);
}

TEST(Sm90BackwardKernel, Windows) {
  check_windows<narrow>();
  check_windows<wide>();
}

// Guards against NaN of rows past the end of a sequence, which products would multiply by 0, and against gradients of
// these rows that are not 0.
template <BackwardConfig B>
void check_short_sequences() {
  for (int first : {-500, -90}) {
    Sm90BackwardProblem<B, MaskKind::band> problem(Shape{.sq = 270,
                                                         .sk = 260,
                                                         .d = 32,
                                                         .d_v = 24,
                                                         .batch = 6,
                                                         .heads = 2,
                                                         .kv_heads = 1,
                                                         .causal_offset = -10,
                                                         .window_offset = first,
                                                         .seqlens_q = {270, 33, 1, 0, 128, 260},
                                                         .seqlens_k = {260, 260, 40, 9, 0, 130},
                                                         .from_end = true,
                                                         .prefix = first > -100 ? std::optional(40) : std::nullopt,
                                                         .prefix_offset = -60,
                                                         .sink = {0.5f, 3}});
    poison_absent(problem);
    check_gradients(problem);
  }
}

TEST(Sm90BackwardKernel, ShortSequences) {
  check_short_sequences<narrow>();
  check_short_sequences<wide>();
}

// Guards against the same of packed sequences, whose neighbours share boxes of TMA: all that belongs to none is NaN.
// And against statistics and sums of a sequence that lie where those of another do.
template <BackwardConfig B>
void check_packed_sequences() {
  for (bool gaps : {false, true}) {
    Shape s{.sq = 470,
            .sk = 440,
            .d = 32,
            .d_v = 24,
            .heads = 2,
            .kv_heads = 1,
            .causal_offset = -30,
            .window_offset = gaps ? -90 : -800,
            .from_end = true,
            .prefix = gaps ? std::optional(20) : std::nullopt,
            .prefix_offset = -40,
            .sink = {0.5f, 3}};
    s.cu_seqlens_q = {3, 233, 233, 234, 266, 394, 460};
    s.cu_seqlens_k = {2, 60, 75, 75, 208, 422, 435};
    if (gaps) s.seqlens_q = {199, 3, 1, 20, 128, 0}, s.seqlens_k = {58, 15, 9, 107, 163, 13};
    Sm90BackwardProblem<B, MaskKind::band> problem(s, gaps);
    poison_absent(problem);
    check_gradients(problem);
  }
}

TEST(Sm90BackwardKernel, PackedSequences) {
  check_packed_sequences<narrow>();
  check_packed_sequences<wide>();
}

// Guards against NaN of one packed sequence in the gradients of the next, whose rows lie in the same boxes.
TEST(Sm90BackwardKernel, NanOfAnotherSequence) {
  Shape s{.sq = 200, .sk = 200, .d = 128, .causal_offset = 200, .window_offset = -200};
  s.cu_seqlens_q = s.cu_seqlens_k = {0, 70, 140, 200};
  Sm90BackwardProblem<wide, MaskKind::band> problem(s);
  for (int i = 70; i < 140; ++i) {
    for (Tensor* t : {&problem.problem.q, &problem.problem.k, &problem.problem.v, &problem.dout})
      t->set_rows(0, i, nan);
  }
  check_gradients(problem);
}

// Guards against the same beside a sink: there the LSE is finite, and P of the row, whose query becomes 0, has to be 0.
TEST(Sm90BackwardKernel, ScoresThatAreAllMinusInfinityBesideASink) {
  Shape const s{.sq = 200, .sk = 200, .d = 128, .causal_offset = 0, .window_offset = -100, .sink = {1}};
  Sm90BackwardProblem<wide, MaskKind::band> problem(s);
  for (int key = 0; key < s.sk; ++key) problem.problem.k.set(0, key, 0, 5, -0.5 - key * 0x1p-10);
  int const row = 70;
  problem.problem.q.set(0, row, 0, 5, inf);
  ASSERT_NO_FATAL_FAILURE(problem.run(1));
  // Of dv the sum of all other rows that see the key.
  for (int key = 0; key <= row; ++key) {
    double sum = 0;
    for (int i = key; i < std::min(key + 101, s.sq); ++i) {
      if (i == row) continue;
      double score = 0;
      for (int c = 0; c < s.d; ++c) score += problem.problem.q.at(0, i, 0, c) * problem.problem.k.at(0, key, 0, c);
      sum +=
          std::exp(problem.problem.scale * score - problem.lse[static_cast<size_t>(i)]) * problem.dout.at(0, i, 0, 3);
    }
    EXPECT_NEAR(problem.dv.at(0, key, 0, 3), sum, 2e-2) << key;
    EXPECT_FALSE(std::isfinite(problem.dk.at(0, key, 0, 5))) << key;
    EXPECT_TRUE(std::isfinite(problem.dk.at(0, key, 0, 6))) << key;
  }
}

// Guards against a block of another head that is left out because one head does not see it, against bits of another
// row or column, and against NaN in what a map hides.
template <BackwardConfig B>
void check_block_maps() {
  for (auto const& [batch, heads] : {std::pair{1, 1}, {2, 4}}) {
    Shape s{.sq = 240, .sk = 300, .d = 40, .batch = 2, .heads = 4, .kv_heads = 2};
    s.causal_offset = 300, s.window_offset = -240;
    s.map = MapProblem::random(batch, heads, s.sq, s.sk, 11);
    Sm90BackwardProblem<B, MaskKind::mapped> problem(s, true);
    check_gradients(problem);
  }
  Shape s{.sq = 230, .sk = 250, .d = 64, .batch = 2, .heads = 2, .kv_heads = 1};
  s.causal_offset = 30, s.window_offset = -90, s.from_end = true;
  s.seqlens_q = {230, 70}, s.seqlens_k = {250, 100};
  s.sink = {0.5f, -1};
  s.map = MapProblem::random(1, 2, s.sq, s.sk, 12);
  Sm90BackwardProblem<B, MaskKind::mapped> problem(s);
  problem.problem.poison_absent();
  check_gradients(problem);

  Shape hiding{.sq = 200, .sk = 300, .d = 64, .causal_offset = 300, .window_offset = -200};
  hiding.map = MapProblem::of(1, 1, hiding.sq, hiding.sk,
                              [](int, int, int i, int j) { return i % 5 != 0 && j % 3 != 0 && (j < 64 || i > 70); });
  Sm90BackwardProblem<B, MaskKind::mapped> hidden(hiding);
  for (int j : {0, 3, 66, 150, 297}) hidden.problem.k.set_row(0, j, 0, nan), hidden.problem.v.set_row(0, j, 0, nan);
  for (int i : {0, 5, 95, 195}) hidden.problem.q.set_row(0, i, 0, nan), hidden.dout.set_row(0, i, 0, nan);
  check_gradients(hidden);
}

TEST(Sm90BackwardKernel, BlockMaps) {
  check_block_maps<narrow>();
  check_block_maps<wide>();
}

}  // namespace
}  // namespace flashcute
