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

/// How many of `threads` threads a call uses: one if it is small, otherwise all. The pairs of a query and a key of its
/// sequences count, whatever the mask hides; packed sequences have far fewer than their tensors.
int useful_threads(ForwardParams const& params, int threads);

void forward_with(Isa isa, int threads, ForwardConfig const& config, Features const& features,
                  ForwardParams const& params);

void backward_with(Isa isa, int threads, BackwardConfig const& config, Features const& features,
                   BackwardParams const& params);

}  // namespace flashcute::cpu
