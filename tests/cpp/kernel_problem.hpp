// A call of the forward kernel on the host: all blocks of the launch, each in an emulated thread block with
// random schedules, a race detector and bounds checks, against attention in fp64.
#pragma once

#include "flashcute/forward.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <random>

namespace flashcute {

using emulation::GlobalMemory;
using Use = GlobalMemory::Use;

inline constexpr double nan = std::numeric_limits<double>::quiet_NaN();
inline constexpr double inf = std::numeric_limits<double>::infinity();

/// The value of a 16-bit float with so many bits of exponent and fraction.
inline double decode(uint16_t bits, int exponent_bits, int fraction_bits) {
  int const exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  int const fraction = bits & ((1 << fraction_bits) - 1);
  int const bias = (1 << (exponent_bits - 1)) - 1;
  double const sign = bits >> 15 ? -1. : 1.;
  if (exponent == (1 << exponent_bits) - 1) return fraction == 0 ? sign * inf : nan;
  int const implicit = exponent == 0 ? 0 : 1 << fraction_bits;
  return sign * std::ldexp(fraction + implicit, std::max(exponent, 1) - bias - fraction_bits);
}

inline double decode(DType t, uint16_t bits) { return t == DType::float16 ? decode(bits, 5, 10) : decode(bits, 8, 7); }

inline uint16_t encode(DType t, double x) {
  auto const f = static_cast<float>(x);
  return t == DType::float16 ? cute::half_t(f).raw() : cute::bfloat16_t(f).raw();
}

enum class Order { bshd, bhsd, padded };

/// A tensor (batch, rows, heads, d) in memory in which all else is NaN.
class Tensor {
 public:
  Tensor(DType type, int batch, int rows, int heads, int d, Order order)
      : type_(type), batch_(batch), rows_(rows), heads_(heads), d_(d) {
    switch (order) {
      case Order::bshd: stride_ = {rows * heads * d, heads * d, d}; break;
      case Order::bhsd: stride_ = {heads * rows * d, d, rows * d}; break;
      case Order::padded: stride_ = {rows * (heads * (d + 8) + 16) + 24, heads * (d + 8) + 16, d + 8}; break;
    }
    bits_.assign(static_cast<size_t>(2 * margin + batch * std::max<int64_t>(stride_.batch, 1)), 0xffff);
  }

  void fill(std::mt19937_64& random) {
    std::normal_distribution<double> normal;
    for_each([&](uint16_t& element) { element = encode(type_, normal(random)); });
  }

  double at(int b, int row, int h, int column) const { return decode(type_, bits_[index(b, row, h, column)]); }

  void set(int b, int row, int h, int column, double x) { bits_[index(b, row, h, column)] = encode(type_, x); }
  void set_row(int b, int row, int h, double x) {
    for (int c = 0; c < d_; ++c) set(b, row, h, c, x);
  }

  void* data() { return &bits_[margin]; }
  Strides const& stride() const { return stride_; }
  std::vector<uint16_t> const& bits() const { return bits_; }

  /// Lets the kernel use rows [first, last) of one head.
  void allow(GlobalMemory& memory, int b, int h, int first, int last, Use use) {
    memory.add(bits_.data(), 2 * bits_.size());
    for (int row = first; row < last; ++row)
      memory.allow(&bits_[index(b, row, h, 0)], static_cast<size_t>(2 * d_), use);
  }

 private:
  static constexpr int margin = 64;

  size_t index(int b, int row, int h, int column) const {
    return static_cast<size_t>(margin + b * stride_.batch + row * stride_.row + h * stride_.head + column);
  }

  template <class F>
  void for_each(F&& f) {
    for (int b = 0; b < batch_; ++b)
      for (int row = 0; row < rows_; ++row)
        for (int h = 0; h < heads_; ++h)
          for (int c = 0; c < d_; ++c) f(bits_[index(b, row, h, c)]);
  }

