// A small LRU cache.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace flashcute {

/// At most `most` values by their keys; the least recently used one is replaced. Not thread-safe.
template <class Key, class Value, std::size_t most>
class Recent {
 public:
  /// The value of the key, made by `make()` if it is not in the cache. The reference is valid until the value is
  /// replaced.
  template <class Make>
  Value const& get(Key const& key, Make const& make) {
    ++now_;
    auto found = std::find_if(entries_.begin(), entries_.end(), [&](Entry const& e) { return e.key == key; });
    if (found == entries_.end()) {
      Value value = make();  // a throw changes nothing
      entries_.reserve(most);
      if (entries_.size() < most) {
        found = entries_.insert(entries_.end(), {key, std::move(value), now_});
      } else {
        auto const older = [](Entry const& a, Entry const& b) { return a.last_use < b.last_use; };
        found = std::min_element(entries_.begin(), entries_.end(), older);
        *found = {key, std::move(value), now_};
      }
    }
    found->last_use = now_;
    return found->value;
  }

 private:
  struct Entry {
    Key key;
    Value value;
    std::uint64_t last_use;
  };

  std::vector<Entry> entries_;
  std::uint64_t now_ = 0;
};

}  // namespace flashcute
