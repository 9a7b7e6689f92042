// The disk cache: a folder of compiled kernel images that many threads and processes share. The first to need an image
// builds it, the others wait and read it. Each read verifies owner, mode and hash. When an image is published, the
// least recently used ones are removed until all fit the limit.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace flashcute {

/// A key is a name, a dot and a SHA-256 in 64 hexadecimal digits. By these digits the cache recognises its own files:
/// it neither counts nor removes others in the same folder.
class DiskCache {
 public:
  static constexpr std::uint64_t no_limit = std::numeric_limits<std::uint64_t>::max();

  /// Does not touch the folder, which is made at the first write. `limit` is in bytes of all images together; the image
  /// that was just published stays even if it is larger. `patience` limits the wait for another builder of the same
  /// key. Running out of it does no harm (two builders publish the same image), and the wait has to end: a process
  /// forked while its parent was building inherits the lock, and keeps it if the parent is killed.
  explicit DiskCache(std::filesystem::path folder, std::uint64_t limit = no_limit,
                     std::chrono::milliseconds patience = std::chrono::minutes(5));

  /// The image, or nothing if there is no entry or it is not exactly what was published under this key. Throws a
  /// CacheError if others could have written into the folder.
  std::optional<std::string> find(std::string const& key) const;

  /// Whether there is an entry, which may be damaged.
  bool has(std::string const& key) const;

  /// The image; `build` makes it if no process has. `built` tells whether this call ran `build`. Exceptions of `build`
  /// pass through, and nothing is published. If the folder cannot be written, this call returns its image all the same,
  /// and the next process builds again.
  std::string get_or_build(std::string const& key, std::function<std::string()> const& build,
                           bool* built = nullptr) const;

  struct Entry {
    std::string key;
    std::uint64_t size;      // of the file
    std::int64_t last_used;  // nanoseconds since 1970; publishing counts as use
  };

  /// The most recently used first.
  std::vector<Entry> entries() const;

  enum class Outcome : std::uint8_t {
    whole,  // as it was published
    removed,
    vanished,  // another process removed it meanwhile
    in_use,    // not touched: another process holds the key's lock
    failed,    // to remove: no permission, or a read-only file system
  };
  using Outcomes = std::vector<std::pair<Entry, Outcome>>;

  /// Verifies every entry as `find` does, and removes those that are damaged or that others can write. Does not count
  /// as use.
  Outcomes check() const;

  /// Removes every entry.
  Outcomes clear() const;

  std::filesystem::path const& folder() const { return folder_; }

 private:
  void tidy(std::string const& published) const;

  std::filesystem::path folder_;
  std::uint64_t limit_;
  std::chrono::milliseconds patience_;
};

}  // namespace flashcute
