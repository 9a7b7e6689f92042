// Launches kernels by their ids: finds or makes the image, and loads and prepares it once per kernel and device.
#pragma once

#include <functional>
#include <vector>

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/backward_params.hpp"
#include "flashcute/policy/block_map_rules.hpp"

namespace flashcute {

/// Launches the kernel on `stream` of the device. The plan has checked that a grid can hold the thread blocks
/// (require_grid). Throws DriverError if the driver reports an error. If the kernel has to be compiled, the kernels
/// that `needed_next` returns are compiled at the same time.
void launch(ForwardKernelId const& kernel, ForwardParams const& params, int device, void* stream,
            std::function<std::vector<BackwardKernelId>()> const& needed_next = {});

/// The kernels of the passes, in order.
std::vector<BackwardKernelId> kernels_of(BackwardConfig const& config, Features const& features,
                                         bool with_sink = false);

/// Launches all passes, in order; nothing is launched before the kernels of all are ready.
void launch(BackwardConfig const& config, Features const& features, BackwardParams const& params, int device,
            void* stream);

/// Makes the block maps that `rules` describe.
void launch(BlockMapRules const& rules, int device, void* stream);

}  // namespace flashcute
