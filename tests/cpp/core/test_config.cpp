// The configuration as a value: names, rules, defaults, and the translation unit made from it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <string_view>
#include <utility>

#include "flashcute/api.hpp"
#include "image/families.hpp"
#include "image/source.hpp"
#include "support/printing.hpp"

namespace flashcute {
namespace {

/// Every value of an option or feature that is no number.
template <class T>
std::vector<T> all_values() {
  std::vector<T> all;
  if constexpr (std::is_same_v<T, bool>) {
    all = {false, true};
  } else {
    for (auto const& row : EnumTable<T>::rows) all.push_back(row.value);
  }
  return all;
}

/// The value with the longest word in the name of a kernel.
template <TabulatedEnum Enum>
Enum longest_word() {
  auto const values = all_values<Enum>();
  return *std::max_element(values.begin(), values.end(), [](Enum a, Enum b) {
    return std::string_view(word_of(a)).size() < std::string_view(word_of(b)).size();
  });
}

/// Every combination of features.
std::vector<Features> all_features() {
  std::vector<Features> all{{}};
  Features const defaults;
  for_each_feature(defaults, [&](Feature const& feature, auto value) {
    for (Features changed : std::exchange(all, {})) {
      for (auto const other : all_values<decltype(value)>()) {
        for_each_feature(changed, [&](Feature const& row, auto& field) {
          if constexpr (std::is_same_v<decltype(value), std::remove_reference_t<decltype(field)>>) {
            if (std::string_view(row.name) == feature.name) field = other;
          }
        });
        all.push_back(changed);
      }
    }
  });
  return all;
}

/// The defaults, and every configuration that differs from them in one option or two.
std::vector<ForwardConfig> sample() {
  auto const values = []<class T>(T) -> std::vector<T> {
    if constexpr (std::is_same_v<T, DType>) {
      return {DType::float16, DType::bfloat16, DType::float32, DType::float64};
    } else if constexpr (TabulatedEnum<T>) {
      return all_values<T>();
    } else if constexpr (std::is_same_v<T, bool>) {
      return {false, true};
    } else {
      return {1, 2, 12, 16, 112, 128};
    }
  };
  std::vector<ForwardConfig> all{ForwardConfig{}};
  for (int changes = 0; changes < 2; ++changes) {
    for (ForwardConfig const config : std::vector(all)) {
      for_each_option(config, [&](Option const& option, auto value) {
        for (auto const changed : values(value)) {
          ForwardConfig other = config;
          for_each_option(other, [&](Option const& row, auto& member) {
            if constexpr (std::is_same_v<decltype(changed), std::remove_reference_t<decltype(member)> const>) {
              if (std::string_view(row.name) == option.name) member = changed;
            }
          });
          if (std::find(all.begin(), all.end(), other) == all.end()) all.push_back(other);
        }
      });
    }
  }
  return all;
}

// Guards against messages of failed tests that list the bytes of a configuration.
TEST(Printing, ConfigurationsArePrintedAsPythonWritesThem) {
  EXPECT_EQ(::testing::PrintToString(ForwardConfig{.block_n = 96, .stages = 2, .swizzled = false}),
            "ForwardConfig(dtype='bfloat16', head_dim=128, block_m=128, block_n=96, stages=2, swizzled=False)");
  EXPECT_EQ(::testing::PrintToString(BackwardConfig{.head_dim = 64, .head_dim_v = 32, .math = Math::tf32x3}),
            "BackwardConfig(dtype='bfloat16', head_dim=64, head_dim_v=32, block_m=64, block_n=64, math='tf32x3')");
  EXPECT_EQ(::testing::PrintToString(kernel_of(ForwardConfig{}, {MaskKind::causal})),
            "flashcute_sm80_fwd_bf16_d128_m128_n64_w4_causal");
  EXPECT_EQ(::testing::PrintToString(check(ForwardConfig{.num_warps = 3}, 80)), "num_warps must be 1, 2, 4 or 8");
}

// Guards against two kernels under one name: the store and the cache would mix them up.
TEST(Config, NamesAreUniqueAndAreIdentifiers) {
  std::set<std::string> names;
  size_t kernels = 0;
  for (auto const& config : sample()) {
    for (Features const& features : all_features()) {
      Name const n = name(kernel_of(config, features));
      std::string const text = n.text;
      EXPECT_EQ(text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_"), std::string::npos) << text;
      EXPECT_LT(static_cast<size_t>(n.length) + 8, sizeof(n.text)) << text;
      names.insert(text);
      ++kernels;
    }
  }
  EXPECT_EQ(names.size(), kernels);
}

/// A kernel with a name that is as long as any: of no valid configuration.
template <class Config>
KernelId<Config> longest_kernel(int32_t extreme) {
  KernelId<Config> kernel;
  auto const choose = [&]<class T>(T& value) {
    if constexpr (std::is_same_v<T, int32_t>) {
      value = extreme;
    } else if constexpr (std::is_same_v<T, bool>) {
      value = !value;
    } else {
      value = longest_word<T>();
    }
  };
  for_each_option(kernel.config, [&](Option const&, auto& option) { choose(option); });
  kernel.config.head_dim_v = extreme + (extreme < 0 ? 1 : -1);
  choose(kernel.pass);
  for_each_feature(kernel.features, [&](Feature const&, auto& field) { choose(field); });
  return kernel;
}

// Guards against a name that is longer than its memory, of a configuration that only an error message needs.
TEST(Config, NamesOfAnyValuesFit) {
  auto const expect_fits = [](Name const& n) {
    EXPECT_EQ(static_cast<size_t>(n.length), std::strlen(n.text));
    EXPECT_LT(static_cast<size_t>(n.length) + 64, sizeof n.text) << "no room for the words of further features";
    EXPECT_GT(n.length, 100);
  };
  for (int32_t extreme : {std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()}) {
    expect_fits(name(longest_kernel<ForwardConfig>(extreme)));
    expect_fits(name(longest_kernel<BackwardConfig>(extreme)));
  }
}

// Guards against an enum's value that is spelled as another, or not at all.
TEST(Config, EveryEnumeratorHasItsName) {
  EXPECT_STREQ(name_of(ElementType::int32), "int32");
  for (auto const& row : EnumTable<DType>::rows) EXPECT_STREQ(name_of(element_type(row.value)), row.name);
  EXPECT_STREQ(name_of(Math::cuda_core), "cuda_core");
  EXPECT_STREQ(word_of(Math::cuda_core), "cudacore");
  EXPECT_STREQ(name_of(MaskKind::causal), "causal");
  EXPECT_STREQ(name_of(BackwardPass::finish), "finish");
  auto const expect_distinct = []<class Enum>(Enum) {
    std::set<std::string> names, words;
    for (Enum const value : all_values<Enum>()) names.insert(name_of(value)), words.insert(word_of(value));
    EXPECT_EQ(names.size(), all_values<Enum>().size()) << EnumTable<Enum>::type;
    EXPECT_EQ(words.size(), all_values<Enum>().size()) << EnumTable<Enum>::type;
    for (Enum const value : all_values<Enum>()) {
      EXPECT_EQ(with_constant(value, []<Enum constant>() { return constant; }), value) << name_of(value);
    }
  };
  expect_distinct(DType{});
  expect_distinct(Math{});
  expect_distinct(MaskKind{});
  expect_distinct(BackwardPass{});
}

// Guards against features that a pass does not read and that give it kernels of its own, and against those that it
// reads and does not get.
TEST(Features, EachPassGetsWhatItReads) {
  Features const all{.mask = MaskKind::causal, .count_blocks = true};
  EXPECT_EQ(relevant(all, SinglePass::forward), all);
  for (BackwardPass const pass : {BackwardPass::queries, BackwardPass::keys, BackwardPass::gradients}) {
    EXPECT_EQ(relevant(all, pass), Features{.mask = MaskKind::causal}) << name_of(pass);
    EXPECT_EQ(kernel_of(BackwardConfig{}, pass, all).features, relevant(all, pass));
  }
  for (BackwardPass const pass : {BackwardPass::prepare, BackwardPass::finish}) {
    EXPECT_EQ(relevant(all, pass), Features{}) << name_of(pass);
  }
}

// Guards against two kernels that the launcher cannot tell apart, or always finds in one place of its table.
TEST(Features, EachCountsForTheHash) {
  std::set<size_t> hashes;
  size_t kernels = 0;
  for (Features const& features : all_features()) {
    hashes.insert(hash_of(kernel_of(ForwardConfig{}, features)));
    ++kernels;
  }
  EXPECT_GE(kernels, 4u);
  EXPECT_EQ(hashes.size(), kernels);
  BackwardConfig const config;
  hashes.clear();
  for (BackwardPass const pass : all_values<BackwardPass>()) hashes.insert(hash_of(kernel_of(config, pass, {})));
  EXPECT_EQ(hashes.size(), all_values<BackwardPass>().size());
  EXPECT_NE(hash_of(kernel_of(ForwardConfig{.block_n = 32}, {})), hash_of(kernel_of(ForwardConfig{}, {})));
}

// Guards against a feature that the name has and the compiled kernel has not.
TEST(Features, TheGeneratedUnitSpellsEach) {
  for (Features const& features : all_features()) {
    ForwardKernelId const kernel = kernel_of(ForwardConfig{}, features);
    std::string const text = generated_source(std::span(&kernel, 1));
    std::string const spelled = std::string("{.mask = flashcute::MaskKind::") + name_of(features.mask) +
                                ", .count_blocks = " + (features.count_blocks ? "true" : "false") + "}";
    EXPECT_NE(text.find(", .features = " + spelled + "})"), std::string::npos) << text;
  }
}

// Guards against an option that is left out of for_each_option, and so out of names, hashes and repr.
TEST(Config, EveryByteOfTheConfigurationIsAnOption) {
  size_t bytes = 0;
  ForwardConfig const config;
  for_each_option(config, [&](Option const&, auto const& option) { bytes += sizeof option; });
  // Padding: 3 bytes after dtype, kernel and math, 2 before rescale_threshold, 3 before cluster. A new member would
  // change it.
  EXPECT_EQ(sizeof(ForwardConfig) - bytes, 14u);
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
  EXPECT_EQ(broken([](auto& c) { c.dtype = DType::float64; }), gpu_dtype);
  EXPECT_EQ(broken([](auto& c) { c.head_dim = 72; }), gpu_head_dim);
  EXPECT_EQ(broken([](auto& c) { c.head_dim_v = 272; }), gpu_head_dim);
  EXPECT_EQ(broken([](auto& c) { c.blocks_per_sm = 0; }), blocks_per_sm);
  EXPECT_EQ(broken([](auto& c) { c.num_warps = 8, c.blocks_per_sm = 9; }), blocks_per_sm);
  EXPECT_EQ(broken([](auto& c) { c.num_warps = 8, c.blocks_per_sm = 8, c.block_n = 32; }), none);
  EXPECT_EQ(broken([](auto& c) { c.num_warps = 8, c.blocks_per_sm = 8, c.block_n = 32; }, 86), blocks_per_sm);
  EXPECT_EQ(broken([](auto& c) { c.copy_bytes = 12; }), copy_bytes);
  EXPECT_EQ(broken([](auto& c) { c.dtype = DType::float32, c.copy_bytes = 2; }), copy_bytes);
  EXPECT_EQ(broken([](auto& c) { c.copy_bytes = 2; }), async_copy);
  EXPECT_EQ(broken([](auto& c) { c.copy_bytes = 2, c.async_copy = false; }), none);
  EXPECT_EQ(broken([](auto& c) { c.head_dim_v = 16, c.block_n = 32; }), copy_rows);
  EXPECT_EQ(broken([](auto& c) { c.math = Math::cuda_core, c.q_in_registers = true; }), fragments);
  EXPECT_EQ(broken([](auto& c) { c.math = Math::tf32x3; }), tf32x3);
  EXPECT_EQ(broken([](auto& c) { c.stages = 3; }), stages);
  EXPECT_EQ(broken([](auto& c) { c.stages = 2, c.eager_load_blocks = false; }), stages);
  EXPECT_EQ(broken([](auto& c) { c.rescale_threshold = 9; }), rescale_threshold);
  EXPECT_EQ(broken([](auto& c) { c.k_tiles_per_load = 3; }), k_tiles_per_load);
  EXPECT_EQ(broken([](auto& c) { c.k_tiles_per_load = 2, c.block_n = 48; }), k_tiles_per_load);
  EXPECT_EQ(broken([](auto& c) { c.head_dim = 257; }, cpu_arch), cpu_head_dim);
  EXPECT_EQ(broken([](auto& c) { c.head_dim = 0; }, cpu_arch), cpu_head_dim);
  EXPECT_EQ(broken([](auto& c) { c.block_m = 24; }, cpu_arch), cpu_block_m);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 24; }, cpu_arch), block_n);
  EXPECT_EQ(broken([](auto& c) { c.num_warps = 3; }), num_warps);
  EXPECT_EQ(broken([](auto& c) { c.block_m = 96; }), block_m);
  EXPECT_EQ(broken([](auto& c) { c.block_m = 0; }), block_m);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 24; }), block_n);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 512; }), block_n);
  EXPECT_EQ(broken([](auto& c) { c.block_m = 256, c.block_n = 256; }), smem);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 128; }, 89), none);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 144; }, 89), smem);
  EXPECT_EQ(broken([](auto& c) { c.pingpong = false; }), other_kernel);
  EXPECT_EQ(broken([](auto& c) { c.cluster = 2; }), other_kernel);

  auto const broken_sm90 = [&](auto change, Arch arch = 90) {
    ForwardConfig c = default_forward_config(DType::bfloat16, 128, 90);
    change(c);
    return check(c, arch);
  };
  EXPECT_EQ(broken_sm90([](auto&) {}), none);
  EXPECT_EQ(broken_sm90([](auto&) {}, 100), sm90_arch);
  EXPECT_EQ(broken_sm90([](auto&) {}, cpu_arch), none);
  EXPECT_EQ(broken_sm90([](auto& c) { c.dtype = DType::float32; }), sm90_dtype);
  EXPECT_EQ(broken_sm90([](auto& c) { c.math = Math::cuda_core; }), sm90_math);
  EXPECT_EQ(broken_sm90([](auto& c) { c.head_dim_v = 80; }), sm90_head_dim);
  EXPECT_EQ(broken_sm90([](auto& c) { c.head_dim = 32; }), sm90_head_dim);
  EXPECT_EQ(broken_sm90([](auto& c) { c.head_dim_v = 96; }), none);
  EXPECT_EQ(broken_sm90([](auto& c) { c.num_warps = 4; }), sm90_block_m);
  EXPECT_EQ(broken_sm90([](auto& c) { c.block_m = 256, c.num_warps = 16; }), sm90_block_m);
  EXPECT_EQ(broken_sm90([](auto& c) { c.block_n = 72; }), block_n);
  EXPECT_EQ(broken_sm90([](auto& c) { c.stages = 1; }), sm90_stages);
  EXPECT_EQ(broken_sm90([](auto& c) { c.cluster = 4; }), cluster);
  EXPECT_EQ(broken_sm90([](auto& c) { c.cluster = 2; }), none);
  EXPECT_EQ(broken_sm90([](auto& c) { c.swizzled = false; }), other_kernel);
  EXPECT_EQ(broken_sm90([](auto& c) { c.blocks_per_sm = 1; }), other_kernel);
  EXPECT_EQ(broken_sm90([](auto& c) { c.overlap = false; }), stale_max);
  EXPECT_EQ(broken_sm90([](auto& c) { c.overlap = c.stale_max = false; }), none);
  EXPECT_EQ(broken_sm90([](auto& c) { c.rescale_threshold = 0; }), stale_max);
  EXPECT_EQ(broken_sm90([](auto& c) { c.scores_ahead = true, c.stale_max = false; }), scores_ahead);
  EXPECT_EQ(broken_sm90([](auto& c) { c.scores_ahead = true; }), none);
  EXPECT_EQ(broken_sm90([](auto& c) { c.late_store = true, c.overlap = c.stale_max = false; }), late_store);
  EXPECT_EQ(broken_sm90([](auto& c) { c.late_store = true; }), none);
  EXPECT_EQ(broken_sm90([](auto& c) { c.stages = 4; }), smem);
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
    for (DType dtype : {DType::float16, DType::bfloat16, DType::float32}) {
      for (int32_t d = 1; d <= 256; ++d) {
        for (int32_t alignment = 16; alignment >= size_of(dtype); alignment /= 2) {
          for (bool allow_tf32 : {false, true}) {
            ForwardConfig const c = default_forward_config({dtype, d, 257 - d, alignment, allow_tf32}, arch);
            EXPECT_EQ(check(c, arch), ForwardConfigError::none) << name(c).text << " on " << arch;
            EXPECT_GE(c.head_dim, d);
            EXPECT_GE(c.head_dim_v, 257 - d);
          }
        }
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
  for (DType dtype : {DType::float16, DType::bfloat16, DType::float32}) {
    for (int32_t d : {8, 64, 72, 128, 136, 256}) {
      for (Arch arch : {80, 90, 100}) {
        // float16 has no images of the widths between 64, 128 and 256.
        ForwardTensors const tensors{
            .dtype = dtype, .head_dim = d, .head_dim_v = d, .heads = 1, .seqlen_q = 1, .any_width = false};
        for (int32_t const multiprocessors : {0, 2}) {
          ForwardConfig const config = default_forward_config(tensors, arch, multiprocessors);
          EXPECT_NE(std::find(built.begin(), built.end(), config), built.end());
        }
      }
    }
  }
}

// Guards against head dimensions that are computed as wider ones than those of the narrowest tile that holds them.
TEST(Config, HopperHasTilesForTheWidthsOfModels) {
  auto const tile = [](int32_t d, int32_t d_v) {
    ForwardConfig const c = default_forward_config({DType::bfloat16, d, d_v}, 90);
    return std::pair(c.head_dim, c.head_dim_v);
  };
  for (auto const& [d, width] : {std::pair{64, 64},
                                 {72, 96},
                                 {80, 96},
                                 {96, 96},
                                 {112, 128},
                                 {136, 160},
                                 {160, 160},
                                 {168, 192},
                                 {192, 192},
                                 {200, 256},
                                 {256, 256}}) {
    EXPECT_EQ(tile(d, d), std::pair(width, width));
  }
  EXPECT_EQ(tile(192, 128), std::pair(192, 128));
  EXPECT_EQ(tile(160, 96), std::pair(192, 128));
  EXPECT_EQ(tile(128, 160), std::pair(160, 160));
  EXPECT_EQ(tile(128, 168), std::pair(192, 192));
  EXPECT_EQ(tile(64, 96), std::pair(96, 96));
  EXPECT_EQ(tile(200, 128), std::pair(256, 256));
}

// Guards against a row whose bits depend on how many others there are.
TEST(Config, TheTilesOfABucketHaveTheSameBits) {
  for (auto const& [grid, tile, reason] : forward_tiles) {
    ForwardTensors const tensors{.dtype = tile.dtype,
                                 .head_dim = tile.head_dim,
                                 .head_dim_v = tile.head_dim_v,
                                 .allow_tf32 = tile.math == Math::tensor_core};
    auto const& large = forward_tile(tensors, tile.kernel, Grid::large).config;
    EXPECT_TRUE(same_head_dims(large, tile));
    EXPECT_EQ(large.block_n, tile.block_n);
    EXPECT_EQ(large.rescale_threshold, tile.rescale_threshold);
    EXPECT_EQ(large.optimized_softmax, tile.optimized_softmax);
    EXPECT_LE(tile.block_m, large.block_m);
  }
}

// Guards against stages that cost a multiprocessor one of its thread blocks.
TEST(Config, StagesFitTheMultiprocessor) {
  EXPECT_EQ(default_forward_config(DType::bfloat16, 128, 80).stages, 1);
  EXPECT_EQ(default_forward_config(DType::bfloat16, 128, 89).stages, 1);
  EXPECT_EQ(default_forward_config(DType::bfloat16, 128, 100).stages, 2);
  EXPECT_EQ(default_forward_config(DType::bfloat16, 64, 86).stages, 2);
}

// Guards against a tile that nobody remembers the reason of.
TEST(Config, EveryTileSaysWhatChoseIt) {
  for (auto const& tile : forward_tiles) EXPECT_GT(std::strlen(tile.chosen_by), 10u);
  for (auto const& tile : backward_tiles) EXPECT_GT(std::strlen(tile.chosen_by), 10u);
}

// Guards against a generated unit that compiles another kernel than its name says.
TEST(Config, TheGeneratedUnitSpellsEveryOption) {
  auto const kernels = kernels_of(forward_families[0]);
  std::string const text = generated_source(kernels);
  for (auto const& kernel : kernels) {
    EXPECT_NE(text.find(std::string("FLASHCUTE_SM80_FORWARD_ENTRY(") + name(kernel).text + ","), std::string::npos);
  }
  for_each_option(kernels[0].config, [&](Option const& option, auto) {
    EXPECT_NE(text.find(std::string(".") + option.name + " = "), std::string::npos) << option.name;
  });
}

// Guards against a unit that includes the entries of its first kernel alone.
TEST(Config, AGeneratedUnitIncludesWhatEachKernelNeeds) {
  auto const includes = [](std::vector<ForwardKernelId> const& kernels) {
    std::string const text = generated_source(kernels);
    return std::pair{text.find("#include \"flashcute/sm80/entry.hpp\"\n") != std::string::npos,
                     text.find("#include \"flashcute/sm90/entry.hpp\"\n") != std::string::npos};
  };
  ForwardKernelId const mma_sync = kernel_of(default_forward_config(DType::bfloat16, 64, 80), {}),
                        hopper = kernel_of(default_forward_config(DType::bfloat16, 64, 90), {});
  EXPECT_EQ(includes({mma_sync, mma_sync}), std::pair(true, false));
  EXPECT_EQ(includes({hopper}), std::pair(false, true));
  EXPECT_EQ(includes({mma_sync, hopper}), std::pair(true, true));
  EXPECT_EQ(includes({hopper, mma_sync}), std::pair(true, true));
}

// Guards against a family that holds other kernels than those of its own list.
TEST(Config, AFamilyHoldsTheFeaturesThatItLists) {
  constexpr Features only_causal[] = {{.mask = MaskKind::causal}};
  Family<ForwardConfig> const forward{"f", {.head_dim = 64}, {only_causal, only_causal}};
  ForwardConfig half = forward.config;
  half.dtype = DType::float16;
  EXPECT_EQ(kernels_of(forward),
            (std::vector{kernel_of(half, only_causal[0]), kernel_of(forward.config, only_causal[0])}));
  Family<BackwardConfig> const backward{"b", {.deterministic = true}, {only_causal, only_causal}};
  EXPECT_EQ(kernels_of(backward).size(), 4u) << "two passes of two dtypes";
  for (auto const& kernel : kernels_of(backward)) EXPECT_EQ(kernel.features, only_causal[0]);
  EXPECT_TRUE(kernels_of(Family<ForwardConfig>{"none", {}, {}}).empty());
}

// ---- the backward ----------------------------------------------------------------------------------

// Guards against an option that is left out of for_each_option, and so out of names, hashes and repr.
TEST(BackwardConfig, EveryByteOfTheConfigurationIsAnOption) {
  size_t bytes = 0;
  BackwardConfig const config;
  for_each_option(config, [&](Option const&, auto const& option) { bytes += sizeof option; });
  // Padding: 3 bytes after dtype, kernel, math and deterministic, 2 after swizzled.
  EXPECT_EQ(sizeof(BackwardConfig) - bytes, 14u);
}

// Guards against two kernels under one name.
TEST(BackwardConfig, NamesAreUniqueAndAreIdentifiers) {
  std::set<std::string> names;
  size_t kernels = 0;
  auto const add = [&](BackwardConfig const& config) {
    for (bool const deterministic : {false, true}) {
      BackwardConfig c = config;
      c.deterministic = deterministic;
      for (auto const& kernel : kernels_of(c, full_and_causal)) {
        std::string const text = name(kernel).text;
        EXPECT_EQ(text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_"), std::string::npos) << text;
        names.insert(text);
        ++kernels;
      }
    }
  };
  add({});
  BackwardConfig const defaults;
  for_each_option(defaults, [&](Option const& option, auto value) {
    using T = decltype(value);
    std::vector<T> others;
    if constexpr (std::is_same_v<T, bool>) others = {!value};
    if constexpr (std::is_same_v<T, int32_t>) others = {value + 1, value + 16};
    if constexpr (std::is_same_v<T, DType>) others = {DType::float16, DType::float32};
    if constexpr (std::is_same_v<T, Math> || std::is_same_v<T, Kernel>)
      others = all_values<T>(), std::erase(others, value);
    if (std::string_view(option.name) == "deterministic") return;
    for (T const other : others) {
      BackwardConfig config;
      for_each_option(config, [&](Option const& row, auto& member) {
        if constexpr (std::is_same_v<T, std::remove_reference_t<decltype(member)>>) {
          if (std::string_view(row.name) == option.name) member = other;
        }
      });
      add(config);
    }
  });
  EXPECT_EQ(names.size(), kernels);
}

// Guards against passes that are no kernels, and against two for one: `prepare` and `finish` know no mask.
TEST(BackwardConfig, KernelsOfAConfiguration) {
  auto const kernels = kernels_of(BackwardConfig{}, full_and_causal);
  ASSERT_EQ(kernels.size(), 4u);
  EXPECT_STREQ(name(kernels[0]).text, "flashcute_sm80_bwd_bf16_d128_m64_n64_w4_prepare");
  EXPECT_STREQ(name(kernels[2]).text, "flashcute_sm80_bwd_bf16_d128_m64_n64_w4_gradients_causal");
  EXPECT_STREQ(name(kernels[3]).text, "flashcute_sm80_bwd_bf16_d128_m64_n64_w4_finish");
  EXPECT_EQ(kernels_of(BackwardConfig{.deterministic = true}, full_and_causal).size(), 4u);
}

// Guards against a rule that cannot fire on a GPU, or fires with another rule's sentence.
TEST(BackwardConfig, EachRuleOfTheGpuFires) {
  BackwardConfig const good{.head_dim = 64, .block_n = 128};
  EXPECT_EQ(check(good, 80), BackwardConfigError::none);
  auto const broken = [&](auto change, Arch arch = 80) {
    BackwardConfig c = good;
    change(c);
    return check(c, arch);
  };
  using enum BackwardConfigError;
  EXPECT_EQ(check(good, 75), arch_too_old);
  EXPECT_EQ(broken([](auto& c) { c.dtype = DType::float64; }), gpu_dtype);
  EXPECT_EQ(broken([](auto& c) { c.dtype = DType::float32; }), math);
  auto const split = [](auto& c) { c.dtype = DType::float32, c.math = Math::tf32x3, c.block_n = 64, c.stages = 1; };
  EXPECT_EQ(broken(split), none);
  EXPECT_EQ(broken([&](auto& c) { split(c), c.copy_bytes = 2, c.async_copy = false; }), copy_bytes);
  EXPECT_EQ(broken([&](auto& c) { split(c), c.k_tiles_per_load = 1; }), k_tiles_per_load);
  EXPECT_EQ(broken([](auto& c) { c.math = Math::tf32x3; }), math);
  EXPECT_EQ(broken([](auto& c) { c.head_dim = 72; }), gpu_head_dim);
  EXPECT_EQ(broken([](auto& c) { c.num_warps = 2; }), num_warps);
  for (int32_t const n : {0, 3, 8}) EXPECT_EQ(broken([&](auto& c) { c.column_warps = n; }), column_warps) << n;
  EXPECT_EQ(broken([](auto& c) { c.column_warps = 4; }), column_warps);
  EXPECT_EQ(broken([](auto& c) { c.num_warps = 8, c.column_warps = 4; }), none);
  EXPECT_EQ(broken([](auto& c) { c.block_m = 24; }), block_m);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 272; }), block_n);
  EXPECT_EQ(broken([](auto& c) { c.blocks_per_sm = 17; }), blocks_per_sm);
  EXPECT_EQ(broken([](auto& c) { c.num_warps = 8, c.blocks_per_sm = 9; }), blocks_per_sm);
  EXPECT_EQ(broken([](auto& c) { c.math = Math::cuda_core; }), math);
  EXPECT_EQ(broken([](auto& c) { c.stages = 3; }), stages);
  EXPECT_EQ(broken([](auto& c) { c.copy_bytes = 12; }), copy_bytes);
  EXPECT_EQ(broken([](auto& c) { c.copy_bytes = 2; }), async_copy);
  EXPECT_EQ(broken([](auto& c) { c.copy_bytes = 2, c.async_copy = false; }), none);
  EXPECT_EQ(broken([](auto& c) { c.head_dim = 16, c.block_m = 32; }), copy_rows);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 32; }), shares);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 32, c.column_warps = 2; }), none);
  EXPECT_EQ(broken([](auto& c) { c.block_m = 32, c.deterministic = true; }), shares);
  EXPECT_EQ(broken([](auto& c) { c.block_m = 48, c.copy_bytes = 8, c.column_warps = 2; }), shares) << "rows of dQ";
  EXPECT_EQ(broken([](auto& c) { c.head_dim = 48; }), shares) << "columns of dQ";
  EXPECT_EQ(broken([](auto& c) { c.head_dim = 48, c.deterministic = true; }), none);
  EXPECT_EQ(broken([](auto& c) { c.head_dim_v = 48; }), none);
  EXPECT_EQ(broken([](auto& c) { c.head_dim_v = 48, c.column_warps = 2; }), shares);
  EXPECT_EQ(broken([](auto& c) { c.k_tiles_per_load = 3; }), k_tiles_per_load);
  EXPECT_EQ(broken([](auto& c) { c.k_tiles_per_load = 2, c.head_dim_v = 48; }), k_tiles_per_load);
  EXPECT_EQ(broken([](auto& c) { c.block_n = 256, c.head_dim = 128; }), smem);
  EXPECT_EQ(broken([](auto& c) { c.head_dim = c.head_dim_v = 128; }), none);
  EXPECT_EQ(broken([](auto& c) { c.head_dim = c.head_dim_v = 128; }, 86), smem);
}

