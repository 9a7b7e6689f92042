// Forward through the C++ interface, without Python: on the CPU, and on GPU 0 if there is one.
// (`python -m flashcute bench` verifies results, and measures side by side with other libraries.)
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <vector>

#include "flashcute/api.hpp"
#include "support/device_memory.hpp"

namespace flashcute {
namespace {

using namespace testing;

struct Problem {
  std::array<int64_t, 4> shape;  // (batch, seqlen, heads, d)
  bool causal;

  explicit Problem(benchmark::State const& state, int64_t tokens, int64_t hidden)
      : shape{std::max<int64_t>(1, tokens / state.range(1)), state.range(1), hidden / state.range(0), state.range(0)},
        causal(state.range(2) != 0) {}

  std::size_t count() const { return static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]); }

  double flops() const {
    double const full = 4.0 * static_cast<double>(shape[0] * shape[1] * shape[2]) * static_cast<double>(shape[1]) *
                        static_cast<double>(shape[3]);
    return causal ? full / 2 : full;
  }
};

void report(benchmark::State& state, Problem const& problem) {
  state.counters["FLOP/s"] = benchmark::Counter(problem.flops(), benchmark::Counter::kIsIterationInvariantRate);
}

template <class T>
std::vector<T> random_values(std::size_t count, T (*make)(float)) {
  std::mt19937 engine(std::random_device{}());
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (auto& v : values) v = make(normal(engine));
  return values;
}

void cpu_forward_f32(benchmark::State& state) {
  Problem const problem(state, 2048, 256);
  auto const same = [](float x) { return x; };
  std::vector<float> q = random_values<float>(problem.count(), same), k = random_values<float>(problem.count(), same),
                     v = random_values<float>(problem.count(), same), out(problem.count());
  CallOptions options;
  options.causal = problem.causal;
  auto const view = [&](std::vector<float>& x) { return dense_view(x.data(), DType::float32, {}, problem.shape); };
  ForwardConfig const config = default_config(DType::float32, problem.shape[3], cpu_arch);
  for (auto _ : state) forward(config, view(q), view(k), view(v), view(out), nullptr, options);
  for (float x : out) {
    if (!std::isfinite(x)) return state.SkipWithError("the output is not finite");
  }
  report(state, problem);
}
BENCHMARK(cpu_forward_f32)
    ->ArgsProduct({{64, 128}, {512, 2048}, {0, 1}})
    ->ArgNames({"d", "s", "causal"})
    ->UseRealTime();

void gpu_forward_bf16(benchmark::State& state) {
  if (!has_gpu()) return state.SkipWithError("no GPU of compute capability 8.0 or later");
  Problem const problem(state, 16384, 2048);
  auto const truncate = [](float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<std::uint16_t>(bits >> 16);
  };
  auto const upload = [&] { return random_values<std::uint16_t>(problem.count(), truncate); };
  DeviceMemory const q(upload()), k(upload()), v(upload()), out(2 * problem.count());
  CallOptions options;
  options.causal = problem.causal;
  Device const gpu{DeviceType::cuda, 0};
  auto const view = [&](DeviceMemory const& m) { return dense_view(m.data(), DType::bfloat16, gpu, problem.shape); };
  ForwardConfig const config = default_config(DType::bfloat16, problem.shape[3], arch_of(gpu));
  auto const run = [&] { forward(config, view(q), view(k), view(v), view(out), nullptr, options); };

  cuda::ContextGuard const guard(cuda::device_facts(0).primary_context);
  auto const& driver = test_driver();
  void *start = nullptr, *stop = nullptr;
  cuda::check_result(driver.cuEventCreate(&start, 0), "cuEventCreate");
  cuda::check_result(driver.cuEventCreate(&stop, 0), "cuEventCreate");
  run();
  for (auto _ : state) {
    constexpr int launches = 10;
    driver.cuEventRecord(start, nullptr);
    for (int i = 0; i < launches; ++i) run();
    driver.cuEventRecord(stop, nullptr);
    cuda::check_result(driver.cuEventSynchronize(stop), "cuEventSynchronize");
    float milliseconds = 0;
    driver.cuEventElapsedTime(&milliseconds, start, stop);
    state.SetIterationTime(milliseconds / 1e3 / launches);
  }
  driver.cuEventDestroy(start);
  driver.cuEventDestroy(stop);
  report(state, problem);
}
BENCHMARK(gpu_forward_bf16)
    ->ArgsProduct({{64, 128}, {1024, 4096, 16384}, {0, 1}})
    ->ArgNames({"d", "s", "causal"})
    ->UseManualTime();

}  // namespace
}  // namespace flashcute

BENCHMARK_MAIN();
