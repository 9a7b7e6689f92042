// The __global__ functions of the sm90 kernels, as flashcute/sm80/entry.hpp.
#pragma once

// For plain sm_90 CuTe compiles WGMMA to a trap that shows only when the kernel runs, hence this check. The host, whose
// compiler defines no __CUDA_ARCH__, may include these headers.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "Hopper's kernels must be compiled for sm_90a: plain sm_90 lacks their instructions (WGMMA, setmaxnreg)"
#endif

#include "flashcute/sm90/backward_passes.hpp"
#include "flashcute/sm90/forward.hpp"

/// Defines the kernel NAME for the ForwardKernelId that follows.
#define FLASHCUTE_SM90_FORWARD_ENTRY(NAME, ...)                                                 \
  extern "C" __global__ void __launch_bounds__(flashcute::num_threads((__VA_ARGS__).config), 1) \
      NAME(__grid_constant__ flashcute::Sm90ForwardParams const params) {                       \
    using Pass = flashcute::sm90::ForwardPass<(__VA_ARGS__)>;                                   \
    extern __shared__ __align__(1024) unsigned char smem[];                                     \
    Pass::run(params, *reinterpret_cast<typename Pass::L::SharedStorage*>(smem));               \
  }

/// Defines the kernel NAME for the BackwardKernelId that follows, of the pass `gradients`.
#define FLASHCUTE_SM90_GRADIENTS_ENTRY(NAME, ...)                                                    \
  extern "C" __global__ void __launch_bounds__(flashcute::num_threads(__VA_ARGS__), 1)               \
      NAME(__grid_constant__ flashcute::Sm90BackwardParams const params) {                           \
    using Pass = flashcute::sm90::KeyGradients<(__VA_ARGS__)>;                                       \
    extern __shared__ __align__(1024) unsigned char smem[];                                          \
    Pass::run(params, *reinterpret_cast<typename Pass::Storage*>(smem));                             \
  }

/// Of the passes before and after it.
#define FLASHCUTE_SM90_BACKWARD_ENTRY(NAME, ...)                                                     \
  extern "C" __global__ void __launch_bounds__(flashcute::num_threads(__VA_ARGS__))                  \
      NAME(__grid_constant__ flashcute::BackwardParams const params) {                               \
    flashcute::sm90::SmallPass<(__VA_ARGS__)>::run(params);                                          \
  }
