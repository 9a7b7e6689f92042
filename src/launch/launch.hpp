// From a kernel's identity to a launch: finds or makes the image, loads and prepares it once per kernel and
// device, launches.
#pragma once

#include <functional>
#include <vector>

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/backward_params.hpp"

namespace flashcute {

/// Launches on `stream` of the device: not more thread blocks than a grid holds (require_grid). Throws DriverError if
/// the driver refuses. If the kernel has to be compiled, those that `needed_next` returns are compiled at the same
/// time.
void launch(ForwardKernelId const& kernel, ForwardParams const& params, int device, void* stream,
            std::function<std::vector<BackwardKernelId>()> const& needed_next = {});

/// The kernels of the passes, in order.
std::vector<BackwardKernelId> kernels_of(BackwardConfig const& config, Features const& features);

/// The same of all passes, in order. Nothing is launched before the kernels of all are ready.
void launch(BackwardConfig const& config, Features const& features, BackwardParams const& params, int device,
            void* stream);

}  // namespace flashcute