// Guards against an exception without the values that broke the rule.
TEST(BackwardConfig, TheExceptionCarriesTheRulesSentenceAndTheValues) {
  try {
    check_config(BackwardConfig{.block_n = 256}, 80);
    FAIL() << "no exception";
  } catch (ConfigError const& e) {
    for (char const* words : {sentence(BackwardConfigError::smem), "block_n=256", " of 166912 bytes", "capability 8.0"})
      EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
  }
}

// Guards against a default that its own device refuses, or that has to be compiled at run time: only deterministic ones
// are, but Hopper's of bfloat16, and those of wide heads where a thread block has but 99 KB of shared memory.
TEST(BackwardConfig, DefaultsAreValidEverywhereAndCompiledAheadOfTime) {
  auto const built = backward_configs();
  for (Arch arch : {80, 86, 87, 89, 90, 100, 120}) {
    for (DType dtype : {DType::float16, DType::bfloat16}) {
      for (int32_t d = 1; d <= 256; ++d) {
        for (bool const deterministic : {false, true}) {
          for (int32_t alignment : {16, 8, 4, 2}) {
            int32_t const d_v = 257 - d;
            BackwardConfig const c = default_backward_config({dtype, d, d_v, alignment, deterministic}, arch);
            EXPECT_EQ(check(c, arch), BackwardConfigError::none) << name(c).text << " on " << arch;
            EXPECT_GE(c.head_dim, d);
            EXPECT_GE(c.head_dim_v, d_v);
            EXPECT_EQ(c.deterministic, deterministic);
            EXPECT_EQ(c.copy_bytes, alignment);
          }
          // On Hopper wide heads are always deterministic; float16 has images of powers of two alone, and none of
          // additions to dQ in a fixed order.
          bool const bfloat16 = dtype == DType::bfloat16;
          bool const hopper_ahead = d > 128 ? d > 192 || bfloat16 : bfloat16 || !deterministic;
          bool const ahead =
              arch == 90 ? hopper_ahead : !deterministic && (d <= 128 || max_smem_bytes(arch) > 99 * 1024);
          for (bool const causal : {false, true}) {
            BackwardConfig const aligned = default_backward_config(dtype, d, arch, d, deterministic, causal);
            EXPECT_EQ(check(aligned, arch), BackwardConfigError::none) << name(aligned).text << " on " << arch;
            EXPECT_EQ(std::find(built.begin(), built.end(), aligned) != built.end(), ahead)
                << name(aligned).text << " on " << arch;
          }
        }
      }
    }
  }
}

