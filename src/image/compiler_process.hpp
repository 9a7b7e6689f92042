// Compiling in a process of its own. NVRTC compiles one kernel at a time in each process, so kernels that are needed
// together are compiled in several; and what a compiler allocates, or a crash of it, ends with its process.
#pragma once

#include <optional>
#include <string>

#include "image/nvrtc.hpp"

namespace flashcute {

/// The path of the program `flashcute_compiler` (compiler_main.cpp). Python sets it at import. If it is empty, as it is
/// by default, the program is looked for in support_folder(). Without it nothing can be compiled apart.
void set_compiler_program(std::string path);

/// What nvrtc_compile returns or throws, by a new process. Nothing, with a reason, where none can be started. A
/// process that dies is a CompileError with how it ended and what it printed. The process ends with the calling
/// process, inherits none of its environment variables, and is waited for: no zombie stays.
std::optional<std::string> compile_apart(CompileRequest const& request, std::string& why_not);

}  // namespace flashcute
