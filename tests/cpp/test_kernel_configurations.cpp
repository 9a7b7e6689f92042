// The forward kernel itself, run on the host by emulated thread blocks: all its configurations.
#include <gtest/gtest.h>

#include "kernel_problem.hpp"

namespace flashcute {
namespace {

/// Sizes that give a kernel full and partial tiles, several of each, and more blocks than one.
template <ForwardKernelId Id>
void check_configuration() {
  constexpr ForwardConfig c = Id.config;
  check<Id>({.sq = c.block_m + 5, .sk = 3 * c.block_n + 7, .d = c.head_dim, .heads = 2}, 3);
  check<Id>({.sq = c.block_m, .sk = 2 * c.block_n, .d = c.head_dim - 24, .order = Order::padded}, 3);
  // Under a causal mask not every row of a tile sees these values.
  Problem poisoned(Id, {.sq = c.block_m + 5, .sk = c.block_m + 5, .d = c.head_dim});
  poisoned.v.set(0, c.block_m / 2, 0, 3, nan);
  poisoned.v.set(0, c.block_m / 2 + 1, 0, c.head_dim - 1, -inf);
  check<Id>(poisoned);
}

// Guards against configurations that only work by luck: every option is used, alone and together.
TEST(ForwardKernel, DefaultConfigurations) {
  check_configuration<causal(default_forward_config(bf16, 64, 80))>();
  check_configuration<full(default_forward_config(f16, 64, 80))>();
  check_configuration<full(default_forward_config(bf16, 128, 80))>();
  check_configuration<causal(default_forward_config(f16, 128, 80))>();
}

TEST(ForwardKernel, OtherConfigurations) {
  check_configuration<causal(ForwardConfig{bf16, 64, 64, 16, 1, false, false})>();
  check_configuration<causal(ForwardConfig{f16, 64, 64, 64, 4, true, true})>();
  check_configuration<causal(ForwardConfig{bf16, 128, 128, 32, 8, false, true})>();
  check_configuration<full(ForwardConfig{bf16, 128, 64, 64, 4, true, false})>();
}

}  // namespace
}  // namespace flashcute
