#include "launch/launch.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <span>
#include <unordered_map>
#include <variant>
#include <vector>

#include "image/image_store.hpp"
#include "launch/driver.hpp"
#include "launch/tensor_map.hpp"
#include "launch/tile_deal.hpp"

namespace flashcute {
namespace {

using namespace cuda;

constexpr int attribute_max_dynamic_shared_bytes = 8;
constexpr int option_binary_is_preserved = 1;

int32_t num_threads(ForwardKernelId const& kernel) { return num_threads(kernel.config); }
int64_t smem_bytes(ForwardKernelId const& kernel) { return smem_bytes(kernel.config); }
int32_t blocks_per_cluster(ForwardKernelId const& kernel) { return kernel.config.cluster; }
int32_t blocks_per_cluster(BackwardKernelId const&) { return 1; }
int32_t blocks_per_cluster(BlockMapKernelId const&) { return 1; }

/// A kernel on a device. Launches look kernels up by id: building a name costs more than the lookup.
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

template <class KernelId>
struct Launch {
  KernelId kernel;
  int64_t blocks;               // thread blocks of the grid
  Function function = nullptr;  // set by KernelCache::get

  /// `params` is the kernel's only parameter.
  template <class Params>
  void run(Params const& params, int device, void* stream) const {
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

/// A kernel being prepared for one device. One thread works; others that want the kernel wait for its mutex, so that a
/// compilation does not block launches of other kernels.
struct Slot {
  std::mutex mutex;
  Function function = nullptr;
};

/// Loads the image of a kernel completely, so that the first launch has nothing left to load.
template <class KernelId>
Function load(KernelId const& id, Image const& image, DeviceFacts const& device) {
  int64_t const shared_bytes = smem_bytes(id);
  Name const entry = name(id);
  require_driver_for(image.cuda_version, driver().version);

  // Loading synchronises, which a stream capture in another thread would forbid.
  RelaxedCapture const relaxed;
  ContextGuard const guard(device.primary_context);
  Library library = nullptr;
  // The driver copies the image unless it is told that the bytes stay valid. Those of an ahead-of-time image do; those
  // that were read or compiled are freed afterwards. So each image is in memory once.
  int option = option_binary_is_preserved;
  void* value = reinterpret_cast<void*>(std::uintptr_t{1});
  unsigned const options = image.storage.empty() ? 1 : 0;
  check_result(driver().cuLibraryLoadData(&library, image.view().data(), nullptr, nullptr, 0, &option, &value, options),
               std::string("cuLibraryLoadData(") + entry.text + ", " + image.origin + ")");
  cuda::Kernel kernel = nullptr;
  check_result(driver().cuLibraryGetKernel(&kernel, library, entry.text),
               std::string("cuLibraryGetKernel(") + entry.text + ")");
  check_result(driver().cuKernelSetAttribute(attribute_max_dynamic_shared_bytes, static_cast<int>(shared_bytes), kernel,
                                             device.handle),
               std::string("cuKernelSetAttribute(") + entry.text + ", " + std::to_string(shared_bytes) +
                   " bytes of shared memory)");
  // With lazy loading the first launch would load, and synchronise; this loads now.
  Function function = nullptr;
  check_result(driver().cuKernelGetFunction(&function, kernel), std::string("cuKernelGetFunction(") + entry.text + ")");
  return function;
}

/// The prepared kernels of one type of id, which must have a `config`, `features`, smem_bytes, num_threads,
/// blocks_per_cluster and a name, and be one of AnyKernelId.
template <class KernelId>
class KernelCache {
 public:
  /// Sets the `function` of each launch. Kernels that are not prepared yet are compiled if necessary, at the same time.
  /// If any is compiled, so are the kernels of `needed_next`, which only go to the disk cache.
  void get(std::span<Launch<KernelId>> wanted, int device,
           std::function<std::vector<BackwardKernelId>()> const& needed_next = {}) {
    if (find(wanted, device)) return;

    std::vector<std::shared_ptr<Slot>> slots;
    {
      std::unique_lock const lock(mutex_);
      for (auto const& launch : wanted) {
        auto& place = slots_[{launch.kernel, device}];
        if (!place) place = std::make_shared<Slot>();
        slots.push_back(place);
      }
    }
    // Locked in the order of their addresses, so that two threads cannot deadlock.
    std::set<std::shared_ptr<Slot>> const ordered(slots.begin(), slots.end());
    std::vector<std::unique_lock<std::mutex>> locks;
    for (auto const& slot : ordered) locks.emplace_back(slot->mutex);

    std::vector<AnyKernelId> missing;
    std::vector<Slot*> places;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      if (slots[i]->function != nullptr) continue;
      missing.emplace_back(wanted[i].kernel);
      places.push_back(slots[i].get());
    }
    DeviceFacts const& facts = device_facts(device);
    auto const is_compiled = [&](AnyKernelId const& kernel) { return needs_compiler(kernel, facts.arch); };
    if (needed_next && std::any_of(missing.begin(), missing.end(), is_compiled)) {
      for (BackwardKernelId const& kernel : needed_next()) {
        if (is_compiled(kernel)) missing.emplace_back(kernel);
      }
    }
    // After a throw the slots are empty, and the next call tries again.
    std::vector<Image> const images = find_images(missing, facts.arch);
    for (std::size_t i = 0; i < places.size(); ++i) {
      auto const& kernel = std::get<KernelId>(missing[i]);
      places[i]->function = load(kernel, images[i], facts);
      std::unique_lock const lock(mutex_);
      ready_.emplace(Key<KernelId>{kernel, device}, places[i]->function);
    }
    find(wanted, device);
  }

 private:
  /// Looks all launches up; false if a kernel is not prepared.
  bool find(std::span<Launch<KernelId>> wanted, int device) {
    std::shared_lock const lock(mutex_);
    return std::all_of(wanted.begin(), wanted.end(), [&](Launch<KernelId>& launch) {
      auto const found = ready_.find({launch.kernel, device});
      if (found != ready_.end()) launch.function = found->second;
      return found != ready_.end();
    });
  }

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

}  // namespace

void launch(ForwardKernelId const& kernel, ForwardParams const& params, int device, void* stream,
            std::function<std::vector<BackwardKernelId>()> const& needed_next) {
  ForwardConfig const& c = kernel.config;
  int64_t const tiles = count_query_tiles(params, tile_rows(c));
  bool const sm90 = c.kernel == flashcute::Kernel::sm90;
  int32_t const clusters = sm90 ? persistent_clusters(c, tiles, device_facts(device).multiprocessors) : 0;
  Launch<ForwardKernelId> ready{kernel, sm90 ? clusters * c.cluster : tiles};
  if (tiles == 0) return;
  kernels<ForwardKernelId>().get({&ready, 1}, device, needed_next);
  if (sm90) {
    ContextGuard const guard(device_facts(device).primary_context);  // for the maps: the thread may have none
    Sm90ForwardParams all{.q = {}, .k = {}, .v = {}, .forward = params, .deal = deal_tiles(kernel, params, clusters)};
    set_tensor_maps(c, all);
    ready.run(all, device, stream);
  } else {
    ready.run(params, device, stream);
  }
}

std::vector<BackwardKernelId> kernels_of(BackwardConfig const& config, Features const& features, bool with_sink) {
  std::vector<BackwardKernelId> kernels;
  for (BackwardPass const pass : passes_of(config)) kernels.push_back(kernel_of(config, pass, features));
  if (with_sink) kernels.push_back(kernel_of(config, BackwardPass::sink, features));
  return kernels;
}

void launch(BackwardConfig const& config, Features const& features, BackwardParams const& params, int device,
            void* stream) {
  int64_t const query_tiles = count_query_tiles(params.forward, config.block_m);
  int64_t const key_tiles = count_key_tiles(params.forward, config.block_n);
  std::vector<Launch<BackwardKernelId>> launches;
  for (BackwardKernelId const& kernel : kernels_of(config, features, params.dsink != nullptr)) {
    int64_t blocks = kernel.pass == BackwardPass::sink ? params.forward.heads
                     : keys_stay(kernel.pass)          ? key_tiles
                                                       : query_tiles;
    // Without queries no pass before it clears the counter of tiles.
    if (is_persistent(kernel) && params.forward.seqlen_q > 0) {
      blocks = min_of<int64_t>(blocks, device_facts(device).multiprocessors);
    }
    if (blocks > 0) launches.push_back({kernel, blocks});
  }
  kernels<BackwardKernelId>().get(launches, device);
  Sm90BackwardParams with_maps{.q = {}, .k = {}, .v = {}, .dout = {}, .backward = params};
  if (config.kernel == flashcute::Kernel::sm90 && query_tiles > 0 && key_tiles > 0) {
    // Before anything is launched, so that an error leaves nothing half done. Autograd's threads have no context.
    ContextGuard const guard(device_facts(device).primary_context);
    set_tensor_maps(config, with_maps);
  }
  for (auto const& ready : launches) {
    if (config.kernel == flashcute::Kernel::sm90 && multiplies(ready.kernel.pass)) {
      ready.run(with_maps, device, stream);
    } else {
      ready.run(params, device, stream);
    }
  }
}

void launch(BlockMapRules const& rules, int device, void* stream) {
  Launch<BlockMapKernelId> ready{{}, MapBlockOrder::of(rules.sizes).count};
  kernels<BlockMapKernelId>().get({&ready, 1}, device);
  {
    ContextGuard const guard(device_facts(device).primary_context);
    check_result(
        driver().cuMemsetD32Async(reinterpret_cast<std::uintptr_t>(rules.words), 0, BlockMapLayout::header, stream),
        "cuMemsetD32Async(the numbers of partial cells)");
  }
  if (ready.blocks > 0) ready.run(rules, device, stream);
}

}  // namespace flashcute
