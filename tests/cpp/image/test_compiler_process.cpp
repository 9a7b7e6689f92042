// Kernels that are compiled in processes of their own: what the processes inherit, how they may end, how many there
// are.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "flashcute/api.hpp"
#include "flashcute/error.hpp"
#include "image/compile_jobs.hpp"
#include "image/compiler_process.hpp"
#include "image/jit.hpp"
#include "image/message.hpp"
#include "image/workers.hpp"
#include "support/scratch.hpp"

namespace flashcute {
namespace {

using namespace testing;

// ---- what the processes tell each other ----------------------------------------------------------

// Guards against an answer that was cut off and is taken for a whole one.
TEST(Message, ComesWholeOrNotAtAll) {
  std::vector<std::string> const texts{"", "one", std::string("a\0:3:", 5), "\n"};
  std::string const message = packed(texts);
  EXPECT_EQ(unpacked(message), texts);
  EXPECT_EQ(unpacked(""), std::vector<std::string>());
  for (std::size_t size = 1; size < message.size(); ++size) {
    auto const parts = unpacked(std::string_view(message).substr(0, size));
    EXPECT_TRUE(!parts || parts->size() < texts.size()) << size;
  }
  for (char const* broken : {"3:ab", "x", "3", ":", "-1:", "99999999999999999999999:a"}) {
    EXPECT_EQ(unpacked(broken), std::nullopt) << broken;
  }
}

// ---- a process -----------------------------------------------------------------------------------

class CompilerProcess : public ::testing::Test {
 protected:
  void SetUp() override { set_compiler_program(FLASHCUTE_FAKE_COMPILER); }

  static CompileRequest request(std::string const& what) { return {"some_kernel", "source", "sm_80", {}, {what}}; }

  /// The image, or "none: " and why the process could not be started.
  static std::string compiled(std::string const& what) {
    std::string why_not;
    auto const image = compile_apart(request(what), why_not);
    return image ? *image : "none: " + why_not;
  }

  /// How many processes this one has started and not waited for: none may stay.
  static bool has_children() { return waitpid(-1, nullptr, WNOHANG) >= 0 || errno != ECHILD; }

  void TearDown() override { EXPECT_FALSE(has_children()) << "a zombie is left"; }

