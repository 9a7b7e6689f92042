#include "image/image_store.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <utility>

#include "image/embedded_images.hpp"
#include "image/jit.hpp"
#include "image/nvrtc.hpp"
#include "image/source.hpp"
#include "system/environment.hpp"

namespace flashcute {
namespace {

/// Every kernel of the families, with its family.
template <class KernelId, class Config, std::size_t n>
auto kernels_among(Family<Config> const (&families)[n]) {
  std::vector<std::pair<KernelId, Family<Config> const*>> all;
  for (auto const& family : families) {
    for (KernelId const& kernel : kernels_of(family)) all.emplace_back(kernel, &family);
  }
  return all;
}

/// The family that holds the kernel, or null. Compares kernels by their ids, because building their names would cost
/// more than the rest.
template <class KernelId, class Config, std::size_t n>
Family<Config> const* family_among(Family<Config> const (&families)[n], KernelId const& kernel) {
  static auto const kernels = kernels_among<KernelId>(families);
  auto const found =
      std::find_if(kernels.begin(), kernels.end(), [&](auto const& held) { return held.first == kernel; });
  return found == kernels.end() ? nullptr : found->second;
}
auto family_of(ForwardKernelId const& kernel) { return family_among(forward_families, kernel); }
auto family_of(BackwardKernelId const& kernel) { return family_among(backward_families, kernel); }

BlockMapFamily const* family_of(BlockMapKernelId const&) { return &block_map_families[0]; }

/// The ahead-of-time image for `arch`; empty if there is none, or FLASHCUTE_JIT forbids its use.
template <class KernelId>
std::string_view embedded_image_for(KernelId const& kernel, Arch arch) {
  if (jit_mode() == JitMode::force || source_among(embedded_targets(), arch) == ImageSource::none) return {};
  auto const* const family = family_of(kernel);
  return family == nullptr ? std::string_view{} : embedded_image(*family);
}

/// Why embedded_image_for returns none.
template <class KernelId>
std::string embedded_problem(KernelId const& kernel) {
  if (jit_mode() == JitMode::force) return "FLASHCUTE_JIT=force";
  if (embedded_targets().empty()) return "flashcute was built without images";
  return family_of(kernel) != nullptr ? "the build has no image of it for this GPU"
                                      : "it is not among the kernels that are compiled ahead of time";
}

/// "13.0.88" -> 13000
int cuda_version_of(std::string_view version) {
  auto const dot = version.find('.');
  int const major = std::atoi(std::string(version.substr(0, dot)).c_str());
  int const minor = dot == std::string_view::npos ? 0 : std::atoi(std::string(version.substr(dot + 1)).c_str());
  return 1000 * major + 10 * minor;
}

/// Which kernels have an image in a folder of the disk cache, as it was when this process first looked.
template <class KernelId>
class KnownImages {
 public:
  bool has(KernelId const& kernel, Arch arch) {
    Place const place{kernel, arch, cache_folder()};
    std::lock_guard const guard(mutex_);
    if (Known const* const known = find(place)) return known->there;
    return known_.emplace_back(place, is_cached(code_of(kernel, arch), arch)).there;
  }

  void add(KernelId const& kernel, Arch arch) {
    Place place{kernel, arch, cache_folder()};
    std::lock_guard const guard(mutex_);
    if (Known* const known = find(place)) {
      known->there = true;
    } else {
      known_.emplace_back(std::move(place), true);
    }
  }

 private:
  struct Place {
    KernelId kernel;
    Arch arch;
    std::filesystem::path folder;

    bool operator==(Place const&) const = default;
  };
  struct Known {
    Known(Place p, bool t) : place(std::move(p)), there(t) {}
    Place place;
    bool there;
  };

  Known* find(Place const& place) {
    auto const found = std::find_if(known_.begin(), known_.end(), [&](Known const& k) { return k.place == place; });
    return found == known_.end() ? nullptr : &*found;
  }

