// Causal attention by flashcute on the CPU and, if there is one, on a GPU, compared with three plain loops.
//
//     cmake -S . -B build -DCMAKE_PREFIX_PATH=<where flashcute is installed> && cmake --build build && build/attention
//
// With the argument `gpu` it is an error that there is no GPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <iostream>
#include <random>
#include <string_view>
#include <vector>

#include "flashcute/api.hpp"
#include "managed_memory.hpp"

namespace {

// Each of q, k, v and out is (batch, seqlen, heads, head_dim).
constexpr int64_t batch = 2, seqlen = 300, heads = 4, head_dim = 64;
constexpr int64_t elements = batch * seqlen * heads * head_dim;

constexpr int64_t offset(int64_t b, int64_t row, int64_t h) { return ((b * seqlen + row) * heads + h) * head_dim; }

flashcute::TensorView view(float* data, flashcute::Device device) {
  return {.data = data,
          .dtype = flashcute::ElementType::float32,
          .device = device,
          .rank = 4,
          .shape = {batch, seqlen, heads, head_dim},
          .strides = {seqlen * heads * head_dim, heads * head_dim, head_dim, 1}};
}

/// out = softmax(q kT / sqrt(head_dim)) v, where query i sees keys 0 to i.
std::vector<double> plain_attention(float const* q, float const* k, float const* v) {
  std::vector<double> out(elements);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < seqlen; ++i) {
        double sum = 0;
        double* const row = &out[offset(b, i, h)];
        for (int64_t j = 0; j <= i; ++j) {
          double score = 0;
          for (int64_t d = 0; d < head_dim; ++d) score += double{q[offset(b, i, h) + d]} * k[offset(b, j, h) + d];
          double const p = std::exp(score / std::sqrt(double{head_dim}));
          sum += p;
          for (int64_t d = 0; d < head_dim; ++d) row[d] += p * v[offset(b, j, h) + d];
        }
        for (int64_t d = 0; d < head_dim; ++d) row[d] /= sum;
      }
    }
  }
  return out;
}

/// q, k, v and out one after the other, in memory of `device`. Whether flashcute's result is that of the loops.
bool attend(float* memory, flashcute::Device device) {
  float *const q = memory, *const k = q + elements, *const v = k + elements, *const out = v + elements;
  std::mt19937 engine(0);
  std::normal_distribution<float> normal;
  std::generate(q, out, [&] { return normal(engine); });
  std::fill(out, out + elements, NAN);

  flashcute::CallOptions const options{.causal = true};
  auto const tq = view(q, device), tk = view(k, device), tv = view(v, device), to = view(out, device);
  flashcute::forward({}, tq, tk, tv, to, nullptr, options);
  if (device.type == flashcute::DeviceType::cuda) ManagedMemory::synchronize();

  double error = 0;
  std::vector<double> const expected = plain_attention(q, k, v);
  for (int64_t i = 0; i < elements; ++i) {
    double const difference = std::abs(out[i] - expected[i]);
    if (!(difference <= error)) error = difference;  // NaN, too
  }
  bool const right = error < 1e-5;
  std::cout << flashcute::to_string(flashcute::explain({}, tq, tk, tv, options)) << '\n'
            << flashcute::to_string(device) << ": largest error " << error << (right ? "\n" : ": WRONG\n");
  return right;
}

int run(bool needs_gpu) {
  std::vector<float> memory(4 * elements);
  bool right = attend(memory.data(), {flashcute::DeviceType::cpu, 0});

  flashcute::DriverInfo const driver = flashcute::driver_info();
  if (driver.gpus.empty()) {
    std::cout << "no GPU: " << (driver.problem.empty() ? "the driver lists none" : driver.problem) << '\n';
    return right && !needs_gpu ? 0 : 1;
  }
  ManagedMemory const shared(4 * elements * sizeof(float));
  right = attend(shared.as<float>(), {flashcute::DeviceType::cuda, 0}) && right;
  return right ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 && argv[1] == std::string_view("gpu"));
  } catch (std::exception const& error) {  // flashcute's own are all flashcute::Error
    std::cerr << error.what() << '\n';
    return 1;
  }
}