  DType type_;
  int batch_, rows_, heads_, d_;
  Strides stride_;
  std::vector<uint16_t> bits_;
};

struct Shape {
  int sq, sk, d;
  int batch = 1, heads = 1, kv_heads = 1;
  Order order = Order::bshd;
  std::optional<int> causal_offset{};  // default: bottom-right
};

/// One call of the forward.
class Problem {
 public:
  Problem(ForwardKernelId id, Shape const& s, uint64_t seed = 0)
      : id_(id),
        s_(s),
        q(id.config.dtype, s.batch, s.sq, s.heads, s.d, s.order),
        k(id.config.dtype, s.batch, s.sk, s.kv_heads, s.d, s.order),
        v(id.config.dtype, s.batch, s.sk, s.kv_heads, s.d, s.order),
        out(id.config.dtype, s.batch, s.sq, s.heads, s.d, s.order) {
    std::mt19937_64 random(seed);
    q.fill(random);
    k.fill(random);
    v.fill(random);
  }

  ForwardKernelId id_;
  Shape s_;
  Tensor q, k, v, out;
  double scale = 1 / std::sqrt(s_.d);
  bool wants_lse = true;
  std::vector<float> lse;  // (batch, heads, sq) between two margins

  static constexpr int margin = 256;  // no smaller than block_m: stores of rows that do not exist land in it

  float lse_at(int b, int h, int i) const { return lse[static_cast<size_t>(margin + (b * s_.heads + h) * s_.sq + i)]; }

  bool visible(int i, int j) const {
    return id_.features.mask == MaskKind::full || j <= i + s_.causal_offset.value_or(s_.sk - s_.sq);
  }

  /// Runs all blocks, in random order, under the schedules of `seed`.
  template <ForwardKernelId Id>
  void run(uint64_t seed) {
    using Pass = ForwardPass<Id>;
    using Storage = typename Pass::L::SharedStorage;
    out = Tensor(Id.config.dtype, s_.batch, s_.sq, s_.heads, s_.d, s_.order);
    float const untouched = std::bit_cast<float>(0x7fedcba9u);
    lse.assign(static_cast<size_t>(2 * margin + s_.batch * s_.heads * s_.sq), untouched);

    ForwardParams p{};
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data();
    p.lse = wants_lse ? &lse[margin] : nullptr;
    p.q_stride = q.stride(), p.k_stride = k.stride(), p.v_stride = v.stride(), p.out_stride = out.stride();
    p.scale = scale;
    // As the plan does: with scale 0 a masked score must stay -inf.
    p.scale_log2 = std::max(static_cast<float>(scale * 1.4426950408889634), std::numeric_limits<float>::min());
    p.batch = s_.batch, p.heads = s_.heads, p.kv_heads = s_.kv_heads;
    p.seqlen_q = s_.sq, p.seqlen_k = s_.sk, p.head_dim = s_.d;
    p.causal_offset = s_.causal_offset.value_or(s_.sk - s_.sq);

    std::vector<uint32_t> blocks(static_cast<size_t>(QueryTile::count(p, Id.config.block_m)));
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<uint32_t>(i);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(seed));
    for (uint32_t block : blocks) {
      auto const tile = QueryTile::at(p, block, Id.config.block_m);
      GlobalMemory memory;
      q.allow(memory, tile.batch, tile.head, tile.row0, tile.row0 + tile.rows, Use::input);
      k.allow(memory, tile.batch, tile.kv_head, 0, s_.sk, Use::input);
      v.allow(memory, tile.batch, tile.kv_head, 0, s_.sk, Use::input);
      out.allow(memory, tile.batch, tile.head, tile.row0, tile.row0 + tile.rows, Use::output);
      std::vector<float> const before = lse;
      emulation::run_block(block, num_threads(Id.config), sizeof(Storage), seed + block, memory,
                           [&](void* shared) { Pass::run(p, *static_cast<Storage*>(shared)); });
      ASSERT_EQ(memory.count(Use::output), 0u) << "elements of the output that were never stored";
      int64_t const first = margin + tile.lse_offset(p);
      for (int64_t i = 0; i < static_cast<int64_t>(lse.size()); ++i) {
        auto const at = static_cast<size_t>(i);
        bool const stored = std::bit_cast<uint32_t>(lse[at]) != std::bit_cast<uint32_t>(before[at]);
        ASSERT_EQ(stored, wants_lse && i >= first && i < first + tile.rows) << "LSE " << i << " of block " << block;
      }
    }
  }

