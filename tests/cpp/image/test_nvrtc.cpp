// The run-time compiler: finding NVRTC, compiling with it, and keeping what it made. Needs no GPU. NVRTC is found as in
// a program: FLASHCUTE_NVRTC, the loader's path, CUDA_HOME.

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "flashcute/core/defaults.hpp"
#include "flashcute/error.hpp"
#include "image/disk_cache.hpp"
#include "image/jit.hpp"
#include "image/nvrtc.hpp"
#include "image/source.hpp"
#include "support/scratch.hpp"
#include "system/shared_library.hpp"

namespace flashcute {
namespace {

using namespace flashcute::testing;
namespace fs = std::filesystem;

// ---- opening libraries ---------------------------------------------------------------------------

// Guards against a wrong path in messages where a plain soname was opened, and against a null function being called.
TEST(SharedLibrary, OpensTheFirstThatWorks) {
  std::string problems;
  auto const library = SharedLibrary::open({"/no/such/library.so", "libm.so.6"}, &problems);
  ASSERT_TRUE(library.has_value());
  EXPECT_TRUE(fs::path(library->path()).is_absolute()) << library->path();
  EXPECT_TRUE(contains(library->path(), "libm.so.6"));
  EXPECT_TRUE(contains(problems, "/no/such/library.so"));
  EXPECT_EQ(library->symbol<double (*)(double)>("sqrt")(9.0), 3.0);
  EXPECT_EQ(library->find<void (*)()>("no_such_function"), nullptr);
  std::string const message = message_of<UnsupportedError>([&] { library->symbol<void (*)()>("no_such_function"); });
  EXPECT_TRUE(contains(message, library->path()));
  EXPECT_TRUE(contains(message, "no_such_function"));
  EXPECT_FALSE(SharedLibrary::open({"/no/such/library.so"}).has_value());
}

// ---- NVRTC is not there --------------------------------------------------------------------------

// NVRTC stays open once found, so each of these runs in a fresh process: the child of a "threadsafe" death test.
class NvrtcMissing : public ::testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }

  /// Prints what a user would see with FLASHCUTE_NVRTC=path.
  [[noreturn]] static void report(std::string const& path) {
    setenv("FLASHCUTE_NVRTC", path.c_str(), 1);
    try {
      std::fprintf(stderr, "available: %d\n", nvrtc_available());
      std::fprintf(stderr, "problem: %s\n", nvrtc_problem().c_str());
      nvrtc_compile({"name", "", "sm_80", {}, {}});
    } catch (UnsupportedError const& e) {
      std::fprintf(stderr, "UnsupportedError: %s\n", e.what());
    }
    std::exit(0);
  }

  static constexpr char const* told =
      "available: 0\nproblem: .*FLASHCUTE_NVRTC='.*pip install nvidia-cuda-nvrtc==(.|\n)*UnsupportedError: NVRTC";
};

// Guards against a crash, or a silent search elsewhere, where the user named a library that does not exist.
TEST_F(NvrtcMissing, NoSuchFile) {
  EXPECT_EXIT(report("/no/such/libnvrtc.so"), ::testing::ExitedWithCode(0), told);
  EXPECT_EXIT(report("/no/such/libnvrtc.so"), ::testing::ExitedWithCode(0), "Tried:\n.*cannot open shared object file");
}

// Guards against calling a null pointer where the library is another one.
TEST_F(NvrtcMissing, NotNvrtc) {
  EXPECT_EXIT(report("libm.so.6"), ::testing::ExitedWithCode(0), told);
  EXPECT_EXIT(report("libm.so.6"), ::testing::ExitedWithCode(0), "libm.so.6 has no function nvrtcVersion");
}

// ---- NVRTC is there ------------------------------------------------------------------------------

class NvrtcTest : public ::testing::Test {
 protected:
  // Set in the fresh process that looks for NVRTC by itself.
  static constexpr char const* search_root = "FLASHCUTE_TEST_SEARCH_ROOT";

  void SetUp() override {
    if (std::getenv(search_root) != nullptr || nvrtc_available()) return;
    char const* const allowed = std::getenv("FLASHCUTE_TEST_ALLOW_NO_NVRTC");
    if (allowed != nullptr && std::string(allowed) == "1") GTEST_SKIP() << nvrtc_problem();
    FAIL() << nvrtc_problem() << "FLASHCUTE_TEST_ALLOW_NO_NVRTC=1 skips this test";
  }

