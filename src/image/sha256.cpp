#include "image/sha256.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace flashcute {
namespace {

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
constexpr std::array<std::uint32_t, 64> round_constants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t big_endian(unsigned char const* p) {
  return std::uint32_t{p[0]} << 24 | std::uint32_t{p[1]} << 16 | std::uint32_t{p[2]} << 8 | std::uint32_t{p[3]};
}

void compress(std::array<std::uint32_t, 8>& state, unsigned char const* block) {
  using std::rotr;
  std::array<std::uint32_t, 64> w;
  for (int i = 0; i < 16; ++i) w[i] = big_endian(block + 4 * i);
  for (int i = 16; i < 64; ++i) {
    std::uint32_t const s0 = rotr(w[i - 15], 7) ^ rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
    std::uint32_t const s1 = rotr(w[i - 2], 17) ^ rotr(w[i - 2], 19) ^ (w[i - 2] >> 10);
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (int i = 0; i < 64; ++i) {
    std::uint32_t const choice = (e & f) ^ (~e & g);
    std::uint32_t const majority = (a & b) ^ (a & c) ^ (b & c);
    std::uint32_t const t1 = h + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + choice + round_constants[i] + w[i];
    std::uint32_t const t2 = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + majority;
    h = g;
    g = f;
    f = e;
    e = d + t1;
    d = c;
    c = b;
    b = a;
    a = t1 + t2;
  }
  std::array<std::uint32_t, 8> const add = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += add[i];
}

}  // namespace

void Sha256::update(std::string_view bytes) {
  if (bytes.empty()) return;  // data() may be null
  total_ += bytes.size();
  auto const* data = reinterpret_cast<unsigned char const*>(bytes.data());
  std::size_t left = bytes.size();
  if (block_size_ > 0) {
    std::size_t const n = std::min(left, block_.size() - block_size_);
    std::memcpy(block_.data() + block_size_, data, n);
    block_size_ += n;
    data += n;
    left -= n;
    if (block_size_ < block_.size()) return;
    compress(state_, block_.data());
    block_size_ = 0;
  }
  for (; left >= block_.size(); data += block_.size(), left -= block_.size()) compress(state_, data);
  if (left > 0) std::memcpy(block_.data(), data, left);
  block_size_ = left;
}

std::string Sha256::hex() const {
  Sha256 padded = *this;
  std::uint64_t const bits = total_ * 8;
  std::string padding(1, '\x80');
  padding.append((block_.size() - (block_size_ + 1 + 8) % block_.size()) % block_.size(), '\0');
  for (int shift = 56; shift >= 0; shift -= 8) padding.push_back(static_cast<char>(bits >> shift & 0xff));
  padded.update(padding);

  constexpr char digits[] = "0123456789abcdef";
  std::string text;
  for (std::uint32_t const word : padded.state_) {
    for (int shift = 28; shift >= 0; shift -= 4) text.push_back(digits[word >> shift & 0xf]);
  }
  return text;
}

std::string sha256_hex(std::string_view bytes) {
  Sha256 hash;
  hash.update(bytes);
  return hash.hex();
}

}  // namespace flashcute
