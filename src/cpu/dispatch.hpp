// Behind forward.hpp: the choices it makes, as arguments. For tests and benchmarks.
#pragma once

#include "forward.hpp"

namespace flashcute::cpu {

enum class Isa : uint8_t { baseline, avx2, avx512 };
inline constexpr Isa all_isas[] = {Isa::baseline, Isa::avx2, Isa::avx512};

char const* name_of(Isa isa);

/// Whether it was compiled in and this CPU has it.
bool is_available(Isa isa);

/// What FLASHCUTE_CPU_ISA = `requested` chooses; null stands for an unset variable. Throws
/// std::invalid_argument.
Isa choose_isa(char const* requested);

/// What FLASHCUTE_NUM_THREADS = `requested` chooses, likewise.
int choose_num_threads(char const* requested);

void forward_with(Isa isa, int threads, ForwardConfig const& config, Features const& features,
                  ForwardParams const& params);

}  // namespace flashcute::cpu
