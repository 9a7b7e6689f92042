// The GPU path against the CPU backend, through the C++ interface. (The Python suite compares both with
// fp64 over many more shapes.)
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "device_memory.hpp"
#include "flashcute/api.hpp"

namespace flashcute {
namespace {

using namespace testing;

using Bits = std::uint16_t;  // a bfloat16

float to_float(Bits bits) {
  std::uint32_t const wide = std::uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

/// Random bfloat16 values; truncation is fine for inputs.
std::vector<Bits> random_values(std::size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<Bits> values(count);
  for (auto& v : values) {
    float const x = normal(engine);
    std::uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    v = static_cast<Bits>(wide >> 16);
  }
  return values;
}

struct Shape {
  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads, d;
  bool causal;
};

class Gpu : public ::testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    if (!has_gpu()) GTEST_SKIP() << "no GPU of compute capability 8.0 or later: " << driver_info().problem;
  }
};

// Guards against any disagreement of the two backends, unwritten outputs, and writes past the end.
TEST_P(Gpu, AgreesWithTheCpu) {
  auto const [batch, seqlen_q, seqlen_k, heads, kv_heads, d, causal] = GetParam();
  std::array<int64_t, 4> const q_shape{batch, seqlen_q, heads, d}, k_shape{batch, seqlen_k, kv_heads, d};
  auto const count = [](auto const& s) { return static_cast<std::size_t>(s[0] * s[1] * s[2] * s[3]); };
  std::vector<Bits> q = random_values(count(q_shape), 1), k = random_values(count(k_shape), 2),
                    v = random_values(count(k_shape), 3), expected(count(q_shape));
  std::vector<float> expected_lse(static_cast<std::size_t>(batch * heads * seqlen_q));
  ForwardOptions options;
  options.causal = causal;

  auto const lse_view = [&](void* data, Device device) {
    TensorView t = dense_view(data, DType::float32, device, {batch, heads, seqlen_q, 1});
    t.rank = 3;
    return t;
  };
  Device const cpu{}, gpu{DeviceType::cuda, 0};
  TensorView lse = lse_view(expected_lse.data(), cpu);
  forward(default_config(DType::bfloat16, d, cpu_arch), dense_view(q.data(), DType::bfloat16, cpu, q_shape),
          dense_view(k.data(), DType::bfloat16, cpu, k_shape), dense_view(v.data(), DType::bfloat16, cpu, k_shape),
          dense_view(expected.data(), DType::bfloat16, cpu, q_shape), &lse, options);

  DeviceMemory const gq(q), gk(k), gv(v), out(count(q_shape) * sizeof(Bits)),
      out_lse(expected_lse.size() * sizeof(float));  // 0xff: NaN
  lse = lse_view(out_lse.data(), gpu);
  forward(default_config(DType::bfloat16, d, arch_of(gpu)), dense_view(gq.data(), DType::bfloat16, gpu, q_shape),
          dense_view(gk.data(), DType::bfloat16, gpu, k_shape), dense_view(gv.data(), DType::bfloat16, gpu, k_shape),
          dense_view(out.data(), DType::bfloat16, gpu, q_shape), &lse, options);

  auto const got = out.download<Bits>();
  auto const got_lse = out_lse.download<float>();
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_FALSE(std::isnan(to_float(got[i]))) << "element " << i;
    error += std::pow(to_float(got[i]) - to_float(expected[i]), 2);
    norm += std::pow(to_float(expected[i]), 2);
  }
  // P is rounded to bfloat16 on the GPU and not on the CPU: 2^-9 relative an element, less in the mean.
  EXPECT_LE(std::sqrt(error), 4e-3 * std::sqrt(norm));
  for (std::size_t i = 0; i < got_lse.size(); ++i) {
    if (std::isinf(expected_lse[i])) {
      ASSERT_EQ(got_lse[i], expected_lse[i]);
    } else {
      ASSERT_NEAR(got_lse[i], expected_lse[i], 1e-4);
    }
  }
  EXPECT_TRUE(out.guard_is_intact());
  EXPECT_TRUE(out_lse.guard_is_intact());
}

INSTANTIATE_TEST_SUITE_P(Shapes, Gpu,
                         ::testing::Values(Shape{2, 203, 333, 4, 2, 64, false}, Shape{1, 512, 512, 2, 2, 128, true},
                                           Shape{2, 300, 129, 3, 1, 104, true}, Shape{1, 1, 1000, 2, 1, 128, true},
                                           Shape{1, 129, 1000, 2, 1, 8, true}, Shape{1, 64, 0, 2, 2, 64, false},
                                           Shape{1, 0, 64, 2, 2, 64, false}, Shape{3, 1023, 1024, 2, 1, 72, false}),
                         [](auto const& info) {
                           auto const& s = info.param;
                           return "b" + std::to_string(s.batch) + "_sq" + std::to_string(s.seqlen_q) + "_sk" +
                                  std::to_string(s.seqlen_k) + "_h" + std::to_string(s.heads) + "_hk" +
                                  std::to_string(s.kv_heads) + "_d" + std::to_string(s.d) +
                                  (s.causal ? "_causal" : "_full");
                         });

// Guards against a device number that is not checked before the driver is asked for it.
TEST_F(Gpu, ADeviceThatDoesNotExistIsRefused) {
  TensorView const t = dense_view(nullptr, DType::bfloat16, {DeviceType::cuda, 4096}, {1, 64, 1, 64});
  EXPECT_THROW(forward(ForwardConfig{}, t, t, t, t, nullptr), DeviceError);
}

}  // namespace
}  // namespace flashcute
