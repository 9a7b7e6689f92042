// The GPU path against the CPU backend, through the C++ interface. (The Python suite compares both with
// fp64 over many more shapes.)
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "flashcute/api.hpp"
#include "image/nvrtc.hpp"
#include "support/device_memory.hpp"
#include "support/printing.hpp"

namespace flashcute {
namespace {

using namespace testing;

struct BFloat16 {
  static constexpr DType dtype = DType::bfloat16;
  std::uint16_t bits;

  static BFloat16 from(float x) {
    std::uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    return {static_cast<std::uint16_t>(wide >> 16)};  // cut: good enough for inputs
  }
  explicit operator float() const {
    std::uint32_t const wide = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

struct Float32 {
  static constexpr DType dtype = DType::float32;
  float value;

  static Float32 from(float x) { return {x}; }
  explicit operator float() const { return value; }
};

template <class Element>
std::vector<Element> random_values(std::size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<Element> values(count);
  for (auto& v : values) v = Element::from(normal(engine));
  return values;
}

struct Shape {
  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads, d, d_v;
  bool causal;
  bool band = false;  // a window, lengths and sinks as well

  std::vector<int32_t> lengths(int64_t most) const {
    std::vector<int32_t> all;
    for (int64_t b = 0; b < batch; ++b) all.push_back(static_cast<int32_t>((most - b * 61 % (most + 1))));
    return all;
  }
};

std::string describe(Shape const& s) {
  return "b" + std::to_string(s.batch) + "_sq" + std::to_string(s.seqlen_q) + "_sk" + std::to_string(s.seqlen_k) +
         "_h" + std::to_string(s.heads) + "_hk" + std::to_string(s.kv_heads) + "_d" + std::to_string(s.d) + "_dv" +
         std::to_string(s.d_v) + (s.causal ? "_causal" : "_full") + (s.band ? "_band" : "");
}

std::string name_of_shape(::testing::TestParamInfo<Shape> const& info) { return describe(info.param); }

void PrintTo(Shape const& s, std::ostream* out) { *out << describe(s); }

// Guards against summaries that list the bytes of the parameter of each test that was skipped or failed.
TEST(Printing, ShapesArePrintedInWords) {
  EXPECT_EQ(::testing::PrintToString(Shape{2, 3, 5, 4, 2, 64, 40, true}), "b2_sq3_sk5_h4_hk2_d64_dv40_causal");
}

/// The options of a call of this shape, with their arrays on a device.
class ShapeOptions {
 public:
  ShapeOptions(Shape const& s, Device device) {
    options.causal = s.causal;
    if (!s.band) return;
    options.window_left = s.seqlen_k / 3;
    for (int64_t head = 0; head < s.heads; ++head) sinks_.push_back(static_cast<float>(head) - 1);
    options.seqlens_q = held(queries_ = s.lengths(s.seqlen_q), ElementType::int32, device, memory_[0], views_[0]);
    options.seqlens_k = held(keys_ = s.lengths(s.seqlen_k), ElementType::int32, device, memory_[1], views_[1]);
    options.sink = held(sinks_, ElementType::float32, device, memory_[2], views_[2]);
  }
  ShapeOptions(ShapeOptions const&) = delete;
  ShapeOptions& operator=(ShapeOptions const&) = delete;

  CallOptions options;

 private:
  template <class T>
  static TensorView const* held(std::vector<T> const& values, ElementType dtype, Device device,
                                std::optional<DeviceMemory>& memory, TensorView& view) {
    view.data = const_cast<T*>(values.data());
    if (device.type == DeviceType::cuda) view.data = memory.emplace(values).data();
    view.dtype = dtype;
    view.device = device;
    view.rank = 1;
    view.shape[0] = static_cast<int64_t>(values.size());
    view.strides[0] = 1;
    return &view;
  }

  std::vector<int32_t> queries_, keys_;
  std::vector<float> sinks_;
  std::array<std::optional<DeviceMemory>, 3> memory_;
  std::array<TensorView, 3> views_;
};

/// NaN in the rows of a (batch, rows, heads, d) tensor that do not exist.
template <class Element>
void poison(std::vector<Element>& x, std::vector<int32_t> const& lengths, int64_t rows, int64_t row_size) {
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    auto const first = x.begin() + (static_cast<int64_t>(b) * rows + lengths[b]) * row_size;
    std::fill(first, x.begin() + static_cast<int64_t>(b + 1) * rows * row_size, Element::from(NAN));
  }
}

template <class Element>
double norm_of(std::vector<Element> const& values) {
  double sum = 0;
  for (Element const& x : values) sum += std::pow(static_cast<float>(x), 2);
  return std::sqrt(sum);
}

/// No element is NaN, and |got - expected| is at most `tolerance` times |expected|, or `norm` if that is larger.
template <class Element>
void expect_close(std::vector<Element> const& got, std::vector<Element> const& expected, double tolerance,
                  double norm = 0) {
  ASSERT_EQ(got.size(), expected.size());
  double error = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    auto const x = static_cast<float>(got[i]), want = static_cast<float>(expected[i]);
    ASSERT_FALSE(std::isnan(x)) << "element " << i;
    error += std::pow(x - want, 2);
  }
  EXPECT_LE(std::sqrt(error), tolerance * std::max(norm, norm_of(expected)));
}

class Gpu : public ::testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    if (!has_gpu()) GTEST_SKIP() << "no GPU of compute capability 8.0 or later: " << driver_info().problem;
  }

