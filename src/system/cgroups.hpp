// The control groups (cgroup v1 and v2) that limit what a process may use, as containers and batch systems set them.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace flashcute {

struct Cgroup {
  std::filesystem::path folder;
  bool v2;
};

/// The groups whose limits of `controller` ("cpu", "memory") apply to the calling process: its own and their ancestors,
/// as far as they are mounted. `root` stands for "/".
std::vector<Cgroup> cgroups(std::filesystem::path const& root, std::string const& controller);

/// The first line of a file, without leading spaces; "" if there is none.
std::string first_line(std::filesystem::path const& file);

/// The text between separators.
std::vector<std::string> words_of(std::string const& line, char separator = ' ');

}  // namespace flashcute
