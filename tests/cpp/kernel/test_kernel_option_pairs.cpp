// The forward kernel with every pair of values of its options, run on the host by emulated thread blocks.
#include "kernel/kernel_configuration.hpp"

namespace flashcute {
namespace {

// Guards against options that work alone and not together.
TEST(ForwardKernel, EveryPairOfOptions) {
#define OPTION_PAIR(mask, ...) check_configuration<mask(ForwardConfig{__VA_ARGS__})>();
#include "../../option_pairs.def"
#undef OPTION_PAIR
}

}  // namespace
}  // namespace flashcute
