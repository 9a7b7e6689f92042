// Kernel images that are compiled when they are first needed: looked for in the disk cache, else made by NVRTC.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "flashcute/core/forward_config.hpp"
#include "image/kernel_code.hpp"

namespace flashcute {

/// The folders that hold flashcute/, cute/, cutlass/, cuda/std/ and nv/: one in a wheel, several in a source tree.
/// Python sets them at import. If there are none, as by default, they are those of support_folder().
void set_include_folders(std::vector<std::string> folders);

/// The image's name in the disk cache: the kernel's name, the target, the compiler, and a hash of all that the image
/// depends on: the headers, the source, the compiler's exact version and its options. No path and no size known at run
/// time enters.
std::string jit_key(KernelCode const& kernel, Arch arch);

/// What such a name tells.
struct JitKeyParts {
  std::string kernel;    // its name, which ends in "-etc" if it was too long for a key
  std::string target;    // "sm_80"
  std::string compiler;  // "NVRTC 13.0"
};
JitKeyParts parts_of_jit_key(std::string_view key);

struct JitImage {
  std::string bytes;  // a cubin
  bool compiled;      // by this call; otherwise it comes from the disk cache
};

/// Whether jit_image is allowed to compile for `arch` and has all that it takes: the compiler, which knows `arch`, our
/// headers and the toolkit's. It looks for them once; after that it costs no more than to read the environment.
bool can_compile(Arch arch);

/// Why it cannot: "FLASHCUTE_JIT=off", or a sentence that says what is missing and how to get it; "" if it can.
std::string compile_problem(Arch arch);

/// The images of the kernels for `arch`, in their order. Those that are not in the disk cache are compiled at the same
/// time, as many as compile_jobs says, each in a process of its own; where such a process cannot be started, in this
/// one, which is said. FLASHCUTE_JIT=off forbids images from the disk cache, too. Throws an UnsupportedError if
/// compiling is switched off or impossible here, a CompileError if it fails, an ArgumentError if `arch` is the CPU.
std::vector<JitImage> jit_images(std::span<KernelCode const> kernels, Arch arch);

inline JitImage jit_image(KernelCode const& kernel, Arch arch) { return jit_images({&kernel, 1}, arch).front(); }

/// Whether the disk cache has an entry of the kernel's image. It is not read: jit_images compiles anew if it is
/// damaged.
bool is_cached(KernelCode const& kernel, Arch arch);

}  // namespace flashcute