  static CompileRequest request(std::string const& source) { return {"program", source, "sm_80", {}, {}}; }
  static std::string kernel(std::string const& name) {
    return "extern \"C\" __global__ void " + name + "(float* p) { *p = 1; }\n";
  }
};

// Guards against a key that does not change with the compiler's patch release, and against reporting another library.
TEST_F(NvrtcTest, SaysWhatItIs) {
  EXPECT_EQ(nvrtc_problem(), "");
  EXPECT_TRUE(fs::exists(nvrtc_path())) << nvrtc_path();
  EXPECT_TRUE(contains(nvrtc_build(), "release " + nvrtc_version() + ", V" + nvrtc_version() + "."));
  EXPECT_FALSE(contains(nvrtc_build(), ".target"));
}

// Guards against an image that is not loadable or lacks the kernel; also fails if NVRTC cannot find its builtins.
TEST_F(NvrtcTest, CompilesToElf) {
  std::string const image = nvrtc_compile(request(kernel("some_kernel")));
  EXPECT_TRUE(
      image.starts_with("\x7f"
                        "ELF"));
  EXPECT_TRUE(image.find("some_kernel") != std::string::npos);
}

// Guards against an error that does not say where the mistake is, or with which options it showed.
TEST_F(NvrtcTest, AnErrorCarriesTheLog) {
  CompileRequest r = request("\n\nint broken = undeclared_name;\n");
  r.options = {"-DSOME_OPTION"};
  std::string const message = message_of<CompileError>([&] { nvrtc_compile(r); });
  EXPECT_TRUE(contains(message, "program.cu(3): error"));
  EXPECT_TRUE(contains(message, "undeclared_name"));
  EXPECT_TRUE(contains(message, "NVRTC_ERROR_COMPILATION"));
  EXPECT_TRUE(contains(message, "-DSOME_OPTION"));
}

// Guards against an arch that NVRTC refuses with a bare "invalid option", or takes for a virtual one without an image.
TEST_F(NvrtcTest, UnknownArch) {
  for (char const* arch : {"sm_999", "sm_8", "sm_", "sm_80x", "sm_80 ", "80", "compute_80", ""}) {
    CompileRequest r = request(kernel("k"));
    r.arch = arch;
    std::string const message = message_of<CompileError>([&] { nvrtc_compile(r); });
    EXPECT_TRUE(contains(message, "'" + std::string(arch) + "'"));
    EXPECT_TRUE(contains(message, "sm_80 "));
  }
}

// Guards against the suffix of Hopper's instructions being refused, or dropped.
TEST_F(NvrtcTest, ArchWithASuffix) {
  CompileRequest r = request("#ifndef __CUDA_ARCH_FEAT_SM90_ALL\n#error suffix lost\n#endif\n" + kernel("k"));
  r.arch = "sm_90a";
  EXPECT_TRUE(
      nvrtc_compile(r).starts_with("\x7f"
                                   "ELF"));
}

// Guards against Hopper's kernel compiled for plain sm_90, where its instructions become a trap: nothing but the GPU
// would notice. The compiler stops at our headers, before it misses CuTe's.
TEST_F(NvrtcTest, HoppersKernelIsCompiledForItsOwnFeaturesAlone) {
  ForwardKernelId const kernel = kernel_of(default_forward_config(DType::bfloat16, 64, 90), {});
  CompileRequest r = request(code_of(kernel, 90).source);
  r.include_folders = {FLASHCUTE_HEADERS, FLASHCUTE_CCCL_HEADERS};
  std::string const sentence = "Hopper's kernels must be compiled for sm_90a";
  for (char const* arch : {"sm_90", "sm_100"}) {
    r.arch = arch;
    EXPECT_TRUE(contains(message_of<CompileError>([&] { nvrtc_compile(r); }), sentence)) << arch;
  }
  r.arch = target_of(code_of(kernel, 90), 90);
  std::string const message = message_of<CompileError>([&] { nvrtc_compile(r); });
  EXPECT_FALSE(contains(message, sentence)) << message;
  EXPECT_TRUE(contains(message, "cute/")) << "only CuTe is missing";
}

