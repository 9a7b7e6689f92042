// A kernel as text: all that the code needs that finds, compiles and caches images.
#pragma once

#include <string>

#include "flashcute/core/forward_config.hpp"
#include "flashcute/error.hpp"

namespace flashcute {

struct KernelCode {
  std::string name;            // of the entry point; unique
  std::string source;          // a complete translation unit that defines it
  bool arch_specific = false;  // it uses instructions that no other architecture has, not even a later one
};

/// "sm_80": a GPU as compilers name it. Throws an ArgumentError for the CPU.
inline std::string target_of(Arch arch) {
  if (arch == cpu_arch) throw ArgumentError("arch", "the compute capability of a GPU, such as 80", "0, the CPU");
  return "sm_" + std::to_string(arch);
}

/// The same, with the suffix "a" that compilers require for instructions of one architecture: "sm_90a".
inline std::string target_of(KernelCode const& kernel, Arch arch) {
  return target_of(arch) + (kernel.arch_specific ? "a" : "");
}

}  // namespace flashcute
