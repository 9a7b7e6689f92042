// The configuration as a value: names, rules, defaults, and the translation unit made from it.
#include <gtest/gtest.h>

#include <set>

#include "families.hpp"
#include "flashcute/api.hpp"
#include "source.hpp"

namespace flashcute {
namespace {

std::vector<ForwardConfig> sample() {
  std::vector<ForwardConfig> all;
  for (DType dtype : {DType::float16, DType::bfloat16, DType::float32, DType::float64})
    for (int32_t head_dim : {40, 64, 128})
      for (int32_t block_m : {16, 64, 128})
        for (int32_t block_n : {16, 64, 128})
          for (int32_t num_warps : {1, 4, 8})
            for (bool swizzled : {false, true})
              for (bool q_in_registers : {false, true})
                all.push_back({dtype, head_dim, block_m, block_n, num_warps, swizzled, q_in_registers});
  return all;
}

// Guards against two kernels under one name: the store and the cache would mix them up.
TEST(Config, NamesAreUniqueAndAreIdentifiers) {
  std::set<std::string> names;
  size_t kernels = 0;
  for (auto const& config : sample()) {
    for (MaskKind mask : family_masks) {
      std::string const text = name(ForwardKernelId{config, {mask}}).text;
      EXPECT_EQ(text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_"), std::string::npos) << text;
      names.insert(text);
      ++kernels;
    }
  }
  EXPECT_EQ(names.size(), kernels);
}

// Guards against an option that is left out of for_each_option, and so out of names, hashes and repr.
TEST(Config, EveryByteOfTheConfigurationIsAnOption) {
  size_t bytes = 0;
  ForwardConfig const config;
  for_each_option(config, [&](char const*, auto const& option) { bytes += sizeof option; });
  // uint8 + four int32 + two bool = 19, in 24 with padding: a new member would not fit unnoticed.
  EXPECT_EQ(bytes, 19u);
  EXPECT_LE(sizeof(ForwardConfig) - bytes, 5u);
}

// Guards against a rule that cannot fire, or fires with another rule's sentence.
TEST(Config, EachRuleFires) {
  ForwardConfig const good;
  EXPECT_EQ(check(good, 80), ForwardConfigError::none);
  auto const broken = [&](auto change, Arch arch = 80) {
    ForwardConfig c;
    change(c);
    return check(c, arch);
  };
  using enum ForwardConfigError;
  EXPECT_EQ(check(good, 75), arch_too_old);
  EXPECT_EQ(broken([](auto& c) { c.dtype = DType::float32; }), gpu_dtype);
  EXPECT_EQ(broken([](auto& c) { c.head_dim = 96; }), gpu_head_dim);
  EXPECT_EQ(broken([](auto& c) { c.head_dim = 257; }, cpu_arch), cpu_head_dim);
  EXPECT_EQ(broken([](auto& c) { c.head_dim = 0; }, cpu_arch), cpu_head_dim);
  EXPECT_EQ(broken([](auto& c) { c.num_warps = 3; }), num_warps);
  EXPECT_EQ(broken([](auto& c) { c.block_m = 96; }), block_m);
  EXPECT_EQ(broken([](auto& c) { c.block_m = 0; }), block_m);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 24; }), block_n);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 512; }), block_n);
  EXPECT_EQ(broken([](auto& c) { c.block_m = 256, c.block_n = 256; }), smem);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 128; }, 89), none);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 144; }, 89), smem);
  EXPECT_EQ(broken([](auto& c) { c.dtype = DType::float64, c.head_dim = 37; }, cpu_arch), none);
}

// Guards against an exception that says something else than the static_assert of the kernel.
TEST(Config, TheExceptionCarriesTheRulesSentenceAndTheValues) {
  ForwardConfig c;
  c.block_m = 100;
  try {
    check_config(c, 80);
    FAIL() << "no exception";
  } catch (ConfigError const& e) {
    EXPECT_NE(std::string(e.what()).find(sentence(ForwardConfigError::block_m)), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("block_m=100"), std::string::npos) << e.what();
  }
}

// Guards against a default that its own device refuses.
TEST(Config, DefaultsAreValidEverywhere) {
  for (Arch arch : {80, 86, 87, 89, 90, 100, 120}) {
    for (DType dtype : family_dtypes) {
      for (int32_t d = 1; d <= 128; ++d) {
        ForwardConfig const c = default_forward_config(dtype, d, arch);
        EXPECT_EQ(check(c, arch), ForwardConfigError::none) << name(c).text << " on " << arch;
        EXPECT_GE(c.head_dim, d);
      }
    }
  }
  for (int32_t d = 1; d <= 256; ++d) {
    EXPECT_EQ(check(default_forward_config(DType::float64, d, cpu_arch), cpu_arch), ForwardConfigError::none);
  }
}

// Guards against a default that always has to be compiled at run time.
TEST(Config, DefaultsAreCompiledAheadOfTime) {
  auto const built = configs();
  for (DType dtype : family_dtypes) {
    for (int32_t d : {8, 64, 72, 128}) {
      EXPECT_NE(std::find(built.begin(), built.end(), default_forward_config(dtype, d, 90)), built.end());
    }
  }
}

// Guards against a generated unit that compiles another kernel than its name says.
TEST(Config, TheGeneratedUnitSpellsEveryOption) {
  auto const kernels = kernels_of(forward_families[0]);
  std::string const text = generated_source(kernels);
  for (auto const& kernel : kernels) {
    EXPECT_NE(text.find(std::string("FLASHCUTE_FORWARD_ENTRY(") + name(kernel).text + ","), std::string::npos);
  }
  for_each_option(kernels[0].config, [&](char const* option, auto) {
    EXPECT_NE(text.find(std::string(".") + option + " = "), std::string::npos) << option;
  });
}

}  // namespace
}  // namespace flashcute