// Guards against an empty image after a successful compilation: with -dlto NVRTC succeeds and makes no cubin.
TEST_F(NvrtcTest, AnEmptyImageIsNeverReturned) {
  CompileRequest r = request(kernel("k"));
  r.options = {"-dlto"};
  EXPECT_TRUE(contains(message_of<CompileError>([&] { nvrtc_compile(r); }), "no ELF image"));
}

// Guards against headers that lie about in the current folder being compiled into images, and against folders with
// spaces in their names.
TEST_F(NvrtcTest, OnlyTheGivenFoldersAreSearched) {
  Scratch const scratch;
  write_file(scratch / "a folder/some_header.hpp", "#define FOUND 1\n");
  CompileRequest r = request("#include \"some_header.hpp\"\n" + kernel("k"));
  fs::path const before = fs::current_path();
  fs::current_path(scratch / "a folder");
  std::string const message = message_of<CompileError>([&] { nvrtc_compile(r); });
  fs::current_path(before);
  EXPECT_TRUE(contains(message, "some_header.hpp"));
  r.include_folders = {(scratch / "a folder").string()};
  EXPECT_TRUE(
      nvrtc_compile(r).starts_with("\x7f"
                                   "ELF"));
}

// Guards against paths in the names of images: the same request from another installation must have the same options.
TEST_F(NvrtcTest, OptionsWithoutPaths) {
  CompileRequest r = request("");
  r.include_folders = {"/some/folder"};
  r.options = {"-DMINE"};
  std::vector<std::string> const options = options_without_paths(r);
  EXPECT_EQ(std::count(options.begin(), options.end(), "-DMINE"), 1);
  EXPECT_EQ(std::count(options.begin(), options.end(), "-std=c++20"), 1);
  for (std::string const& option : options) EXPECT_EQ(option.find('/'), std::string::npos) << option;
}

// Guards against constants that become variables of an image, with symbols several times as large as the code, and
// against plain constexpr functions being refused.
TEST_F(NvrtcTest, ConstantsAreNoVariablesOfTheImage) {
  std::string const image = nvrtc_compile(
      request("template <int N> inline constexpr bool some_constant = N == 2;\n"
              "constexpr int plain_function(int a) { return some_constant<2> ? a + 1 : a; }\n"
              "extern \"C\" __global__ void some_kernel(int* p) { constexpr int a = plain_function(2); *p = a; }\n"));
  EXPECT_TRUE(contains(image, "some_kernel"));
  EXPECT_FALSE(contains(image, "some_constant"));
}

// Guards against device code that calls at run time what only constant expressions may call. Only the assembler
// notices.
TEST_F(NvrtcTest, DeviceCodeCallsNoHostFunction) {
  CompileRequest const r = request(
      "constexpr int plain_function(int a) { return a + 1; }\n"
      "extern \"C\" __global__ void some_kernel(int* p) { *p = plain_function(*p); }\n");
  EXPECT_TRUE(contains(message_of<CompileError>([&] { nvrtc_compile(r); }), "plain_function"));
}

// Guards against a compiler that only one thread may use: each thread's image holds its own kernel.
TEST_F(NvrtcTest, ThreadsCompileAtTheSameTime) {
  std::vector<std::string> images(4);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < images.size(); ++i) {
    threads.emplace_back([&images, i] { images[i] = nvrtc_compile(request(kernel("kernel_" + std::to_string(i)))); });
  }
  for (std::thread& t : threads) t.join();
  for (std::size_t i = 0; i < images.size(); ++i) {
    EXPECT_TRUE(images[i].find("kernel_" + std::to_string(i)) != std::string::npos);
  }
}