  /// Any disagreement of the two backends, unwritten outputs, and writes past the end. `chosen` turns the default
  /// configuration on the GPU into the one to test.
  template <class Element, class Chosen>
  void expect_what_the_cpu_computes(double tolerance, Chosen const& chosen) {
    auto const [batch, seqlen_q, seqlen_k, heads, kv_heads, d, d_v, causal, band] = GetParam();
    using Sizes = std::array<int64_t, 4>;
    Sizes const q_shape{batch, seqlen_q, heads, d}, k_shape{batch, seqlen_k, kv_heads, d},
        v_shape{batch, seqlen_k, kv_heads, d_v}, out_shape{batch, seqlen_q, heads, d_v};
    auto const count = [](Sizes const& s) { return static_cast<std::size_t>(s[0] * s[1] * s[2] * s[3]); };
    auto q = random_values<Element>(count(q_shape), 1), k = random_values<Element>(count(k_shape), 2),
         v = random_values<Element>(count(v_shape), 3);
    if (band) {
      poison(q, GetParam().lengths(seqlen_q), seqlen_q, heads * d);
      poison(k, GetParam().lengths(seqlen_k), seqlen_k, kv_heads * d);
      poison(v, GetParam().lengths(seqlen_k), seqlen_k, kv_heads * d_v);
    }
    std::vector<Element> expected(count(out_shape));
    std::vector<float> expected_lse(static_cast<std::size_t>(batch * heads * seqlen_q));

    auto const run = [&](Device device, void const* q_data, void const* k_data, void const* v_data, void* out,
                         void* lse_data) {
      ShapeOptions const given(GetParam(), device);
      auto const view = [&](void const* data, Sizes const& shape) {
        return dense_view(const_cast<void*>(data), Element::dtype, device, shape);
      };
      TensorView lse = dense_view(lse_data, DType::float32, device, {batch, heads, seqlen_q, 1});
      lse.rank = 3;
      TensorView const tq = view(q_data, q_shape), tk = view(k_data, k_shape), tv = view(v_data, v_shape),
                       to = view(out, out_shape);
      ForwardConfig const config = config_for(tq, tk, tv, &to);
      forward(device.type == DeviceType::cpu ? config : chosen(config), tq, tk, tv, to, &lse, given.options);
      if (device.type == DeviceType::cuda) test_driver().cuCtxSynchronize();  // before the arrays of the options go
    };
    run({}, q.data(), k.data(), v.data(), expected.data(), expected_lse.data());
    DeviceMemory const gq(q), gk(k), gv(v), out(count(out_shape) * sizeof(Element)),
        out_lse(expected_lse.size() * sizeof(float));  // 0xff: NaN
    run({DeviceType::cuda, 0}, gq.data(), gk.data(), gv.data(), out.data(), out_lse.data());

    auto const got = out.template download<Element>();
    auto const got_lse = out_lse.download<float>();
    expect_close(got, expected, tolerance);
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
};

// P is rounded to bfloat16 on the GPU and not on the CPU: 2^-9 relative an element, less in the mean.
TEST_P(Gpu, BFloat16AgreesWithTheCpu) {
  expect_what_the_cpu_computes<BFloat16>(4e-3, [](ForwardConfig const& config) { return config; });
}

TEST_P(Gpu, Float32AgreesWithTheCpu) {
  if (GetParam().band) GTEST_SKIP() << "compiled at its first use: the Python suite runs it";
  expect_what_the_cpu_computes<Float32>(1e-5, [](ForwardConfig const& config) { return config; });
}

// On a Hopper GPU: what it takes where its own kernel cannot serve, and what newer GPUs take.
TEST_P(Gpu, BFloat16ByMmaSyncAgreesWithTheCpu) {
  if (arch_of({DeviceType::cuda, 0}) != 90) GTEST_SKIP() << "it is what BFloat16AgreesWithTheCpu runs";
  expect_what_the_cpu_computes<BFloat16>(
      4e-3, [](ForwardConfig const& config) { return default_config(DType::bfloat16, config.head_dim, 100); });
}

// Every family of images, partial tiles, small grids and large ones. Only what needs no compiler: sanitizers run this.
INSTANTIATE_TEST_SUITE_P(
    Shapes, Gpu,
    ::testing::Values(Shape{2, 203, 333, 4, 2, 64, 64, false}, Shape{1, 512, 512, 2, 2, 128, 128, true},
                      Shape{2, 300, 129, 3, 1, 104, 104, true}, Shape{1, 1, 1000, 2, 1, 128, 128, true},
                      Shape{1, 129, 1000, 2, 1, 8, 8, true}, Shape{1, 64, 0, 2, 2, 64, 64, false},
                      Shape{1, 0, 64, 2, 2, 64, 64, false}, Shape{3, 1023, 1024, 2, 1, 72, 72, false},
                      Shape{1, 300, 333, 2, 1, 256, 256, true}, Shape{2, 65, 200, 2, 1, 136, 40, false},
                      Shape{200, 70, 90, 2, 1, 64, 64, true}, Shape{200, 70, 90, 2, 1, 128, 128, false},
                      Shape{3, 403, 333, 4, 2, 64, 64, true, true}, Shape{3, 512, 600, 2, 2, 128, 128, true, true},
                      Shape{2, 300, 333, 2, 1, 256, 256, false, true}, Shape{50, 70, 90, 2, 1, 128, 40, true, true}),
    name_of_shape);

class GpuBackward : public ::testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    if (!has_gpu()) GTEST_SKIP() << "no GPU of compute capability 8.0 or later: " << driver_info().problem;
  }

  /// Has kernels compiled at first use; sanitizers come with a warm cache.
  static void set_up_compiler() {
    set_search_paths({}, {FLASHCUTE_DEVICE_HEADERS, FLASHCUTE_DEVICE_HEADERS "/cccl"}, FLASHCUTE_COMPILER);
    if (!nvrtc_available()) GTEST_SKIP() << nvrtc_problem();
  }

  static constexpr char const* gradient_names[] = {"dq", "dk", "dv"};

  /// Any disagreement of the two backends, gradients that are not written or added to what was there, and writes past
  /// the end. With `deterministic` also other bits in a second run.
  template <class Element>
  void expect_what_the_cpu_computes(bool deterministic, double tolerance) {
    using Gradients = std::array<std::vector<Element>, 3>;  // dq, dk and dv, each as (batch, seqlen, heads, d)
    auto const [batch, seqlen_q, seqlen_k, heads, kv_heads, d, d_v, causal, band] = GetParam();
    using Sizes = std::array<int64_t, 4>;
    Sizes const q_shape{batch, seqlen_q, heads, d}, k_shape{batch, seqlen_k, kv_heads, d},
        v_shape{batch, seqlen_k, kv_heads, d_v}, out_shape{batch, seqlen_q, heads, d_v};
    auto const count = [](Sizes const& s) { return static_cast<std::size_t>(s[0] * s[1] * s[2] * s[3]); };
    auto q = random_values<Element>(count(q_shape), 1), k = random_values<Element>(count(k_shape), 2),
         v = random_values<Element>(count(v_shape), 3), dout = random_values<Element>(count(out_shape), 4);
    if (band) {
      poison(q, GetParam().lengths(seqlen_q), seqlen_q, heads * d);
      poison(dout, GetParam().lengths(seqlen_q), seqlen_q, heads * d_v);
      poison(k, GetParam().lengths(seqlen_k), seqlen_k, kv_heads * d);
      poison(v, GetParam().lengths(seqlen_k), seqlen_k, kv_heads * d_v);
    }
    auto const rows = static_cast<std::size_t>(batch * heads * seqlen_q);
    std::vector<float> dlse(rows), lse(rows);
    for (std::size_t i = 0; auto const& x : random_values<Element>(rows, 5)) dlse[i++] = static_cast<float>(x);
    std::vector<Element> out(count(out_shape));

    auto const view = [&](void const* data, Device device, Sizes const& shape) {
      return dense_view(const_cast<void*>(data), Element::dtype, device, shape);
    };
    auto const rows_view = [&](void const* data, Device device) {
      TensorView t = dense_view(const_cast<void*>(data), DType::float32, device, {batch, heads, seqlen_q, 1});
      t.rank = 3;
      return t;
    };
    // One forward, so that both backends begin with the same out and lse.
    TensorView const hq = view(q.data(), {}, q_shape), hk = view(k.data(), {}, k_shape),
                     hv = view(v.data(), {}, v_shape), ho = view(out.data(), {}, out_shape),
                     hlse = rows_view(lse.data(), {});
    ShapeOptions const forward_options(GetParam(), {});
    forward(config_for(hq, hk, hv, &ho), hq, hk, hv, ho, &hlse, forward_options.options);

    auto const run = [&](Device device, void const* q_data, void const* k_data, void const* v_data,
                         void const* out_data, void const* dout_data, void const* lse_data, void const* dlse_data,
                         void* dq, void* dk, void* dv, void* dsink) {
      ShapeOptions given(GetParam(), device);
      CallOptions& options = given.options;
      options.deterministic = deterministic;
      TensorView sink_gradient = options.sink != nullptr ? *options.sink : TensorView{};
      sink_gradient.data = dsink;
      TensorView const tq = view(q_data, device, q_shape), tk = view(k_data, device, k_shape),
                       tv = view(v_data, device, v_shape), to = view(out_data, device, out_shape),
                       tdout = view(dout_data, device, out_shape), tlse = rows_view(lse_data, device),
                       tdlse = rows_view(dlse_data, device);
      auto const size = backward_workspace_size({}, tq, tv, options);
      std::optional<DeviceMemory> memory;
      TensorView view_of_memory;
      if (size > 0) {
        memory.emplace(static_cast<std::size_t>(size) * sizeof(float));
        view_of_memory = dense_view(memory->data(), DType::float32, device, {1, 1, 1, size});
      }
      backward(backward_config_for(tq, tk, tv, {}, options), tdout, tq, tk, tv, to, tlse, &tdlse,
               view(dq, device, q_shape), view(dk, device, k_shape), view(dv, device, v_shape), options,
               memory ? &view_of_memory : nullptr, options.sink != nullptr ? &sink_gradient : nullptr);
      if (device.type == DeviceType::cuda) test_driver().cuCtxSynchronize();  // before the arrays of the options go
      EXPECT_TRUE(!memory || memory->guard_is_intact()) << "workspace";
    };
    Gradients expected{q, k, v};
    std::vector<float> expected_dsink(static_cast<std::size_t>(heads));
    run({}, q.data(), k.data(), v.data(), out.data(), dout.data(), lse.data(), dlse.data(), expected[0].data(),
        expected[1].data(), expected[2].data(), expected_dsink.data());

    DeviceMemory const gq(q), gk(k), gv(v), go(out), gdout(dout), glse(lse), gdlse(dlse);
    auto const run_on_gpu = [&] {
      DeviceMemory const dq(q.size() * sizeof(Element)), dk(k.size() * sizeof(Element)), dv(v.size() * sizeof(Element)),
          dsink(expected_dsink.size() * sizeof(float));  // 0xff: NaN
      run({DeviceType::cuda, 0}, gq.data(), gk.data(), gv.data(), go.data(), gdout.data(), glse.data(), gdlse.data(),
          dq.data(), dk.data(), dv.data(), dsink.data());
      if (band) {
        auto const sums = dsink.download<float>();
        double largest = 0;
        for (float const x : expected_dsink) largest = std::fmax(largest, std::fabs(x));
        for (std::size_t h = 0; h < sums.size(); ++h) {
          EXPECT_NEAR(sums[h], expected_dsink[h], 1e-3 * (1 + largest)) << "dsink of head " << h;
        }
      }
      Gradients got{dq.download<Element>(), dk.download<Element>(), dv.download<Element>()};
      for (DeviceMemory const* memory : {&dq, &dk, &dv}) EXPECT_TRUE(memory->guard_is_intact());
      return got;
    };
    Gradients const got = run_on_gpu();
    for (std::size_t i = 0; i < 3; ++i) {
      SCOPED_TRACE(gradient_names[i]);
      // Of one key dS = P (dP - delta) is what fp32 leaves of a difference of equals, plus dLSE.
      bool const cancels = Element::dtype == DType::float32 && seqlen_k == 1;
      expect_close(got[i], expected[i], tolerance, cancels ? norm_of(expected[2]) : 0);
    }
    if (!deterministic) return;
    Gradients const again = run_on_gpu();
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(std::memcmp(got[i].data(), again[i].data(), got[i].size() * sizeof(Element)), 0) << gradient_names[i];
    }
  }
};

