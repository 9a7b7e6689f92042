// A call of a forward kernel on the host, and attention in fp64 to compare with.
#pragma once

#include "flashcute/core/forward_params.hpp"
#include "flashcute/device/instructions.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <optional>
#include <random>

#include "support/map_problem.hpp"
#include "support/mask_definition.hpp"

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

inline double decode(DType t, uint32_t bits) {
  if (t == DType::float32) return std::bit_cast<float>(bits);
  auto const half = static_cast<uint16_t>(bits);
  return t == DType::float16 ? decode(half, 5, 10) : decode(half, 8, 7);
}

inline uint32_t encode(DType t, double x) {
  auto const f = static_cast<float>(x);
  if (t == DType::float32) return std::bit_cast<uint32_t>(f);
  return t == DType::float16 ? cute::half_t(f).raw() : cute::bfloat16_t(f).raw();
}

enum class Order { bshd, bhsd, padded };

/// A tensor (batch, rows, heads, d) in memory in which all else is NaN.
class Tensor {
 public:
  /// Padded: the base and all strides are multiples of `copy_bytes`, and of nothing more.
  Tensor(DType type, int batch, int rows, int heads, int d, Order order, int copy_bytes)
      : type_(type), batch_(batch), rows_(rows), heads_(heads), d_(d), first_(64) {
    int const unit = copy_bytes / size_of(type);
    int64_t const width = d + unit;
    switch (order) {
      case Order::bshd: stride_ = {rows * heads * d, heads * d, d}; break;
      case Order::bhsd: stride_ = {heads * rows * d, d, rows * d}; break;
      case Order::padded:
        stride_ = {rows * (heads * width + 2 * unit) + 3 * unit, heads * width + 2 * unit, width};
        first_ += unit;
        break;
    }
    auto const elements = static_cast<size_t>(first_ + 64 + batch * std::max<int64_t>(stride_.batch, 1));
    bytes_.assign(elements * size(), 0xff);
  }

  void fill(std::mt19937_64& random) {
    std::normal_distribution<double> normal;
    for (int b = 0; b < batch_; ++b)
      for (int row = 0; row < rows_; ++row)
        for (int h = 0; h < heads_; ++h)
          for (int c = 0; c < d_; ++c) set(b, row, h, c, normal(random));
  }

  double at(int b, int row, int h, int column) const {
    uint32_t bits = 0;
    std::memcpy(&bits, &bytes_[index(b, row, h, column)], size());
    return decode(type_, bits);
  }

  void set(int b, int row, int h, int column, double x) {
    uint32_t const bits = encode(type_, x);
    std::memcpy(&bytes_[index(b, row, h, column)], &bits, size());
  }
  void set_row(int b, int row, int h, double x) {
    for (int c = 0; c < d_; ++c) set(b, row, h, c, x);
  }
  /// Of all heads.
  void set_rows(int b, int row, double x) {
    for (int h = 0; h < heads_; ++h) set_row(b, row, h, x);
  }

  void* data() { return &bytes_[static_cast<size_t>(first_) * size()]; }
  Strides const& stride() const { return stride_; }
  std::vector<uint8_t> const& bytes() const { return bytes_; }

  /// Lets the kernel use rows [first, last) of one head.
  void allow(GlobalMemory& memory, int b, int h, int first, int last, Use use) {
    memory.add(bytes_.data(), bytes_.size());
    for (int row = first; row < last; ++row)
      memory.allow(&bytes_[index(b, row, h, 0)], static_cast<size_t>(d_) * size(), use);
  }

 private:
  size_t size() const { return type_ == DType::float32 ? 4 : 2; }

  size_t index(int b, int row, int h, int column) const {
    return static_cast<size_t>(first_ + b * stride_.batch + row * stride_.row + h * stride_.head + column) * size();
  }

