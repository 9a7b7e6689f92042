// A folder of compiled kernel images that many threads and processes share: whoever needs an image first builds it,
// the others wait and read it. Nothing is believed because it lies there: each read verifies owner, mode and hash.
#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

namespace flashcute {

class DiskCache {
 public:
  /// Touches nothing yet; the folder is made at the first write. `patience` limits the wait for another builder of the
  /// same key. It may run out without harm (two builders then publish the same image), and has to end: a process
  /// that was forked while its parent was building inherits the lock, and keeps it if the parent is killed.
  explicit DiskCache(std::filesystem::path folder, std::chrono::milliseconds patience = std::chrono::minutes(5));

  /// The image, or nothing if there is no entry or it is not exactly what was published under this key. Throws a
  /// CacheError if others could have written into the folder.
  std::optional<std::string> find(std::string const& key) const;

  /// The image, built now if nobody has. `built` tells whether this call ran `build`. What `build` throws passes
  /// through and publishes nothing. A folder that cannot be written costs the next process a build, never this one its
  /// image.
  std::string get_or_build(std::string const& key, std::function<std::string()> const& build,
                           bool* built = nullptr) const;

  std::filesystem::path const& folder() const { return folder_; }

 private:
  std::filesystem::path folder_;
  std::chrono::milliseconds patience_;
};

}  // namespace flashcute
