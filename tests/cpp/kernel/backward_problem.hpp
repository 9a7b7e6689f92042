// A call of the backward for kernels that are run on the host: tensors, the forward's results, and gradients in fp64 to
// compare with.
#pragma once

#include "flashcute/core/backward_params.hpp"
#include "kernel/kernel_problem.hpp"

namespace flashcute {

/// One call of the backward, of the forward's problem.
template <BackwardConfig B, MaskKind Kind>
class BackwardCall {
  static constexpr DType dtype = B.dtype;
  static constexpr ForwardConfig forward_config = {.dtype = dtype,
                                                   .head_dim = B.head_dim,
                                                   .head_dim_v = B.head_dim_v,
                                                   .block_m = B.block_m,
                                                   .block_n = B.block_n,
                                                   .math = B.math,
                                                   .copy_bytes = B.copy_bytes};

 public:
  explicit BackwardCall(Shape const& s, bool with_dlse = false)
      : s_(s),
        problem(kernel_of(forward_config, {Kind}), s),
        dout(dtype, s.batch, s.sq, s.heads, s.d_v, s.order, B.copy_bytes),
        dq(dtype, s.batch, s.sq, s.heads, s.d, s.order, B.copy_bytes),
        dk(dtype, s.batch, s.sk, s.kv_heads, s.d, s.order, B.copy_bytes),
        dv(dtype, s.batch, s.sk, s.kv_heads, s.d_v, s.order, B.copy_bytes),
        lse(static_cast<size_t>(s.batch * s.heads * s.sq)),
        delta(static_cast<size_t>(workspace_of(B, s.batch * s.heads, s.sq, s.row_blocks(B.block_m)).delta),
              std::numeric_limits<float>::quiet_NaN()),
        counters(static_cast<size_t>(workspace_of(B, s.batch * s.heads, s.sq, s.row_blocks(B.block_m)).counters)),
        dq_sums(
            static_cast<size_t>(workspace_of(B, s.batch * s.heads, s.sq, s.row_blocks(B.block_m)).dq_sums) + counters,
            std::numeric_limits<float>::quiet_NaN()),
        dlse(with_dlse ? lse.size() : 0) {
    std::mt19937_64 random(7);
    dout.fill(random);
    std::normal_distribution<float> normal;
    for (float& x : dlse) x = normal(random);
  }

  Shape s_;
  Problem problem;  // q, k, v; its output too
  Tensor dout, dq, dk, dv;
  std::vector<float> lse, delta;
  size_t counters;             // at the end of dq_sums
  std::vector<float> dq_sums;  // of Hopper's kernels with counters
  std::vector<float> dlse, dsink;
  bool any_nonfinite =
      false;  // where NaN or infinity is wanted, either is right: which one depends on what is summed first

  /// Of a gradient's elements together.
  class Error {
   public:
    void add(double got, double want) { of_errors_ += (got - want) * (got - want), of_wanted_ += want * want; }
    /// In L2.
    double relative() const { return std::sqrt(of_errors_ / of_wanted_); }

   private:
    double of_errors_ = 0, of_wanted_ = 0;
  };
  Error dq_error, dk_error;  // that expect_right finds

