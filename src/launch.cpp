#include "launch.hpp"

#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "driver.hpp"
#include "image_store.hpp"

namespace flashcute {
namespace {

using namespace cuda;

constexpr int attribute_max_dynamic_shared_bytes = 8;

struct Key {
  ForwardKernelId kernel;
  int device;

  bool operator==(Key const&) const = default;
};

struct KeyHash {
  std::size_t operator()(Key const& key) const {
    std::size_t hash = static_cast<std::size_t>(key.device) * 31 +
                       static_cast<std::size_t>(key.kernel.features.mask) * 2 +
                       static_cast<std::size_t>(key.kernel.features.count_blocks);
    for_each_option(key.kernel.config,
                    [&](char const*, auto option) { hash = hash * 1000003 + static_cast<std::size_t>(option); });
    return hash;
  }
};

/// A kernel being prepared for one device: one thread works, others that want it wait on the slot, not on
/// each other's slots, so a compilation does not hold up launches.
struct Slot {
  std::mutex mutex;
  Function function = nullptr;
  Image image;  // the driver reads an image while it loads it
};

class KernelCache {
 public:
  Function get(Key const& key) {
    {
      std::shared_lock const lock(mutex_);
      if (auto const found = ready_.find(key); found != ready_.end()) return found->second;
    }
    std::shared_ptr<Slot> slot;
    {
      std::unique_lock const lock(mutex_);
      auto& place = slots_[key];
      if (!place) place = std::make_shared<Slot>();
      slot = place;
    }
    std::lock_guard const lock(slot->mutex);
    if (slot->function == nullptr) {
      slot->function = prepare(key, slot->image);  // a throw leaves the slot for the next call to try again
      std::unique_lock const ready_lock(mutex_);
      ready_.emplace(key, slot->function);
    }
    return slot->function;
  }

 private:
  static Function prepare(Key const& key, Image& image) {
    DeviceFacts const& device = device_facts(key.device);
    std::string const kernel_name = name(key.kernel).text;
    image = find_image(key.kernel, device.arch);
    require_driver_for(image.cuda_version, driver().version);

    // Loading synchronises, which a stream capture under way elsewhere in the process would forbid.
    RelaxedCapture const relaxed;
    ContextGuard const guard(device.primary_context);
    Library library = nullptr;
    check_result(driver().cuLibraryLoadData(&library, image.view().data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
                 "cuLibraryLoadData(" + kernel_name + ", " + image.origin + ")");
    Kernel kernel = nullptr;
    check_result(driver().cuLibraryGetKernel(&kernel, library, kernel_name.c_str()),
                 "cuLibraryGetKernel(" + kernel_name + ")");
    check_result(driver().cuKernelSetAttribute(attribute_max_dynamic_shared_bytes,
                                               static_cast<int>(smem_bytes(key.kernel.config)), kernel, device.handle),
                 "cuKernelSetAttribute(" + kernel_name + ", " + std::to_string(smem_bytes(key.kernel.config)) +
                     " bytes of shared memory)");
    // Under lazy loading the first launch would load, and synchronise: do it now.
    Function function = nullptr;
    check_result(driver().cuKernelGetFunction(&function, kernel), "cuKernelGetFunction(" + kernel_name + ")");
    return function;
  }

  std::shared_mutex mutex_;
  std::unordered_map<Key, Function, KeyHash> ready_;
  std::unordered_map<Key, std::shared_ptr<Slot>, KeyHash> slots_;
};

KernelCache& kernels() {
  // Never destroyed: other threads may still launch while the process exits.
  static auto* const cache = new KernelCache;
  return *cache;
}

}  // namespace

void launch(ForwardKernelId const& kernel, ForwardParams const& params, int device, void* stream) {
  int64_t const blocks = QueryTile::count(params, kernel.config.block_m);
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw UnsupportedError("q: batch * heads * ceil(seqlen_q / block_m) is " + std::to_string(blocks) +
                           " tiles, more than a grid holds (2147483647); split the batch");
  }
  if (blocks == 0) return;
  Function const function = kernels().get({kernel, device});
  ContextGuard const guard(device_facts(device).primary_context);
  void* arguments[] = {const_cast<ForwardParams*>(&params)};
  Result const result = driver().cuLaunchKernel(
      function, static_cast<unsigned>(blocks), 1, 1, static_cast<unsigned>(num_threads(kernel.config)), 1, 1,
      static_cast<unsigned>(smem_bytes(kernel.config)), stream, arguments, nullptr);
  if (result != success) {
    check_result(result, std::string("cuLaunchKernel(") + name(kernel).text + ", grid " + std::to_string(blocks) +
                             ", block " + std::to_string(num_threads(kernel.config)) + ", shared memory " +
                             std::to_string(smem_bytes(kernel.config)) + ")");
  }
}

}  // namespace flashcute
