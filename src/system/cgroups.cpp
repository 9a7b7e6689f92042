#include "system/cgroups.hpp"

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <sstream>

namespace flashcute {
namespace {

bool lists(std::string const& names, std::string const& name) {
  auto const all = words_of(names, ',');
  return std::find(all.begin(), all.end(), name) != all.end();
}

/// A hierarchy of cgroups that knows the controller, and the process's group in it.
struct Hierarchy {
  bool v2;
  std::string group;  // as /proc/self/cgroup names it
};

std::vector<Hierarchy> hierarchies(std::filesystem::path const& root, std::string const& controller) {
  std::vector<Hierarchy> all;
  std::ifstream file{root / "proc/self/cgroup"};
  for (std::string line; std::getline(file, line);) {  // number:controllers:group
    std::size_t const first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string const controllers = line.substr(first + 1, second - first - 1);
    if (controllers.empty() || lists(controllers, controller)) {
      all.push_back({controllers.empty(), line.substr(second + 1)});
    }
  }
  return all;
}

}  // namespace

std::string first_line(std::filesystem::path const& file) {
  std::string line;
  std::getline(std::ifstream{file} >> std::ws, line);
  return line;
}

std::vector<std::string> words_of(std::string const& line, char separator) {
  std::vector<std::string> words;
  std::istringstream stream{line};
  for (std::string word; std::getline(stream, word, separator);) words.push_back(word);
  return words;
}

std::vector<Cgroup> cgroups(std::filesystem::path const& root, std::string const& controller) {
  std::vector<Cgroup> found;
  auto const groups = hierarchies(root, controller);
  std::ifstream mounts{root / "proc/self/mountinfo"};
  for (std::string line; std::getline(mounts, line);) {
    // 36 35 98:0 /group /mount/point options ... - type source options
    std::size_t const dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    auto const left = words_of(line.substr(0, dash)), right = words_of(line.substr(dash + 3));
    if (left.size() < 5 || right.size() < 3) continue;
    bool const v2 = right[0] == "cgroup2";
    if (!v2 && !(right[0] == "cgroup" && lists(right[2], controller))) continue;
    for (Hierarchy const& h : groups) {
      if (h.v2 != v2) continue;
      // The mount shows the hierarchy from left[3] down, which in a container may be the process's own group.
      std::filesystem::path below = std::filesystem::path(h.group).lexically_relative(left[3]);
      if (below.empty() || *below.begin() == ".." || *below.begin() == ".") below.clear();
      std::filesystem::path const top = root / std::filesystem::path(left[4]).relative_path();
      for (std::filesystem::path at = below;; at = at.parent_path()) {
        found.push_back({at.empty() ? top : top / at, v2});
        if (at.empty()) break;
      }
    }
  }
  return found;
}

}  // namespace flashcute
