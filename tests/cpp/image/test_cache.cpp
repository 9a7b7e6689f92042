// The disk cache of compiled images, and what it stands on: SHA-256, environment variables, hashes of headers.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "flashcute/api.hpp"
#include "flashcute/error.hpp"
#include "image/disk_cache.hpp"
#include "image/header_hash.hpp"
#include "image/sha256.hpp"
#include "image/source.hpp"
#include "support/scratch.hpp"
#include "system/environment.hpp"

namespace flashcute {
namespace {

using namespace flashcute::testing;
using namespace std::chrono_literals;
namespace fs = std::filesystem;

// ---- SHA-256 -------------------------------------------------------------------------------------

// Guards against a wrong constant, rotation or padding: the vectors of FIPS 180-4 and NIST's examples.
TEST(Sha256, NistVectors) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256_hex(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

// Guards against a mistake where a piece ends within, at or beyond a block of 64 bytes.
TEST(Sha256, PiecesDoNotMatter) {
  std::string const text(200, 'x');
  for (std::size_t first = 0; first <= 130; ++first) {
    Sha256 hash;
    hash.update(std::string_view(text).substr(0, first));
    hash.update({});
    hash.update(std::string_view(text).substr(first));
    ASSERT_EQ(hash.hex(), sha256_hex(text)) << first;
  }
}

// Guards against hex() changing the state: it is asked for in the middle and at the end.
TEST(Sha256, HexLeavesTheStateAlone) {
  Sha256 hash;
  hash.update("ab");
  hash.hex();
  hash.update("c");
  EXPECT_EQ(hash.hex(), sha256_hex("abc"));
}

// ---- environment variables -----------------------------------------------------------------------

// Guards against a variable that a getter reads and the printed table lacks, and against duplicates.
TEST(Environment, TableIsComplete) {
  std::set<std::string> names;
  for (Variable const& v : variables()) {
    EXPECT_TRUE(names.insert(v.name).second) << v.name;
    EXPECT_NE(std::string(v.meaning), "");
    EXPECT_NE(std::string(v.default_value), "");
  }
  for (char const* name : {"FLASHCUTE_JIT", "FLASHCUTE_CACHE_DIR", "FLASHCUTE_CACHE_SIZE", "FLASHCUTE_NVRTC",
                           "FLASHCUTE_CUDA_INCLUDE", "FLASHCUTE_NUM_THREADS", "FLASHCUTE_CPU_ISA", "FLASHCUTE_QUIET"}) {
    EXPECT_EQ(names.count(name), 1u) << name;
  }
  EXPECT_THROW(env("FLASHCUTE_JTI"), ArgumentError);
}

// Guards against a misspelt value that is silently taken for the default.
TEST(Environment, BadValuesAreRefused) {
  struct Case {
    char const* name;
    std::vector<std::string> bad;
    char const* allowed;
    std::function<void()> read;
  };
  Case const cases[] = {
      {"FLASHCUTE_JIT", {"of", "ON", "1", " on"}, "on, off, fastest, force", [] { jit_mode(); }},
      {"FLASHCUTE_CPU_ISA", {"avx", "AVX2"}, "auto, baseline, avx2, avx512", [] { cpu_isa(); }},
      {"FLASHCUTE_QUIET", {"yes", "2"}, "0, 1", [] { quiet(); }},
      {"FLASHCUTE_NUM_THREADS", {"0", "-1", "4x", "1025", "99999999999"}, "from 1 to 1024", [] { cpu_threads(); }},
      {"FLASHCUTE_CACHE_SIZE",
       {"-1", "1.5G", "2GB", "2g", "G", " 2", "1 G", "8388608T", "9223372036854775808", "99999999999999999999"},
       "K, M, G or T",
       [] { cache_limit(); }},
      {"FLASHCUTE_CACHE_DIR", {"cache", "~/cache"}, "an absolute path", [] { cache_folder(); }},
  };
  for (Case const& c : cases) {
    for (std::string const& bad : c.bad) {
      ScopedVariable const variable(c.name, bad);
      std::string const message = message_of<ArgumentError>(c.read);
      EXPECT_TRUE(contains(message, c.name));
      EXPECT_TRUE(contains(message, "'" + bad + "'"));
      EXPECT_TRUE(contains(message, c.allowed));
    }
  }
}

// Guards against a good value that is misread; a variable set to nothing counts as not set.
TEST(Environment, GoodValues) {
  auto const with = [](char const* name, std::optional<std::string> const& value, auto read) {
    ScopedVariable const variable(name, value);
    return read();
  };
  for (auto const& unset : {std::optional<std::string>(), std::optional<std::string>("")}) {
    EXPECT_EQ(with("FLASHCUTE_JIT", unset, jit_mode), JitMode::on);
    EXPECT_EQ(with("FLASHCUTE_NUM_THREADS", unset, cpu_threads), std::nullopt);
    EXPECT_EQ(with("FLASHCUTE_CPU_ISA", unset, cpu_isa), "auto");
    EXPECT_EQ(with("FLASHCUTE_CACHE_SIZE", unset, cache_limit), 1073741824u);
    EXPECT_FALSE(with("FLASHCUTE_QUIET", unset, quiet));
  }
  EXPECT_EQ(with("FLASHCUTE_JIT", "on", jit_mode), JitMode::on);
  EXPECT_EQ(with("FLASHCUTE_JIT", "off", jit_mode), JitMode::off);
  EXPECT_EQ(with("FLASHCUTE_JIT", "force", jit_mode), JitMode::force);
  EXPECT_EQ(with("FLASHCUTE_NUM_THREADS", "12", cpu_threads), 12);
  EXPECT_EQ(with("FLASHCUTE_CPU_ISA", "avx512", cpu_isa), "avx512");
  EXPECT_EQ(with("FLASHCUTE_CACHE_SIZE", "0", cache_limit), 0u);
  EXPECT_EQ(with("FLASHCUTE_CACHE_SIZE", "1000", cache_limit), 1000u);
  EXPECT_EQ(with("FLASHCUTE_CACHE_SIZE", "3K", cache_limit), 3072u);
  EXPECT_EQ(with("FLASHCUTE_CACHE_SIZE", "512M", cache_limit), 536870912u);
  EXPECT_EQ(with("FLASHCUTE_CACHE_SIZE", "8388607T", cache_limit), 8388607ull << 40);
  EXPECT_EQ(with("FLASHCUTE_CACHE_SIZE", "9223372036854775807", cache_limit), 9223372036854775807ull);
  EXPECT_TRUE(with("FLASHCUTE_QUIET", "1", quiet));
}

// Guards against a call that reads the environment while another thread sets it: from the snapshot on, it does not.
TEST(Environment, ASnapshotIsOfThisThreadAndOfItsTime) {
  ScopedVariable const threads("FLASHCUTE_NUM_THREADS", "3"), jit("FLASHCUTE_JIT", std::nullopt);
  {
    EnvironmentSnapshot const snapshot;
    ScopedVariable const later("FLASHCUTE_NUM_THREADS", "5"), new_one("FLASHCUTE_JIT", "off");
    EXPECT_EQ(cpu_threads(), 3);
    EXPECT_EQ(jit_mode(), JitMode::on) << "was not set";
    {
      EnvironmentSnapshot const inner;
      EXPECT_EQ(cpu_threads(), 3) << "the environment may be changing";
    }
    EXPECT_EQ(cpu_threads(), 3);
    std::thread{[] { EXPECT_EQ(cpu_threads(), 5); }}.join();
  }
  EXPECT_EQ(cpu_threads(), 3);
  ScopedVariable const longer("FLASHCUTE_NUM_THREADS_AND_MORE", "7"), home("HOME", "/home/somebody");
  EnvironmentSnapshot const snapshot;
  EXPECT_EQ(cpu_threads(), 3) << "one name begins with the other";
  EXPECT_EQ(snapshot.value("HOME"), "/home/somebody");
  EXPECT_EQ(snapshot.value("FLASHCUTE"), "");
}

// Guards against a cache in the current folder, or in another user's, where a variable is missing or relative.
TEST(Environment, CacheFolder) {
  ScopedVariable const home("HOME", "/home/somebody");
  ScopedVariable const none("FLASHCUTE_CACHE_DIR", std::nullopt);
  {
    ScopedVariable const xdg("XDG_CACHE_HOME", "/xdg");
    EXPECT_EQ(cache_folder(), "/xdg/flashcute");
    ScopedVariable const ours("FLASHCUTE_CACHE_DIR", "/ours");
    EXPECT_EQ(cache_folder(), "/ours");
  }
  for (auto const& xdg : {std::optional<std::string>(), std::optional<std::string>("relative")}) {
    ScopedVariable const variable("XDG_CACHE_HOME", xdg);
    EXPECT_EQ(cache_folder(), "/home/somebody/.cache/flashcute");
  }
}

// ---- hashes of headers ---------------------------------------------------------------------------

// Guards against a stale image after a header was edited, renamed, added or moved into a folder.
TEST(HeaderHash, EveryChangeShows) {
  Scratch const scratch;
  std::set<std::string> seen;
  auto const is_new = [&] { return seen.insert(hash_of_contents(scratch.path())).second; };
  EXPECT_TRUE(is_new());
  write_file(scratch / "a/one.hpp", "1");
  EXPECT_TRUE(is_new());
  write_file(scratch / "a/one.hpp", "2");
  EXPECT_TRUE(is_new());
  write_file(scratch / "a/two.hpp", "");
  EXPECT_TRUE(is_new());
  fs::rename(scratch / "a/two.hpp", scratch / "a/three.hpp");
  EXPECT_TRUE(is_new());
  fs::rename(scratch / "a/three.hpp", scratch / "three.hpp");
  EXPECT_TRUE(is_new());
  EXPECT_FALSE(is_new());
}

// Guards against the place of an installation, or a trailing slash, entering the names of images.
TEST(HeaderHash, ThePlaceDoesNotCount) {
  Scratch const one;
  Scratch const two;
  for (Scratch const* s : {&one, &two}) {
    write_file(*s / "b.hpp", "text");
    write_file(*s / "a/c.hpp", "more");
  }
  EXPECT_EQ(hash_of_contents(one.path()), hash_of_contents(two.path()));
  EXPECT_EQ(hash_of_contents(one.path()), hash_of_contents(one.path().string() + "/"));
  EXPECT_EQ(hash_of_sizes(one.path()), hash_of_sizes(two.path()));
  write_file(two / "b.hpp", "longer text");
  EXPECT_NE(hash_of_sizes(one.path()), hash_of_sizes(two.path()));
}

// Guards against a missing folder that hashes like an empty one.
TEST(HeaderHash, MissingFolderIsAnError) {
  Scratch const scratch;
  EXPECT_TRUE(contains(message_of<CompileError>([&] { hash_of_contents(scratch / "none"); }), "none"));
}

// ---- the generated source ------------------------------------------------------------------------

// Guards against an option that is not spelled: the kernel would have its default and another one's name.
TEST(Source, SpellsEveryOption) {
  ForwardKernelId kernel;
  kernel.config = {.dtype = DType::float16,
                   .head_dim = 64,
                   .block_m = 32,
                   .block_n = 16,
                   .num_warps = 2,
                   .swizzled = false,
                   .q_in_registers = true};
  kernel.features.mask = MaskKind::causal;
  std::vector<ForwardKernelId> const kernels = {kernel, ForwardKernelId{}};
  std::string const text = generated_source(kernels);
  EXPECT_TRUE(text.starts_with("#include \"flashcute/sm80/entry.hpp\"\n")) << text;
  EXPECT_TRUE(contains(text, std::string("FLASHCUTE_SM80_FORWARD_ENTRY(") + name(kernel).text + ","));
  EXPECT_TRUE(contains(text, std::string("FLASHCUTE_SM80_FORWARD_ENTRY(") + name(ForwardKernelId{}).text + ","));
  EXPECT_TRUE(contains(text, ".mask = flashcute::MaskKind::causal"));
  EXPECT_TRUE(contains(text, ".dtype = flashcute::DType::float16"));
  EXPECT_TRUE(contains(text, ".swizzled = false"));
  EXPECT_TRUE(contains(text, ".q_in_registers = true"));
  for_each_option(kernel.config, [&](Option const& option, auto) {
    EXPECT_TRUE(contains(text, "." + std::string(option.name) + " = "));
  });
}

// Guards against code that lacks the kernel it is named after, and against code of a kernel that breaks a rule.
TEST(Source, CodeOfOneKernel) {
  ForwardKernelId kernel;
  KernelCode const code = code_of(kernel, 80);
  EXPECT_EQ(code.name, name(kernel).text);
  EXPECT_EQ(code.source, generated_source(std::span(&kernel, 1)));
  std::string const cpu = message_of<ArgumentError>([&] { code_of(kernel, cpu_arch); });
  EXPECT_EQ(cpu, "arch: expected the compute capability of a GPU, such as 80, got 0, the CPU");
  kernel.config.num_warps = 3;
  EXPECT_EQ(message_of<ConfigError>([&] { code_of(kernel, 80); }),
            std::string(name(kernel.config).text) + " for sm_80: num_warps must be 1, 2, 4 or 8");
}

// ---- the disk cache ------------------------------------------------------------------------------

std::string const image =
    "\x7f"
    "ELF and the rest of an image\n with lines\n";

/// The key with a name: as in life, its hash is another for each name.
std::string key_of(std::string const& name) { return name + "." + sha256_hex(name); }

std::string const key = key_of("key");

/// A build that must not run.
std::string never() {
  ADD_FAILURE() << "built again";
  return "wrong";
}

/// A lock that another process holds, as a builder does, until the object ends.
class ForeignLock {
 public:
  explicit ForeignLock(fs::path const& file) {
    int ready[2];
    if (pipe(ready) != 0) throw std::runtime_error("pipe failed");
    holder_ = spawn([&]() -> int {
      int const fd = open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
      char const byte = fd >= 0 && flock(fd, LOCK_EX) == 0 ? 'y' : 'n';
      if (write(ready[1], &byte, 1) != 1) return 1;
      while (true) pause();
    });
    char byte = 'n';
    EXPECT_EQ(read(ready[0], &byte, 1), 1);
    EXPECT_EQ(byte, 'y');
    close(ready[0]);
    close(ready[1]);
  }
  ForeignLock(ForeignLock const&) = delete;
  ForeignLock& operator=(ForeignLock const&) = delete;
  ~ForeignLock() {
    kill(holder_, SIGKILL);
    waitpid(holder_, nullptr, 0);
  }

 private:
  pid_t holder_;
};

class Cache : public ::testing::Test {
 protected:
  fs::path folder() const { return scratch_ / "cache"; }
  fs::path entry(std::string const& of) const { return folder() / (of + ".image"); }
  fs::path lock_file(std::string const& name) const { return folder() / (key_of(name) + ".lock"); }
  DiskCache cache(std::uint64_t limit = DiskCache::no_limit) const { return DiskCache(folder(), limit); }
  void publish(std::string const& of, std::uint64_t limit = DiskCache::no_limit) const {
    cache(limit).get_or_build(of, [] { return image; });
  }

  int files_ending_in(std::string const& suffix) const {
    int count = 0;
    for (auto const& file : fs::directory_iterator(folder())) count += file.path().native().ends_with(suffix);
    return count;
  }

  Scratch scratch_;
  ScopedVariable heard_{"FLASHCUTE_QUIET", std::nullopt};
};

// Guards against an image that differs from what was built, and against a cache that never hits.
TEST_F(Cache, RoundTrip) {
  EXPECT_EQ(cache().find(key), std::nullopt);
  EXPECT_FALSE(fs::exists(folder())) << "looking must not write";
  std::string binary(100'000, '\0');
  for (std::size_t i = 0; i < binary.size(); ++i) binary[i] = static_cast<char>(i * 7);
  bool built = false;
  EXPECT_EQ(cache().get_or_build(key, [&] { return binary; }, &built), binary);
  EXPECT_TRUE(built);
  EXPECT_EQ(cache().get_or_build(key, never, &built), binary);
  EXPECT_FALSE(built);
  EXPECT_EQ(cache().find(key), binary);
  EXPECT_EQ(cache().find(key_of("other")), std::nullopt);
  EXPECT_EQ(files_ending_in(".tmp"), 0);
}

// Guards against images that other users can replace: modes of folders and files, whatever the umask.
TEST_F(Cache, OnlyTheOwnerMayEnter) {
  mode_t const old = umask(0);
  DiskCache(folder() / "deep/er").get_or_build(key, [] { return image; });
  umask(old);
  auto const mode = [](fs::path const& p) { return static_cast<unsigned>(fs::status(p).permissions()); };
  EXPECT_EQ(mode(folder()), 0700u);
  EXPECT_EQ(mode(folder() / "deep"), 0700u);
  EXPECT_EQ(mode(folder() / "deep/er"), 0700u);
  EXPECT_EQ(mode(folder() / "deep/er" / (key + ".image")), 0600u);
}

// Guards against loading what is not exactly the published image (kill in mid-write, full disk, bad disk), and against
// an entry that stays bad for ever.
TEST_F(Cache, DamagedEntriesCountAsAbsentAndAreReplaced) {
  publish(key);
  std::string const good = read_file(entry(key));
  std::vector<std::string> damaged = {"", "\n\n\n\n", "\n\n\n\nimage", good + "x", "x" + good, image};
  for (std::size_t size = 0; size < good.size(); ++size) damaged.push_back(good.substr(0, size));
  for (std::size_t i = 0; i < good.size(); ++i) {
    damaged.push_back(good);
    damaged.back()[i] = static_cast<char>(damaged.back()[i] ^ 1);
  }
  for (std::string const& bytes : damaged) {
    write_file(entry(key), bytes);
    ASSERT_EQ(cache().find(key), std::nullopt) << bytes;
  }
  bool built = false;
  EXPECT_EQ(cache().get_or_build(key, [] { return image; }, &built), image);
  EXPECT_TRUE(built);
  EXPECT_EQ(read_file(entry(key)), good);
}

// Guards against a kernel that runs under another kernel's name because a file was renamed or copied.
TEST_F(Cache, AnotherKeysFileIsRefused) {
  publish(key_of("one"));
  fs::rename(entry(key_of("one")), entry(key_of("two")));
  EXPECT_EQ(cache().find(key_of("two")), std::nullopt);
}

// Guards against images planted by others: a folder that is theirs, or that they can write, is not even read.
TEST_F(Cache, UnsafeFoldersAreRefused) {
  publish(key);
  for (fs::perms const extra : {fs::perms::group_write, fs::perms::others_write}) {
    fs::permissions(folder(), fs::perms::owner_all | extra);
    for (std::string const& wanted : {key, key_of("new")}) {
      EXPECT_THROW(cache().find(wanted), CacheError);
      std::string const message = message_of<CacheError>([&] { cache().get_or_build(wanted, never); });
      EXPECT_TRUE(contains(message, folder().string()));
      EXPECT_TRUE(contains(message, extra == fs::perms::group_write ? "0720" : "0702"));
      EXPECT_TRUE(contains(message, "user " + std::to_string(geteuid())));
      EXPECT_TRUE(contains(message, "FLASHCUTE_CACHE_DIR"));
    }
  }
  fs::permissions(folder(), fs::perms::owner_all);
  EXPECT_EQ(cache().find(key), image);

  fs::path theirs = "/usr";  // root's, where we are not root
  if (geteuid() == 0) {
    theirs = scratch_ / "theirs";
    fs::create_directory(theirs);
    ASSERT_EQ(chown(theirs.c_str(), 12345, 12345), 0);
  }
  std::string const message = message_of<CacheError>([&] { DiskCache(theirs).get_or_build(key, never); });
  EXPECT_TRUE(contains(message, "belongs to user " + std::string(geteuid() == 0 ? "12345" : "0")));
}

// Guards against a planted entry that outlived a correction of the folder's mode.
TEST_F(Cache, WritableEntriesAreRefused) {
  publish(key);
  fs::permissions(entry(key), fs::perms::owner_read | fs::perms::owner_write | fs::perms::others_write);
  EXPECT_EQ(cache().find(key), std::nullopt);
}

// Guards against being led to a file elsewhere, or stopped for ever by something that is no file.
TEST_F(Cache, OnlyPlainFilesAreEntries) {
  publish(key);
  fs::path const elsewhere = scratch_ / "elsewhere";
  fs::rename(entry(key), elsewhere);
  fs::create_symlink(elsewhere, entry(key));
  EXPECT_EQ(cache().find(key), std::nullopt);
  publish(key);
  EXPECT_FALSE(fs::is_symlink(entry(key))) << "publishing must replace the link, not write through it";

  fs::remove(entry(key));
  ASSERT_EQ(mkfifo(entry(key).c_str(), 0600), 0);
  EXPECT_EQ(cache().find(key), std::nullopt);
  publish(key);
  EXPECT_EQ(cache().find(key), image);
}

// Guards against a key that is left locked, or an entry that is left, when the build fails.
TEST_F(Cache, AThrowingBuildLeavesNothing) {
  auto const failing = []() -> std::string { throw CompileError("syntax error"); };
  bool built = false;
  EXPECT_EQ(message_of<CompileError>([&] { cache().get_or_build(key, failing, &built); }), "syntax error");
  EXPECT_TRUE(built);
  EXPECT_EQ(files_ending_in(".image") + files_ending_in(".tmp"), 0);
  publish(key);
  EXPECT_EQ(cache().find(key), image);
}

// Guards against an empty image, which the compiler hands out after a failure, being kept for everybody.
TEST_F(Cache, AnEmptyImageIsAnError) {
  std::string const message = message_of<CompileError>([&] { cache().get_or_build(key, [] { return ""; }); });
  EXPECT_TRUE(contains(message, key));
  EXPECT_EQ(files_ending_in(".image") + files_ending_in(".tmp"), 0);
}

// Guards against a key that leaves the folder, names another key's files or exceeds a file name.
TEST_F(Cache, KeysAreValidated) {
  std::string const hash = key.substr(key.rfind('.'));
  for (std::string const name : {"", ".", "..", ".hidden", "a/b", "../a", "A", "a b", "a\n", "ä"}) {
    EXPECT_THROW(cache().find(name + hash), ArgumentError) << name;
    EXPECT_THROW(cache().get_or_build(name + hash, never), ArgumentError) << name;
  }
  std::string const short_hash = hash.substr(0, 64), no_digit = short_hash + "g", no_dot = hash.substr(1) + "a";
  for (std::string const& end : {std::string(), no_digit, no_dot, short_hash, hash + ".image"}) {
    EXPECT_THROW(cache().find("key" + end), ArgumentError) << end;
  }
  EXPECT_THROW(cache().find(std::string("a\0b", 3) + hash), ArgumentError);
  EXPECT_THROW(cache().find(std::string(231 - hash.size(), 'a') + hash), ArgumentError);
  EXPECT_FALSE(fs::exists(folder()));
  std::string const longest(230 - hash.size(), 'a');
  for (char const* name : {longest.c_str(), "a", "a.image", "a.lock", "a.tmp", "0-_.9"}) {
    publish(name + hash);
    EXPECT_EQ(cache().find(name + hash), image) << name;
  }
}

// Guards against a cold start that compiles once per process: 16 processes, one build.
TEST_F(Cache, SixteenProcessesBuildOnce) {
  std::string const log = scratch_ / "builds";
  fs::path const go = scratch_ / "go";
  std::vector<pid_t> children;
  for (int i = 0; i < 16; ++i) {
    children.push_back(spawn([&] {
      while (!fs::exists(go)) std::this_thread::sleep_for(1ms);
      std::string const got = cache().get_or_build(key, [&] {
        std::ofstream(log, std::ios::app) << "built\n" << std::flush;
        std::this_thread::sleep_for(200ms);  // long enough for all others to wait
        return image;
      });
      return got == image ? 0 : 1;
    }));
  }
  write_file(go, "");
  for (pid_t const child : children) EXPECT_EQ(exit_code(child), 0);
  EXPECT_EQ(read_file(log), "built\n");
  EXPECT_EQ(files_ending_in(".tmp"), 0);
}

// Guards against threads that share one lock: flock belongs to an open file, and each call opens its own.
TEST_F(Cache, ThreadsBuildOnce) {
  std::atomic<int> builds = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      EXPECT_EQ(cache().get_or_build(key,
                                     [&] {
                                       ++builds;
                                       std::this_thread::sleep_for(100ms);
                                       return image;
                                     }),
                image);
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(builds, 1);
}

// Guards against building again what was published between the first look and the lock: all start at once and builds
// take no time, so that for some of the keys a thread comes in between.
TEST_F(Cache, ThreadsLookAgainAfterTheLock) {
  std::atomic<int> builds = 0;
  std::vector<std::thread> threads;
  constexpr int keys = 500;
  std::barrier start(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < keys; ++k) {
        start.arrive_and_wait();
        cache().get_or_build(key_of(std::to_string(k)), [&] {
          ++builds;
          return image;
        });
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(builds, keys);
}

// Guards against one lock for all keys: each build waits until the other one runs.
TEST_F(Cache, DifferentKeysBuildAtTheSameTime) {
  std::mutex mutex;
  std::condition_variable changed;
  int running = 0;
  auto const build = [&] {
    std::unique_lock lock(mutex);
    ++running;
    changed.notify_all();
    EXPECT_TRUE(changed.wait_for(lock, 20s, [&] { return running == 2; }));
    return image;
  };
  std::thread other([&] { cache().get_or_build(key_of("two"), build); });
  cache().get_or_build(key_of("one"), build);
  other.join();
}

/// Blocks until SIGKILL.
[[noreturn]] void wait_for_death() {
  while (true) pause();
}

void kill_and_reap(pid_t child) {
  kill(child, SIGKILL);
  int status = 0;
  waitpid(child, &status, 0);
}

void wait_until_exists(fs::path const& file) {
  auto const deadline = std::chrono::steady_clock::now() + 20s;
  while (!fs::exists(file) && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(1ms);
  ASSERT_TRUE(fs::exists(file)) << file;
}

// Guards against a key that stays blocked after its builder was killed while compiling.
TEST_F(Cache, AKilledBuilderBlocksNobody) {
  fs::path const building = scratch_ / "building";
  pid_t const child = spawn([&]() -> int {
    cache().get_or_build(key, [&]() -> std::string {
      write_file(building, "");
      wait_for_death();
    });
    return 1;
  });
  wait_until_exists(building);
  kill_and_reap(child);
  auto const start = std::chrono::steady_clock::now();
  publish(key);
  EXPECT_LT(std::chrono::steady_clock::now() - start, 10s);
  EXPECT_EQ(cache().find(key), image);
}

// Guards against rubbish of writers killed between writing and renaming: it must neither count as an entry nor pile up.
// What a live writer is about to rename must stay: a young file, and that of a stopped process, which holds the lock.
TEST_F(Cache, TemporariesOfDeadWritersAreRemoved) {
  publish(key_of("first"));
  fs::path const old = folder() / (key + ".0123456789abcdef.tmp");
  fs::path const young = folder() / (key + ".1123456789abcdef.tmp");
  fs::path const locked = folder() / (key_of("locked") + ".0123456789abcdef.tmp");
  for (fs::path const& file : {old, young, locked}) write_file(file, "half an im");
  for (fs::path const& file : {old, locked}) fs::last_write_time(file, fs::file_time_type::clock::now() - 2h);
  EXPECT_EQ(cache().find(key), std::nullopt);
  {
    ForeignLock const lock(lock_file("locked"));
    publish(key);
    EXPECT_EQ(cache().find(key), image);
    EXPECT_FALSE(fs::exists(old));
    EXPECT_TRUE(fs::exists(young));
    EXPECT_TRUE(fs::exists(locked));
  }
  publish(key_of("second"));
  EXPECT_FALSE(fs::exists(locked));
}

// Guards against a lock that a forked child (a data loader, say) keeps alive after the builder released it.
TEST_F(Cache, AForkedChildDoesNotKeepTheLock) {
  pid_t child = 0;
  auto const forks_and_fails = [&]() -> std::string {
    child = spawn([]() -> int { wait_for_death(); });
    throw CompileError("failed");
  };
  EXPECT_THROW(cache().get_or_build(key, forks_and_fails), CompileError);
  auto const start = std::chrono::steady_clock::now();
  publish(key);
  EXPECT_LT(std::chrono::steady_clock::now() - start, 10s);
  kill_and_reap(child);
}

// Guards against waiting for ever when the builder is killed and such a child lives on: patience ends, and we build.
TEST_F(Cache, PatienceEnds) {
  fs::path const building = scratch_ / "building";
  pid_t const parent = spawn([&]() -> int {
    cache().get_or_build(key, [&]() -> std::string {
      pid_t const child = spawn([]() -> int { wait_for_death(); });
      write_file(scratch_ / "pid", std::to_string(child));
      write_file(building, "");
      wait_for_death();
    });
    return 1;
  });
  wait_until_exists(building);
  kill_and_reap(parent);
  bool built = false;
  EXPECT_EQ(DiskCache(folder(), DiskCache::no_limit, 300ms).get_or_build(key, [] { return image; }, &built), image);
  EXPECT_TRUE(built);
  EXPECT_EQ(cache().find(key), image);
  kill(static_cast<pid_t>(std::stol(read_file(scratch_ / "pid"))), SIGKILL);
}

// Guards against a waiter that holds out for the lock although the image is there.
TEST_F(Cache, AWaiterTakesThePublishedImage) {
  fs::path const building = scratch_ / "building";
  pid_t const child = spawn([&]() -> int {
    cache().get_or_build(key, [&]() -> std::string {
      write_file(building, "");
      wait_for_death();
    });
    return 1;
  });
  wait_until_exists(building);
  std::thread publisher([&] {
    std::this_thread::sleep_for(100ms);
    DiskCache(folder(), DiskCache::no_limit, 0ms).get_or_build(key, [] {
      return image;
    });  // one without patience for the lock
  });
  EXPECT_EQ(cache().get_or_build(key, never), image);
  publisher.join();
  kill_and_reap(child);
}

// Guards against losing a compiled image because it cannot be stored, and against silence or noise about it. A folder
// below a plain file cannot be made by root either.
TEST_F(Cache, WithoutAFolderItWorksFromMemory) {
  write_file(scratch_ / "file", "");
  auto const twice = [&] {
    for (int i = 0; i < 2; ++i) {
      DiskCache const nowhere(scratch_ / "file/cache");
      bool built = false;
      if (nowhere.find(key) || nowhere.get_or_build(key, [] { return image; }, &built) != image || !built) abort();
    }
  };
  std::string const report = stderr_of(twice);
  EXPECT_TRUE(contains(report, (scratch_ / "file/cache").string()));
  EXPECT_TRUE(contains(report, "FLASHCUTE_CACHE_DIR"));
  EXPECT_EQ(std::count(report.begin(), report.end(), '\n'), 1) << report;
  ScopedVariable const variable("FLASHCUTE_QUIET", "1");
  EXPECT_EQ(stderr_of(twice), "");
}

// Guards against a user without a home folder (a container's random uid), for whom the folder is "".
TEST_F(Cache, WithoutAHomeItWorksFromMemory) {
  std::string const report = stderr_of([] {
    if (DiskCache("").get_or_build(key, [] { return image; }) != image) abort();
  });
  EXPECT_TRUE(contains(report, "without a home folder"));
}

// Guards against a read-only cache (an installed one, or a full quota) being useless: it is read, and new images come
// from memory. A child without root's privileges tries it.
TEST_F(Cache, AReadOnlyFolderIsRead) {
  publish(key);
  if (geteuid() == 0) {
    for (fs::path const& p : {scratch_.path(), folder(), entry(key)}) ASSERT_EQ(chown(p.c_str(), 65534, 65534), 0);
  }
  fs::permissions(folder(), fs::perms::owner_read | fs::perms::owner_exec);
  std::string const report = stderr_of([&] {
    if (geteuid() == 0 && setuid(65534) != 0) abort();
    if (cache().get_or_build(key, never) != image) abort();
    bool built = false;
    if (cache().get_or_build(key_of("new"), [] { return image; }, &built) != image || !built) abort();
  });
  fs::permissions(folder(), fs::perms::owner_all);
  EXPECT_TRUE(contains(report, "cannot be kept in " + folder().string()));
  EXPECT_FALSE(fs::exists(entry(key_of("new"))));
}

// Guards against half an entry when the disk fills up while it is written: a limit on the size of files stands in.
TEST_F(Cache, AFullDiskLeavesNoHalfEntry) {
  std::string const large(100'000, 'x');
  std::string const report = stderr_of([&] {
    signal(SIGXFSZ, SIG_IGN);
    rlimit const limit{50'000, 50'000};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) abort();
    if (cache().get_or_build(key, [&] { return large; }) != large) abort();
  });
  EXPECT_TRUE(contains(report, "cannot be kept"));
  EXPECT_EQ(files_ending_in(".image") + files_ending_in(".tmp"), 0);
}

// Guards against a failure when somebody clears the cache while an image is being built.
TEST_F(Cache, TheFolderMayVanishWhileBuilding) {
  std::string const got = cache().get_or_build(key, [&] {
    fs::remove_all(folder());
    return image;
  });
  EXPECT_EQ(got, image);
  EXPECT_EQ(cache().find(key), image);
}

// ---- the limit of the disk cache -----------------------------------------------------------------

/// A cache with room for two images of one size, whose entries the tests make in order of age.
class CacheLimit : public Cache {
 protected:
  /// Published so many minutes ago.
  void publish_old(std::string const& name, int minutes, std::string const& bytes = image) const {
    cache().get_or_build(key_of(name), [&] { return bytes; });
    age(name, minutes);
  }

  void age(std::string const& name, int minutes) const {
    fs::last_write_time(entry(key_of(name)), fs::file_time_type::clock::now() - std::chrono::minutes(minutes));
  }

  /// Room for so many of the images that publish() makes, whose entries differ by the length of their names.
  std::uint64_t room_for(int count) const {
    publish(key_of("probe"));
    std::uint64_t const size = fs::file_size(entry(key_of("probe")));
    fs::remove(entry(key_of("probe")));
    return static_cast<std::uint64_t>(count) * (size + 10);
  }

  bool kept(std::string const& name) const { return fs::exists(entry(key_of(name))); }

  /// Names of the entries that are there, in alphabetical order.
  std::string all_kept() const {
    std::set<std::string> names;
    for (auto const& listed : cache().entries()) names.insert(listed.key.substr(0, listed.key.find('.')));
    std::string text;
    for (std::string const& name : names) text += (text.empty() ? "" : " ") + name;
    return text;
  }
};

// Guards against a cache that grows for ever, that throws out what is in use instead of what is not, or more than it
// must.
TEST_F(CacheLimit, TheLeastRecentlyUsedGo) {
  std::uint64_t const limit = room_for(3);
  publish_old("a", 40);
  publish_old("b", 30);
  publish_old("c", 20);
  publish_old("d", 10);
  EXPECT_EQ(all_kept(), "a b c d");
  EXPECT_EQ(cache(limit).find(key_of("a")), image);  // which is now the most recently used
  std::this_thread::sleep_for(30ms);                 // the kernel's clock for files may tick every 10 ms
  EXPECT_EQ(cache(limit).get_or_build(key_of("b"), never), image);
  EXPECT_EQ(all_kept(), "a b c d") << "only publishing removes";
  std::this_thread::sleep_for(30ms);
  publish(key_of("e"), limit);
  EXPECT_EQ(all_kept(), "a b e");
  publish(key_of("f"), limit);
  EXPECT_FALSE(kept("a"));
  EXPECT_EQ(all_kept(), "b e f");
}

// Guards against a use that is not recorded where files are read-only, and against one of a damaged entry.
TEST_F(CacheLimit, EveryUseIsRecorded) {
  auto const used_now = [&] { return fs::last_write_time(entry(key)) > fs::file_time_type::clock::now() - 1min; };
  publish_old("key", 10);
  fs::permissions(entry(key), fs::perms::owner_read);
  EXPECT_EQ(cache().find(key), image);
  EXPECT_TRUE(used_now());
  age("key", 10);
  cache().check();
  cache().entries();
  EXPECT_FALSE(used_now()) << "looking after the cache is no use of an image";
  fs::permissions(entry(key), fs::perms::owner_read | fs::perms::owner_write);
  write_file(entry(key), "damaged");
  age("key", 10);
  EXPECT_EQ(cache().find(key), std::nullopt);
  EXPECT_FALSE(used_now());
}

// Guards against the image that somebody just waited for being thrown out: with the limit 0, or as the oldest by a
// clock that was set back, or alone too large.
TEST_F(CacheLimit, TheImageJustPublishedStays) {
  publish_old("a", 10);
  publish_old("future", -100);
  publish(key_of("b"), 0);
  EXPECT_EQ(all_kept(), "b");
  publish(key_of("c"), 0);
  EXPECT_EQ(all_kept(), "c");
  EXPECT_EQ(cache(0).get_or_build(key_of("c"), never), image);
}

// Guards against a limit that counts files instead of bytes.
TEST_F(CacheLimit, BytesAreCounted) {
  publish_old("large", 10, std::string(100'000, 'x'));
  publish_old("small", 20);
  publish_old("tiny", 30, "x");
  publish(key_of("new"), 100'000);
  EXPECT_EQ(all_kept(), "new") << "small and tiny are older, and large alone with new is too much";
  publish_old("large", 20, std::string(100'000, 'x'));
  publish_old("small", 10);
  publish(key_of("more"), 100'000);
  EXPECT_EQ(all_kept(), "more new small");
}

// Guards against removing what another process is about to read or publish, against waiting for it, and against a total
// that then stays too large though others could go.
TEST_F(CacheLimit, LockedEntriesStay) {
  std::uint64_t const limit = room_for(2);
  publish_old("a", 30);
  publish_old("b", 20);
  {
    ForeignLock const lock(lock_file("a"));
    auto const start = std::chrono::steady_clock::now();
    publish(key_of("c"), limit);
    EXPECT_LT(std::chrono::steady_clock::now() - start, 10s);
    EXPECT_EQ(all_kept(), "a c");
    EXPECT_TRUE(fs::exists(lock_file("a")));
  }
  publish(key_of("d"), limit);
  EXPECT_EQ(all_kept(), "c d");
}

// Guards against touching what is not the cache's: the user may have named a folder with other files. Their names come
// close to those of entries, locks and temporaries.
TEST_F(CacheLimit, ForeignFilesAreNotTouched) {
  std::string const hash = key.substr(key.rfind('.'));
  std::vector<std::string> const names = {"disk.image",
                                          "poetry.lock",
                                          "download.tmp",
                                          "notes",
                                          key,
                                          key + ".image.old",
                                          "Upper" + hash + ".image",
                                          hash + ".image",
                                          key + ".1234.tmp",
                                          "a b" + hash + ".lock",
                                          "x.tmp",
                                          "0123456789abcdef.tmp"};
  for (std::string const& name : names) {
    write_file(folder() / name, std::string(1000, 'f'));
    fs::last_write_time(folder() / name, fs::file_time_type::clock::now() - 48h);
  }
  fs::permissions(folder(), fs::perms::owner_all);
  fs::create_directory(entry(key_of("folder")));
  write_file(scratch_ / "elsewhere", "linked");
  fs::create_symlink(scratch_ / "elsewhere", entry(key_of("link")));

  publish_old("a", 10);
  std::uint64_t const limit = room_for(2);  // the foreign files have more bytes
  publish(key_of("b"), limit);
  EXPECT_EQ(all_kept(), "a b");
  publish(key_of("c"), 0);
  EXPECT_EQ(cache().check().size(), 1u);
  EXPECT_EQ(cache().clear().size(), 1u);
  for (std::string const& name : names) EXPECT_EQ(read_file(folder() / name), std::string(1000, 'f')) << name;
  EXPECT_TRUE(fs::is_directory(entry(key_of("folder"))));
  EXPECT_TRUE(fs::is_symlink(entry(key_of("link"))));
  EXPECT_EQ(read_file(scratch_ / "elsewhere"), "linked");
}

// Guards against processes that remove and publish at the same time: an error, a wrong or missing image, a lock that
// two hold because its file was removed under one of them, a cache that is over its limit in the end, and files that
// are left.
TEST_F(CacheLimit, ProcessesPublishAndRemoveAtTheSameTime) {
  std::uint64_t const limit = room_for(3);
  std::vector<pid_t> children;
  for (int i = 0; i < 8; ++i) {
    children.push_back(spawn([&] {
      for (int round = 0; round < 200; ++round) {
        std::string const name = std::to_string((i * 7 + round) % 10);
        std::string const got = cache(limit).get_or_build(key_of(name), [&] {
          // Whoever holds the lock is alone here.
          int const fd = open((scratch_ / name).c_str(), O_WRONLY | O_CREAT | O_EXCL, 0600);
          if (fd < 0) throw std::runtime_error("two build " + name + " at once");
          close(fd);
          std::this_thread::sleep_for(100us);
          fs::remove(scratch_ / name);
          return image + name;
        });
        if (got != image + name) return 1;
      }
      return 0;
    }));
  }
  for (pid_t const child : children) EXPECT_EQ(exit_code(child), 0);
  publish(key_of("last"), limit);
  std::uint64_t total = 0;
  for (auto const& listed : cache().entries()) total += listed.size;
  EXPECT_LE(total, limit);
  EXPECT_EQ(files_ending_in(".tmp") + files_ending_in(".lock"), 0);
}

// Guards against a lock whose file its holder removed: a process that waits for that file must not take it for the lock
// while another holds the new one, and must not wait for it for ever.
TEST_F(CacheLimit, ARemovedLockFileIsNoLock) {
  fs::create_directory(folder());
  fs::permissions(folder(), fs::perms::owner_all);
  {
    ForeignLock const removed(lock_file("key"));
    std::thread waiter([&] {
      DiskCache(folder(), DiskCache::no_limit, 5s).get_or_build(key, [&] {
        EXPECT_TRUE(fs::exists(lock_file("key"))) << "built when patience ended, without a lock";
        return image;
      });
    });
    std::this_thread::sleep_for(50ms);  // it waits for the file that is there now
    fs::remove(lock_file("key"));
    waiter.join();  // although the removed file is still locked
  }
  EXPECT_EQ(cache().find(key), image);
}

// Guards against lock files that pile up: one that is left by a killed process goes, and no call leaves its own.
TEST_F(CacheLimit, LockFilesDoNotPileUp) {
  publish(key_of("a"));
  EXPECT_EQ(files_ending_in(".lock"), 0);
  EXPECT_THROW(cache().get_or_build(key, []() -> std::string { throw CompileError("failed"); }), CompileError);
  EXPECT_EQ(files_ending_in(".lock"), 0);
  write_file(lock_file("killed"), "");
  ForeignLock const lock(lock_file("alive"));
  publish(key_of("b"));
  EXPECT_FALSE(fs::exists(lock_file("killed")));
  EXPECT_TRUE(fs::exists(lock_file("alive")));
}

// Guards against an exception, or a lost image, because something cannot be removed: the folder becomes read-only while
// the image is compiled. A child without root's privileges tries it.
TEST_F(CacheLimit, WhatCannotBeRemovedIsNoError) {
  publish_old("a", 10);
  if (geteuid() == 0) {
    for (fs::path const& p : {scratch_.path(), folder(), entry(key_of("a"))}) {
      ASSERT_EQ(chown(p.c_str(), 65534, 65534), 0);
    }
  }
  stderr_of([&] {
    if (geteuid() == 0 && setuid(65534) != 0) abort();
    std::string const got = cache(0).get_or_build(key_of("b"), [&] {
      fs::permissions(folder(), fs::perms::owner_read | fs::perms::owner_exec);
      return image;
    });
    if (got != image) abort();
    auto const cleared = cache().clear();
    if (cleared.size() != 1 || cleared[0].second != DiskCache::Outcome::failed) abort();
    if (cache().find(key_of("a")) != image) abort();
  });
  fs::permissions(folder(), fs::perms::owner_all);
  EXPECT_TRUE(kept("a"));
  EXPECT_FALSE(kept("b"));
}

// ---- looking after the disk cache ----------------------------------------------------------------

// Guards against a list in another order than that in which images go, with a wrong size or time, or with a folder that
// was made by looking.
TEST_F(CacheLimit, EntriesAreListed) {
  EXPECT_TRUE(cache().entries().empty());
  EXPECT_FALSE(fs::exists(folder()));
  publish_old("a", 10);
  publish_old("b", 30);
  publish_old("c", 20);
  auto const listed = cache().entries();
  ASSERT_EQ(listed.size(), 3u);
  EXPECT_EQ(listed[0].key, key_of("a"));
  EXPECT_EQ(listed[1].key, key_of("c"));
  EXPECT_EQ(listed[2].key, key_of("b"));
  EXPECT_EQ(listed[0].size, fs::file_size(entry(key_of("a"))));
  auto const now = std::chrono::system_clock::now().time_since_epoch();
  auto const age = now - std::chrono::nanoseconds(listed[2].last_used);
  EXPECT_GT(age, 29min);
  EXPECT_LT(age, 40min);
}

// Guards against damage that stays, against whole images that go, and against touching what another process replaces.
TEST_F(CacheLimit, CheckRemovesTheDamaged) {
  for (char const* name : {"whole", "empty", "flipped", "theirs", "locked"}) publish(key_of(name));
  std::string bytes = read_file(entry(key_of("flipped")));
  bytes[bytes.size() / 2] ^= 1;
  write_file(entry(key_of("flipped")), bytes);
  write_file(entry(key_of("empty")), "");
  write_file(entry(key_of("locked")), "damaged");
  fs::permissions(entry(key_of("theirs")), fs::perms::owner_all | fs::perms::others_write);
  ForeignLock const lock(lock_file("locked"));
  std::map<std::string, DiskCache::Outcome> outcomes;
  for (auto const& [checked, outcome] : cache().check()) outcomes[checked.key] = outcome;
  EXPECT_EQ(outcomes.size(), 5u);
  EXPECT_EQ(outcomes[key_of("whole")], DiskCache::Outcome::whole);
  EXPECT_EQ(outcomes[key_of("empty")], DiskCache::Outcome::removed);
  EXPECT_EQ(outcomes[key_of("flipped")], DiskCache::Outcome::removed);
  EXPECT_EQ(outcomes[key_of("theirs")], DiskCache::Outcome::removed);
  EXPECT_EQ(outcomes[key_of("locked")], DiskCache::Outcome::in_use);
  EXPECT_EQ(all_kept(), "locked whole");
}

// Guards against an entry that is left, one of another process that goes, and against rubbish that is left.
TEST_F(CacheLimit, ClearRemovesAllButTheLocked) {
  EXPECT_TRUE(cache().clear().empty());
  for (char const* name : {"a", "b", "c"}) publish(key_of(name));
  write_file(lock_file("killed"), "");
  std::map<std::string, DiskCache::Outcome> outcomes;
  {
    ForeignLock const lock(lock_file("b"));
    for (auto const& [cleared, outcome] : cache().clear()) outcomes[cleared.key] = outcome;
  }
  EXPECT_EQ(outcomes.size(), 3u);
  EXPECT_EQ(outcomes[key_of("a")], DiskCache::Outcome::removed);
  EXPECT_EQ(outcomes[key_of("b")], DiskCache::Outcome::in_use);
  EXPECT_EQ(outcomes[key_of("c")], DiskCache::Outcome::removed);
  EXPECT_EQ(all_kept(), "b");
  EXPECT_FALSE(fs::exists(lock_file("killed")));
  cache().clear();
  EXPECT_TRUE(fs::is_empty(folder()));
}

// Guards against removing, at the wish of whoever can write into the folder, and against "nothing is there" where it
// cannot be read.
TEST_F(CacheLimit, UnsafeAndUnreadableFoldersAreErrors) {
  publish(key);
  fs::permissions(folder(), fs::perms::owner_all | fs::perms::others_write);
  EXPECT_THROW(cache().entries(), CacheError);
  EXPECT_THROW(cache().check(), CacheError);
  EXPECT_THROW(cache().clear(), CacheError);
  EXPECT_TRUE(fs::exists(entry(key)));
  write_file(scratch_ / "file", "");
  std::string const message = message_of<CacheError>([&] { DiskCache(scratch_ / "file/cache").entries(); });
  EXPECT_TRUE(contains(message, (scratch_ / "file/cache").string()));
  EXPECT_TRUE(DiskCache("").entries().empty()) << "without a home folder there is no cache";
}

}  // namespace
}  // namespace flashcute
