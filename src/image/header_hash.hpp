// What the headers of a folder say, as one hash: part of the name of every image that was compiled from them.
#pragma once

#include <filesystem>
#include <string>

namespace flashcute {

/// SHA-256 over the relative path and the contents of every file below `folder`. The place of the folder does not
/// count: the same headers hash alike in a wheel and in a build folder.
std::string hash_of_contents(std::filesystem::path const& folder);

/// SHA-256 over the relative path and the size of every file below `folder`. For NVIDIA's own headers: 20 MB that
/// change only as a package, where reading all would take longer than loading the image.
std::string hash_of_sizes(std::filesystem::path const& folder);

}  // namespace flashcute
