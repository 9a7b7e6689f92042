// Messages between the library and its compiler processes: a list of texts packed into one.
#pragma once

#include <charconv>
#include <cstddef>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flashcute {

/// Each text is preceded by its length: "3:abc0:".
inline std::string packed(std::span<std::string const> texts) {
  std::string message;
  for (std::string const& text : texts) message += std::to_string(text.size()) + ":" + text;
  return message;
}
inline std::string packed(std::initializer_list<std::string> texts) {
  return packed(std::span(texts.begin(), texts.size()));
}

/// Nothing if the message is malformed.
inline std::optional<std::vector<std::string>> unpacked(std::string_view message) {
  std::vector<std::string> texts;
  while (!message.empty()) {
    std::size_t size = 0;
    auto const [end, error] = std::from_chars(message.data(), message.data() + message.size(), size);
    message.remove_prefix(static_cast<std::size_t>(end - message.data()));
    if (error != std::errc() || !message.starts_with(':') || message.size() - 1 < size) return std::nullopt;
    texts.emplace_back(message.substr(1, size));
    message.remove_prefix(1 + size);
  }
  return texts;
}

}  // namespace flashcute
