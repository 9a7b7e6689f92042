#include "image/header_hash.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <vector>

#include "flashcute/error.hpp"
#include "image/sha256.hpp"

namespace flashcute {
namespace {

namespace fs = std::filesystem;

struct File {
  std::string name;  // relative to the folder
  std::uintmax_t size;
};

/// Every file below the folder, in an order that does not depend on the file system.
std::vector<File> files_below(fs::path const& folder) {
  std::vector<File> files;
  try {
    // Symbolic links are followed: a development build may link its header folders together.
    auto const options = fs::directory_options::follow_directory_symlink;
    std::size_t const prefix = (folder / "").native().size();
    for (fs::directory_entry const& entry : fs::recursive_directory_iterator(folder / "", options)) {
      if (entry.is_regular_file()) files.push_back({entry.path().native().substr(prefix), entry.file_size()});
    }
  } catch (fs::filesystem_error const& e) {
    throw CompileError("The headers for the run-time compiler cannot be listed: " + std::string(e.what()));
  }
  std::sort(files.begin(), files.end(), [](File const& a, File const& b) { return a.name < b.name; });
  return files;
}

std::string contents(fs::path const& path, std::uintmax_t size) {
  std::string text(size, '\0');
  std::size_t done = 0;
  int const fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  while (fd >= 0 && done < text.size()) {
    ssize_t const n = read(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    done += static_cast<std::size_t>(n);
  }
  if (fd >= 0) close(fd);
  if (fd < 0 || done < text.size()) throw CompileError("The header " + path.string() + " cannot be read");
  return text;
}

/// The name and size of each file are hashed before its contents, so no two lists of files hash the same text.
template <class More>
std::string hash_of_files(fs::path const& folder, More const& more) {
  Sha256 hash;
  for (File const& file : files_below(folder)) {
    hash.update(file.name + '\0' + std::to_string(file.size) + '\0');
    more(hash, file);
  }
  return hash.hex();
}

}  // namespace

std::string hash_of_contents(fs::path const& folder) {
  return hash_of_files(folder, [&](Sha256& hash, File const& f) { hash.update(contents(folder / f.name, f.size)); });
}

std::string hash_of_sizes(fs::path const& folder) {
  return hash_of_files(folder, [](Sha256&, File const&) {});
}

}  // namespace flashcute
