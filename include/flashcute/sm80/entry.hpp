// The __global__ functions of the sm80 kernels. A generated translation unit has one of these macros per kernel; nvcc
// and NVRTC compile the same text.
#pragma once

#include "flashcute/sm80/backward_passes.hpp"
#include "flashcute/sm80/forward.hpp"

/// Defines the kernel NAME for the ForwardKernelId that follows.
#define FLASHCUTE_SM80_FORWARD_ENTRY(NAME, ...)                                              \
  extern "C" __global__ void __launch_bounds__(flashcute::num_threads((__VA_ARGS__).config), \
                                               (__VA_ARGS__).config.blocks_per_sm)           \
      NAME(__grid_constant__ flashcute::ForwardParams const params) {                        \
    using Pass = flashcute::ForwardPass<(__VA_ARGS__)>;                                      \
    extern __shared__ __align__(128) unsigned char smem[];                                   \
    Pass::run(params, *reinterpret_cast<typename Pass::L::SharedStorage*>(smem));            \
  }

/// Defines the kernel NAME for the BackwardKernelId that follows.
#define FLASHCUTE_SM80_BACKWARD_ENTRY(NAME, ...)                                    \
  extern "C" __global__ void __launch_bounds__(flashcute::num_threads(__VA_ARGS__), \
                                               (__VA_ARGS__).config.blocks_per_sm)  \
      NAME(__grid_constant__ flashcute::BackwardParams const params) {              \
    using Kernel = flashcute::BackwardKernel<(__VA_ARGS__)>;                        \
    extern __shared__ __align__(128) unsigned char smem[];                          \
    Kernel::run(params, *reinterpret_cast<typename Kernel::SharedStorage*>(smem));  \
  }
