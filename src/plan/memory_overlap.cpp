#include "plan/memory_overlap.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace flashcute {
namespace {

/// A dimension of size above 1.
struct Step {
  int64_t distance, size;
  std::size_t dimension;
};

/// The number of dimensions, at most the 4 that a view can hold.
std::size_t dimensions_of(TensorView const& t) { return static_cast<std::size_t>(std::clamp(t.rank, 0, 4)); }

int64_t length(int64_t stride) { return std::abs(std::max(stride, -std::numeric_limits<int64_t>::max())); }

/// The dimensions of size above 1, the largest distance first; none of an empty tensor.
std::vector<Step> steps_of(TensorView const& t) {
  std::vector<Step> steps;
  for (std::size_t i = 0; i < dimensions_of(t); ++i) {
    if (t.shape[i] == 0) return {};
    if (t.shape[i] > 1) steps.push_back({length(t.strides[i]), t.shape[i], i});
  }
  std::sort(steps.begin(), steps.end(), [](Step const& a, Step const& b) { return a.distance > b.distance; });
  return steps;
}

/// Along one dimension: the counts of steps that can lead from an element of one tensor to an element of the other.
struct Walk {
  int64_t distance, fewest, most;
};

/// Whether counts of steps within their limits add up to `distance`. Walks are ordered from the largest distance to the
/// smallest, and each distance is larger than all that the smaller ones reach, so only the nearest counts can succeed.
bool can_reach(int64_t distance, std::span<Walk const> walks) {
  if (walks.empty()) return distance == 0;
  Walk const& walk = walks.front();
  int64_t const nearest = distance / walk.distance;
  for (int64_t count : {nearest - 1, nearest, nearest + 1}) {
    bool const allowed = walk.fewest <= count && count <= walk.most;
    if (allowed && can_reach(distance - count * walk.distance, walks.subspan(1))) return true;
  }
  return false;
}

int64_t address(TensorView const& t) { return static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(t.data)); }

/// The address of a tensor's first byte in memory, and that after its last byte.
struct Extent {
  int64_t low, high;
};

/// Empty for an empty tensor; nothing if the addresses do not fit 64 bits.
std::optional<Extent> extent(TensorView const& t) {
  int64_t const start = address(t);
  Extent e{start, start};
  bool fits = true;
  for (std::size_t i = 0; i < dimensions_of(t); ++i) {
    if (t.shape[i] == 0) return Extent{start, start};
    int64_t bytes = 0;
    fits = fits && !__builtin_mul_overflow(t.shape[i] - 1, t.strides[i], &bytes);
    fits = fits && !__builtin_mul_overflow(bytes, size_of(t.dtype), &bytes);
    int64_t& end = bytes < 0 ? e.low : e.high;
    fits = fits && !__builtin_add_overflow(end, bytes, &end);
  }
  fits = fits && !__builtin_add_overflow(e.high, size_of(t.dtype), &e.high);
  return fits ? std::optional(e) : std::nullopt;
}

}  // namespace

std::optional<std::size_t> overlapping_dimension(TensorView const& t) {
  std::vector<Step> const steps = steps_of(t);
  int64_t reach = 0;  // of the smaller dimensions, which the next distance must exceed
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    if (step->distance <= reach) return step->dimension;
    int64_t own = 0;
    // No distance exceeds the largest number, so the sum may stop there.
    if (__builtin_mul_overflow(step->size - 1, step->distance, &own) || __builtin_add_overflow(reach, own, &reach)) {
      reach = std::numeric_limits<int64_t>::max();
    }
  }
  return std::nullopt;
}

bool may_share_an_element(TensorView const& a, TensorView const& b) {
  auto const in_a = extent(a), in_b = extent(b);
  if (!in_a || !in_b) return true;  // assumed
  if (in_a->low == in_a->high || in_b->low == in_b->high) return false;
  if (in_a->high <= in_b->low || in_b->high <= in_a->low) return false;
  int64_t distance = 0;
  if (__builtin_sub_overflow(address(a), address(b), &distance)) return true;
  if (a.rank != b.rank || a.strides != b.strides || distance % size_of(a.dtype) != 0) return true;
  std::vector<Walk> walks;
  for (std::size_t i = 0; i < dimensions_of(a); ++i) {
    if (a.shape[i] == 1 && b.shape[i] == 1) continue;
    bool const forwards = a.strides[i] > 0;
    int64_t const back = (forwards ? a : b).shape[i] - 1, ahead = (forwards ? b : a).shape[i] - 1;
    walks.push_back({length(a.strides[i]), -back, ahead});
  }
  std::sort(walks.begin(), walks.end(), [](Walk const& x, Walk const& y) { return x.distance > y.distance; });
  if (!walks.empty() && walks.back().distance == 0) return true;
  return can_reach(distance / size_of(a.dtype), walks);
}

}  // namespace flashcute