  /// Compares with the definition, element by element.
  void expect_right() {
    for (int h = 0; h < static_cast<int>(dsink.size()); ++h) {
      double want = 0, size = 0;
      for (int b = 0; b < s_.batch; ++b) {
        for (int i = 0; i < s_.sq; ++i) {
          if (!s_.row_exists(b, i)) continue;
          double d = dlse.empty() ? 0 : -dlse[row(b, h, i)];
          for (int c = 0; c < s_.d_v; ++c) d += problem.out.at(b, i, h, c) * dout.at(b, i, h, c);
          double const weight = std::exp(static_cast<double>(s_.sink[static_cast<size_t>(h)]) - lse[row(b, h, i)]);
          want -= weight * d;
          size += weight * std::fabs(d);
        }
      }
      EXPECT_NEAR(dsink[static_cast<size_t>(h)], want, 1e-5 * (size + 1)) << "dsink of head " << h;
    }
    double const unit = dtype == DType::float32 ? 0 : dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
    for (int b = 0; b < s_.batch; ++b) {
      for (int kv = 0; kv < s_.kv_heads; ++kv) {
        Sums want_dk(s_.sk * s_.d), want_dv(s_.sk * s_.d_v);
        int const group = s_.heads / s_.kv_heads;
        for (int h = kv * group; h < (kv + 1) * group; ++h) {
          for (int i = 0; i < s_.sq; ++i) {
            Sums want_dq(s_.d);
            double const row_lse = lse[row(b, h, i)];
            double d = dlse.empty() ? 0 : -dlse[row(b, h, i)];
            for (int c = 0; c < s_.d_v; ++c) d += problem.out.at(b, i, h, c) * dout.at(b, i, h, c);
            for (int j = 0; j < s_.sk; ++j) {
              if (!problem.visible(b, h, i, j)) continue;
              double score = 0, dp = 0;
              for (int c = 0; c < s_.d; ++c) score += problem.q.at(b, i, h, c) * problem.k.at(b, j, kv, c);
              for (int c = 0; c < s_.d_v; ++c) dp += dout.at(b, i, h, c) * problem.v.at(b, j, kv, c);
              double const weight = std::exp(problem.scale * score - row_lse);
              double const ds = weight * (dp - d), size = weight * (std::fabs(dp) + std::fabs(d));
              for (int c = 0; c < s_.d; ++c) {
                want_dq.add(c, problem.scale * problem.k.at(b, j, kv, c), ds, size);
                want_dk.add(j * s_.d + c, problem.scale * problem.q.at(b, i, h, c), ds, size);
              }
              for (int c = 0; c < s_.d_v; ++c) want_dv.add(j * s_.d_v + c, dout.at(b, i, h, c), weight, weight);
            }
            for (int c = 0; c < s_.d; ++c) {
              want_dq.expect(c, dq.at(b, i, h, c), unit, "dq", any_nonfinite);
              dq_error.add(dq.at(b, i, h, c), want_dq.value[static_cast<size_t>(c)]);
            }
          }
        }
        for (int j = 0; j < s_.sk; ++j) {
          for (int c = 0; c < s_.d; ++c) {
            want_dk.expect(j * s_.d + c, dk.at(b, j, kv, c), unit, "dk", any_nonfinite);
            dk_error.add(dk.at(b, j, kv, c), want_dk.value[static_cast<size_t>(j * s_.d + c)]);
          }
          for (int c = 0; c < s_.d_v; ++c)
            want_dv.expect(j * s_.d_v + c, dv.at(b, j, kv, c), unit, "dv", any_nonfinite);
        }
      }
    }
  }

 protected:
  /// Sums of products, and of how large they were: a rounding of a factor is as large as what it was computed from.
  struct Sums {
    explicit Sums(int count) : value(static_cast<size_t>(count)), size(value.size()) {}

    void add(int i, double x, double factor, double factor_size) {
      value[static_cast<size_t>(i)] += x * factor;
      size[static_cast<size_t>(i)] += std::fabs(x) * factor_size;
    }

    /// `any_nonfinite`: as in BackwardCall.
    void expect(int i, double got, double unit, char const* what, bool any_nonfinite) const {
      double const want = value[static_cast<size_t>(i)];
      double const tolerance = (1.1 * unit + 1e-5) * (size[static_cast<size_t>(i)] + std::fabs(want)) + 1e-6;
      bool const right = any_nonfinite && !std::isfinite(want)
                             ? !std::isfinite(got)
                             : (std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= tolerance);
      if (!right) ADD_FAILURE() << what << " " << i << ": " << got << " is not " << want << " +- " << tolerance;
    }