// Guards against Python's packages not being found, NVRTC's companion library included: a folder that is laid out like
// site-packages links to the NVRTC of this machine. What opens it is a fresh process (as above), which inherits the
// folder in a variable: the parent must ask where NVRTC is, the child must not have opened it.
TEST_F(NvrtcTest, FindsPythonPackages) {
  Scratch const scratch;
  if (std::getenv(search_root) == nullptr) {
    if (!nvrtc_version().starts_with("13.")) GTEST_SKIP() << "the layout differs before CUDA 13";
    fs::create_directories(scratch / "nvidia/cu13/include");
    fs::create_directory_symlink(fs::path(nvrtc_path()).parent_path(), scratch / "nvidia/cu13/lib");
    write_file(scratch / "nvidia/cu13/include/cuda_fp16.h", "");
  }
  ScopedVariable const root(search_root, std::getenv(search_root) ? std::getenv(search_root) : scratch.path().string());
  ScopedVariable const no_nvrtc("FLASHCUTE_NVRTC", std::nullopt);
  ScopedVariable const no_include("FLASHCUTE_CUDA_INCLUDE", std::nullopt);
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  auto const report = [&] {
    set_search_roots({"/no/such/root", std::getenv(search_root)});
    bool const works = !nvrtc_compile(request(kernel("k"))).empty();
    std::fprintf(stderr, "%d %s %s\n", works, nvrtc_path().c_str(), cuda_include_folder().value_or("none").c_str());
    std::exit(0);
  };
  std::string const found = std::string("1 ") + std::getenv(search_root) + "/nvidia/cu13/lib/libnvrtc.so.13 " +
                            std::getenv(search_root) + "/nvidia/cu13/include\n";
  EXPECT_EXIT(report(), ::testing::ExitedWithCode(0), found);
}

// Guards against an include folder that is taken on trust.
TEST_F(NvrtcTest, CudaIncludeFolder) {
  Scratch const scratch;
  ScopedVariable const variable("FLASHCUTE_CUDA_INCLUDE", scratch.path().string());
  EXPECT_TRUE(contains(message_of<ArgumentError>([] { cuda_include_folder(); }), "FLASHCUTE_CUDA_INCLUDE"));
  write_file(scratch / "cuda_fp16.h", "");
  EXPECT_EQ(cuda_include_folder(), scratch.path().string());
}

// ---- images on demand ----------------------------------------------------------------------------

/// A stand-in for our headers: the entry macro defines a kernel that does nothing, so a compilation takes no time.
class Jit : public NvrtcTest {
 protected:
  void SetUp() override {
    NvrtcTest::SetUp();
    write_file(scratch_ / "cuda/cuda_fp16.h", "");
    write_file(entry_header(),
               "#define FLASHCUTE_SM80_FORWARD_ENTRY(NAME, ...) extern \"C\" __global__ void NAME() {}\n");
    set_include_folders({(scratch_ / "include").string()});
  }

  std::string entry_header() const { return scratch_ / "include/flashcute/sm80/entry.hpp"; }
  std::string cached(std::string const& key) const { return scratch_ / ("cache/" + key + ".image"); }

  static ForwardKernelId id() {
    return kernel_of(default_forward_config(DType::bfloat16, 64, 80), {.mask = MaskKind::causal});
  }
  static KernelCode kernel() { return code_of(id(), 80); }

  Scratch scratch_;
  ScopedVariable cuda_{"FLASHCUTE_CUDA_INCLUDE", scratch_ / "cuda"};
  ScopedVariable cache_{"FLASHCUTE_CACHE_DIR", scratch_ / "cache"};
  ScopedVariable mode_{"FLASHCUTE_JIT", std::nullopt};
  ScopedVariable quiet_{"FLASHCUTE_QUIET", std::nullopt};
};

// Guards against compiling again what is cached, and against silence, or more than a line, while the user waits.
TEST_F(Jit, CompilesOnceWithOneLine) {
  std::string const first = stderr_of([] { jit_image(kernel(), 80); });
  EXPECT_TRUE(contains(first, "flashcute: compiling " + kernel().name + " for sm_80 with NVRTC " + nvrtc_version() +
                                  " (once; cached in " + (scratch_ / "cache").string() + ") ... "));
  EXPECT_TRUE(first.ends_with(" s\n")) << first;
  EXPECT_EQ(std::count(first.begin(), first.end(), '\n'), 1) << first;
  EXPECT_TRUE(fs::exists(cached(jit_key(kernel(), 80))));
  EXPECT_EQ(stderr_of([] { jit_image(kernel(), 80); }), "");
  JitImage const image = jit_image(kernel(), 80);
  EXPECT_FALSE(image.compiled);
  EXPECT_TRUE(
      image.bytes.starts_with("\x7f"
                              "ELF"));
  EXPECT_TRUE(image.bytes.find(kernel().name) != std::string::npos);
  ForwardKernelId other = id();
  other.config.swizzled = false;
  ScopedVariable const quiet("FLASHCUTE_QUIET", "1");
  EXPECT_TRUE(jit_image(code_of(other, 80), 80).compiled);
}