  std::mutex mutex_;
  std::vector<Known> known_;
};

template <class KernelId>
KnownImages<KernelId>& known_images() {
  static KnownImages<KernelId> known;
  return known;
}

}  // namespace

ImageSource source_among(std::string_view targets, Arch arch) {
  ImageSource best = ImageSource::none;
  while (!targets.empty()) {
    auto const end = targets.find(' ');
    std::string_view const target = targets.substr(0, end);
    targets = end == std::string_view::npos ? std::string_view{} : targets.substr(end + 1);
    int const number = std::atoi(std::string(target).c_str());
    if (number > arch) continue;
    if (target.ends_with("-ptx")) {
      best = std::max(best, ImageSource::ptx);
    } else if (number / 10 == arch / 10) {
      best = ImageSource::library;
    }
  }
  return best;
}

std::string_view image_archs() { return embedded_targets(); }

std::string_view image_compiler() {
  static std::string const compiler =
      embedded_compiler_version().empty() ? "" : "nvcc " + std::string(embedded_compiler_version());
  return compiler;
}

std::vector<Image> find_images(std::span<AnyKernelId const> kernels, Arch arch) {
  std::vector<Image> images(kernels.size());
  std::vector<KernelCode> missing;
  std::vector<std::size_t> places;
  for (std::size_t i = 0; i < kernels.size(); ++i) {
    std::string_view const embedded =
        std::visit([&](auto const& kernel) { return embedded_image_for(kernel, arch); }, kernels[i]);
    if (!embedded.empty()) {
      images[i] = {embedded, {}, "ahead of time", cuda_version_of(embedded_compiler_version())};
    } else {
      missing.push_back(std::visit([&](auto const& kernel) { return code_of(kernel, arch); }, kernels[i]));
      places.push_back(i);
    }
  }
  std::vector<JitImage> compiled = jit_images(missing, arch);
  for (std::size_t i = 0; i < places.size(); ++i) {
    images[places[i]] = {{},
                         std::move(compiled[i].bytes),
                         compiled[i].compiled ? "compiled by NVRTC " + nvrtc_version() : "disk cache",
                         cuda_version_of(nvrtc_version())};
    std::visit([&]<class KernelId>(KernelId const& kernel) { known_images<KernelId>().add(kernel, arch); },
               kernels[places[i]]);
  }
  return images;
}

bool needs_compiler(AnyKernelId const& kernel, Arch arch) {
  return std::visit(
      [&](auto const& k) {
        return embedded_image_for(k, arch).empty() && can_compile(arch) && !is_cached(code_of(k, arch), arch);
      },
      kernel);
}

template <class KernelId>
ImageSource image_source(KernelId const& kernel, Arch arch) {
  if (!embedded_image_for(kernel, arch).empty()) return source_among(embedded_targets(), arch);
  if (!can_compile(arch)) return ImageSource::none;
  return known_images<KernelId>().has(kernel, arch) ? ImageSource::disk_cache : ImageSource::compiler;
}

template <class KernelId>
std::string image_problem(KernelId const& kernel, Arch arch) {
  std::string const problem = compile_problem(arch);
  return embedded_problem(kernel) + (problem.empty() ? "" : ", and " + problem);
}

template <class KernelId>
std::string image_origin(KernelId const& kernel, Arch arch) {
  switch (image_source(kernel, arch)) {
    case ImageSource::library: return "ahead of time";
    case ImageSource::ptx: return "ahead of time, as PTX, which the driver compiles (once)";
    case ImageSource::disk_cache: return "disk cache";
    case ImageSource::compiler: return "run-time compilation, once (" + embedded_problem(kernel) + ")";
    case ImageSource::none: break;
  }
  return "none: " + image_problem(kernel, arch);
}

template ImageSource image_source(ForwardKernelId const&, Arch);
template ImageSource image_source(BackwardKernelId const&, Arch);
template ImageSource image_source(BlockMapKernelId const&, Arch);
template std::string image_problem(ForwardKernelId const&, Arch);
template std::string image_problem(BackwardKernelId const&, Arch);
template std::string image_problem(BlockMapKernelId const&, Arch);
template std::string image_origin(ForwardKernelId const&, Arch);
template std::string image_origin(BackwardKernelId const&, Arch);

}  // namespace flashcute
