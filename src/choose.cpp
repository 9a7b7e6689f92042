#include "choose.hpp"

#include "driver.hpp"
#include "image_store.hpp"

namespace flashcute {
namespace {

/// What the choice depends on, and may do without.
struct Wishes {
  ForwardTensors tensors;
  int32_t multiprocessors;
};

/// What can be given up without changing what a call computes, one after the other: Hopper's kernel, for mma.sync's;
/// one product of TF32, which is allowed and not demanded, for three; a tile for small grids, for the usual one.
constexpr void (*concessions[])(Wishes&) = {
    [](Wishes& wishes) { wishes.tensors.allow_wgmma = false; },
    [](Wishes& wishes) { wishes.tensors.allow_tf32 = false; },
    [](Wishes& wishes) { wishes.multiprocessors = 0; },
};

}  // namespace

ForwardConfig choose_config(ForwardTensors tensors, Features const& features, Device device,
                            std::vector<GivenUp>* given_up) {
  if (device.type == DeviceType::cpu) return default_forward_config(tensors, cpu_arch);
  cuda::DeviceFacts const& facts = cuda::device_facts(device.index);
  Wishes wishes{tensors, facts.multiprocessors};
  auto const config_of = [&] { return default_forward_config(wishes.tensors, facts.arch, wishes.multiprocessors); };
  // To ask for more than `none` here would spare a first call the wait for a compiler.
  auto const can_run = [&](ForwardConfig const& config) {
    return image_source(kernel_of(config, features), facts.arch) > ImageSource::none;
  };

  ForwardConfig const fastest = config_of();
  if (can_run(fastest)) return fastest;
  std::vector<GivenUp> without_image;
  auto const give_up = [&](ForwardConfig const& config) {
    if (given_up != nullptr) without_image.push_back({config, image_problem(kernel_of(config, features), facts.arch)});
  };
  ForwardConfig config = fastest;
  for (auto const& concede : concessions) {
    concede(wishes);
    ForwardConfig const next = config_of();
    if (next == config) continue;
    give_up(config);
    config = next;
    if (!can_run(config)) continue;
    if (given_up != nullptr) *given_up = std::move(without_image);
    return config;
  }
  return fastest;
}

}  // namespace flashcute
