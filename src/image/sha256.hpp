// SHA-256 (FIPS 180-4): names compiled images by what went into them and verifies them when they are read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace flashcute {

/// The hash of a text that arrives in pieces.
class Sha256 {
 public:
  void update(std::string_view bytes);

  /// 64 lower-case hexadecimal digits. The object keeps its state: more pieces may follow.
  std::string hex() const;

 private:
  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> block_ = {};  // the bytes that do not fill a block yet
  std::size_t block_size_ = 0;
  std::uint64_t total_ = 0;  // bytes so far
};

std::string sha256_hex(std::string_view bytes);

}  // namespace flashcute