  ScopedVariable nvrtc_{"FLASHCUTE_NVRTC", FLASHCUTE_FAKE_NVRTC};
};

TEST_F(CompilerProcess, ReturnsTheImage) {
  EXPECT_EQ(compiled(""),
            "\x7f"
            "ELFsource");
}

// Guards against variables that another thread changes at this moment, and that change what is compiled.
TEST_F(CompilerProcess, InheritsNoVariables) {
  ScopedVariable const secret("FLASHCUTE_TEST_SECRET", "1");
  EXPECT_EQ(compiled("variables"),
            "\x7f"
            "ELFFLASHCUTE_NVRTC=" FLASHCUTE_FAKE_NVRTC "\nsource");
}

// Guards against a process that cannot be ended, or goes on after its reader is gone: Python ignores SIGPIPE, and
// threads that must not run handlers block all signals.
TEST_F(CompilerProcess, StartsWithTheUsualSignals) {
  auto const pipe = signal(SIGPIPE, SIG_IGN), interrupt = signal(SIGINT, SIG_DFL), hangup = signal(SIGHUP, SIG_DFL);
  {
    BlockSignals const blocked;
    EXPECT_EQ(compiled("signals"),
              "\x7f"
              "ELF0 default default defaultsource");
  }
  // Guards against a program under nohup, or in a script's background, whose compilers Ctrl-C ends.
  signal(SIGINT, SIG_IGN);
  signal(SIGHUP, SIG_IGN);
  EXPECT_EQ(compiled("signals"),
            "\x7f"
            "ELF0 default ignored ignoredsource");
  signal(SIGPIPE, pipe);
  signal(SIGINT, interrupt);
  signal(SIGHUP, hangup);
}

// Guards against a crash of the compiler that takes the program along, or leaves nothing to read.
TEST_F(CompilerProcess, ADeadCompilerIsAnErrorWithItsLog) {
  std::string const crashed = message_of<CompileError>([] { compiled("crash"); });
  EXPECT_TRUE(contains(crashed, "some_kernel"));
  EXPECT_TRUE(contains(crashed, "signal 11"));
  EXPECT_TRUE(contains(crashed, "the compiler's last words"));
  std::string const killed = message_of<CompileError>([] { compiled("killed"); });
  EXPECT_TRUE(contains(killed, "signal 9"));
  EXPECT_TRUE(contains(killed, "FLASHCUTE_JIT_JOBS=1"));
  EXPECT_TRUE(contains(message_of<CompileError>([] { compiled("half an answer"); }), "exited with status 3"));
}

// Guards against an error where this process can compile by itself.
TEST_F(CompilerProcess, WhatCannotStartIsNoError) {
  EXPECT_TRUE(contains(compiled("cannot start"), "none: "));
  EXPECT_TRUE(contains(compiled("cannot start"), "libsomething.so"));
  set_compiler_program("/missing/flashcute_compiler");
  EXPECT_TRUE(contains(compiled(""), "none: /missing/flashcute_compiler: No such file"));
  set_compiler_program("/etc/passwd");
  EXPECT_TRUE(contains(compiled(""), "none: /etc/passwd: Permission denied"));
  set_compiler_program("");
  EXPECT_TRUE(contains(compiled(""), "none: no compiler program"));
}

// Guards against a program that waits for every child of its own, or ignores SIGCHLD: the answer is there all the same.
TEST_F(CompilerProcess, SomebodyElseMayWaitForIt) {
  auto const before = signal(SIGCHLD, SIG_IGN);
  EXPECT_EQ(compiled(""),
            "\x7f"
            "ELFsource");
  EXPECT_TRUE(contains(message_of<CompileError>([] { compiled("killed"); }), "ended without an answer"));
  signal(SIGCHLD, before);
}

// Guards against files of the request that land in each other's place where a daemon has closed its standard files.
TEST_F(CompilerProcess, WithoutStandardFiles) {
  for (std::vector<int> const& closed : {std::vector{0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}, {0, 1, 2}}) {
    std::vector<int> kept;
    for (int const fd : closed) kept.push_back(fcntl(fd, F_DUPFD_CLOEXEC, 100));
    for (int const fd : closed) close(fd);
    std::string const image = compiled("");
    for (std::size_t i = 0; i < closed.size(); ++i) dup2(kept[i], closed[i]), close(kept[i]);
    EXPECT_EQ(image,
              "\x7f"
              "ELFsource")
        << closed.size();
  }
}

/// The children of a process that run the real program.
std::vector<pid_t> compilers_of(pid_t parent) {
  std::vector<pid_t> found;
  for (auto const& entry : std::filesystem::directory_iterator("/proc")) {
    std::error_code error;
    if (std::filesystem::read_symlink(entry.path() / "exe", error) != FLASHCUTE_COMPILER) continue;
    std::string const stat = read_file(entry.path() / "stat");
    if (std::stoi(stat.substr(stat.rfind(')') + 4)) == parent) found.push_back(std::stoi(entry.path().filename()));
  }
  return found;
}

/// Whether it is gone, or only waits for its parent to ask how it ended.
bool has_ended(pid_t process) {
  std::string const stat = read_file("/proc/" + std::to_string(process) + "/stat");
  return stat.empty() || stat[stat.rfind(')') + 2] == 'Z';
}

// Guards against compilers that work on for a program that is gone.
TEST_F(CompilerProcess, EndsWithTheProgram) {
  pid_t const program = fork();
  if (program == 0) {
    set_compiler_program(FLASHCUTE_COMPILER);
    std::string why_not;
    compile_apart({"some_kernel", "// sleep", "sm_80", {}, {}}, why_not);
    _exit(1);
  }
  auto const wait_for = [](auto const& condition) {
    for (int i = 0; i < 1000 && !condition(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    return condition();
  };
  std::vector<pid_t> compilers;
  EXPECT_TRUE(wait_for([&] { return !(compilers = compilers_of(program)).empty(); }));
  kill(program, SIGKILL);
  waitpid(program, nullptr, 0);
  ASSERT_EQ(compilers.size(), 1u);
  EXPECT_TRUE(wait_for([&] { return has_ended(compilers[0]); }));
}

// ---- several -------------------------------------------------------------------------------------

/// With the real program, and a compiler that compiles nothing.
class Batch : public ::testing::Test {
 protected:
  void SetUp() override {
    write_file(scratch_ / "include/cuda_fp16.h", "");
    set_include_folders({scratch_ / "include"});
    set_compiler_program(FLASHCUTE_COMPILER);
  }

  static std::vector<KernelCode> kernels(int count) {
    std::vector<KernelCode> all;
    for (int i = 0; i < count; ++i) all.push_back({"kernel_" + std::to_string(i), "// " + std::to_string(i)});
    return all;
  }

  Scratch scratch_;
  ScopedVariable nvrtc_{"FLASHCUTE_NVRTC", FLASHCUTE_FAKE_NVRTC};
  ScopedVariable include_{"FLASHCUTE_CUDA_INCLUDE", scratch_ / "include"};
  ScopedVariable cache_{"FLASHCUTE_CACHE_DIR", scratch_ / "cache"};
  ScopedVariable quiet_{"FLASHCUTE_QUIET", std::nullopt};
};

// Guards against one line for each kernel, a count that is never complete, and images in another order.
TEST_F(Batch, OneLineThatCounts) {
  ScopedVariable const jobs("FLASHCUTE_JIT_JOBS", "3");
  auto const wanted = kernels(3);
  std::vector<JitImage> images;
  std::string const said = stderr_of([&] { jit_images(wanted, 80); });
  EXPECT_TRUE(contains(said, "flashcute: compiling kernel_0 and 2 more for sm_80 with NVRTC 13.0 (once; cached in "));
  EXPECT_TRUE(contains(said, "... 1 2 3, "));
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
  EXPECT_FALSE(contains(said, "in this process")) << said;
  EXPECT_EQ(stderr_of([&] { jit_images(wanted, 80); }), "");
}

TEST_F(Batch, ImagesComeInTheOrderOfTheirKernels) {
  ScopedVariable const quiet("FLASHCUTE_QUIET", "1");
  auto const wanted = kernels(5);
  jit_image(wanted[3], 80);
  auto const images = jit_images(wanted, 80);
  for (std::size_t i = 0; i < images.size(); ++i) {
    EXPECT_EQ(images[i].compiled, i != 3) << i;
    EXPECT_TRUE(contains(images[i].bytes, wanted[i].source)) << i;  // fake_nvrtc.cpp puts it there
  }
}

// Guards against an error where no process can be started, and against silence about it.
TEST_F(Batch, WithoutTheProgramItCompilesHereAndSaysSo) {
  set_compiler_program("/missing/flashcute_compiler");
  std::string const said = stderr_of([] {
    for (JitImage const& image : jit_images(kernels(2), 80)) {
      if (!image.compiled) std::abort();
    }
  });
  EXPECT_TRUE(contains(said, "in this process, one kernel at a time")) << said;
  EXPECT_TRUE(contains(said, "/missing/flashcute_compiler: No such file"));
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
}

// Guards against a failure that is lost among the others, and against locks that stay behind it.
TEST_F(Batch, AFailureIsThrownAndLeavesNoLock) {
  ScopedVariable const quiet("FLASHCUTE_QUIET", "1");
  auto wanted = kernels(4);
  wanted[2].source = "#error on purpose";  // fake_nvrtc.cpp refuses it
  EXPECT_TRUE(contains(message_of<CompileError>([&] { jit_images(wanted, 80); }), "kernel_2"));
  for (auto const& file : std::filesystem::directory_iterator(scratch_ / "cache")) {
    EXPECT_EQ(file.path().extension(), ".image") << file.path();
  }
  wanted[2].source = "";
  EXPECT_EQ(jit_images(wanted, 80).size(), 4u);
}

// ---- threads and limits --------------------------------------------------------------------------

// Guards against more at once than was allowed, work that is done twice or not at all, and threads that read the
// environment which the call has taken a picture of.
TEST(Workers, DoEverythingOnceWithinTheLimit) {
  ScopedVariable const variable("FLASHCUTE_CPU_ISA", "avx2");
  EnvironmentSnapshot const snapshot;
  setenv("FLASHCUTE_CPU_ISA", "changed", 1);
  std::atomic<int> running{0}, most{0};
  std::vector<std::atomic<int>> times(50);
  run_at_once(times.size(), 3, [&](std::size_t i) {
    int const now = ++running;
    int seen = most;
    while (seen < now && !most.compare_exchange_weak(seen, now)) {
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ++times[i];
    EXPECT_EQ(environment_value("FLASHCUTE_CPU_ISA"), "avx2");
    --running;
  });
  EXPECT_LE(most, 3);
  EXPECT_GE(most, 2);
  for (auto const& count : times) EXPECT_EQ(count, 1);
  EXPECT_THROW(run_at_once(20, 4,
                           [](std::size_t i) {
                             if (i == 7) throw CompileError("seven");
                           }),
               CompileError);
}

// Guards against a machine that is driven out of memory, in a container above all.
TEST(CompileJobs, AvailableMemoryIsWhatTheGroupsLeave) {
  Scratch const root;
  EXPECT_EQ(available_memory(root.path()), std::nullopt);
  write_file(root / "proc/meminfo",
             "MemTotal:       32768000 kB\nMemFree:          100 kB\nMemAvailable:    8192 kB\n");
  EXPECT_EQ(available_memory(root.path()), 8192u * 1024);
  write_file(root / "proc/self/cgroup", "0::/user/job\n");
  write_file(root / "proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n");
  write_file(root / "sys/fs/cgroup/user/job/memory.max", "max\n");
  EXPECT_EQ(available_memory(root.path()), 8192u * 1024) << "no limit";
  write_file(root / "sys/fs/cgroup/user/memory.max", "5000000\n");
  write_file(root / "sys/fs/cgroup/user/memory.current", "4000000\n");
  EXPECT_EQ(available_memory(root.path()), 1000000u);
  write_file(root / "sys/fs/cgroup/user/memory.stat", "anon 1\ninactive_file 500000\n");
  EXPECT_EQ(available_memory(root.path()), 1500000u) << "cached files make room";
  write_file(root / "sys/fs/cgroup/user/memory.current", "9000000\n");
  EXPECT_EQ(available_memory(root.path()), 0u);
}

TEST(CompileJobs, FollowTheVariableAndAreAtLeastOne) {
  {
    ScopedVariable const jobs("FLASHCUTE_JIT_JOBS", "7");
    EXPECT_EQ(compile_jobs(), 7);
  }
  ScopedVariable const wrong("FLASHCUTE_JIT_JOBS", "0");
  EXPECT_TRUE(contains(message_of<ArgumentError>([] { compile_jobs(); }), "FLASHCUTE_JIT_JOBS"));
  ScopedVariable const unset("FLASHCUTE_JIT_JOBS", std::nullopt);
  EXPECT_GE(compile_jobs(), 1);
  EXPECT_LE(compile_jobs(), cpu::available_cpus());
}

}  // namespace
}  // namespace flashcute
