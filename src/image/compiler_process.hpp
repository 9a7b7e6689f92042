// Compiles in a process of its own. NVRTC compiles one kernel at a time in each process, so kernels that are needed
// together are compiled in several; and memory that a compiler allocates, or its crash, ends with its process.
#pragma once

#include <optional>
#include <string>

#include "image/nvrtc.hpp"

namespace flashcute {

/// The path of the program `flashcute_compiler` (compiler_main.cpp), which is installed beside the library. Python
/// sets it at import. Without it compile_apart returns nothing.
void set_compiler_program(std::string path);

/// As nvrtc_compile, in a new process. Returns nothing, and the reason in `why_not`, if none can be started. If the
/// process dies, throws a CompileError with how it ended and what it printed. The process is killed if the calling one
/// dies, inherits none of its environment variables, and is always waited for, so no zombie remains.
std::optional<std::string> compile_apart(CompileRequest const& request, std::string& why_not);

}  // namespace flashcute
