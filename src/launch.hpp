// From a kernel's identity to a launch: finds or makes the image, loads and prepares it once per kernel and
// device, launches.
#pragma once

#include "flashcute/config.hpp"
#include "flashcute/params.hpp"

namespace flashcute {

/// Launches on `stream` of the device. Throws DriverError if the driver refuses.
void launch(ForwardKernelId const& kernel, ForwardParams const& params, int device, void* stream);

}  // namespace flashcute