// Guards against a store of images that serves forward kernels only, or takes the name alone for the kernel.
TEST_F(Jit, AnyKernelByItsCode) {
  ScopedVariable const quiet("FLASHCUTE_QUIET", "1");
  KernelCode code{"some_kernel", NvrtcTest::kernel("some_kernel")};
  JitImage const image = jit_image(code, 80);
  EXPECT_TRUE(image.compiled);
  EXPECT_TRUE(image.bytes.find("some_kernel") != std::string::npos);
  std::string const key = jit_key(code, 80);
  EXPECT_TRUE(key.starts_with("some_kernel.sm_80.")) << key;
  EXPECT_TRUE(fs::exists(cached(key)));
  code.source += "// another\n";
  EXPECT_NE(jit_key(code, 80), key);
}

// Guards against messages of a program that asked for none.
TEST_F(Jit, Quiet) {
  ScopedVariable const quiet("FLASHCUTE_QUIET", "1");
  EXPECT_EQ(stderr_of([] { jit_image(kernel(), 80); }), "");
}

// Guards against a list of images that cannot say which they are, and against a name of another release, or by
// somebody's hand, that breaks it.
TEST_F(Jit, KeyTellsKernelTargetAndCompiler) {
  JitKeyParts const parts = parts_of_jit_key(jit_key(kernel(), 80));
  EXPECT_EQ(parts.kernel, kernel().name);
  EXPECT_EQ(parts.target, "sm_80");
  EXPECT_EQ(parts.compiler, "NVRTC " + nvrtc_version());
  for (auto const& [key, kernel, target, compiler] : std::vector<std::array<std::string, 4>>{
           {"k.sm_80.0123", "k", "sm_80", ""}, {"k.0123", "k", "", ""}, {"k.nvrtc1.2.0123", "k", "", "NVRTC 1.2"}}) {
    JitKeyParts const found = parts_of_jit_key(key);
    EXPECT_EQ(found.kernel, kernel) << key;
    EXPECT_EQ(found.target, target) << key;
    EXPECT_EQ(found.compiler, compiler) << key;
  }
}

/// Every change of one option to a value that may lengthen a name.
template <class Config>
std::vector<std::function<void(Config&)>> changes_of() {
  std::vector<std::function<void(Config&)>> changes;
  Config const defaults;
  for_each_option(defaults, [&]<class T>(Option const& option, T) {
    std::vector<T> values;
    if constexpr (std::is_same_v<T, bool>) {
      values = {false, true};
    } else if constexpr (std::is_same_v<T, int32_t>) {
      values = {1, 2, 3, 4, 8, 16, 32, 64, 112, 128, 144, 160, 192, 240};
    } else {
      for (auto const& row : EnumTable<T>::rows) values.push_back(row.value);
    }
    for (T const value : values) {
      changes.push_back([option, value](Config& config) {
        for_each_option(config, [&](Option const& row, auto& member) {
          if constexpr (std::is_same_v<T, std::remove_reference_t<decltype(member)>>) {
            if (std::string_view(row.name) == option.name) member = value;
          }
        });
      });
    }
  });
  return changes;
}

/// A configuration that is valid on `arch` with a name that no change of one option or two makes longer.
template <class Config>
Config longest_valid(Config config, Arch arch) {
  auto const changes = changes_of<Config>();
  auto const is_better = [&](Config const& c) {
    return name(c).length > name(config).length && check(c, arch) == decltype(check(c, arch)){};
  };
  for (bool found = true; found;) {
    found = false;
    for (auto const& first : changes) {
      for (auto const& second : changes) {
        Config c = config;
        first(c), second(c);
        if (is_better(c)) config = c, found = true;
      }
    }
  }
  return config;
}

