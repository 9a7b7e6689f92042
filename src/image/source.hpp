// Generates the translation unit that defines kernels: the same text for the ahead-of-time build (nvcc) and for NVRTC.
// Plain C++ only, because the build runs it (generate_unit.cpp) before the library exists.
#pragma once

#include <span>
#include <string>

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/block_map_kernel.hpp"
#include "image/kernel_code.hpp"

namespace flashcute {

/// One entry point per kernel, called name(kernel).
std::string generated_source(std::span<ForwardKernelId const> kernels);
std::string generated_source(std::span<BackwardKernelId const> kernels);
std::string generated_source(std::span<BlockMapKernelId const> kernels);

/// The kernel alone. Throws a ConfigError if it cannot run on `arch`, an ArgumentError if that is the CPU.
KernelCode code_of(ForwardKernelId const& kernel, Arch arch);
KernelCode code_of(BackwardKernelId const& kernel, Arch arch);
KernelCode code_of(BlockMapKernelId const& kernel, Arch arch);

}  // namespace flashcute
