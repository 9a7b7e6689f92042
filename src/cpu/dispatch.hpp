// The functions behind forward.hpp and backward.hpp with instruction set and number of threads as arguments, for tests
// and benchmarks.
#pragma once

#include <string>

#include "cpu/backward.hpp"
#include "cpu/forward.hpp"

namespace flashcute::cpu {

enum class Isa : uint8_t { baseline, avx2, avx512 };
inline constexpr Isa all_isas[] = {Isa::baseline, Isa::avx2, Isa::avx512};

char const* name_of(Isa isa);

/// Whether it was compiled in and this CPU has it.
bool is_available(Isa isa);

/// What FLASHCUTE_CPU_ISA = `requested` chooses: the named one, or the best for "auto". Throws ArgumentError.
Isa choose_isa(std::string const& requested);

void forward_with(Isa isa, int threads, ForwardConfig const& config, Features const& features,
                  ForwardParams const& params);

void backward_with(Isa isa, int threads, BackwardConfig const& config, Features const& features,
                   BackwardParams const& params);

}  // namespace flashcute::cpu