// Guards against types and widths that get a kernel's promise and then none.
TEST(BackwardConfig, WhatHasNoDefaultIsRefused) {
  EXPECT_THROW(default_backward_config(DType::float64, 64, 80), UnsupportedError);
  EXPECT_THROW(default_backward_config(DType::float32, 136, 86), UnsupportedError);
  EXPECT_THROW(default_backward_config(DType::float16, 64, 75), DeviceError);
  EXPECT_THROW(default_backward_config(DType::float16, 257, 80), ArgumentError);
  EXPECT_THROW(default_backward_config(DType::float16, 257, cpu_arch), ArgumentError);
  EXPECT_EQ(default_backward_config(DType::float64, 37, cpu_arch, 256).head_dim_v, 256);
}

// Guards against a default for float32 that its own device refuses. All are compiled at first use.
TEST(BackwardConfig, DefaultsOfFloat32AreValidWhereTheyFit) {
  for (Arch arch : {80, 86, 87, 89, 90, 100, 120}) {
    for (int32_t d = 1; d <= (max_smem_bytes(arch) > 99 * 1024 ? 256 : 128); ++d) {
      for (bool const deterministic : {false, true}) {
        BackwardConfig const c = default_backward_config({DType::float32, d, 1, 4, deterministic}, arch);
        EXPECT_EQ(check(c, arch), BackwardConfigError::none) << name(c).text << " on " << arch;
        EXPECT_GE(c.head_dim, d);
        EXPECT_EQ(c.math, Math::tf32x3);
        EXPECT_EQ(c.deterministic, deterministic);
      }
    }
  }
}

