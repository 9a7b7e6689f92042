// See backward_impl.hpp.
#define FLASHCUTE_CPU_ISA avx512
#include "backward_impl.hpp"
