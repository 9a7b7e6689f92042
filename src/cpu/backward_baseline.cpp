// See backward_impl.hpp.
#define FLASHCUTE_CPU_ISA baseline
#include "backward_impl.hpp"
