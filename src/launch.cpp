#include "launch.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "driver.hpp"
#include "image_store.hpp"
#include "tensor_map.hpp"
#include "tile_deal.hpp"

namespace flashcute {
namespace {

using namespace cuda;

constexpr int attribute_max_dynamic_shared_bytes = 8;
constexpr int option_binary_is_preserved = 1;

int32_t num_threads(ForwardKernelId const& kernel) { return num_threads(kernel.config); }
int64_t smem_bytes(ForwardKernelId const& kernel) { return smem_bytes(kernel.config); }
int32_t blocks_per_cluster(ForwardKernelId const& kernel) { return kernel.config.cluster; }
int32_t blocks_per_cluster(BackwardKernelId const&) { return 1; }

/// A kernel, by its id, on a device. Launches compare ids: to spell a name costs more than to find its kernel.
template <class KernelId>
struct Key {
  KernelId kernel;
  int device;

  bool operator==(Key const&) const = default;
};

template <class KernelId>
struct KeyHash {
  std::size_t operator()(Key<KernelId> const& key) const {
    return hash_of(key.kernel) * 31 + static_cast<std::size_t>(key.device);
  }
};

/// A kernel being prepared for one device: one thread works, others that want it wait on the slot, not on
/// each other's slots, so a compilation does not hold up launches.
struct Slot {
  std::mutex mutex;
  Function function = nullptr;
};

/// Loads the image of a kernel, and leaves nothing for the first launch.
template <class KernelId>
Function prepare(KernelId const& id, DeviceFacts const& device) {
  int64_t const shared_bytes = smem_bytes(id);
  Name const entry = name(id);
  Image const image = find_image(id, device.arch);
  require_driver_for(image.cuda_version, driver().version);

  // Loading synchronises, which a stream capture under way elsewhere in the process would forbid.
  RelaxedCapture const relaxed;
  ContextGuard const guard(device.primary_context);
  Library library = nullptr;
  // The driver makes a copy of the image, unless it is told that the bytes stay. Those of an ahead-of-time image do;
  // those that were read or compiled are freed here, so that each image is in memory once.
  int option = option_binary_is_preserved;
  void* value = reinterpret_cast<void*>(std::uintptr_t{1});
  unsigned const options = image.storage.empty() ? 1 : 0;
  check_result(driver().cuLibraryLoadData(&library, image.view().data(), nullptr, nullptr, 0, &option, &value, options),
               std::string("cuLibraryLoadData(") + entry.text + ", " + image.origin + ")");
  Kernel kernel = nullptr;
  check_result(driver().cuLibraryGetKernel(&kernel, library, entry.text),
               std::string("cuLibraryGetKernel(") + entry.text + ")");
  check_result(driver().cuKernelSetAttribute(attribute_max_dynamic_shared_bytes, static_cast<int>(shared_bytes), kernel,
                                             device.handle),
               std::string("cuKernelSetAttribute(") + entry.text + ", " + std::to_string(shared_bytes) +
                   " bytes of shared memory)");
  // Under lazy loading the first launch would load, and synchronise: do it now.
  Function function = nullptr;
  check_result(driver().cuKernelGetFunction(&function, kernel), std::string("cuKernelGetFunction(") + entry.text + ")");
  return function;
}

/// The prepared kernels of one type of id: it has a `config`, `features`, smem_bytes, num_threads, blocks_per_cluster,
/// a name and a find_image.
template <class KernelId>
class KernelCache {
 public:
  Function get(Key<KernelId> const& key) {
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
      // A throw leaves the slot for the next call to try again.
      slot->function = prepare(key.kernel, device_facts(key.device));
      std::unique_lock const ready_lock(mutex_);
      ready_.emplace(key, slot->function);
    }
    return slot->function;
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<Key<KernelId>, Function, KeyHash<KernelId>> ready_;
  std::unordered_map<Key<KernelId>, std::shared_ptr<Slot>, KeyHash<KernelId>> slots_;
};

template <class KernelId>
KernelCache<KernelId>& kernels() {
  // Never destroyed: other threads may still launch while the process exits.
  static auto* const cache = new KernelCache<KernelId>;
  return *cache;
}

/// A kernel that is ready to be launched.
template <class KernelId>
struct Launch {
  KernelId kernel;
  int64_t blocks;  // as many as a grid holds, or none
  Function function = nullptr;

  Launch(KernelId const& id, int64_t grid, int device) : kernel(id), blocks(grid) {
    if (blocks > 0) function = kernels<KernelId>().get({kernel, device});
  }

  /// `params` is the kernel's only parameter.
  template <class Params>
  void run(Params const& params, int device, void* stream) const {
    if (blocks == 0) return;
    ContextGuard const guard(device_facts(device).primary_context);
    void* arguments[] = {const_cast<Params*>(&params)};
    LaunchAttribute cluster{attribute_cluster_dimension, {}, {static_cast<unsigned>(blocks_per_cluster(kernel)), 1, 1}};
    LaunchConfig const config{
        .grid_x = static_cast<unsigned>(blocks),
        .grid_y = 1,
        .grid_z = 1,
        .block_x = static_cast<unsigned>(num_threads(kernel)),
        .block_y = 1,
        .block_z = 1,
        .shared_bytes = static_cast<unsigned>(smem_bytes(kernel)),
        .stream = stream,
        .attributes = &cluster,
        .attribute_count = blocks_per_cluster(kernel) > 1 ? 1u : 0u,
    };
    Result const result = driver().cuLaunchKernelEx(&config, function, arguments, nullptr);
    if (result != success) {
      check_result(result, std::string("cuLaunchKernelEx(") + name(kernel).text + ", grid " + std::to_string(blocks) +
                               ", block " + std::to_string(num_threads(kernel)) + ", shared memory " +
                               std::to_string(smem_bytes(kernel)) + ")");
    }
  }
};

}  // namespace

void launch(ForwardKernelId const& kernel, ForwardParams const& params, int device, void* stream) {
  ForwardConfig const& c = kernel.config;
  int64_t const tiles = QueryTile::count(params, tile_rows(c));
  if (c.math == Math::wgmma) {
    int32_t const clusters = persistent_clusters(c, tiles, device_facts(device).multiprocessors);
    Launch const ready(kernel, clusters * c.cluster, device);
    if (tiles == 0) return;
    HopperForwardParams all{.q = {}, .k = {}, .v = {}, .forward = params, .deal = deal_tiles(kernel, params, clusters)};
    set_tensor_maps(c, all);
    ready.run(all, device, stream);
  } else {
    Launch(kernel, tiles, device).run(params, device, stream);
  }
}

void launch(BackwardConfig const& config, Features const& features, BackwardParams const& params, int device,
            void* stream) {
  int64_t const query_tiles = QueryTile::count(params.forward, config.block_m);
  int64_t const key_tiles = KeyTile::count(params.forward, config.block_n);
  std::vector<Launch<BackwardKernelId>> launches;
  for (BackwardPass const pass : passes_of(config)) {
    launches.emplace_back(kernel_of(config, pass, features), keys_stay(pass) ? key_tiles : query_tiles, device);
  }
  for (auto const& ready : launches) ready.run(params, device, stream);
}

}  // namespace flashcute
