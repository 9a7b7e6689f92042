// A hash of all headers in a folder: part of the cache key of every image that was compiled from them.
#pragma once

#include <filesystem>
#include <string>

namespace flashcute {

/// SHA-256 over the relative path and the contents of every file below `folder`. The folder's own path does not count:
/// the same headers hash alike in a wheel and in a build folder.
std::string hash_of_contents(std::filesystem::path const& folder);

/// SHA-256 over the relative path and the size of every file below `folder`. For the CUDA toolkit's headers: 20 MB that
/// change only with their version, and take longer to read than an image takes to load.
std::string hash_of_sizes(std::filesystem::path const& folder);

}  // namespace flashcute
