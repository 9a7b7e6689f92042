#include "plan/choose.hpp"

#include <algorithm>

#include "image/image_store.hpp"
#include "launch/driver.hpp"
#include "system/environment.hpp"

namespace flashcute {
namespace {

/// What a default configuration depends on, to be reduced by concessions.
struct Wishes {
  ForwardTensors tensors;
  int32_t multiprocessors;
};

/// What can be given up, one after the other, within what the call allows: on Hopper a tile of the tensors' own width,
/// for a wider one; Hopper's kernel, for the sm80 one; one product of TF32, which is allowed and not demanded, for
/// three; a tile for small grids, for the usual one.
constexpr void (*concessions[])(Wishes&) = {
    [](Wishes& wishes) { wishes.tensors.any_width = false; },
    [](Wishes& wishes) { wishes.tensors.allow_sm90 = false; },
    [](Wishes& wishes) { wishes.tensors.allow_tf32 = false; },
    [](Wishes& wishes) { wishes.multiprocessors = 0; },
};

/// The configurations that serve the call, the fastest first.
std::vector<ForwardConfig> candidates(Wishes wishes, Arch arch) {
  auto const config_of = [&] { return default_forward_config(wishes.tensors, arch, wishes.multiprocessors); };
  std::vector<ForwardConfig> configs{config_of()};
  for (auto const& concede : concessions) {
    concede(wishes);
    if (ForwardConfig const next = config_of(); next != configs.back()) configs.push_back(next);
  }
  return configs;
}

}  // namespace

ForwardConfig choose_config(ForwardTensors const& tensors, Features const& features, Device device,
                            std::vector<GivenUp>* given_up) {
  if (device.type == DeviceType::cpu) return default_forward_config(tensors, cpu_arch);
  cuda::DeviceFacts const& facts = cuda::device_facts(device.index);
  auto const source_of = [&](ForwardConfig const& config) {
    return image_source(kernel_of(config, features), facts.arch);
  };
  Wishes const wishes{tensors, facts.multiprocessors};
  ForwardConfig const fastest = default_forward_config(tensors, facts.arch, facts.multiprocessors);
  // The disk cache and the library need no compiler.
  if (source_of(fastest) >= ImageSource::disk_cache) return fastest;

  std::vector<ForwardConfig> const all = candidates(wishes, facts.arch);
  auto const first_from = [&](ImageSource least) {
    return std::find_if(all.begin(), all.end(), [&](ForwardConfig const& c) { return source_of(c) >= least; });
  };
  auto chosen = jit_mode() == JitMode::on ? first_from(ImageSource::disk_cache) : all.end();
  if (chosen == all.end()) chosen = first_from(ImageSource::compiler);
  if (chosen == all.end()) return fastest;
  if (given_up != nullptr) {
    given_up->clear();
    for (auto config = all.begin(); config != chosen; ++config) {
      given_up->push_back(
          {*config, source_of(*config) != ImageSource::none, image_problem(kernel_of(*config, features), facts.arch)});
    }
  }
  return *chosen;
}

}  // namespace flashcute
