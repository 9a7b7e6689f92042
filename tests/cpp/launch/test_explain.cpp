// What `explain` says of a call: which kernels run, and why those and no others. With the fakes of test_launch.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <set>
#include <sstream>
#include <string>

#include "fakes/fake_gpu.hpp"
#include "flashcute/api.hpp"
#include "flashcute/core/defaults.hpp"
#include "support/printing.hpp"

namespace flashcute {
namespace {

using namespace testing;

class ExplainCall : public FakeGpuAndCompiler {};

/// The lines of an explanation that hold `word`.
std::string lines_with(std::string const& word, Explanation const& e) {
  std::istringstream text(to_string(e));
  std::string found;
  for (std::string line; std::getline(text, line);) {
    if (line.find(word) != std::string::npos) found += line + "\n";
  }
  return found;
}

// Guards against an explanation that tells what runs on an H100 and not why, or tells it of another GPU's kernel.
TEST_F(ExplainCall, SaysWhyHoppersKernelWasChosen) {
  TensorView const t = tensor({2, 4096, 16, 88}, hopper);
  Explanation const e = explain(std::nullopt, t, t, t);
  EXPECT_EQ(e.reasons.size(), 3u);
  EXPECT_EQ(lines_with("why", e), "  why     The tensors are on cuda:2, a GPU of compute capability 9.0.\n");
  EXPECT_NE(lines_with("Hopper's kernel (copies by TMA", e), "");
  EXPECT_NE(lines_with("Tiles of 128 query rows and blocks of 128 keys are the default for head dimensions up to 96. "
                       "A head dimension of 88 is padded with zeros and computed as one of 96.",
                       e),
            "");

  ForwardConfig const asked = *e.config;
  EXPECT_NE(lines_with("cfg asks for this configuration.", explain(asked, t, t, t)), "");
  EXPECT_EQ(lines_with("Tiles of", explain(asked, t, t, t)), "");
}

// Guards against reasons of one kernel told of another: float32, tensors that the copy engine cannot read, small grids.
TEST_F(ExplainCall, SaysWhyTheMmaSyncKernelWasChosen) {
  TensorView f32 = tensor({2, 4096, 16, 64}, hopper);
  f32.dtype = ElementType::float32;
  Explanation const exact = explain(std::nullopt, f32, f32, f32);
  EXPECT_NE(
      lines_with("Hopper's kernel takes float16 and bfloat16 only. It multiplies float32 on tensor cores by three",
                 exact),
      "");
  CallOptions fast;
  fast.allow_tf32 = true;
  EXPECT_NE(lines_with("FLASHCUTE_JIT=fastest", explain(std::nullopt, f32, f32, f32, fast)), "");
  {
    ScopedVariable const fastest("FLASHCUTE_JIT", "fastest");
    EXPECT_NE(lines_with("allow_tf32 lets it round", explain(std::nullopt, f32, f32, f32, fast)), "");
  }

  TensorView shifted = tensor({2, 4096, 16, 64}, hopper);
  shifted.data = static_cast<char*>(shifted.data) + 8;
  Explanation const misaligned = explain(std::nullopt, shifted, shifted, shifted);
  EXPECT_NE(lines_with("It copies 8 bytes at a time", misaligned), "");
  EXPECT_NE(lines_with("sm90, copy_bytes=16: q's address is 8 bytes past a multiple of 16", misaligned), "")
      << to_string(misaligned);

  TensorView const large = tensor({2, 4096, 16, 64}), small = tensor({1, 64, 1, 64});
  EXPECT_EQ(lines_with("without work", explain(std::nullopt, large, large, large)), "");
  EXPECT_NE(lines_with("where tiles of 128 rows would leave multiprocessors without work",
                       explain(std::nullopt, small, small, small)),
            "");
}

// Guards against dozens of lines, one for each configuration that was not taken: they are grouped by their reason, and
// the data still has all of them.
TEST_F(ExplainCall, GroupsWhatWasNotTakenByReason) {
  TensorView const t = tensor({2, 4096, 16, 64}, hopper);
  Explanation const e = explain(std::nullopt, t, t, t);
  EXPECT_EQ(e.rejected.size(), 1 + configs().size() - 1) << "the CPU, and all configurations but the one that runs";
  std::set<std::string> reasons;
  for (auto const& [what, reason] : e.rejected) reasons.insert(reason);
  EXPECT_LE(reasons.size(), 6u);
  std::string const text = to_string(e);
  for (std::string const& reason : reasons) EXPECT_NE(text.find(": " + reason), std::string::npos) << reason;
  EXPECT_NE(lines_with("9 ahead-of-time configurations: dtype float16 does not fit the tensors' bfloat16", e), "")
      << text;
  EXPECT_LT(std::ranges::count(text, '\n'), 14) << text;
}

// ---- what explain says of gradients ------------------------------------------------------------------

/// Of a call with one shape for all tensors.
BackwardExplanation gradients_of(TensorView const& t, CallOptions options = {}) {
  options.gradients_follow = true;
  return explain(std::nullopt, t, t, t, options).gradients.value();
}

bool is_rejected(BackwardExplanation const& e, std::string const& what, char const* why) {
  return std::ranges::any_of(e.rejected,
                             [&](auto const& pair) { return pair.first == what && contains(pair.second, why); });
}

// Guards against an explanation of other gradients than those that are computed.
TEST_F(ExplainCall, TellsOfTheGradientsThatRun) {
  TensorView const t = tensor({2, 1000, 4, 64}, hopper);
  EXPECT_EQ(explain(std::nullopt, t, t, t).gradients, std::nullopt) << "nobody asked";
  CallOptions options;
  options.causal = true;
  for (bool const deterministic : {false, true}) {
    options.deterministic = deterministic;
    BackwardExplanation const e = gradients_of(t, options);
    BackwardConfig const config = backward_config_for(t, t, t, {}, options);
    EXPECT_EQ(e.backend, "sm90");
    EXPECT_EQ(e.config, config);
    EXPECT_EQ(e.same_bits, deterministic);
    EXPECT_EQ(e.workspace_bytes, 4 * backward_workspace_size({}, t, t, options));
    ASSERT_EQ(e.kernels.size(), 3u);
    std::size_t next = 0;
    for (BackwardPass const pass : passes_of(config)) {
      auto const& [kernel, image] = e.kernels[next++];
      EXPECT_EQ(kernel, name(kernel_of(config, pass, {MaskKind::causal})).text);
      EXPECT_TRUE(contains(image, "ahead of time")) << image;
    }
    EXPECT_EQ(e.notes.size(), 0u);
    EXPECT_TRUE(contains(e.reasons[1], deterministic ? "in a fixed order" : "last bits differ from run to run"));
    EXPECT_EQ(is_rejected(e, "deterministic=False", "faster"), deterministic);
  }
  options.window_left = 8;  // under which bits that are the same in every run are those of the mma.sync kernels
  BackwardExplanation const two_passes = gradients_of(t, options);
  EXPECT_EQ(two_passes.backend, "sm80");
  EXPECT_TRUE(is_rejected(two_passes, "sm90", "of full and causal masks only"));
  EXPECT_TRUE(contains(two_passes.kernels.at(0).second, "run-time compilation, once"));
  EXPECT_TRUE(contains(two_passes.notes.at(0), "2 of 2 kernels")) << "a first call that waits for a compiler";
  EXPECT_EQ(driver_->loads, 0);
}

// Guards against an alternative without its reason, and against reasons of the forward.
TEST_F(ExplainCall, SaysWhyTheGradientsOfThisConfiguration) {
  TensorView const t = tensor({2, 1000, 4, 60});
  BackwardExplanation const e = gradients_of(t);
  EXPECT_TRUE(is_rejected(e, "cpu", "the tensors are on cuda:0"));
  EXPECT_TRUE(is_rejected(e, "copy_bytes=16", "head_dim 60 is not a multiple of 8 elements"));
  for (BackwardConfig const& other : backward_configs())
    EXPECT_TRUE(is_rejected(e, name(other).text, "")) << name(other).text;
  ASSERT_EQ(e.reasons.size(), 3u);
  EXPECT_TRUE(contains(e.reasons[1], "last bits differ from run to run"));
  EXPECT_TRUE(contains(e.reasons[2], "A head dimension of 60 is padded"));
  EXPECT_TRUE(contains(e.reasons[2], "copies 8 bytes at a time"));
  EXPECT_FALSE(contains(e.reasons[2], "shared memory"));
  driver_->arch = 89;
  TensorView const wide = tensor({2, 1000, 4, 256}, 1);
  EXPECT_TRUE(contains(gradients_of(wide).reasons.at(2), "no more than 101376 bytes of shared memory"));
  CallOptions options;
  options.gradients_follow = true;
  std::string const text = to_string(explain(std::nullopt, t, t, t, options));
  EXPECT_TRUE(contains(text, "\ngradients by backend sm80\n  why     The tensors are on cuda:0")) << text;
  EXPECT_TRUE(contains(text, "  memory  a workspace of "));
  EXPECT_TRUE(contains(text, "  kernels " + e.kernels[0].first + "\n          " + e.kernels[1].first)) << text;
  EXPECT_TRUE(contains(text, "\n  image   " + e.kernels[0].second + "\n")) << "all have this one";
  BackwardExplanation two_origins = e;
  two_origins.kernels[1].second = "disk cache";
  EXPECT_TRUE(contains(to_string(two_origins), "\n  image   disk cache: " + e.kernels[1].first + "\n"));
  EXPECT_TRUE(contains(text, "  bits    those of dq differ from run to run"));
}

// Guards against gradients that are promised where a call for them raises: no kernel, a launch too large, no image.
TEST_F(ExplainCall, SaysWhatKeepsGradientsFromBeingComputed) {
  driver_->arch = 89;
  TensorView f32 = tensor({1, 64, 1, 136});
  f32.dtype = ElementType::float32;
  BackwardExplanation const none = gradients_of(f32);
  EXPECT_EQ(none.backend, "");
  EXPECT_EQ(none.config, std::nullopt);
  EXPECT_TRUE(is_rejected(none, "sm80", "need more shared memory than this GPU has"));
  EXPECT_TRUE(contains(to_string(none), "no kernel computes gradients of this call"));
  TensorView const q = tensor({1 << 17, 1, 1 << 14, 8}), k = tensor({1 << 17, 0, 1 << 14, 8});
  CallOptions options;
  options.gradients_follow = true;
  Explanation const large = explain(std::nullopt, q, k, k, options);
  EXPECT_TRUE(is_rejected(large.gradients.value(), "sm80", "Split the batch"));
  ScopedVariable const off("FLASHCUTE_JIT", "off");
  options.deterministic = true;
  TensorView const t = tensor({1, 64, 1, 64});
  EXPECT_TRUE(contains(gradients_of(t, options).kernels.at(0).second, "none: it is not among the kernels"));
  TensorView const wrong = tensor({1, 63, 1, 64});
  EXPECT_EQ(explain(std::nullopt, t, t, wrong, options).gradients, std::nullopt);
}

// Guards against a choice that forgets where the output goes, which `forward` looks at.
TEST_F(ExplainCall, LooksAtTheOutput) {
  TensorView const t = tensor({2, 64, 2, 64});
  TensorView out = output({2, 64, 2, 64});
  out.data = static_cast<char*>(out.data) + 8;
  Explanation const e = explain(std::nullopt, t, t, t, {}, &out);
  EXPECT_EQ(e.config, config_for(t, t, t, &out));
  EXPECT_EQ(e.config.value().copy_bytes, 8);
  out.shape[1] = 63;
  EXPECT_EQ(explain(std::nullopt, t, t, t, {}, &out).backend, "");
}

}  // namespace
}  // namespace flashcute
