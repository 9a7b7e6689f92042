// How the CPU backend uses threads and chooses its code: reproducibility, callers at once, fork, the pool.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cpu/cores.hpp"
#include "cpu/cpu_problem.hpp"
#include "cpu/thread_pool.hpp"
#include "flashcute/error.hpp"
#include "support/scratch.hpp"
#include "system/environment.hpp"

namespace flashcute::testing {
namespace {

// ---- threads -----------------------------------------------------------------------------------------

Shape large(DType dtype = DType::float32) {
  return {.dtype = dtype,
          .head_dim = 32,
          .batch = 2,
          .heads = 3,
          .kv_heads = 3,
          .seqlen_q = 300,
          .seqlen_k = 300,
          .mask = MaskKind::causal};
}

// Results that depend on the number of threads or on timing.
TEST(CpuForward, SameBitsWithAnyNumberOfThreads) {
  for (DType const dtype : all_dtypes) {
    Problem problem{large(dtype)};
    for (Isa const isa : available_isas()) {
      Result const alone = run(isa, problem, 1);
      for (int const threads : {2, 3, 8}) {
        for (int repeat = 0; repeat < 5; ++repeat) ASSERT_TRUE(same_bits(run(isa, problem, threads), alone));
      }
    }
  }
}

// A sequence whose result changes with its batch mates (flash-attention 1897).
TEST(CpuForward, SameBitsAloneAndInABatch) {
  for (DType const dtype : all_dtypes) {
    Shape shape = large(dtype);
    Problem batch{shape};
    shape.batch = 1;
    Problem single{shape};
    Tensor* const to[] = {&single.q, &single.k, &single.v};
    Tensor* const from[] = {&batch.q, &batch.k, &batch.v};
    size_t const bytes = static_cast<size_t>(batch.q.stride().batch * size_of(dtype));
    for (int t = 0; t < 3; ++t) std::memcpy(to[t]->data(), static_cast<char*>(from[t]->data()) + bytes, bytes);
    for (Isa const isa : available_isas()) {
      Result together = run(isa, batch), alone = run(isa, single);
      EXPECT_EQ(0, std::memcmp(alone.out.data(), static_cast<char*>(together.out.data()) + bytes, bytes));
    }
  }
}

// A result that depends on which other rows share the tile: one query alone against the same query among
// others.
TEST(CpuForward, SameBitsForARowAlone) {
  for (DType const dtype : all_dtypes) {
    Shape shape{.dtype = dtype, .head_dim = 40, .heads = 1, .kv_heads = 1, .seqlen_q = 100, .seqlen_k = 150};
    Problem many{shape};
    shape.seqlen_q = 1;
    for (Isa const isa : available_isas()) {
      Result const all = run(isa, many);
      for (int const row : {0, 15, 63, 64, 99}) {
        Problem one{shape};
        one.k = many.k;
        one.v = many.v;
        for (int e = 0; e < 40; ++e) one.q.put(0, 0, 0, e, many.q.at(0, row, 0, e));
        Result const alone = run(isa, one);
        for (int e = 0; e < 40; ++e) ASSERT_EQ(alone.out.at(0, 0, 0, e), all.out.at(0, row, 0, e));
        ASSERT_EQ(alone.lse.at(0, 0, 0, 0), all.lse.at(0, row, 0, 0));
      }
    }
  }
}

// The same of rows that see blocks which their neighbours do not, in sequences so long that blocks are added up in
// groups: where a group ends must not depend on the tile.
TEST(CpuForward, SameBitsForACausalRowAlone) {
  Shape shape{.head_dim = 8,
              .heads = 1,
              .kv_heads = 1,
              .seqlen_q = 64,
              .seqlen_k = 64 * 70,
              .mask = MaskKind::causal,
              .causal_offset = 64 * 64 - 10};
  Problem many{shape};
  shape.seqlen_q = 1;
  for (Isa const isa : available_isas()) {
    Result const all = run(isa, many);
    for (int const row : {0, 9, 10, 63}) {
      shape.causal_offset = 64 * 64 - 10 + row;
      Problem one{shape};
      one.k = many.k;
      one.v = many.v;
      for (int e = 0; e < 8; ++e) one.q.put(0, 0, 0, e, many.q.at(0, row, 0, e));
      Result const alone = run(isa, one);
      for (int e = 0; e < 8; ++e) ASSERT_EQ(alone.out.at(0, 0, 0, e), all.out.at(0, row, 0, e)) << "row " << row;
      ASSERT_EQ(alone.lse.at(0, 0, 0, 0), all.lse.at(0, row, 0, 0));
    }
  }
}

// Threads that are woken for next to nothing: packed sequences counted as if every query met every key of the tensor,
// sequences as if they were as long as the tensor. And large calls on one thread.
TEST(CpuForward, ThreadsForThePairsThatThereAre) {
  auto const threads = [](Shape const& shape, SequenceParams const& sequences) {
    Problem problem{shape};
    ForwardParams p = params_of(problem);
    p.sequences = sequences;
    return cpu::useful_threads(p, 8);
  };
  Shape const shape{.head_dim = 32, .heads = 1, .kv_heads = 1, .seqlen_q = 1000, .seqlen_k = 1000};
  EXPECT_EQ(threads(shape, {}), 8);

  std::vector<int32_t> of_one(1001), of_ten{0, 990, 1000, 1000};
  std::iota(of_one.begin(), of_one.end(), 0);
  SequenceParams packed;
  packed.cu_seqlens_q = packed.cu_seqlens_k = of_one.data();
  packed.count = 1000;
  EXPECT_EQ(threads(shape, packed), 1);
  packed.cu_seqlens_q = packed.cu_seqlens_k = of_ten.data();
  packed.count = 3;
  EXPECT_EQ(threads(shape, packed), 8);

  std::vector<int32_t> const short_ones{7, 0};
  Shape two = shape;
  two.batch = 2;
  SequenceParams padded;
  padded.seqlens_k = short_ones.data();
  EXPECT_EQ(threads(two, padded), 1);
}

// Callers on several threads at once: shared scratch, a pool that serves two jobs as one, a deadlock.
TEST(CpuForward, EightCallersAtOnce) {
  std::vector<Problem> problems;
  std::vector<Result> want;
  Isa const best = cpu::choose_isa("auto");
  for (int i = 0; i < 8; ++i) {
    Shape shape = large(all_dtypes[i % 4]);
    shape.head_dim = 8 + 5 * i;
    problems.emplace_back(shape);
    want.push_back(run(best, problems.back(), 1));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (size_t i = 0; i < 8; ++i) {
    callers.emplace_back([&, i] {
      for (int repeat = 0; repeat < 20; ++repeat) wrong += !same_bits(run(best, problems[i], 4), want[i]);
    });
  }
  for (std::thread& t : callers) t.join();
  EXPECT_EQ(wrong, 0);
}

/// Exit code of `work` in a forked child, or -1 if it hangs or crashes.
int in_child(std::function<int()> const& work) {
  pid_t const child = fork();
  if (child == 0) {
    alarm(60);  // a child that hangs dies by this
    _exit(work());
  }
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// A child of fork that waits for threads which exist only in its parent (as libgomp does): forks before and
// after the parent used its threads, while it uses them, and a grandchild.
TEST(CpuForward, WorksInForkedChildren) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer does not allow threads after a fork";
#endif
  Isa const best = cpu::choose_isa("auto");
  Problem problem{large()};
  Result const want = run(best, problem, 1);
  auto const works = [&] { return same_bits(run(best, problem, 4), want) ? 0 : 1; };

  EXPECT_EQ(in_child([&] { return in_child(works) + works(); }), 0);
  EXPECT_EQ(works(), 0);
  EXPECT_EQ(in_child([&] { return works() + in_child(works) + works(); }), 0);

  std::atomic<bool> stop{false};
  std::thread busy{[&] {
    while (!stop) works();
  }};
  for (int i = 0; i < 20; ++i) EXPECT_EQ(in_child(works), 0);
  stop = true;
  busy.join();
  EXPECT_EQ(works(), 0);
}

// A process that exits while its worker threads sleep: a hang or a crash in static destructors.
TEST(CpuForward, ExitsCleanlyAfterUse) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // in a new process, not in a fork of this one
  Problem problem{large()};
  EXPECT_EXIT(
      {
        alarm(60);
        run(cpu::choose_isa("auto"), problem, 4);
        std::exit(0);
      },
      ::testing::ExitedWithCode(0), "");
}

// ---- the thread pool ---------------------------------------------------------------------------------

// Indices done twice or not at all; a return before all are done.
TEST(ThreadPool, CallsEachIndexOnce) {
  for (int const count : {0, 1, 2, 3, 1000}) {
    for (int const threads : {1, 2, 8}) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(count));
      cpu::parallel_for(count, threads, [&](int64_t i) { ++calls[static_cast<size_t>(i)]; });
      for (std::atomic<int> const& c : calls) ASSERT_EQ(c, 1);
    }
  }
}

