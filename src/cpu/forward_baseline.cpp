// See forward_impl.hpp.
#define FLASHCUTE_CPU_ISA baseline
#include "cpu/forward_impl.hpp"
