// See forward_impl.hpp.
#define FLASHCUTE_CPU_ISA avx2
#include "cpu/forward_impl.hpp"
