// What every configuration of the forward kernel has to pass, on the host.
#pragma once

#include "kernel/kernel_run.hpp"

namespace flashcute {

/// Sizes that give a kernel full and partial tiles, several of each, and more blocks than one.
template <ForwardKernelId Id>
void check_configuration() {
  constexpr ForwardConfig c = Id.config;
  constexpr int narrower = c.copy_bytes == 16 ? 8 : c.copy_bytes / size_of(c.dtype);  // the least that d may lack
  check<Id>({.sq = c.block_m + 5, .sk = 3 * c.block_n + 7, .d = c.head_dim, .d_v = c.head_dim_v, .heads = 2}, 3);
  check<Id>({.sq = c.block_m,
             .sk = 2 * c.block_n,
             .d = c.head_dim - narrower,
             .d_v = c.head_dim_v - narrower,
             .order = Order::padded},
            3);
  // Under a causal mask not every row of a tile sees these values.
  Problem poisoned(Id, {.sq = c.block_m + 5, .sk = c.block_m + 5, .d = c.head_dim, .d_v = c.head_dim_v});
  poisoned.v.set(0, c.block_m / 2, 0, 3, nan);
  poisoned.v.set(0, c.block_m / 2 + 1, 0, c.head_dim_v - 1, -inf);
  check<Id>(poisoned);
}

}  // namespace flashcute
