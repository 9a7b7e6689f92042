// A folder of compiled kernel images that many threads and processes share: whoever needs an image first builds it,
// the others wait and read it. Nothing is believed because it lies there: each read verifies owner, mode and hash.
// When an image is published, those that were used least recently go, until the images fit the limit.
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

/// A key is a name, a dot and a SHA-256 in 64 hexadecimal digits. By these digits the cache tells its files from those
/// of others, which may lie in the same folder: it neither counts nor removes them.
class DiskCache {
 public:
  static constexpr std::uint64_t no_limit = std::numeric_limits<std::uint64_t>::max();

  /// Touches nothing yet; the folder is made at the first write. `limit` is in bytes of all images together; the image
  /// that was just published stays even if it is larger. `patience` limits the wait for another builder of the
  /// same key. It may run out without harm (two builders then publish the same image), and has to end: a process
  /// that was forked while its parent was building inherits the lock, and keeps it if the parent is killed.
  explicit DiskCache(std::filesystem::path folder, std::uint64_t limit = no_limit,
                     std::chrono::milliseconds patience = std::chrono::minutes(5));

  /// The image, or nothing if there is no entry or it is not exactly what was published under this key. Throws a
  /// CacheError if others could have written into the folder.
  std::optional<std::string> find(std::string const& key) const;

  /// Whether there is an entry, which may be damaged.
  bool has(std::string const& key) const;

  /// The image, built now if nobody has. `built` tells whether this call ran `build`. What `build` throws passes
  /// through and publishes nothing. A folder that cannot be written costs the next process a build, never this one its
  /// image.
  std::string get_or_build(std::string const& key, std::function<std::string()> const& build,
                           bool* built = nullptr) const;

  struct Entry {
    std::string key;
    std::uint64_t size;      // of the file
    std::int64_t last_used;  // nanoseconds since 1970; published counts as used
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

  /// Verifies every entry as reading it does, and removes those that are damaged or that others can write. Counts as no
  /// use.
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
