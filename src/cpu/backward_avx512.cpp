// See backward_impl.hpp.
#define FLASHCUTE_CPU_ISA avx512
#include "cpu/backward_impl.hpp"