// A pool that works on the caller's thread only, or on more threads than it may: every task waits until as
// many are running as there are threads.
TEST(ThreadPool, UsesTheThreadsItMay) {
  for (int const threads : {1, 2, 4}) {
    std::atomic<int> running{0}, most{0};
    std::mutex mutex;
    std::set<std::thread::id> ids;
    cpu::parallel_for(64, threads, [&](int64_t) {
      int const now = ++running;
      for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) continue;
      auto const deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (most < threads && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      {
        std::lock_guard const lock{mutex};
        ids.insert(std::this_thread::get_id());
      }
      --running;
    });
    EXPECT_EQ(most, threads);
    EXPECT_EQ(ids.size(), static_cast<size_t>(threads));
    EXPECT_TRUE(ids.count(std::this_thread::get_id()));
  }
}

// An exception on a worker that ends the process, gets lost, comes after all the remaining work, or leaves
// the pool unusable.
TEST(ThreadPool, PassesExceptionsOn) {
  int started = 0;
  EXPECT_THROW(cpu::parallel_for(100, 1, [&](int64_t) { ++started, throw std::runtime_error("first"); }),
               std::runtime_error);
  EXPECT_EQ(started, 1);
  for (int const threads : {1, 4}) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      auto const failing = [](int64_t i) {
        if (i == 7) throw std::runtime_error("seven");
      };
      EXPECT_THROW(cpu::parallel_for(100, threads, failing), std::runtime_error);
      std::atomic<int> calls{0};
      cpu::parallel_for(100, threads, [&](int64_t) { ++calls; });
      EXPECT_EQ(calls, 100);
    }
  }
}