  DType type_;
  int batch_, rows_, heads_, d_;
  int64_t first_;  // element of the memory that is element (0, 0, 0, 0)
  Strides stride_;
  std::vector<uint8_t> bytes_;
};

struct Shape {
  int sq, sk, d;
  int d_v = d;
  int batch = 1, heads = 1, kv_heads = 1;
  Order order = Order::bshd;
  std::optional<int> causal_offset{};  // default: bottom-right
  int window_offset = 0;               // of the band
  // Of the band: lengths of each batch entry, with whose ends the offsets move if `from_end`; prefix; sink of each
  // head.
  std::vector<int> seqlens_q{}, seqlens_k{};
  bool from_end = false;
  std::optional<int> prefix{};
  int prefix_offset = 0;
  std::vector<float> sink{};
  // Packed sequences in sq and sk rows of a batch of one, to each of which the lengths are told.
  std::vector<int> cu_seqlens_q{}, cu_seqlens_k{};
  MapProblem map{};

  bool packed() const { return !cu_seqlens_q.empty(); }
  /// Rows of batch entry or sequence `b` that exist.
  int rows(int b) const { return existing(cu_seqlens_q, seqlens_q, b, sq); }
  int keys(int b) const { return existing(cu_seqlens_k, seqlens_k, b, sk); }
  /// The sequence of a row and its number in it; of a batch entry that is not packed, that entry. Below 0: none.
  static std::pair<int, int> place(std::vector<int> const& starts, int b, int row) {
    if (starts.empty()) return {b, row};
    for (size_t s = 0; s + 1 < starts.size(); ++s) {
      if (starts[s] <= row && row < starts[s + 1]) return {static_cast<int>(s), row - starts[s]};
    }
    return {-1, 0};
  }
  bool row_exists(int b, int i) const {
    auto const [entry, row] = place(cu_seqlens_q, b, i);
    return entry >= 0 && row < rows(entry);
  }
  bool key_exists(int b, int j) const {
    auto const [entry, key] = place(cu_seqlens_k, b, j);
    return entry >= 0 && key < keys(entry);
  }
  int last_offset() const { return causal_offset.value_or(sk - sq); }
  bool sees(MaskKind kind, int batch, int head, int query, int other) const {
    auto const [b, i] = place(cu_seqlens_q, batch, query);
    auto const [b_of_key, j] = place(cu_seqlens_k, batch, other);
    if (b < 0 || b != b_of_key) return false;
    int const shift = from_end ? (keys(b) - sk) - (rows(b) - sq) : 0;
    definition::MaskProblem m{keys(b), last_offset() + shift, window_offset + shift, rows(b)};
    if (prefix) m.prefix = *prefix, m.prefix_offset = prefix_offset + shift;
    m.map_shows = !map.exists() || map.shows(b, head, i, j);
    return definition::sees(kind, i, j, m);
  }

  /// How many tiles of `block` query rows a head has; packed, how many slots.
  int row_blocks(int block) const {
    if (!packed()) return ceil_div(sq, block);
    return sq == 0 ? 0 : sq / block + static_cast<int>(cu_seqlens_q.size()) + 1;
  }

  /// What a launch is told of the mask. The pointers are into this shape.
  void describe(ForwardParams& p) const {
    p.batch = batch, p.heads = heads, p.kv_heads = kv_heads;
    p.seqlen_q = sq, p.seqlen_k = sk, p.head_dim = d, p.head_dim_v = d_v;
    p.causal_offset = last_offset();
    p.window_offset = window_offset;
    p.sequences.from_end = from_end;
    if (!seqlens_q.empty()) p.sequences.seqlens_q = seqlens_q.data();
    if (!seqlens_k.empty()) p.sequences.seqlens_k = seqlens_k.data();
    if (prefix) p.sequences.prefix = *prefix, p.sequences.prefix_offset = prefix_offset;
    if (!sink.empty()) p.sink.logits = sink.data(), p.sink.float32 = true;
    p.map = map.described();
    if (!packed()) return;
    p.sequences.count = static_cast<int>(cu_seqlens_q.size()) - 1;
    p.sequences.cu_seqlens_q = cu_seqlens_q.data();
    p.sequences.cu_seqlens_k = cu_seqlens_k.data();
  }

