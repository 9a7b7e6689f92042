#include "memory_overlap.hpp"

#include <algorithm>
#include <cstdlib>
#include <span>
#include <utility>
#include <vector>

namespace flashcute {
namespace {

/// A dimension that is stepped over.
struct Step {
  int64_t distance, size;
  std::size_t dimension;
};

/// All of them, the largest distance first; none of an empty tensor.
std::vector<Step> steps_of(TensorView const& t) {
  std::vector<Step> steps;
  for (std::size_t i = 0; i < static_cast<std::size_t>(t.rank); ++i) {
    if (t.shape[i] == 0) return {};
    if (t.shape[i] > 1) steps.push_back({std::abs(t.strides[i]), t.shape[i], i});
  }
  std::sort(steps.begin(), steps.end(), [](Step const& a, Step const& b) { return a.distance > b.distance; });
  return steps;
}

/// Counts of steps that lead from an element of one tensor to an element of the other, along one dimension.
struct Walk {
  int64_t distance, fewest, most;
};

/// Whether counts of steps within their limits add up to `distance`. Walks come from the largest distance to the
/// smallest, and each steps over all that the smaller ones reach, so only the nearest counts can succeed.
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

/// The bytes from a tensor's lowest address to its highest; nothing for an empty tensor.
std::pair<char const*, char const*> extent(TensorView const& t) {
  auto const* low = static_cast<char const*>(t.data);
  auto const* high = low;
  for (std::size_t i = 0; i < static_cast<std::size_t>(t.rank); ++i) {
    if (t.shape[i] == 0) return {low, low};
    int64_t const bytes = (t.shape[i] - 1) * t.strides[i] * size_of(t.dtype);
    (bytes < 0 ? low : high) += bytes;
  }
  return {low, high + size_of(t.dtype)};
}

}  // namespace

std::optional<std::size_t> overlapping_dimension(TensorView const& t) {
  std::vector<Step> const steps = steps_of(t);
  int64_t reach = 0;  // of the smaller dimensions, over which the next must step
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    if (step->distance <= reach) return step->dimension;
    reach += (step->size - 1) * step->distance;
  }
  return std::nullopt;
}

bool may_share_an_element(TensorView const& a, TensorView const& b) {
  auto const [a_low, a_high] = extent(a);
  auto const [b_low, b_high] = extent(b);
  if (a_low == a_high || b_low == b_high || a_high <= b_low || b_high <= a_low) return false;
  int64_t const distance = static_cast<char const*>(a.data) - static_cast<char const*>(b.data);
  if (a.rank != b.rank || a.strides != b.strides || distance % size_of(a.dtype) != 0) return true;
  std::vector<Walk> walks;
  for (std::size_t i = 0; i < static_cast<std::size_t>(a.rank); ++i) {
    if (a.shape[i] == 1 && b.shape[i] == 1) continue;
    bool const forwards = a.strides[i] > 0;
    int64_t const back = (forwards ? a : b).shape[i] - 1, ahead = (forwards ? b : a).shape[i] - 1;
    walks.push_back({std::abs(a.strides[i]), -back, ahead});
  }
  std::sort(walks.begin(), walks.end(), [](Walk const& x, Walk const& y) { return x.distance > y.distance; });
  if (!walks.empty() && walks.back().distance == 0) return true;
  return can_reach(distance / size_of(a.dtype), walks);
}

}  // namespace flashcute
