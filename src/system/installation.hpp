// Where an installed library finds what it needs at run time, without being told.
#pragma once

#include <filesystem>
#include <optional>

namespace flashcute {

/// The folder that `cmake --install` makes for the library itself: the device headers in include/, and the program
/// flashcute_compiler. It lies beside a shared library, as flashcute/; a program in bin/ that is linked to a static one
/// finds it in the same prefix, as lib/flashcute/. Nothing elsewhere: in a build folder, or in Python's package, which
/// names its own.
std::optional<std::filesystem::path> support_folder();

}  // namespace flashcute
