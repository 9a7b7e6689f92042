// What the host does beside a call's computation, on the CPU: pieces that docs/decisions/ gives figures of.
#include <benchmark/benchmark.h>

#include "cpu/cores.hpp"
#include "flashcute/core/defaults.hpp"
#include "flashcute/policy/mask.hpp"
#include "launch/tile_deal.hpp"

namespace flashcute {
namespace {

void read_affinity_mask(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(cpu::CpuSet::of_this_thread());
}
BENCHMARK(read_affinity_mask)->Unit(benchmark::kMicrosecond);

void read_cpu_quota(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(cpu::cpu_quota("/"));
}
BENCHMARK(read_cpu_quota)->Unit(benchmark::kMicrosecond);

/// Of a causal call to the thread blocks of 132 multiprocessors. More sizes than a thread remembers take turns, so each
/// call deals anew.
void deal_tiles_anew(benchmark::State& state) {
  ForwardKernelId const kernel = kernel_of(
      default_forward_config(DType::bfloat16, static_cast<int32_t>(state.range(0)), 90), {.mask = MaskKind::causal});
  ForwardParams params{};
  params.batch = static_cast<int32_t>(16384 / state.range(1));
  params.heads = params.kv_heads = static_cast<int32_t>(2048 / state.range(0));
  params.seqlen_q = static_cast<int32_t>(state.range(1));
  int32_t const blocks = persistent_clusters(kernel.config, count_query_tiles(params, tile_rows(kernel.config)), 132);
  for (auto _ : state) {
    params.causal_offset = (params.causal_offset + 1) % static_cast<int32_t>(2 * remembered_deals);
    params.seqlen_k = params.seqlen_q + params.causal_offset;
    benchmark::DoNotOptimize(&deal_tiles(kernel, params, blocks));
  }
}
BENCHMARK(deal_tiles_anew)
    ->ArgsProduct({{64, 128}, {1024, 4096, 16384}})
    ->ArgNames({"d", "s"})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace flashcute

BENCHMARK_MAIN();