  /// Compares with attention in fp64. P and the output are rounded to the 16-bit type, the rest is fp32.
  void expect_right() const {
    double const unit = id_.config.dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
    for (int b = 0; b < s_.batch; ++b) {
      for (int h = 0; h < s_.heads; ++h) {
        int const kv = h / (s_.heads / s_.kv_heads);
        for (int i = 0; i < s_.sq; ++i) {
          std::vector<int> keys;  // that the row sees
          std::vector<double> p;
          double top = -inf, sum = 0;
          for (int j = 0; j < s_.sk; ++j) {
            if (!visible(i, j)) continue;
            double score = 0;
            for (int c = 0; c < s_.d; ++c) score += q.at(b, i, h, c) * k.at(b, j, kv, c);
            keys.push_back(j);
            p.push_back(scale * score);
            top = std::fmax(top, scale * score);
          }
          for (double& x : p) {
            x = top == -inf && !std::isnan(x) ? 0 : std::exp(x - top);
            sum += x;
          }
          double const lse = sum == 0 ? -inf : top + std::log(sum);
          if (wants_lse && !is_close(lse_at(b, h, i), lse, 2e-5 * std::max(1., std::fabs(lse)))) {
            FAIL() << where(b, i, h) << ": LSE is " << lse_at(b, h, i) << ", not " << lse;
          }
          for (int c = 0; c < s_.d; ++c) {
            double o = 0, magnitude = 0;
            for (size_t n = 0; n < keys.size(); ++n) {
              o += p[n] * v.at(b, keys[n], kv, c);
              magnitude += std::fabs(p[n] * v.at(b, keys[n], kv, c));
            }
            double const want = keys.empty() ? 0 : o / sum;
            double const tolerance =
                keys.empty() ? 0 : (1.1 * unit + 1e-5) * (magnitude / sum + std::fabs(want)) + 1e-6;
            double const got = out.at(b, i, h, c);
            if (!is_close(got, want, tolerance)) {
              FAIL() << where(b, i, h) << " column " << c << ": " << got << " is not " << want << " +- " << tolerance;
            }
          }
        }
      }
    }
  }

 private:
  static bool is_close(double got, double want, double tolerance) {
    return std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= tolerance;
  }

  std::string where(int b, int i, int h) const {
    return std::string(name(id_).text) + ", seqlen_q " + std::to_string(s_.sq) + ", seqlen_k " + std::to_string(s_.sk) +
           ", d " + std::to_string(s_.d) + ": batch " + std::to_string(b) + " row " + std::to_string(i) + " head " +
           std::to_string(h);
  }
};

/// Runs under several schedules: the first result is compared with fp64, the others bit by bit with the first.
template <ForwardKernelId Id>
void check(Problem& problem, int schedules = 1) {
  if (testing::Test::HasFailure()) return;  // the first failure says enough
  try {
    ASSERT_NO_FATAL_FAILURE(problem.template run<Id>(1));
    problem.expect_right();
    auto const out = problem.out.bits();
    auto const lse = problem.lse;
    for (int seed = 2; seed <= schedules; ++seed) {
      ASSERT_NO_FATAL_FAILURE(problem.template run<Id>(static_cast<uint64_t>(seed) << 32));
      ASSERT_EQ(problem.out.bits(), out) << "the schedule changes the output";
      ASSERT_EQ(std::memcmp(problem.lse.data(), lse.data(), lse.size() * sizeof(float)), 0);
    }
  } catch (emulation::Violation const& e) {
    FAIL() << name(Id).text << ": " << e.what();
  }
}

template <ForwardKernelId Id>
void check(Shape const& s, int schedules = 1) {
  Problem problem(Id, s);
  check<Id>(problem, schedules);
}

constexpr ForwardKernelId causal(ForwardConfig c) { return {c, {MaskKind::causal}}; }
constexpr ForwardKernelId full(ForwardConfig c) { return {c, {MaskKind::full}}; }

inline constexpr auto f16 = DType::float16, bf16 = DType::bfloat16;

}  // namespace flashcute