// Guards against stages that cost a multiprocessor one of its thread blocks, or that are given up for none.
TEST(BackwardConfig, StagesFitTheMultiprocessor) {
  EXPECT_EQ(default_backward_config(DType::bfloat16, 128, 80).stages, 1);
  EXPECT_EQ(default_backward_config(DType::bfloat16, 128, 89).stages, 1);
  EXPECT_EQ(default_backward_config({DType::bfloat16, 128, 128}, 90).stages, 2);
  EXPECT_EQ(default_backward_config(DType::bfloat16, 64, 80).stages, 2);
  EXPECT_EQ(default_backward_config(DType::bfloat16, 64, 86).stages, 2);
}

// Guards against sums that lie across each other's places, or where 16 bytes cannot be added at once.
TEST(BackwardConfig, TheWorkspace) {
  BackwardConfig const c{.head_dim = 64};
  BackwardWorkspace const w = workspace_of(c, 3, 65);
  EXPECT_EQ(w.delta, 196);
  EXPECT_EQ(w.dq_sums, 3 * 2 * 64 * 64);
  EXPECT_EQ(w.total(), w.delta + w.dq_sums);
  EXPECT_EQ(workspace_of({.head_dim = 64, .deterministic = true}, 3, 65).total(), 196);
  // LSE and delta in whole tiles.
  EXPECT_EQ(workspace_of(default_backward_config(DType::bfloat16, 256, 90), 3, 129).total(), 2 * 3 * 256);
  // Hopper's: a counter of tiles; deterministic: one more for each warpgroup's half of each block.
  BackwardConfig hopper = default_backward_config(DType::bfloat16, 64, 90);
  BackwardWorkspace const adding = workspace_of(hopper, 3, 129);
  EXPECT_EQ(adding.delta, 2 * 3 * 2 * 128);
  EXPECT_EQ(adding.dq_sums, 3 * 2 * 128 * 64);
  EXPECT_EQ(adding.counters, 1);
  hopper.deterministic = true;
  EXPECT_EQ(workspace_of(hopper, 3, 129).total(), adding.total() + 3 * 2 * 2);
  EXPECT_EQ(workspace_of(hopper, 3, 0).total(), 0);
}

