// See forward_impl.hpp.
#define FLASHCUTE_CPU_ISA baseline
#include "forward_impl.hpp"
