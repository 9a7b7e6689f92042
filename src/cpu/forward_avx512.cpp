// See forward_impl.hpp.
#define FLASHCUTE_CPU_ISA avx512
#include "cpu/forward_impl.hpp"