    std::vector<double> value, size;
  };

  size_t row(int b, int h, int i) const { return static_cast<size_t>((b * s_.heads + h) * s_.sq + i); }

  void compute_forward() {
    for (int b = 0; b < s_.batch; ++b) {
      for (int h = 0; h < s_.heads; ++h) {
        int const kv = h / (s_.heads / s_.kv_heads);
        for (int i = 0; i < s_.sq; ++i) {
          std::vector<double> scores(static_cast<size_t>(s_.sk), -inf);
          double top = -inf, sum = 0;
          for (int j = 0; j < s_.sk; ++j) {
            if (!problem.visible(b, h, i, j)) continue;
            double score = 0;
            for (int c = 0; c < s_.d; ++c) score += problem.q.at(b, i, h, c) * problem.k.at(b, j, kv, c);
            scores[static_cast<size_t>(j)] = problem.scale * score;
            top = std::fmax(top, problem.scale * score);
          }
          double const sink = s_.sink.empty() || !s_.row_exists(b, i) ? -inf : s_.sink[static_cast<size_t>(h)];
          top = std::fmax(top, sink);
          if (sink != -inf) sum = std::exp(sink - top);
          for (double& x : scores) sum += x = top == -inf && !std::isnan(x) ? 0 : std::exp(x - top);
          lse[row(b, h, i)] = static_cast<float>(sum == 0 ? -inf : top + std::log(sum));
          for (int c = 0; c < s_.d_v; ++c) {
            double o = 0;
            for (int j = 0; j < s_.sk; ++j) {
              if (problem.visible(b, h, i, j)) o += scores[static_cast<size_t>(j)] * problem.v.at(b, j, kv, c);
            }
            problem.out.set(b, i, h, c, sum == 0 ? 0 : o / sum);
          }
        }
      }
    }
  }

  BackwardParams params() {
    BackwardParams p{};
    p.forward.q = problem.q.data(), p.forward.k = problem.k.data(), p.forward.v = problem.v.data();
    p.forward.out = problem.out.data(), p.forward.lse = lse.data();
    p.forward.q_stride = problem.q.stride(), p.forward.k_stride = problem.k.stride();
    p.forward.v_stride = problem.v.stride(), p.forward.out_stride = problem.out.stride();
    p.forward.scale = problem.scale;
    p.forward.scale_log2 =
        std::max(static_cast<float>(problem.scale * 1.4426950408889634), std::numeric_limits<float>::min());
    problem.s_.describe(p.forward);
    p.dout = dout.data(), p.dq = dq.data(), p.dk = dk.data(), p.dv = dv.data(), p.delta = delta.data();
    if (!dq_sums.empty()) p.dq_sums = dq_sums.data();
    p.dout_stride = dout.stride(), p.dq_stride = dq.stride(), p.dk_stride = dk.stride(), p.dv_stride = dv.stride();
    if (!dlse.empty()) p.dlse = dlse.data();
    p.dlse_stride = {s_.heads * s_.sq, 1, s_.sq};
    dsink.assign(s_.sink.size(), NAN);
    if (!dsink.empty()) p.dsink = dsink.data();
    return p;
  }

  using Queries = QueryTile<BatchSequence>;
  using Keys = KeyTile<BatchSequence>;

