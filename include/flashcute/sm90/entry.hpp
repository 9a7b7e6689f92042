// The __global__ functions of the sm90 kernels, as flashcute/sm80/entry.hpp.
#pragma once

// First, so that nothing else is said of another target.
#include "flashcute/sm90/target.hpp"
// The kernels.
#include "flashcute/sm90/forward.hpp"

/// Defines the kernel NAME for the ForwardKernelId that follows.
#define FLASHCUTE_SM90_FORWARD_ENTRY(NAME, ...)                                                 \
  extern "C" __global__ void __launch_bounds__(flashcute::num_threads((__VA_ARGS__).config), 1) \
      NAME(__grid_constant__ flashcute::Sm90ForwardParams const params) {                       \
    using Pass = flashcute::sm90::ForwardPass<(__VA_ARGS__)>;                                   \
    extern __shared__ __align__(1024) unsigned char smem[];                                     \
    Pass::run(params, *reinterpret_cast<typename Pass::L::SharedStorage*>(smem));               \
  }
