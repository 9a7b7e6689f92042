// Which configuration a call gets that brings none, in builds with some images and machines with and without a
// compiler.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <string_view>

#include "fakes/fake_gpu.hpp"
#include "fakes/fake_images.hpp"
#include "flashcute/core/defaults.hpp"
#include "image/families.hpp"
#include "image/image_store.hpp"
#include "image/source.hpp"
#include "plan/choose.hpp"

namespace flashcute {
namespace {

using namespace testing;

/// The reason why something was not taken; "" if there is none.
std::string reason(Explanation const& e, std::string const& what) {
  for (auto const& [rejected, why] : e.rejected) {
    if (rejected == what) return why;
  }
  return "";
}

class Choice : public FakeGpuAndCompiler {
 protected:
  void SetUp() override {
    FakeGpuAndCompiler::SetUp();
    fake_images() = {"80 80-ptx", "_sm90_"};  // as FLASHCUTE_ARCHS="80;80-ptx" builds them
  }

  ForwardConfig chosen() const { return config_for(q_, q_, q_, nullptr); }
  void run(ForwardConfig const& config) { forward(config, q_, q_, q_, out_, nullptr); }

  /// What mma.sync's kernel takes for q_.
  static ForwardConfig mma_sync() {
    return default_forward_config({.dtype = DType::bfloat16, .head_dim = 128, .head_dim_v = 128, .allow_sm90 = false},
                                  90);
  }