  void allow_keys(GlobalMemory& memory, Keys const& tile) {
    int const group = s_.heads / s_.kv_heads, batch = tile.entry.batch;
    int const query = tile.entry.first_query, queries = tile.entry.queries;
    for (int h = tile.kv_head * group; h < (tile.kv_head + 1) * group; ++h) {
      problem.q.allow(memory, batch, h, query, query + queries, Use::input);
      dout.allow(memory, batch, h, query, query + queries, Use::input);
      allow(memory, lse, row(batch, h, query), queries, Use::input);
      if (B.kernel == Kernel::sm80) allow(memory, delta, row(batch, h, query), queries, Use::input);
      int const block = tile.entry.first_query_block(B.block_m);
      allow_sums(memory, batch, h, block, block + ceil_div(queries, B.block_m), Use::sum);
    }
    int const key = tile.entry.first_key + tile.row0, last = key + tile.rows;
    problem.k.allow(memory, batch, tile.kv_head, key, last, Use::input);
    problem.v.allow(memory, batch, tile.kv_head, key, last, Use::input);
    // Hopper's kernel adds to what it has stored.
    Use const use = B.kernel == Kernel::sm90 ? Use::result : Use::output;
    dk.allow(memory, batch, tile.kv_head, key, last, use);
    dv.allow(memory, batch, tile.kv_head, key, last, use);
  }

  void allow_queries(GlobalMemory& memory, BackwardPass pass, Queries const& tile) {
    auto const& entry = tile.entry;
    int const first = entry.first_query + tile.row0, last = first + tile.rows;
    bool const is_finish = pass == BackwardPass::finish;
    if (!is_finish) {
      problem.out.allow(memory, entry.batch, tile.head, first, last, Use::input);
      dout.allow(memory, entry.batch, tile.head, first, last, Use::input);
      if (!dlse.empty()) allow(memory, dlse, row(entry.batch, tile.head, first), tile.rows, Use::input);
      if (B.kernel == Kernel::sm80) {
        allow(memory, delta, row(entry.batch, tile.head, first), tile.rows, Use::output);
      }
    }
    if (pass == BackwardPass::queries) {
      problem.q.allow(memory, entry.batch, tile.head, first, last, Use::input);
      problem.k.allow(memory, entry.batch, tile.kv_head, entry.first_key, entry.first_key + entry.keys, Use::input);
      problem.v.allow(memory, entry.batch, tile.kv_head, entry.first_key, entry.first_key + entry.keys, Use::input);
      allow(memory, lse, row(entry.batch, tile.head, first), tile.rows, Use::input);
    } else {
      int const block = entry.first_query_block(B.block_m) + tile.row0 / B.block_m;
      allow_sums(memory, entry.batch, tile.head, block, block + 1, is_finish ? Use::input : Use::output);
    }
    // Hopper's kernel replaces what it has stored where K is not finite.
    Use const use = B.kernel == Kernel::sm90 && pass == BackwardPass::queries ? Use::result : Use::output;
    if (pass != BackwardPass::prepare) dq.allow(memory, entry.batch, tile.head, first, last, use);
  }

  void allow_sink(GlobalMemory& memory, int head) {
    problem.allow_sink(memory);
    for (int b = 0; b < s_.batch; ++b) {
      allow(memory, lse, row(b, head, 0), s_.sq, Use::input);
      if (B.kernel == Kernel::sm80) allow(memory, delta, row(b, head, 0), s_.sq, Use::input);
    }
    if (B.kernel == Kernel::sm90) allow(memory, delta, 0, static_cast<int>(delta.size()), Use::input);
    allow(memory, dsink, static_cast<size_t>(head), 1, Use::output);
  }

  /// The sums of dQ of a head's blocks [first, last) of query rows.
  void allow_sums(GlobalMemory& memory, int b, int h, int first, int last, Use use) {
    if (dq_sums.empty()) return;
    size_t const tiles = static_cast<size_t>(s_.row_blocks(B.block_m)), size = B.block_m * B.head_dim;
    allow(memory, dq_sums, (static_cast<size_t>(b * s_.heads + h) * tiles + static_cast<size_t>(first)) * size,
          (last - first) * static_cast<int>(size), use);
  }

  static void allow(GlobalMemory& memory, std::vector<float>& items, size_t first, int count, Use use) {
    if (count == 0) return;
    memory.add(items.data(), items.size() * sizeof(float));
    memory.allow(&items[first], static_cast<size_t>(count) * sizeof(float), use);
  }
};

}  // namespace flashcute
