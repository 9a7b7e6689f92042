// Run-time compilation: images of kernels come from the disk cache, or NVRTC makes them when they are first needed.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "flashcute/core/forward_config.hpp"
#include "image/kernel_code.hpp"

namespace flashcute {

/// The folders that hold flashcute/, cute/, cutlass/, cuda/std/ and nv/: one in a wheel, several in a source tree.
/// Python sets them at import; a C++ program that compiles at run time sets them once, before it does.
void set_include_folders(std::vector<std::string> folders);

/// The image's key in the disk cache: the kernel's name, the target, the compiler, and a hash of everything that the
/// image depends on: the headers, the source, the compiler's exact version and its options. Paths and the sizes of
/// tensors are not part of it.
std::string jit_key(KernelCode const& kernel, Arch arch);

/// The readable parts of such a key.
struct JitKeyParts {
  std::string kernel;    // its name; ends in "-etc" if it was too long for a key
  std::string target;    // "sm_80"
  std::string compiler;  // "NVRTC 13.0"
};
JitKeyParts parts_of_jit_key(std::string_view key);

struct JitImage {
  std::string bytes;  // a cubin
  bool compiled;      // by this call; otherwise it comes from the disk cache
};

/// Whether jit_images may compile for `arch` and has everything it needs: NVRTC, with support for `arch`, flashcute's
/// headers and the toolkit's. Once it is true, a further call costs no more than reading the environment.
bool can_compile(Arch arch);

/// Why can_compile is false: "FLASHCUTE_JIT=off", or a sentence that says what is missing and how to get it; "" if it
/// can.
std::string compile_problem(Arch arch);

/// The images of the kernels for `arch`, in their order. Those that are not in the disk cache are compiled, at most
/// compile_jobs at the same time, each in a process of its own; if such a process cannot be started, in this one, with
/// a note on stderr. FLASHCUTE_JIT=off forbids images from the disk cache, too. Throws an UnsupportedError if compiling
/// is switched off or impossible here, a CompileError if it fails, an ArgumentError if `arch` is the CPU.
std::vector<JitImage> jit_images(std::span<KernelCode const> kernels, Arch arch);

inline JitImage jit_image(KernelCode const& kernel, Arch arch) { return jit_images({&kernel, 1}, arch).front(); }

/// Whether the disk cache has an entry for the kernel's image. The entry is not read: if it is damaged, jit_images
/// compiles again.
bool is_cached(KernelCode const& kernel, Arch arch);

}  // namespace flashcute