 private:
  static int existing(std::vector<int> const& starts, std::vector<int> const& lengths, int b, int all) {
    auto const i = static_cast<size_t>(b);
    int const most = starts.empty() ? all : starts[i + 1] - starts[i];
    return lengths.empty() ? most : std::clamp(lengths[i], 0, most);
  }
};

/// One call of the forward.
class Problem {
 public:
  Problem(ForwardKernelId id, Shape const& s, uint64_t seed = 0)
      : id_(id),
        s_(s),
        q(id.config.dtype, s.batch, s.sq, s.heads, s.d, s.order, id.config.copy_bytes),
        k(id.config.dtype, s.batch, s.sk, s.kv_heads, s.d, s.order, id.config.copy_bytes),
        v(id.config.dtype, s.batch, s.sk, s.kv_heads, s.d_v, s.order, id.config.copy_bytes),
        out(empty_output()) {
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
  std::vector<float> lse;                 // (batch, heads, sq)
  std::vector<BlockCounts> block_counts;  // (batch, heads, row blocks)

  float lse_at(int b, int h, int i) const { return lse[static_cast<size_t>((b * s_.heads + h) * s_.sq + i)]; }

  bool visible(int b, int h, int i, int j) const { return s_.sees(id_.features.mask, b, h, i, j); }

  /// NaN in all rows that do not exist.
  void poison_absent() {
    for (int b = 0; b < s_.batch; ++b) {
      for (int i = 0; i < s_.sq; ++i) {
        if (!s_.row_exists(b, i)) q.set_rows(b, i, NAN);
      }
      for (int j = 0; j < s_.sk; ++j) {
        if (!s_.key_exists(b, j)) k.set_rows(b, j, NAN), v.set_rows(b, j, NAN);
      }
    }
  }

  /// Clears the outputs; what a launch is told.
  ForwardParams prepare() {
    ForwardConfig const& config = id_.config;
    out = empty_output();
    lse.assign(static_cast<size_t>(s_.batch * s_.heads * s_.sq), 0.f);
    block_counts.assign(static_cast<size_t>(s_.batch * s_.heads * s_.row_blocks(tile_rows(config))), {});

    ForwardParams p{};
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data();
    p.lse = wants_lse ? lse.data() : nullptr;
    p.block_counts = id_.features.count_blocks ? block_counts.data() : nullptr;
    p.q_stride = q.stride(), p.k_stride = k.stride(), p.v_stride = v.stride(), p.out_stride = out.stride();
    p.scale = scale;
    // As the plan does: with scale 0 a masked score must stay -inf.
    p.scale_log2 = std::max(static_cast<float>(scale * 1.4426950408889634), std::numeric_limits<float>::min());
    s_.describe(p);
    return p;
  }

  /// Lets a block store `count` items from `first` on.
  template <class T>
  static void allow_items(GlobalMemory& memory, std::vector<T>& items, int64_t first, int count) {
    memory.add(items.data(), items.size() * sizeof(T));
    memory.allow(&items[static_cast<size_t>(first)], static_cast<size_t>(count) * sizeof(T), Use::output);
  }

  /// Lets the kernel read the sink.
  void allow_sink(GlobalMemory& memory) {
    if (s_.sink.empty()) return;
    memory.add(s_.sink.data(), s_.sink.size() * sizeof(float));
    memory.allow(s_.sink.data(), s_.sink.size() * sizeof(float), Use::input);
  }

  /// Lets the kernel store all items.
  template <class T>
  static void allow_all(GlobalMemory& memory, std::vector<T>& items) {
    allow_items(memory, items, 0, static_cast<int>(items.size()));
  }

  /// Compares with attention in fp64. P and the output are rounded to the 16-bit type, the rest is fp32. In
  /// TF32 all operands are rounded.
  void expect_right() const {
    bool const fp32 = id_.config.dtype == DType::float32, tf32 = fp32 && id_.config.math == Math::tensor_core;
    double const unit = tf32 ? 0x1p-10 : fp32 ? 0 : id_.config.dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
    for (int b = 0; b < s_.batch; ++b) {
      for (int h = 0; h < s_.heads; ++h) {
        int const kv = h / (s_.heads / s_.kv_heads);
        for (int i = 0; i < s_.sq; ++i) {
          std::vector<int> keys;  // that the row sees
          std::vector<double> p;
          double top = -inf, sum = 0, largest = 0;
          for (int j = 0; j < s_.sk; ++j) {
            if (!visible(b, h, i, j)) continue;
            double score = 0, magnitude = 0;
            for (int c = 0; c < s_.d; ++c) {
              double const product = q.at(b, i, h, c) * k.at(b, j, kv, c);
              score += product;
              magnitude += std::fabs(product);
            }
            largest = std::fmax(largest, scale * magnitude);
            keys.push_back(j);
            p.push_back(scale * score);
            top = std::fmax(top, scale * score);
          }
          if (!s_.sink.empty() && s_.row_exists(b, i)) {  // one more key, of value 0
            p.push_back(static_cast<double>(s_.sink[static_cast<size_t>(h)]));
            top = std::fmax(top, p.back());
          }
          for (double& x : p) {
            x = top == -inf && !std::isnan(x) ? 0 : std::exp(x - top);
            sum += x;
          }
          double const lse = sum == 0 ? -inf : top + std::log(sum);
          double const score_error = tf32 ? unit * largest : 0;
          if (wants_lse && !is_close(lse_at(b, h, i), lse, 2e-5 * std::max(1., std::fabs(lse)) + score_error)) {
            FAIL() << where(b, i, h) << ": LSE is " << lse_at(b, h, i) << ", not " << lse;
          }
          for (int c = 0; c < s_.d_v; ++c) {
            double o = 0, magnitude = 0;
            for (size_t n = 0; n < keys.size(); ++n) {
              o += p[n] * v.at(b, keys[n], kv, c);
              magnitude += std::fabs(p[n] * v.at(b, keys[n], kv, c));
            }
            double const want = keys.empty() ? 0 : o / sum;
            double const tolerance =
                keys.empty() ? 0 : (1.1 * unit + 1e-5 + 2 * score_error) * (magnitude / sum + std::fabs(want)) + 1e-6;
            double const got = out.at(b, i, h, c);
            if (!is_close(got, want, tolerance)) {
              FAIL() << where(b, i, h) << " column " << c << ": " << got << " is not " << want << " +- " << tolerance;
            }
          }
        }
      }
    }
  }

  /// Compares the counts of every tile with the mask, element by element. `from_end`: tiles are counted off from the
  /// last row, so that an incomplete one is the first.
  void expect_counts(bool from_end = false) const {
    int const m = tile_rows(id_.config), n = id_.config.block_n, tiles = s_.row_blocks(m);
    for (size_t t = 0; t < block_counts.size(); ++t) {
      int const tile = static_cast<int>(t) % tiles;
      int b = static_cast<int>(t) / (tiles * s_.heads), block = tile, length = s_.sq, first_row = 0, first_key = 0;
      if (s_.packed()) {  // the last sequence whose slots begin there or before, if it has rows in this one
        b = -1;
        for (size_t s = 0; s + 1 < s_.cu_seqlens_q.size(); ++s) {
          int const first_slot = s_.cu_seqlens_q[s] / m + static_cast<int>(s) + 1;
          length = s_.cu_seqlens_q[s + 1] - s_.cu_seqlens_q[s];
          if (tile < first_slot || tile >= first_slot + ceil_div(length, m)) continue;
          b = static_cast<int>(s), block = tile - first_slot;
          first_row = s_.cu_seqlens_q[s], first_key = s_.cu_seqlens_k[s];
          break;
        }
      }
      int const begin = block * m - (from_end ? ceil_div(length, m) * m - length : 0), keys = b < 0 ? 0 : s_.keys(b);
      int const row0 = std::max(begin, 0), row_end = b < 0 ? 0 : std::min(begin + m, s_.rows(b));
      int const batch = s_.packed() ? 0 : b, head = static_cast<int>(t) / tiles % s_.heads;
      BlockCounts want{};
      for (int key0 = 0; key0 < keys; key0 += n) {
        bool any = false, all = key0 + n <= keys;
        for (int i = row0; i < row_end; ++i) {
          for (int j = key0; j < std::min(key0 + n, keys); ++j) {
            bool const seen = visible(batch, head, first_row + i, first_key + j);
            (seen ? any : all) = seen;
          }
        }
        if (s_.map.exists()) look_at_cells(b, head, row0, row_end, key0, std::min(key0 + n, keys), any, all);
        ++(any && all ? want.full : any ? want.partial : want.skipped);
      }
      EXPECT_EQ(block_counts[t].full, want.full) << "tile " << t;
      EXPECT_EQ(block_counts[t].partial, want.partial) << "tile " << t;
      EXPECT_EQ(block_counts[t].skipped, want.skipped) << "tile " << t;
    }
  }

 private:
  Tensor empty_output() const {
    return Tensor(id_.config.dtype, s_.batch, s_.sq, s_.heads, s_.d_v, s_.order, id_.config.copy_bytes);
  }

  /// A map is known by cells: a block is visited if any of its cells is seen at all, and needs no test only if all of
  /// them are seen whole.
  void look_at_cells(int b, int h, int row0, int row_end, int key0, int key_end, bool& any, bool& all) const {
    bool in_band = false, in_cells = false;
    for (int i = row0; i < row_end; ++i) {
      for (int j = key0; j < key_end; ++j) in_band = in_band || s_.sees(MaskKind::band, b, h, i, j);
    }
    auto const rounded = [](int x, int most) { return std::min(ceil_div(x, cell_size) * cell_size, most); };
    for (int i = row0 / cell_size * cell_size; i < rounded(row_end, s_.sq); ++i) {
      for (int j = key0 / cell_size * cell_size; j < rounded(key_end, s_.sk); ++j) {
        bool const shown = s_.map.shows(b, h, i, j);
        in_cells = in_cells || shown;
        all = all && shown;
      }
    }
    any = in_band && in_cells;
  }

  static bool is_close(double got, double want, double tolerance) {
    return std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= tolerance;
  }

  std::string where(int b, int i, int h) const {
    return std::string(name(id_).text) + ", seqlen_q " + std::to_string(s_.sq) + ", seqlen_k " + std::to_string(s_.sk) +
           ", d " + std::to_string(s_.d) + ": batch " + std::to_string(b) + " row " + std::to_string(i) + " head " +
           std::to_string(h);
  }
};

// All of them count blocks, which costs nothing here.
constexpr ForwardKernelId causal(ForwardConfig c) {
  return kernel_of(c, {.mask = MaskKind::causal, .count_blocks = true});
}
constexpr ForwardKernelId band(ForwardConfig c) { return kernel_of(c, {.mask = MaskKind::band, .count_blocks = true}); }
constexpr ForwardKernelId mapped(ForwardConfig c) {
  return kernel_of(c, {.mask = MaskKind::mapped, .count_blocks = true});
}
constexpr ForwardKernelId full(ForwardConfig c) { return kernel_of(c, {.mask = MaskKind::full, .count_blocks = true}); }

inline constexpr auto f16 = DType::float16, bf16 = DType::bfloat16, f32 = DType::float32;

}  // namespace flashcute
