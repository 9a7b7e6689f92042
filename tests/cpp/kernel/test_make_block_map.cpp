// The GPU kernel that makes block maps, run on the host by emulated thread blocks, against what the CPU makes.
#include <gtest/gtest.h>

#include <array>

#include "flashcute/device/make_block_map.hpp"
#include "kernel/kernel_problem.hpp"

namespace flashcute {
namespace {

/// Every cell of a direction: its bits, and its elements where it is partial. (The numbers of partial cells are in the
/// order in which thread blocks come, which is not that of the CPU.)
std::vector<uint64_t> cells_of(std::vector<uint64_t> const& memory, BlockMapSizes const& sizes,
                               CellPlanes const& planes) {
  auto const* const words = reinterpret_cast<uint32_t const*>(memory.data());
  std::vector<uint64_t> all;
  for (int64_t at = 0; at < sizes.maps * planes.rows * planes.words; ++at) {
    uint32_t const some = words[planes.some + at], whole = words[planes.whole + at];
    all.push_back(some);
    all.push_back(whole);
    int64_t number = words[planes.first + at];
    for (int c = 0; c < cells_of_word; ++c) {
      if (!((some & ~whole) >> c & 1)) continue;
      for (int i = 0; i < cell_size; ++i) all.push_back(memory[static_cast<size_t>(planes.bits / 2 + number * 64 + i)]);
      ++number;
    }
  }
  return all;
}

/// Runs the kernel on memory that holds anything, but for the counts, which the launch has cleared.
void expect_as_on_the_cpu(MapProblem like, BlockMapRules rules) {
  rules.sizes = like.sizes();
  rules.heads = like.heads;
  rules.capacity = like.params.capacity;
  std::vector<uint64_t> made(like.memory.size(), 0x5555555555555555), want = made;
  rules.words = reinterpret_cast<uint32_t*>(want.data());
  cpu::make_block_map(rules);
  rules.words = reinterpret_cast<uint32_t*>(made.data());
  std::fill_n(rules.words, BlockMapLayout::header, 0u);
  BlockMapLayout const layout = BlockMapLayout::of(rules.sizes, rules.capacity);
  int64_t const blocks = MapBlockOrder::of(rules.sizes).count;
  for (int64_t block = 0; block < blocks; ++block) {
    GlobalMemory memory;
    memory.add(made.data(), made.size() * 8);
    memory.allow(made.data(), made.size() * 8, Use::output);
    emulation::run_block(
        static_cast<uint32_t>(block), threads_of_map, sizeof(MakeBlockMap::SharedStorage), 7, memory,
        [&](void* shared) { MakeBlockMap::run(rules, *static_cast<MakeBlockMap::SharedStorage*>(shared)); });
  }
  EXPECT_EQ(rules.words[0], reinterpret_cast<uint32_t*>(want.data())[0]);
  EXPECT_EQ(rules.words[1], reinterpret_cast<uint32_t*>(want.data())[1]);
  for (CellPlanes const* planes : {&layout.by_query, &layout.by_key}) {
    EXPECT_EQ(cells_of(made, rules.sizes, *planes), cells_of(want, rules.sizes, *planes));
  }
}

TEST(MakeBlockMap, AsOnTheCpu) {
  for (auto const& [rows, keys] : {std::pair{1, 1}, {64, 128}, {130, 200}, {70, 2200}, {2200, 70}}) {
    MapProblem const dense = MapProblem::random(2, 2, rows, keys, 3);
    BlockMapRules rules{};
    rules.dense = dense.shown.data();
    int64_t const strides[] = {int64_t{2} * rows * keys, int64_t{rows} * keys, keys, 1};
    std::copy_n(strides, 4, rules.dense_stride);
    expect_as_on_the_cpu(dense, rules);
    // The same bytes as another mask: neighbours in memory are queries; then, two apart, neither.
    rules.dense_stride[2] = 1, rules.dense_stride[3] = rows;
    expect_as_on_the_cpu(dense, rules);
    std::vector<uint8_t> apart(2 * dense.shown.size(), 1);
    for (size_t i = 0; i < dense.shown.size(); ++i) apart[2 * i] = dense.shown[i];
    rules.dense = apart.data();
    std::transform(strides, strides + 4, rules.dense_stride, [](int64_t stride) { return 2 * stride; });
    expect_as_on_the_cpu(dense, rules);
    rules.dense_stride[2] = 0;  // one row for all queries
    expect_as_on_the_cpu(dense, rules);

    std::mt19937 random(9);
    std::vector<int> q(static_cast<size_t>(2 * rows)), k(static_cast<size_t>(2 * keys));
    for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<int>(i / 40) - 1;
    for (size_t i = 0; i < k.size(); ++i) k[i] = static_cast<int>(i / 70 + random() % 2) - 1;
    BlockMapRules documents{};
    documents.documents_q = q.data(), documents.documents_k = k.data();
    documents.documents_stride_q = rows, documents.documents_stride_k = keys;
    expect_as_on_the_cpu(dense, documents);

    BlockMapRules both = documents;  // of hidden cells no boolean is read
    both.dense = dense.shown.data();
    std::copy_n(strides, 4, both.dense_stride);
    expect_as_on_the_cpu(dense, both);
    both.dense_stride[3] = -1, both.dense += keys - 1;  // keys from the last to the first
    expect_as_on_the_cpu(dense, both);

    documents.documents_stride_q = documents.documents_stride_k = 0;  // one row for both batch entries
    documents.first = dense.described();
    expect_as_on_the_cpu(dense, documents);
  }
}

}  // namespace
}  // namespace flashcute
