// What tests of files, processes and environment variables share.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <utility>

namespace flashcute::testing {

/// A folder that exists as long as the object.
class Scratch {
 public:
  Scratch() {
    std::string pattern = (std::filesystem::temp_directory_path() / "flashcute_test_XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed: " + pattern);
    path_ = pattern;
  }
  Scratch(Scratch const&) = delete;
  Scratch& operator=(Scratch const&) = delete;
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::filesystem::path const& path() const { return path_; }
  std::filesystem::path operator/(std::string const& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

/// An environment variable that has another value, or none, as long as the object exists.
class ScopedVariable {
 public:
  ScopedVariable(std::string name, std::optional<std::string> const& value) : name_(std::move(name)) {
    if (char const* old = std::getenv(name_.c_str())) old_ = old;
    set(value);
  }
  ScopedVariable(ScopedVariable const&) = delete;
  ScopedVariable& operator=(ScopedVariable const&) = delete;
  ~ScopedVariable() { set(old_); }

 private:
  void set(std::optional<std::string> const& value) const {
    if (value) {
      setenv(name_.c_str(), value->c_str(), 1);
    } else {
      unsetenv(name_.c_str());
    }
  }

  std::string name_;
  std::optional<std::string> old_;
};

inline std::string read_file(std::filesystem::path const& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

inline void write_file(std::filesystem::path const& path, std::string const& bytes) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

/// Runs f in a child process, which exits with what f returns (200 if it throws).
template <class F>
pid_t spawn(F const& f) {
  std::fflush(nullptr);
  pid_t const child = fork();
  if (child != 0) return child;
  int code = 200;
  try {
    code = f();
  } catch (std::exception const& e) {
    std::fprintf(stderr, "child: %s\n", e.what());
  }
  std::fflush(nullptr);
  _exit(code);
}

inline int exit_code(pid_t child) {
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// What f, run in a child process, writes to stderr.
template <class F>
std::string stderr_of(F const& f) {
  Scratch const scratch;
  std::string const file = scratch / "stderr";
  pid_t const child = spawn([&] {
    if (std::freopen(file.c_str(), "w", stderr) == nullptr) return 201;
    f();
    return 0;
  });
  EXPECT_EQ(exit_code(child), 0);
  return read_file(file);
}

/// The message of the Expected that f throws.
template <class Expected, class F>
std::string message_of(F const& f) {
  try {
    f();
  } catch (Expected const& e) {
    return e.what();
  } catch (std::exception const& e) {
    ADD_FAILURE() << "threw another exception: " << e.what();
    return "";
  }
  ADD_FAILURE() << "threw nothing";
  return "";
}

/// Whether the text contains the part; a failure shows both.
inline ::testing::AssertionResult contains(std::string const& text, std::string const& part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "'" << part << "' is not in:\n" << text;
}

}  // namespace flashcute::testing
