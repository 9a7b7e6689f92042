// Runs the mma.sync forward on the host: all blocks of the launch, each in an emulated thread block with random
// schedules, a race detector and bounds checks.
#pragma once

#include "flashcute/sm80/forward.hpp"
#include "kernel/kernel_problem.hpp"

namespace flashcute {

/// Runs all blocks, in random order, under the schedules of `seed`.
template <ForwardKernelId Id>
void run(Problem& problem, uint64_t seed) {
  using Pass = ForwardPass<Id>;
  using Storage = typename Pass::L::SharedStorage;
  ForwardParams const p = problem.prepare();

  std::vector<uint32_t> blocks(static_cast<size_t>(count_query_tiles(p, Id.config.block_m)));
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<uint32_t>(i);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(seed));
  for (uint32_t block : blocks) {
    auto const tile = QueryTile<BatchSequence>::at(p, block, Id.config.block_m);
    GlobalMemory memory;
    auto const& entry = tile.entry;
    int const row = entry.first_query + tile.row0, key = entry.first_key;
    problem.q.allow(memory, entry.batch, tile.head, row, row + tile.rows, Use::input);
    problem.k.allow(memory, entry.batch, tile.kv_head, key, key + entry.keys, Use::input);
    problem.v.allow(memory, entry.batch, tile.kv_head, key, key + entry.keys, Use::input);
    problem.out.allow(memory, entry.batch, tile.head, row, row + tile.rows, Use::output);
    problem.allow_sink(memory);
    if (problem.wants_lse && tile.rows > 0) problem.allow_items(memory, problem.lse, tile.lse_offset(p), tile.rows);
    if (Id.features.count_blocks && tile.rows > 0) {
      problem.allow_items(memory, problem.block_counts, tile.block_counts_offset(p, Id.config.block_m), 1);
    }
    emulation::run_block(block, num_threads(Id.config), sizeof(Storage), seed + block, memory,
                         [&](void* shared) { Pass::run(p, *static_cast<Storage*>(shared)); });
    ASSERT_EQ(memory.count(Use::output), 0u) << "bytes of the outputs that were never stored";
  }
}

/// Runs under several schedules: the first result is compared with fp64, the others bit by bit with the first.
template <ForwardKernelId Id>
void check(Problem& problem, int schedules = 1) {
  if (testing::Test::HasFailure()) return;  // the first failure says enough
  try {
    ASSERT_NO_FATAL_FAILURE(run<Id>(problem, 1));
    problem.expect_right();
    if (Id.features.count_blocks) problem.expect_counts();
    auto const out = problem.out.bytes();
    auto const lse = problem.lse;
    for (int seed = 2; seed <= schedules; ++seed) {
      ASSERT_NO_FATAL_FAILURE(run<Id>(problem, static_cast<uint64_t>(seed) << 32));
      ASSERT_EQ(problem.out.bytes(), out) << "the schedule changes the output";
      ASSERT_EQ(std::memcmp(problem.lse.data(), lse.data(), lse.size() * sizeof(float)), 0);
    }
  } catch (emulation::Violation const& e) {
    FAIL() << name(Id).text << ": " << e.what();
  }
}

template <ForwardKernelId Id>
void check(Shape const& s, int schedules = 1) {
  Problem problem(Id, s);
  check<Id>(problem, schedules);
}

}  // namespace flashcute