// Guards against a valid configuration whose image cannot be kept because the key with its name exceeds a file name,
// also once names have the words of further features, and against two long names that become one key.
TEST_F(Jit, TheLongestNamesHaveKeys) {
  DiskCache const cache(scratch_ / "cache");
  std::set<std::string> keys;
  auto const expect_key = [&](KernelCode const& code, Arch arch) {
    std::string const key = jit_key(code, arch);
    EXPECT_NO_THROW(cache.find(key)) << key;
    EXPECT_LE(key.size(), 230u - 20u) << "no room for a longer version of the compiler: " << key;
    EXPECT_TRUE(keys.insert(key).second) << key;
    JitKeyParts const parts = parts_of_jit_key(key);
    EXPECT_EQ(parts.kernel.substr(0, 120), code.name.substr(0, 120));
    EXPECT_EQ(parts.kernel == code.name, !parts.kernel.ends_with("-etc")) << key;
    EXPECT_EQ(parts.target, target_of(code, arch));
    EXPECT_EQ(parts.compiler, "NVRTC " + nvrtc_version());
  };
  auto const expect_keys = [&](auto const& kernel, Arch arch) {
    KernelCode const code = code_of(kernel, arch);
    expect_key(code, arch);
    for (std::string const words : {"_one_more_feature", "_one_more_feature_and_another", "_a_feature_of_other_code"}) {
      std::string source = code.source;
      source.replace(source.find(code.name), code.name.size(), code.name + words);
      expect_key({code.name + words, source, code.arch_specific}, arch);
    }
  };
  Features const features{.mask = MaskKind::causal, .count_blocks = true};
  for (auto const& [config, arch] : {std::pair{ForwardConfig{}, 80},
                                     {ForwardConfig{}, 120},
                                     {default_forward_config(DType::bfloat16, 128, 90), 90}}) {
    ForwardConfig const longest = longest_valid(config, arch);
    EXPECT_GT(name(longest).length, 80);
    expect_keys(kernel_of(longest, features), arch);
  }
  for (bool const deterministic : {false, true}) {
    BackwardConfig const longest = longest_valid(BackwardConfig{.deterministic = deterministic}, 120);
    EXPECT_GT(name(longest).length, 70);
    for (BackwardPass const pass : passes_of(longest)) expect_keys(kernel_of(longest, pass, features), 120);
  }
}

// Guards against a limit that is read and not obeyed.
TEST_F(Jit, TheLimitHolds) {
  ScopedVariable const quiet("FLASHCUTE_QUIET", "1");
  ScopedVariable const limit("FLASHCUTE_CACHE_SIZE", "0");
  std::string const first = jit_key({"first", NvrtcTest::kernel("first")}, 80);
  jit_image({"first", NvrtcTest::kernel("first")}, 80);
  EXPECT_TRUE(fs::exists(cached(first)));
  jit_image(kernel(), 80);
  EXPECT_FALSE(fs::exists(cached(first)));
  EXPECT_TRUE(fs::exists(cached(jit_key(kernel(), 80))));
}

// Guards against two images with one name: everything that changes the code changes the key, and paths do not.
TEST_F(Jit, KeyNamesAllThatMatters) {
  std::string const key = jit_key(kernel(), 80);
  EXPECT_TRUE(key.starts_with(kernel().name + ".sm_80.")) << key;
  EXPECT_EQ(jit_key(kernel(), 80), key);
  EXPECT_NE(jit_key(kernel(), 90), key);
  ForwardKernelId other = id();
  other.config.swizzled = false;
  EXPECT_NE(jit_key(code_of(other, 80), 80), key);

  // The hash alone must differ, not only the readable names before it.
  auto const hash = [](std::string const& k) { return k.substr(k.rfind('.')); };
  EXPECT_NE(hash(jit_key(kernel(), 90)), hash(key));
  EXPECT_NE(hash(jit_key(code_of(other, 80), 80)), hash(key));

  fs::rename(scratch_ / "include", scratch_ / "moved");
  set_include_folders({(scratch_ / "moved").string()});
  EXPECT_EQ(jit_key(kernel(), 80), key) << "the place of the headers must not count";
  write_file(scratch_ / "moved/cute/new.hpp", "");
  set_include_folders({(scratch_ / "moved").string()});
  EXPECT_NE(jit_key(kernel(), 80), key) << "the text of the headers must count";
}

