// The __global__ functions of Hopper's gradients, as entry.hpp of its forward.
#pragma once

// First, so that nothing else is said of another target.
#include "flashcute/sm90/target.hpp"
// The kernels.
#include "flashcute/sm90/backward_passes.hpp"

/// Defines the kernel NAME for the BackwardKernelId that follows, of a pass that multiplies.
#define FLASHCUTE_SM90_GRADIENTS_ENTRY(NAME, ...)                                      \
  extern "C" __global__ void __launch_bounds__(flashcute::num_threads(__VA_ARGS__), 1) \
      NAME(__grid_constant__ flashcute::Sm90BackwardParams const params) {             \
    using Pass = flashcute::sm90::GradientPass<(__VA_ARGS__)>;                         \
    extern __shared__ __align__(1024) unsigned char smem[];                            \
    Pass::run(params, *reinterpret_cast<typename Pass::Storage*>(smem));               \
  }

/// Of the passes before and after it.
#define FLASHCUTE_SM90_BACKWARD_ENTRY(NAME, ...)                                    \
  extern "C" __global__ void __launch_bounds__(flashcute::num_threads(__VA_ARGS__)) \
      NAME(__grid_constant__ flashcute::BackwardParams const params) {              \
    using Pass = flashcute::sm90::SmallPass<(__VA_ARGS__)>;                         \
    extern __shared__ __align__(16) unsigned char smem[];                           \
    Pass::run(params, *reinterpret_cast<typename Pass::SharedStorage*>(smem));      \
  }