  TensorView q_ = tensor({4, 4096, 16, 128}, hopper), out_ = output({4, 4096, 16, 128}, hopper);
};

// Guards against a call that fails for want of an image of Hopper's kernel, where mma.sync's has one that runs.
TEST_F(Choice, WithoutACompilerHopperGpusTakeTheKernelThatHasAnImage) {
  for (auto const& [variable, value] :
       {std::pair{"FLASHCUTE_JIT", "off"}, std::pair{"FLASHCUTE_NVRTC", "/missing/libnvrtc.so"},
        std::pair{"FLASHCUTE_CUDA_INCLUDE", "/missing"}}) {
    // What was found stays for the process: the compiler is looked for last.
    ScopedVariable const broken(variable, value);
    EXPECT_EQ(chosen(), mma_sync()) << variable;
    Explanation const e = explain(std::nullopt, q_, q_, q_);
    EXPECT_EQ(e.backend, "sm80");
    EXPECT_EQ(e.image, "ahead of time, as PTX, which the driver compiles (once)");
    EXPECT_TRUE(contains(reason(e, "sm90"), "no image of its kernel")) << variable;
    EXPECT_TRUE(contains(reason(e, "sm90"), variable));
    EXPECT_EQ(reason(e, name(default_config(DType::bfloat16, 128, 90)).text), "") << "one reason is enough";
    ASSERT_EQ(e.notes.size(), 1u);
    EXPECT_TRUE(contains(e.notes[0], "times as fast"));
    run(chosen());
    EXPECT_TRUE(contains(driver_->launches.back().kernel, "flashcute_sm80_fwd_bf16_d128"));
  }
}

// Guards against a choice that is remembered: the environment may change from call to call, and what was compiled once
// is loaded. PTX of a slower kernel is not at hand: the driver would compile it.
TEST_F(Choice, FollowsTheEnvironmentFromCallToCall) {
  ForwardConfig const hoppers = default_config(DType::bfloat16, 128, 90);
  ASSERT_EQ(hoppers.kernel, Kernel::sm90);
  EXPECT_EQ(chosen(), hoppers) << "it can be compiled";
  EXPECT_TRUE(
      contains(explain(std::nullopt, q_, q_, q_).image, "run-time compilation, once (the build has no image of it"));
  run(chosen());
  EXPECT_TRUE(contains(driver_->launches.back().kernel, "flashcute_sm90_fwd_bf16_d128"));
  {
    ScopedVariable const off("FLASHCUTE_JIT", "off");
    EXPECT_EQ(chosen(), mma_sync());
    EXPECT_TRUE(contains(explain(std::nullopt, q_, q_, q_).image, "ahead of time, as PTX"));
  }
  {
    ScopedVariable const force("FLASHCUTE_JIT", "force");
    EXPECT_EQ(chosen(), hoppers);
  }
  ScopedVariable const wrong("FLASHCUTE_JIT", "of");
  EXPECT_THROW(chosen(), ArgumentError);
}

// Guards against a first call that waits for a compiler although a slower image is at hand, and against one that stays
// slow after the user has had the faster kernel compiled.
TEST_F(Choice, DoesNotWaitForACompilerWhereASlowerImageIsAtHand) {
  fake_images() = {"80 90", "_sm90_"};  // mma.sync's machine code for 9.0 is there, Hopper's kernel is not
  ForwardConfig const hoppers = default_config(DType::bfloat16, 128, 90);
  EXPECT_EQ(chosen(), mma_sync());
  Explanation const e = explain(std::nullopt, q_, q_, q_);
  EXPECT_EQ(e.image, "ahead of time");
  EXPECT_TRUE(contains(reason(e, "sm90"), "not compiled yet"));
  ASSERT_EQ(e.notes.size(), 1u);
  EXPECT_TRUE(contains(e.notes[0], "times as fast"));
  EXPECT_TRUE(contains(e.notes[0], "flashcute.prebuild"));
  EXPECT_TRUE(contains(e.notes[0], "FLASHCUTE_JIT=fastest"));
  {
    ScopedVariable const fastest("FLASHCUTE_JIT", "fastest");
    EXPECT_EQ(chosen(), hoppers);
  }
  EXPECT_EQ(chosen(), mma_sync());
  prebuild(hoppers, 90);
  EXPECT_EQ(chosen(), hoppers);
  EXPECT_EQ(explain(std::nullopt, q_, q_, q_).image, "disk cache");
  EXPECT_TRUE(explain(std::nullopt, q_, q_, q_).notes.empty());
  ScopedVariable const elsewhere("FLASHCUTE_CACHE_DIR", "/nowhere");
  EXPECT_EQ(chosen(), mma_sync()) << "another folder holds other images";
}

// Guards against kernels that are compiled although nobody asked for them, or not although somebody did.
TEST_F(Choice, PrebuildMakesTheKernelsOfTheFeaturesThatItIsGiven) {
  BackwardConfig const config = default_backward_config(DType::bfloat16, 128, 100, {}, true);
  auto const names = [](auto const& done) {
    std::vector<std::string> all;
    for (auto const& [kernel, origin] : done) {
      EXPECT_EQ(origin.substr(0, 8), "compiled") << kernel;
      all.push_back(kernel.substr(kernel.rfind("deterministic") + 14));
    }
    return all;
  };
  Features const causal{.mask = MaskKind::causal};
  EXPECT_EQ(names(prebuild(config, 90, {&causal, 1})), (std::vector<std::string>{"queries_causal", "keys_causal"}));
  EXPECT_FALSE(is_cached(code_of(kernel_of(config, BackwardPass::keys, {}), 90), 90));
  EXPECT_TRUE(is_cached(code_of(kernel_of(config, BackwardPass::keys, causal), 90), 90));
  ForwardConfig const forward = mma_sync();
  Features const counting{.mask = MaskKind::causal, .count_blocks = true};
  auto const counted = prebuild(forward, 90, {&counting, 1});
  ASSERT_EQ(counted.size(), 1u);
  EXPECT_EQ(counted[0].first, name(kernel_of(forward, counting)).text);
  EXPECT_EQ(prebuild(forward, 90).size(), 2u);
  EXPECT_EQ(prebuild(config, 90).size(), 4u);
}

// Guards against bits that change in the middle of a run, because another process has compiled something.
TEST_F(Choice, AProcessKeepsItsChoice) {
  fake_images() = {"80 90", "_sm90_"};
  ForwardConfig const hoppers = default_config(DType::bfloat16, 128, 90);
  EXPECT_EQ(chosen(), mma_sync());
  // As another process does it: behind the back of the store.
  for (auto const& kernel : kernels_of(hoppers, full_and_causal)) jit_image(code_of(kernel, 90), 90);
  EXPECT_TRUE(is_cached(code_of(kernel_of(hoppers, {}), 90), 90));
  EXPECT_EQ(chosen(), mma_sync());
}

// Guards against a configuration that is replaced although the user chose it.
TEST_F(Choice, AGivenConfigurationIsNotReplaced) {
  ScopedVariable const off("FLASHCUTE_JIT", "off");
  ForwardConfig const hoppers = default_config(DType::bfloat16, 128, 90);
  std::string const message = message_of<UnsupportedError>([&] { run(hoppers); });
  EXPECT_TRUE(contains(message, name(kernel_of(hoppers, {})).text));
  EXPECT_TRUE(contains(message, "FLASHCUTE_JIT=off"));
  Explanation const e = explain(hoppers, q_, q_, q_);
  EXPECT_EQ(e.config, hoppers);
  EXPECT_TRUE(contains(e.image, "none: the build has no image of it for this GPU, and FLASHCUTE_JIT=off"));
  EXPECT_TRUE(driver_->launches.empty());
}

// Guards against a check that mistakes what is in the library: an image that is there needs no compiler.
TEST_F(Choice, HoppersImageNeedsNoCompiler) {
  ScopedVariable const off("FLASHCUTE_JIT", "off");
  fake_images() = {};
  EXPECT_EQ(chosen(), default_config(DType::bfloat16, 128, 90));
  run(chosen());
  EXPECT_TRUE(contains(driver_->launches.back().kernel, "flashcute_sm90_fwd_bf16_d128"));
  EXPECT_FALSE(driver_->last_load_copied) << "the image lives as long as the library: a copy would be a second one";
  EXPECT_TRUE(explain(std::nullopt, q_, q_, q_).notes.empty());
  fake_images().targets = "100";  // runs on no GPU of compute capability 9.0
  EXPECT_EQ(image_source(kernel_of(mma_sync(), {}), 90), ImageSource::none);
  EXPECT_EQ(image_source(kernel_of(mma_sync(), {}), 100), ImageSource::library);
}

// The same of what else a default configuration may do without. allow_tf32 allows one product of TF32 and does not
// demand it; a tile for small grids gives the same bits as the usual one.
TEST_F(Choice, OtherWishesAreGivenUpToo) {
  TensorView f32 = tensor({4, 4096, 16, 64});
  f32.dtype = ElementType::float32;
  TensorView const few = tensor({1, 64, 1, 128});
  CallOptions tf32;
  tf32.allow_tf32 = true;
  auto const math = [&] { return config_for(f32, f32, f32, nullptr, tf32).math; };
  auto const rows = [&] { return config_for(few, few, few, nullptr).block_m; };
  {
    ScopedVariable const fastest("FLASHCUTE_JIT", "fastest");
    EXPECT_EQ(math(), Math::tensor_core);
  }
  EXPECT_EQ(rows(), 32);
  ScopedVariable const off("FLASHCUTE_JIT", "off");
  EXPECT_EQ(math(), Math::tf32x3);
  Explanation const e = explain(std::nullopt, f32, f32, f32, tf32);
  EXPECT_TRUE(contains(reason(e, "fwd_f32_d64_m128_n32_w4"),
                       "no image of its kernel: it is not among the kernels that are compiled"));
  EXPECT_TRUE(contains(e.notes.at(0), "allow_tf32"));
  EXPECT_EQ(rows(), 32) << "it has an image";
  fake_images().without = "_small";
  EXPECT_EQ(rows(), 128);
  EXPECT_TRUE(contains(explain(std::nullopt, few, few, few).rejected.at(1).second, "no image of its kernel"));
}

// Guards against a first call that waits for the tile of a width, or leaves Hopper's kernel, where a wider tile's image
// is at hand.
TEST_F(Choice, AWiderTileIsTakenWhereTheExactOneHasNoImage) {
  fake_images() = {};
  auto const of = [](int64_t d, int64_t d_v, ElementType dtype = ElementType::bfloat16, CallOptions options = {}) {
    TensorView q = tensor({2, 2048, 8, d}, hopper), v = tensor({2, 2048, 8, d_v}, hopper);
    q.dtype = v.dtype = dtype;
    return std::pair(config_for(q, q, v, nullptr, options), explain(std::nullopt, q, q, v, options));
  };
  for (auto const& [d, d_v] : {std::pair{96, 96}, {160, 160}, {192, 192}, {192, 128}}) {
    auto const [config, e] = of(d, d_v);
    EXPECT_EQ(config, default_forward_config({DType::bfloat16, d, d_v}, 90));
    EXPECT_EQ(e.image, "ahead of time");
    EXPECT_TRUE(e.notes.empty());
  }
  CallOptions window;
  window.window_left = window.window_right = 100;
  for (auto const& [dtype, options] :
       {std::pair{ElementType::float16, CallOptions{}}, {ElementType::bfloat16, window}}) {
    auto const [config, e] = of(80, 80, dtype, options);
    EXPECT_EQ(config.kernel, Kernel::sm90);
    EXPECT_EQ(config.head_dim, 128);
    EXPECT_EQ(e.image, "ahead of time");
    ASSERT_EQ(e.notes.size(), 1u);
    EXPECT_TRUE(contains(e.notes[0], "a tile of these head dimensions would be faster: ForwardConfig(dtype='"));
    EXPECT_TRUE(contains(e.notes[0], "head_dim=96"));
    EXPECT_TRUE(contains(e.notes[0], "flashcute.prebuild"));
    ScopedVariable const fastest("FLASHCUTE_JIT", "fastest");
    EXPECT_EQ(of(80, 80, dtype, options).first.head_dim, 96);
  }
  fake_images().without = "_sm90_";
  ScopedVariable const off("FLASHCUTE_JIT", "off");
  auto const [config, e] = of(96, 96);
  EXPECT_EQ(config.kernel, Kernel::sm80);
  EXPECT_EQ(e.notes.size(), 1u) << "one note about Hopper's kernel, not one for each of its tiles";
}

// Guards against gradients of causal calls by the tile that is the fastest without a mask, and the reverse; and against
// a default that is not the one which calls take.
TEST_F(Choice, GradientsOfTheCausalMaskHaveADefaultOfTheirOwn) {
  fake_images() = {};
  TensorView const t = tensor({2, 64, 2, 128}, hopper);
  CallOptions causal, window;
  causal.causal = true;
  window.causal = true;
  window.window_left = 8;
  BackwardConfig const whole = default_backward_config(DType::bfloat16, 128, 90);
  BackwardConfig const cut = default_backward_config(DType::bfloat16, 128, 90, {}, false, true);
  EXPECT_NE(whole, cut);
  EXPECT_EQ(backward_config_for(t, t, t), whole);
  EXPECT_EQ(backward_config_for(t, t, t, {}, causal), cut);
  EXPECT_EQ(backward_config_for(t, t, t, {}, window), whole);
  // Without its image the other one is the next best, not the mma.sync kernels.
  fake_images().without = "bwd_sm90_d128_causal";
  ScopedVariable const off("FLASHCUTE_JIT", "off");
  EXPECT_EQ(backward_config_for(t, t, t, {}, causal), whole);
}

// Guards against gradients that fail, or wait, for the image of one more kernel, that of a sink's gradient.
TEST_F(Choice, ASinkNeedsAnImageOfItsOwn) {
  fake_images() = {"80 90", "_sm90_"};
  TensorView const t = tensor({2, 64, 2, 64}, hopper);
  BackwardConfig const hoppers = default_backward_config(DType::bfloat16, 64, 90);
  ASSERT_EQ(hoppers.kernel, Kernel::sm90);
  Features const band{.mask = MaskKind::band};
  for (BackwardPass const pass : passes_of(hoppers)) jit_image(code_of(kernel_of(hoppers, pass, band), 90), 90);
  CallOptions window, with_sink;
  window.window_left = 8;
  TensorView sink = tensor({1, 1, 1, 2}, hopper);
  sink.rank = 1;
  sink.shape = {2};
  sink.strides = {1};
  with_sink.sink = &sink;
  with_sink.gradients_follow = true;
  auto const kernel_of_call = [&](CallOptions const& options) {
    return backward_config_for(t, t, t, {}, options).kernel;
  };
  EXPECT_EQ(kernel_of_call(window), Kernel::sm90);
  EXPECT_EQ(kernel_of_call(with_sink), Kernel::sm80);
  BackwardExplanation const e = explain(std::nullopt, t, t, t, with_sink).gradients.value();
  EXPECT_TRUE(std::ranges::any_of(e.rejected, [](auto const& pair) {
    return pair.first == "sm90" && contains(pair.second, "would wait for its compilation");
  }));
  prebuild(hoppers, 90, {&band, 1});
  EXPECT_EQ(kernel_of_call(with_sink), Kernel::sm90);
}

// Guards against another configuration, and its error, where none has an image.
TEST_F(Choice, WhereNothingCanRunTheDefaultSaysWhatIsMissing) {
  ScopedVariable const off("FLASHCUTE_JIT", "off");
  ForwardConfig const hoppers = default_config(DType::bfloat16, 128, 90);
  fake_images().targets = "";
  EXPECT_EQ(chosen(), hoppers);
  EXPECT_EQ(explain(std::nullopt, q_, q_, q_).image, "none: flashcute was built without images, and FLASHCUTE_JIT=off");
  fake_images().targets = "80 80-ptx";
  EXPECT_EQ(config_for(q_, q_, q_, nullptr, {}, true), hoppers) << "no kernel that counts blocks has an image";
  TensorView odd = q_;
  odd.shape[3] = 124;
  EXPECT_EQ(config_for(odd, odd, odd, nullptr).copy_bytes, 8) << "nor one of narrow copies";
  EXPECT_TRUE(contains(message_of<UnsupportedError>([&] { run(chosen()), run(hoppers); }), "FLASHCUTE_JIT=off"));
}

// What cannot be compiled, and why; what is found missing is looked for again.
TEST_F(Choice, ACompilerNeedsHeadersAndMustKnowTheGpu) {
  EXPECT_TRUE(can_compile(90));
  EXPECT_EQ(compile_problem(90), "");
  EXPECT_FALSE(can_compile(89));  // fake_nvrtc.cpp
  EXPECT_TRUE(contains(compile_problem(89), "sm_89"));
  {
    ScopedVariable const missing("FLASHCUTE_CUDA_INCLUDE", "/missing");
    EXPECT_FALSE(can_compile(90));
    EXPECT_TRUE(contains(compile_problem(90), "FLASHCUTE_CUDA_INCLUDE"));
  }
  EXPECT_TRUE(can_compile(90));
  set_include_folders({});
  EXPECT_FALSE(can_compile(90));
  EXPECT_TRUE(contains(compile_problem(90), "set_search_paths"));
}

}  // namespace
}  // namespace flashcute