// Guards against the toolkit's headers being left out of the key.
TEST_F(Jit, KeyChangesWithTheToolkit) {
  std::string const key = jit_key(kernel(), 80);
  write_file(scratch_ / "another/cuda_fp16.h", "// of another release\n");
  ScopedVariable const another("FLASHCUTE_CUDA_INCLUDE", scratch_ / "another");
  EXPECT_NE(jit_key(kernel(), 80), key);
}

// Guards against compiling behind the back of a user who forbade it, and against a message that gives no way out.
TEST_F(Jit, OffMeansOff) {
  ScopedVariable const off("FLASHCUTE_JIT", "off");
  std::string const message = message_of<UnsupportedError>([] { jit_image(kernel(), 80); });
  EXPECT_TRUE(contains(message, "FLASHCUTE_JIT=off"));
  EXPECT_TRUE(contains(message, "python -m flashcute compile"));
  EXPECT_TRUE(contains(message, kernel().name));
  EXPECT_FALSE(fs::exists(scratch_ / "cache"));
}

// Guards against handing the compiler a kernel that breaks a rule, or none for a GPU.
TEST_F(Jit, RefusesWhatCannotRun) {
  ForwardKernelId bad = id();
  bad.config.num_warps = 3;
  EXPECT_TRUE(contains(message_of<ConfigError>([&] { jit_image(code_of(bad, 80), 80); }), "num_warps must be"));
  EXPECT_THROW(jit_image(code_of(id(), 75), 75), ConfigError);
  EXPECT_THROW(jit_image(code_of(id(), cpu_arch), cpu_arch), ArgumentError);
  EXPECT_THROW(jit_image(kernel(), cpu_arch), ArgumentError);
  set_include_folders({});
  EXPECT_TRUE(contains(message_of<UnsupportedError>([] { jit_image(kernel(), 80); }), "set_search_paths"));
}

// Guards against publishing what a failed compilation left, and against a progress line that stays open.
TEST_F(Jit, AFailedCompilationPublishesNothing) {
  write_file(entry_header(), "#error broken on purpose\n");
  std::string const report = stderr_of([] {
    EXPECT_TRUE(contains(message_of<CompileError>([] { jit_image(kernel(), 80); }), "broken on purpose"));
    if (::testing::Test::HasFailure()) std::abort();
  });
  EXPECT_TRUE(contains(report, " failed after "));
  EXPECT_TRUE(report.ends_with(" s\n")) << report;
  EXPECT_FALSE(fs::exists(cached(jit_key(kernel(), 80))));
}

// Guards against images of new headers under the hash of the old: somebody edits while a long-lived process runs.
TEST_F(Jit, EditedHeadersAreNotPublishedUnderTheOldHash) {
  ScopedVariable const quiet("FLASHCUTE_QUIET", "1");
  std::string const key = jit_key(kernel(), 80);
  write_file(entry_header(), read_file(entry_header()) + "// edited\n");
  EXPECT_TRUE(contains(message_of<CompileError>([] { jit_image(kernel(), 80); }), "have changed"));
  EXPECT_FALSE(fs::exists(cached(key)));
}

// Guards against two lines of progress that run into each other.
TEST_F(Jit, TwoThreadsReportOnLinesOfTheirOwn) {
  std::string const report = stderr_of([] {
    ForwardKernelId other = id();
    other.features.mask = MaskKind::full;
    std::thread thread([&] { jit_image(code_of(other, 80), 80); });
    jit_image(kernel(), 80);
    thread.join();
  });
  std::size_t begin = 0;
  int seconds = 0;
  for (std::size_t end; (end = report.find('\n', begin)) != std::string::npos; begin = end + 1) {
    std::string const line = report.substr(begin, end - begin);
    EXPECT_TRUE(line.starts_with("flashcute: ")) << report;
    EXPECT_EQ(line.find("flashcute: ", 1), std::string::npos) << report;
    seconds += line.ends_with(" s");
  }
  EXPECT_EQ(begin, report.size()) << report;
  EXPECT_EQ(seconds, 2) << report;
}

}  // namespace
}  // namespace flashcute
