// See backward_impl.hpp.
#define FLASHCUTE_CPU_ISA avx2
#include "cpu/backward_impl.hpp"