// P and dS are rounded to bfloat16 on the GPU and not on the CPU, and both round what they write: 2^-9 relative an
// element each, less in the mean.
TEST_P(GpuBackward, AgreesWithTheCpu) { expect_what_the_cpu_computes<BFloat16>(false, 4e-3); }

TEST_P(GpuBackward, DeterministicAgreesWithTheCpu) {
  ASSERT_NO_FATAL_FAILURE(set_up_compiler());
  if (!IsSkipped()) expect_what_the_cpu_computes<BFloat16>(true, 4e-3);
}

// Operands are taken apart up to 2^-21.
TEST_P(GpuBackward, Float32AgreesWithTheCpu) {
  ASSERT_NO_FATAL_FAILURE(set_up_compiler());
  if (!IsSkipped()) expect_what_the_cpu_computes<Float32>(false, 1e-5);
}

TEST_P(GpuBackward, DeterministicFloat32AgreesWithTheCpu) {
  ASSERT_NO_FATAL_FAILURE(set_up_compiler());
  if (!IsSkipped()) expect_what_the_cpu_computes<Float32>(true, 1e-5);
}

// Every family of images, partial tiles, grouped heads, rows that see no key, empty sides.
INSTANTIATE_TEST_SUITE_P(
    Shapes, GpuBackward,
    ::testing::Values(Shape{2, 203, 333, 4, 2, 64, 64, false}, Shape{2, 203, 203, 4, 1, 64, 64, true},
                      Shape{1, 1024, 1024, 2, 2, 64, 64, true}, Shape{1, 1024, 1024, 2, 2, 128, 128, true},
                      Shape{2, 113, 203, 3, 1, 128, 128, false}, Shape{1, 300, 129, 3, 1, 72, 72, true},
                      Shape{2, 113, 64, 2, 1, 40, 40, true}, Shape{1, 1, 1000, 2, 1, 128, 128, true},
                      Shape{1, 1000, 1, 2, 1, 64, 64, false}, Shape{1, 65, 200, 2, 1, 72, 40, false},
                      Shape{1, 65, 200, 2, 1, 40, 128, true}, Shape{1, 1, 1, 1, 1, 64, 64, true},
                      Shape{1, 64, 0, 2, 2, 64, 64, false}, Shape{1, 0, 64, 2, 2, 128, 128, false},
                      Shape{100, 70, 90, 4, 2, 64, 64, true}, Shape{1, 300, 333, 2, 1, 256, 256, true},
                      Shape{2, 65, 200, 2, 1, 136, 40, false}, Shape{3, 403, 333, 4, 2, 64, 64, true, true},
                      Shape{3, 512, 600, 2, 2, 128, 128, true, true}, Shape{2, 300, 333, 2, 1, 256, 256, false, true},
                      Shape{50, 70, 90, 2, 1, 128, 40, true, true}),
    name_of_shape);

// Guards against a device number that is not checked before the driver is asked for it.
TEST_F(Gpu, ADeviceThatDoesNotExistIsRefused) {
  void* const nowhere = reinterpret_cast<void*>(std::uintptr_t{0x10000000});
  TensorView const t = dense_view(nowhere, DType::bfloat16, {DeviceType::cuda, 4096}, {1, 64, 1, 64});
  EXPECT_THROW(forward(ForwardConfig{}, t, t, t, t, nullptr), DeviceError);
}

}  // namespace
}  // namespace flashcute