// Guards against a generated unit that compiles another kernel than its name says.
TEST(BackwardConfig, TheGeneratedUnitSpellsEveryOption) {
  auto const kernels = kernels_of(backward_families[0]);
  std::string const text = generated_source(kernels);
  EXPECT_TRUE(text.starts_with("#include \"flashcute/sm80/entry.hpp\"\n")) << text;
  for (auto const& kernel : kernels) {
    EXPECT_NE(text.find(std::string("FLASHCUTE_SM80_BACKWARD_ENTRY(") + name(kernel).text + ","), std::string::npos);
    EXPECT_NE(text.find(std::string(".pass = flashcute::BackwardPass::") + name_of(kernel.pass)), std::string::npos);
  }
  EXPECT_NE(text.find(".mask = flashcute::MaskKind::causal"), std::string::npos);
  for_each_option(kernels[0].config, [&](Option const& option, auto) {
    EXPECT_NE(text.find(std::string(".") + option.name + " = "), std::string::npos) << option.name;
  });
  KernelCode const code = code_of(kernels[0], 80);
  EXPECT_EQ(code.name, name(kernels[0]).text);
  EXPECT_EQ(code.source, generated_source(std::span(&kernels[0], 1)));
  EXPECT_THROW(code_of(kernels[0], 75), ConfigError);
  EXPECT_THROW(code_of(kernels[0], cpu_arch), ArgumentError);
}

}  // namespace
}  // namespace flashcute
