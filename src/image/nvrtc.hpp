// A client of NVRTC, NVIDIA's run-time compiler, which is found and opened when it is first needed and may be missing.
// Every function may be called from several threads at once.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace flashcute {

/// Folders that hold NVIDIA's Python packages (site-packages): searched before the system. Python sets them at import;
/// C++ programs need not.
void set_search_roots(std::vector<std::string> roots);

bool nvrtc_available();

/// "pip install ...": installs NVRTC and the headers that kernels include, for machines without a CUDA toolkit.
std::string install_command();

/// Why there is no NVRTC and how to get one, in a sentence; "" where it is available.
std::string nvrtc_problem();

// What was found. These and nvrtc_compile throw an UnsupportedError with nvrtc_problem() where there is none.

std::string nvrtc_version();  // "13.0"
std::string nvrtc_path();     // the file

/// The compiler's exact version, with patch level and build number, which nvrtc_version() leaves out.
std::string nvrtc_build();

/// Throws a CompileError that lists the supported architectures unless NVRTC compiles for `arch`: "sm_80", "sm_90a".
void require_nvrtc_knows(std::string const& arch);

/// The folder that holds cuda_fp16.h, or nothing. Throws an ArgumentError if FLASHCUTE_CUDA_INCLUDE names a folder
/// without it.
std::optional<std::string> cuda_include_folder();

struct CompileRequest {
  std::string name;  // of the program: errors are reported as "<name>.cu(line)"
  std::string source;
  std::string arch;  // "sm_80"
  std::vector<std::string> include_folders;
  std::vector<std::string> options;  // in addition to those that are always given
};

/// All options of NVRTC but the include folders: paths must not be part of a cache key.
std::vector<std::string> options_without_paths(CompileRequest const& request);

/// The image: a cubin, an ELF file that is never empty. A CompileError carries the compiler's log.
std::string nvrtc_compile(CompileRequest const& request);

}  // namespace flashcute
