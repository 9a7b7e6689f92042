#include "image/compiler_process.hpp"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <mutex>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "flashcute/error.hpp"
#include "image/message.hpp"

namespace flashcute {
namespace {

struct Program {
  std::mutex mutex;
  std::string path;
};

Program& program() {
  static Program p;
  return p;
}

std::string program_path() {
  Program& p = program();
  std::lock_guard const guard(p.mutex);
  return p.path;
}

[[noreturn]] void throw_errno(char const* call, int error) {
  throw std::system_error(error, std::generic_category(), call);
}

/// A file in memory (memfd). Unlike a pipe it holds any amount, so no writer blocks until somebody reads.
class MemoryFile {
 public:
  explicit MemoryFile(char const* name) : fd_(memfd_create(name, MFD_CLOEXEC)) {
    if (fd_ < 0) throw_errno("memfd_create", errno);
  }
  MemoryFile(MemoryFile const&) = delete;
  MemoryFile& operator=(MemoryFile const&) = delete;
  ~MemoryFile() { close(fd_); }

  int fd() const { return fd_; }

  /// Writes the text and leaves the position at its beginning.
  void fill(std::string_view text) {
    for (off_t at = 0; !text.empty();) {
      ssize_t const n = pwrite(fd_, text.data(), text.size(), at);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) throw_errno("pwrite", errno);
      text.remove_prefix(static_cast<std::size_t>(n));
      at += n;
    }
  }

  std::string contents() const {
    std::string text;
    std::array<char, 65536> part;
    while (true) {
      ssize_t const n = pread(fd_, part.data(), part.size(), static_cast<off_t>(text.size()));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return text;
      text.append(part.data(), static_cast<std::size_t>(n));
    }
  }

 private:
  int fd_;
};

/// The signals of a terminal that this program ignores. Its compilers must ignore them too: a program in a shell
/// script's background, or under nohup, continues when its terminal sends Ctrl-C or is closed.
std::vector<int> ignored_of_a_terminal() {
  std::vector<int> ignored;
  for (int const signal : {SIGINT, SIGQUIT, SIGHUP}) {
    struct sigaction action;
    if (sigaction(signal, nullptr, &action) == 0 && action.sa_handler == SIG_IGN) ignored.push_back(signal);
  }
  return ignored;
}

/// How the new process starts: with three files as its standard streams and no others, no blocked signal, no ignored
/// signal but those, and no environment variable but the path of NVRTC. This process's own environment is not read,
/// because another thread may be changing it.
class Start {
 public:
  Start(MemoryFile const& in, MemoryFile const& out, MemoryFile const& log)
      : nvrtc_("FLASHCUTE_NVRTC=" + nvrtc_path()) {
    posix_spawn_file_actions_init(&files_);
    // In this order no dup2 overwrites a file that is still needed, even if this process has closed its own 0, 1 or 2.
    posix_spawn_file_actions_adddup2(&files_, in.fd(), STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&files_, out.fd(), STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&files_, log.fd(), STDERR_FILENO);
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 34)
    posix_spawn_file_actions_addclosefrom_np(&files_, STDERR_FILENO + 1);
#endif
    posix_spawnattr_init(&attributes_);
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    for (int const signal : ignored_of_a_terminal()) sigdelset(&all, signal);
    posix_spawnattr_setsigmask(&attributes_, &none);
    posix_spawnattr_setsigdefault(&attributes_, &all);
    posix_spawnattr_setflags(&attributes_, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  }
  Start(Start const&) = delete;
  Start& operator=(Start const&) = delete;
  ~Start() {
    posix_spawn_file_actions_destroy(&files_);
    posix_spawnattr_destroy(&attributes_);
  }

  pid_t operator()(std::string const& path) {
    std::array<char*, 2> arguments{const_cast<char*>(path.c_str()), nullptr};
    std::array<char*, 2> variables{nvrtc_.data(), nullptr};
    pid_t child = 0;
    int const error = posix_spawn(&child, path.c_str(), &files_, &attributes_, arguments.data(), variables.data());
    if (error != 0) throw_errno(path.c_str(), error);
    return child;
  }

 private:
  std::string nvrtc_;
  posix_spawn_file_actions_t files_;
  posix_spawnattr_t attributes_;
};

/// How the process ended; nothing if other code in this program has waited for it, or SIGCHLD is ignored. Then its
/// answer alone decides.
std::optional<int> status_of(pid_t child) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return std::nullopt;
  }
  return status;
}

std::string how_it_ended(std::optional<int> status) {
  if (!status) return "ended without an answer";
  if (WIFEXITED(*status)) return "exited with status " + std::to_string(WEXITSTATUS(*status));
  int const signal = WTERMSIG(*status);
  std::string text = "was ended by signal " + std::to_string(signal) + " (" + strsignal(signal) + ")";
  if (signal == SIGKILL) text += ", as the system does when memory runs out; FLASHCUTE_JIT_JOBS=1 needs least";
  return text;
}

}  // namespace

void set_compiler_program(std::string path) {
  Program& p = program();
  std::lock_guard const guard(p.mutex);
  p.path = std::move(path);
}

std::optional<std::string> compile_apart(CompileRequest const& request, std::string& why_not) {
  std::string const path = program_path();
  if (path.empty()) {
    why_not = "no compiler program was named";
    return std::nullopt;
  }
  std::optional<int> status;
  std::string answer, log;
  try {
    MemoryFile in("flashcute request"), out("flashcute answer"), err("flashcute log");
    in.fill(
        packed({request.name, request.source, request.arch, packed(request.include_folders), packed(request.options)}));
    status = status_of(Start(in, out, err)(path));
    answer = out.contents();
    log = err.contents();
  } catch (std::system_error const& error) {
    why_not = error.what();
    return std::nullopt;
  }
  if (auto const parts = unpacked(answer); parts && parts->size() == 2) {
    if (parts->at(0) == "image") return parts->at(1);
    if (parts->at(0) == "error") throw CompileError(parts->at(1));
  }
  // Exit status 126 or 127: the program exists but could not be started.
  bool const started = !status || !WIFEXITED(*status) || (WEXITSTATUS(*status) != 126 && WEXITSTATUS(*status) != 127);
  if (!started) {
    why_not = path + " " + how_it_ended(status) + (log.empty() ? "" : ": " + log);
    while (why_not.ends_with('\n')) why_not.pop_back();
    return std::nullopt;
  }
  throw CompileError("The process that compiled " + request.name + " for " + request.arch + " " + how_it_ended(status) +
                     (log.empty() ? "" : ".\n" + log));
}

}  // namespace flashcute
