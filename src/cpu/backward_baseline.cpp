// See backward_impl.hpp.
#define FLASHCUTE_CPU_ISA baseline
#include "cpu/backward_impl.hpp"