// A call from inside a task that waits for threads which are all busy.
TEST(ThreadPool, NestedCallsFinish) {
  std::atomic<int> calls{0};
  cpu::parallel_for(16, 4, [&](int64_t) { cpu::parallel_for(16, 4, [&](int64_t) { ++calls; }); });
  EXPECT_EQ(calls, 256);
}

// Workers that spin between calls.
TEST(ThreadPool, SleepsWhenIdle) {
  auto const cpu_time = [] {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  cpu::parallel_for(64, 4, [](int64_t) {});
  double const before = cpu_time();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  EXPECT_LT(cpu_time() - before, 0.05);
}

/// How floats are rounded on this thread, as arithmetic shows it (fegetround tells of x87's registers).
int rounding_now() {
  float const volatile one = 1, tiny = 0x1p-30f;
  if (one + tiny > 1) return FE_UPWARD;
  return one - tiny < 1 ? FE_DOWNWARD : FE_TONEAREST;
}

// Tasks that round as their thread happens to, and a caller whose mode is not given back: the bits would depend on
// which thread gets which tile.
TEST(ThreadPool, TasksRunInTheDefaultFloatingPointMode) {
  cpu::parallel_for(64, 4, [](int64_t) {});  // threads that were started in one mode serve callers in another
  for (int const mode : {FE_UPWARD, FE_DOWNWARD, FE_TONEAREST}) {
    for (int const threads : {1, 4}) {
      ASSERT_EQ(fesetround(mode), 0);
      std::atomic<int> wrong{0};
      cpu::parallel_for(64, threads, [&](int64_t) {
        wrong += rounding_now() != FE_TONEAREST;
        std::this_thread::yield();
      });
      int const after = rounding_now();
      fesetround(FE_TONEAREST);
      EXPECT_EQ(after, mode);
      EXPECT_EQ(wrong, 0) << "mode " << mode << ", " << threads << " threads";
    }
  }
}

// An exception that leaves the caller in another mode than it came with.
TEST(ThreadPool, GivesTheFloatingPointModeBackAfterAnException) {
  ASSERT_EQ(fesetround(FE_DOWNWARD), 0);
  EXPECT_THROW(cpu::parallel_for(4, 1, [](int64_t) { throw std::runtime_error("first"); }), std::runtime_error);
  int const after = rounding_now();
  fesetround(FE_TONEAREST);
  EXPECT_EQ(after, FE_DOWNWARD);
}

// ---- cores -------------------------------------------------------------------------------------------

/// The CPUs of this process, by number.
std::vector<int> own_cpus() {
  cpu::CpuSet const mask = cpu::CpuSet::of_this_thread();
  std::vector<int> all;
  for (int cpu = 0; cpu < 8192; ++cpu) {
    if (mask.has(cpu)) all.push_back(cpu);
  }
  return all;
}

cpu::CpuSet set_of(std::vector<int> const& cpus) {
  cpu::CpuSet set;
  for (int const cpu : cpus) set.add(cpu);
  return set;
}

// Pool threads that keep the mask of the thread that happened to start them, wider or narrower than the caller's.
TEST(Cores, PoolThreadsFollowTheCaller) {
  if (own_cpus().size() < 2) GTEST_SKIP() << "one CPU";
  EXPECT_EQ(in_child([] {
              cpu::CpuSet const all = cpu::CpuSet::of_this_thread(), one = set_of({own_cpus().back()});
              for (cpu::CpuSet const& mask : {all, one, all}) {
                if (!mask.bind_this_thread()) return 2;
                std::atomic<int> present{0}, elsewhere{0};
                cpu::parallel_for(3, 3, [&](int64_t) {
                  ++present;
                  while (present < 3) std::this_thread::yield();  // each task on a thread of its own
                  elsewhere += cpu::CpuSet::of_this_thread() != mask;
                });
                if (elsewhere != 0) return 1;
              }
              return 0;
            }),
            0);
}

/// The fake OpenMP runtime has these places.
void have_places(std::vector<std::vector<int>> const& places) {
  void* const library = dlopen(FLASHCUTE_FAKE_OPENMP, RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(library, nullptr) << dlerror();
  auto const add = reinterpret_cast<void (*)(int const*, int)>(dlsym(library, "fake_openmp_add_place"));
  add(nullptr, 0);
  for (auto const& place : places) add(place.data(), static_cast<int>(place.size()));
}

/// Of the variables that ask OpenMP to pin, this one alone is set.
class OnlyVariable {
 public:
  explicit OnlyVariable(char const* name) {
    for (char const* other : {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_DYNAMIC"}) {
      variables_.push_back(std::make_unique<ScopedVariable>(other, std::string_view(other) == name ? "true" : ""));
    }
  }

 private:
  std::vector<std::unique_ptr<ScopedVariable>> variables_;
};

// OpenMP pins the thread that loads it to one of its places, if a variable asks for it, and one core was all that was
// seen. What the user sets must hold: a mask that is no place, a runtime that was itself started in a narrow mask.
TEST(Cores, OfAThreadThatOpenMpHasPinned) {
  int const own = own_cpus().front(), other = own + 1;
  struct Case {
    char const* variable;
    std::vector<std::vector<int>> places;
    std::vector<int> want;
  };
  std::vector<Case> const cases = {
      {"OMP_PROC_BIND", {{own}, {other}}, {own, other}},
      {"OMP_PLACES", {{other, other + 1}, {own}}, {own, other, other + 1}},
      {"GOMP_CPU_AFFINITY", {{own}, {other}}, {own, other}},
      {"KMP_AFFINITY", {{own}, {8000}}, {own, 8000}},
      {"OMP_PROC_BIND", {{own}}, {own}},                 // the runtime was limited, too
      {"OMP_PROC_BIND", {{own, other}, {8000}}, {own}},  // no place: the user's own mask
      {"OMP_PROC_BIND", {}, {own}},
      {"OMP_DYNAMIC", {{own}, {other}}, {own}},  // nobody asked it to pin
  };
  for (Case const& c : cases) {
    OnlyVariable const asked(c.variable);
    std::thread{[&] {
      std::string const what = std::string(c.variable) + " with " + std::to_string(c.places.size()) + " places";
      have_places(c.places);
      set_of({own}).bind_this_thread();
      EXPECT_EQ(cpu::cores(), set_of(c.want)) << what;
      EXPECT_EQ(cpu::cores(), set_of(c.want)) << what << ", asked again";
      EXPECT_EQ(in_child([&] { return cpu::cores() == set_of(c.want) ? 0 : 1; }), 0) << what << ", after a fork";
      have_places({});
    }}.join();
  }
}

// Guards against a forked child that asks the dynamic loader: another thread of the parent may have held its lock at
// the fork, and the child waits for ever.
TEST(Cores, AForkedChildKnowsWhatItsParentWasTold) {
  int const own = own_cpus().front(), other = own + 1;
  OnlyVariable const asked("OMP_PROC_BIND");
  std::thread{[&] {
    have_places({{own}, {other}});
    set_of({own}).bind_this_thread();
    EXPECT_EQ(cpu::cores(), set_of({own, other}));
    have_places({});
    auto const in_another_thread = [&] {
      int wrong = 1;
      std::thread{[&] { wrong = cpu::cores() == set_of({own, other}) ? 0 : 1; }}.join();  // has the mask, asked nothing
      return wrong;
    };
    EXPECT_EQ(in_child(in_another_thread), 0);
  }}.join();
}

/// A folder that stands for "/".
class FakeRoot {
 public:
  void write(std::string const& file, std::string const& text) {
    std::filesystem::create_directories((folder_.path() / file).parent_path());
    std::ofstream{folder_.path() / file} << text;
  }
  std::optional<int> quota() const { return cpu::cpu_quota(folder_.path()); }

 private:
  Scratch folder_;
};

// A container that may use 2 of the machine's 64 CPUs, and 64 threads that wait for each other in it.
TEST(CpuQuota, OfCgroupV2) {
  FakeRoot root;
  root.write("proc/self/cgroup", "0::/user/worker\n");
  root.write("proc/self/mountinfo",
             "24 30 0:22 / /proc rw,nosuid shared:12 - proc proc rw\n"
             "35 24 0:30 / /sys/fs/cgroup rw,nosuid,nodev shared:9 - cgroup2 cgroup2 rw,nsdelegate\n");
  EXPECT_EQ(root.quota(), std::nullopt);  // the kernel has no such files in the topmost group
  root.write("sys/fs/cgroup/user/worker/cpu.max", "max 100000\n");
  EXPECT_EQ(root.quota(), std::nullopt);
  struct {
    char const* text;
    int cpus;
  } const cases[] = {{"200000 100000\n", 2}, {"150000 100000\n", 2}, {"200001 100000\n", 3},
                     {"1000 100000\n", 1},   {"50000 50000\n", 1},   {"6400000 100000\n", 64}};
  for (auto const& c : cases) {
    root.write("sys/fs/cgroup/user/worker/cpu.max", c.text);
    EXPECT_EQ(root.quota(), c.cpus) << c.text;
  }
  root.write("sys/fs/cgroup/user/cpu.max", "400000 100000\n");  // of a group above
  EXPECT_EQ(root.quota(), 4);
  root.write("sys/fs/cgroup/user/worker/cpu.max", "300000 100000\n");
  EXPECT_EQ(root.quota(), 3);
}

// In a container the mount shows the process's own group as the topmost one, whatever /proc/self/cgroup calls it.
TEST(CpuQuota, InAContainer) {
  for (auto const& [group, mounted] : {std::pair("/", "/"), {"/docker/1a2b", "/docker/1a2b"}, {"/../other", "/"}}) {
    FakeRoot root;
    root.write("proc/self/cgroup", std::string("0::") + group + "\n");
    root.write("proc/self/mountinfo",
               std::string("35 24 0:30 ") + mounted + " /sys/fs/cgroup ro shared:9 - cgroup2 cgroup rw\n");
    root.write("sys/fs/cgroup/cpu.max", "250000 100000\n");
    EXPECT_EQ(root.quota(), 3) << group;
  }
}

TEST(CpuQuota, OfCgroupV1) {
  FakeRoot root;
  root.write("proc/self/cgroup", "5:memory:/m\n4:cpu,cpuacct:/docker/1a2b/inner\n3:cpuset:/c\n0::/\n");
  root.write("proc/self/mountinfo",
             "40 33 0:35 /docker/1a2b /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
             "41 33 0:36 / /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n");
  auto const set = [&](std::string const& group, char const* quota) {
    root.write("sys/fs/cgroup/cpu,cpuacct/" + group + "cpu.cfs_quota_us", quota);
    root.write("sys/fs/cgroup/cpu,cpuacct/" + group + "cpu.cfs_period_us", "100000\n");
  };
  set("inner/", "-1\n");
  EXPECT_EQ(root.quota(), std::nullopt);
  set("", "450000\n");
  EXPECT_EQ(root.quota(), 5);
  set("inner/", "100000\n");
  EXPECT_EQ(root.quota(), 1);
}

// Systems without cgroups, files that say nothing: an exception, or a quota out of thin air.
TEST(CpuQuota, WithoutUsableFiles) {
  FakeRoot root;
  EXPECT_EQ(root.quota(), std::nullopt);
  root.write("proc/self/cgroup", "0:/\n0::/\nnothing\n");
  root.write("proc/self/mountinfo", "nothing\n - \n1 2 - cgroup2 x\n35 24 0:30 / /c rw - cgroup2 cgroup2 rw\n");
  for (char const* text : {"", "\n", "100000\n", "a b\n", "100000 0\n", "-5 100000\n", "99999999999999999999 1\n"}) {
    root.write("c/cpu.max", text);
    EXPECT_EQ(root.quota(), std::nullopt) << text;
  }
}

// ---- choices -----------------------------------------------------------------------------------------

// A misspelt or unavailable instruction set that is ignored.
TEST(CpuDispatch, OnlyAvailableInstructionSetsAreChosen) {
  for (Isa const isa : available_isas()) EXPECT_EQ(cpu::choose_isa(name_of(isa)), isa);
  EXPECT_EQ(cpu::choose_isa("auto"), available_isas().back());
  for (Isa const isa : cpu::all_isas) {
    if (cpu::is_available(isa)) continue;
    EXPECT_THROW(cpu::choose_isa(name_of(isa)), ArgumentError);
  }
  try {
    cpu::choose_isa("avx9");
    FAIL() << "no exception";
  } catch (ArgumentError const& e) {
    for (char const* part : {"FLASHCUTE_CPU_ISA", name_of(available_isas().back()), "avx9"}) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  }
}

// An affinity mask (taskset, a container) that is ignored: too many threads for the CPUs there are.
TEST(CpuDispatch, ThreadsFollowAffinity) {
  EXPECT_EQ(in_child([] {
              cpu_set_t one;
              CPU_ZERO(&one);
              CPU_SET(sched_getcpu(), &one);
              if (sched_setaffinity(0, sizeof(one), &one) != 0) return 2;
              return cpu::available_cpus() == 1 ? 0 : 1;
            }),
            0);
}

// The public entry: the same result as the chosen instruction set gives.
TEST(CpuDispatch, ForwardUsesTheChosenIsa) {
  Problem problem{large()};
  Isa const chosen = cpu::choose_isa(cpu_isa());
  EXPECT_STREQ(cpu::isa(), name_of(chosen));
  EXPECT_EQ(cpu::num_threads(), cpu_threads().value_or(cpu::available_cpus()));
  Result const want = run(chosen, problem, 1);
  Shape const& s = problem.shape;
  Tensor out{s.dtype, s.batch, s.seqlen_q, s.heads, s.head_dim, {}, untouched};
  ForwardParams p = params_of(problem);
  p.out = out.data();
  p.out_stride = out.stride();
  cpu::forward(config_of(s), {s.mask}, p);
  EXPECT_EQ(out.bytes(), want.out.bytes());
}

}  // namespace
}  // namespace flashcute::testing
