// Stands in for include/flashcute/device/instructions.hpp: the same names, executed by the emulated thread block.
// What the instructions do with fragments is written from the PTX ISA (sections "ldmatrix" and "Matrix
// Fragments for mma.m16n8k16"); only what CuTe believes about them comes from CuTe's atoms. A kernel
// computes the right result only if both agree.
#pragma once

// As the header that it stands for.
#include <cute/tensor_impl.hpp>
// The rest needs its tensor first.
#include <cute/algorithm/clear.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/pointer_flagged.hpp>
#include <cute/pointer_swizzle.hpp>
#include <cute/swizzle_layout.hpp>

#include <bit>
#include <cmath>
#include <memory>

#include "../../emulator.hpp"
#include "flashcute/core/forward_config.hpp"

namespace flashcute {
namespace emulation {

/// All values of a 16-bit type, because CUTLASS's conversions on the host are slow.
template <class Element>
float const* values() {
  static auto const table = [] {
    auto t = std::make_unique<float[]>(1 << 16);
    for (uint32_t i = 0; i < 1 << 16; ++i) t[i] = static_cast<float>(Element::bitcast(static_cast<uint16_t>(i)));
    return t;
  }();
  return table.get();
}

/// mma.m16n8kK: each 32-bit register of A and B holds `per_register` elements, neighbours in k.
template <class Operand, class Real_>
struct Mma {
  static constexpr int per_register = 4 / sizeof(Operand), k_size = 8 * per_register;

  using Real = Real_;
  using DRegisters = float[4];
  using ARegisters = uint32_t[4];
  using BRegisters = uint32_t[2];
  using CRegisters = float[4];

  struct Lane {
    uint32_t a[4], b[2];
    float c[4];
  };

  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t const& a0, uint32_t const& a1,
                  uint32_t const& a2, uint32_t const& a3, uint32_t const& b0, uint32_t const& b1, float const& c0,
                  float const& c1, float const& c2, float const& c3) {
    Lane own{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
    warp_instruction("mma", &own, execute);
    d0 = own.c[0];
    d1 = own.c[1];
    d2 = own.c[2];
    d3 = own.c[3];
  }

  /// Element i of a register. The tensor cores read the upper 19 bits of a TF32 number.
  static float element(uint32_t word, int i) {
    if constexpr (per_register == 2) {
      return values<Operand>()[word >> 16 * i & 0xffff];
    } else {
      return std::bit_cast<float>(word & 0xffffe000u);
    }
  }

  static void execute(void* const* lanes) {
    float a[16][k_size], b[k_size][8], c[16][8];  // (m, k), (k, n), (m, n)
    for (int lane = 0; lane < 32; ++lane) {
      auto const& own = *static_cast<Lane const*>(lanes[lane]);
      int const group = lane / 4, in_group = lane % 4;
      for (int r = 0; r < 4; ++r) {  // registers: rows group and group + 8, then the same in the second half of k
        for (int i = 0; i < per_register; ++i) {
          a[group + r % 2 * 8][in_group * per_register + i + r / 2 * k_size / 2] = element(own.a[r], i);
        }
      }
      for (int r = 0; r < 2; ++r) {
        for (int i = 0; i < per_register; ++i) {
          b[in_group * per_register + i + r * k_size / 2][group] = element(own.b[r], i);
        }
      }
      for (int i = 0; i < 4; ++i) c[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = own.c[i];
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < k_size; ++k) {
        for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        static_cast<Lane*>(lanes[lane])->c[i] = c[i < 2 ? lane / 4 : lane / 4 + 8][lane % 4 * 2 + (i & 1)];
      }
    }
  }
};

}  // namespace emulation
}  // namespace flashcute

namespace cute {

template <class Operand, class Real>
struct MMA_Traits<flashcute::emulation::Mma<Operand, Real>> : MMA_Traits<Real> {};

}  // namespace cute

namespace flashcute {

// ---- fragments and products, as CuTe operations --------------------------------------------------

template <DType>
struct TensorCore;

template <>
struct TensorCore<DType::float16> {
  using Element = cute::half_t;
  using Operand = Element;
  using Mma = emulation::Mma<Operand, cute::SM80_16x8x16_F32F16F16F32_TN>;
};

template <>
struct TensorCore<DType::bfloat16> {
  using Element = cute::bfloat16_t;
  using Operand = Element;
  using Mma = emulation::Mma<Operand, cute::SM80_16x8x16_F32BF16BF16F32_TN>;
};

template <>
struct TensorCore<DType::float32> {
  using Element = float;
  using Operand = cute::tfloat32_t;
  using Mma = emulation::Mma<Operand, cute::SM80_16x8x8_F32TF32TF32F32_TN>;
};

// ---- memory --------------------------------------------------------------------------------------

using SharedAddress = uintptr_t;

FLASHCUTE_DEVICE SharedAddress shared_address(void const* p) { return reinterpret_cast<uintptr_t>(p); }

FLASHCUTE_DEVICE SharedAddress computed_here(SharedAddress address) { return address; }

template <bool Transposed>
FLASHCUTE_DEVICE void ldmatrix(SharedAddress row, uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3) {
  struct Lane {
    void const* row;
    uint32_t registers[4];
  };
  Lane own{reinterpret_cast<void const*>(row), {}};
  emulation::warp_instruction(Transposed ? "ldmatrix.trans" : "ldmatrix", &own, [](void* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int i = 0; i < 8; ++i) {
        emulation::load_shared_by_warp(element[i], static_cast<Lane*>(lanes[8 * matrix + i])->row, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        int const i = lane / 4, j = 2 * (lane % 4);
        uint32_t const low = Transposed ? element[j][i] : element[i][j];
        uint32_t const high = Transposed ? element[j + 1][i] : element[i][j + 1];
        static_cast<Lane*>(lanes[lane])->registers[matrix] = low | high << 16;
      }
    }
  });
  d0 = own.registers[0];
  d1 = own.registers[1];
  d2 = own.registers[2];
  d3 = own.registers[3];
}

template <class Word>
FLASHCUTE_DEVICE Word shared_load(void const* from) {
  Word word;
  emulation::load_shared(&word, from, sizeof(Word));
  return word;
}

FLASHCUTE_DEVICE float shared_load_at(SharedAddress from) {
  return shared_load<float>(reinterpret_cast<void const*>(from));
}

template <class Word>
FLASHCUTE_DEVICE void shared_store(void* to, Word const& word) {
  emulation::store_shared(to, &word, sizeof(Word));
}

template <class Word>
FLASHCUTE_DEVICE Word global_load(void const* from) {
  Word word;
  emulation::load_global(&word, from, sizeof(Word));
  return word;
}

template <class Word>
FLASHCUTE_DEVICE void global_store(void* to, Word const& word) {
  emulation::store_global(to, &word, sizeof(Word));
}

/// Of a block that runs alone.
FLASHCUTE_DEVICE uint32_t count_up(uint32_t* number, uint32_t by) {
  uint32_t const before = *number;
  *number += by;
  return before;
}

inline constexpr int reduction_width = 1;

template <int Width>
FLASHCUTE_DEVICE void reduce_add(float* to, float const* x) {
  for (int i = 0; i < Width; ++i) emulation::add_global(to + i, x[i]);
}

template <class Word>
FLASHCUTE_DEVICE void copy_async(void const* from, void* to, bool exists) {
  static_assert(sizeof(Word) == 4 || sizeof(Word) == 8 || sizeof(Word) == 16);
  emulation::start_copy(from, to, sizeof(Word), exists);
}

FLASHCUTE_DEVICE void keep_loads_behind() {}

FLASHCUTE_DEVICE void copies_wait() { emulation::wait_for_copies(); }

// ---- threads -------------------------------------------------------------------------------------

FLASHCUTE_DEVICE int thread_index() { return emulation::thread_index(); }

FLASHCUTE_DEVICE uint32_t block_index() { return emulation::block_index(); }

FLASHCUTE_DEVICE void block_sync(char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::block_sync(file, line);
}

FLASHCUTE_DEVICE bool block_any(bool x, char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulation::block_any(x, file, line);
}

namespace emulation {

/// What every lane gets of another's value.
inline float exchange(char const* name, float x, int from) {
  struct Lane {
    float value, result;
    int from;
  };
  Lane own{x, 0.f, from};
  warp_instruction(name, &own, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto& lane = *static_cast<Lane*>(lanes[i]);
      lane.result = static_cast<Lane const*>(lanes[lane.from])->value;
    }
  });
  return own.result;
}

}  // namespace emulation

FLASHCUTE_DEVICE float shuffle_xor(float x, int mask) {
  return emulation::exchange("shuffle_xor", x, thread_index() % 32 ^ mask);
}

FLASHCUTE_DEVICE uint32_t shuffle_xor_word(uint32_t word, int mask) {
  return std::bit_cast<uint32_t>(
      emulation::exchange("shuffle_xor_word", std::bit_cast<float>(word), thread_index() % 32 ^ mask));
}

FLASHCUTE_DEVICE bool warp_any(bool x) {
  struct Lane {
    bool value, any;
  };
  Lane own{x, false};
  emulation::warp_instruction("warp_any", &own, [](void* const* lanes) {
    bool any = false;
    for (int i = 0; i < 32; ++i) any = any || static_cast<Lane*>(lanes[i])->value;
    for (int i = 0; i < 32; ++i) static_cast<Lane*>(lanes[i])->any = any;
  });
  return own.any;
}

FLASHCUTE_DEVICE uint32_t lanes_with(bool x) {
  struct Lane {
    bool value;
    uint32_t lanes;
  };
  Lane own{x, 0};
  emulation::warp_instruction("lanes_with", &own, [](void* const* lanes) {
    uint32_t with = 0;
    for (int i = 0; i < 32; ++i) with |= static_cast<uint32_t>(static_cast<Lane*>(lanes[i])->value) << i;
    for (int i = 0; i < 32; ++i) static_cast<Lane*>(lanes[i])->lanes = with;
  });
  return own.lanes;
}

namespace emulation {

/// A number of the warp's, for all lanes.
template <class Choose>
int32_t reduce(char const* name, int32_t x, Choose) {
  warp_instruction(name, &x, [](void* const* lanes) {
    int32_t chosen = *static_cast<int32_t*>(lanes[0]);
    for (int i = 1; i < 32; ++i) chosen = Choose{}(chosen, *static_cast<int32_t*>(lanes[i]));
    for (int i = 0; i < 32; ++i) *static_cast<int32_t*>(lanes[i]) = chosen;
  });
  return x;
}

}  // namespace emulation

FLASHCUTE_DEVICE int32_t warp_least(int32_t x) {
  return emulation::reduce("warp_least", x, [](int32_t a, int32_t b) { return min_of(a, b); });
}
FLASHCUTE_DEVICE int32_t warp_greatest(int32_t x) {
  return emulation::reduce("warp_greatest", x, [](int32_t a, int32_t b) { return max_of(a, b); });
}

template <int Width>
FLASHCUTE_DEVICE float shuffle(float x, int lane) {
  return emulation::exchange("shuffle", x, thread_index() % 32 / Width * Width + lane);
}

// ---- arithmetic ----------------------------------------------------------------------------------

/// What .ftz makes of an operand or result.
FLASHCUTE_DEVICE float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

FLASHCUTE_DEVICE float exp2_approx(float x) { return flush(std::exp2(flush(x))); }

FLASHCUTE_DEVICE float max_or_nan(float x, float y) { return x != x ? x : y != y ? y : std::max(x, y); }

FLASHCUTE_DEVICE float reciprocal_approx(float x) { return flush(1.f / flush(x)); }

template <class To>
FLASHCUTE_DEVICE uint32_t round_pair(float low, float high) {
  return static_cast<uint32_t>(To(low).raw()) | static_cast<uint32_t>(To(high).raw()) << 16;
}

template <class Element>
FLASHCUTE_DEVICE uint32_t at_most_one(uint32_t word) {
  if constexpr (std::is_same_v<Element, float>) {
    return std::bit_cast<float>(word) > 1 ? std::bit_cast<uint32_t>(1.f) : word;
  } else {
    auto const least = [](uint32_t bits) {
      auto const x = static_cast<float>(Element::bitcast(static_cast<uint16_t>(bits)));
      return uint32_t{Element(x > 1 ? 1.f : x).raw()};
    };
    return least(word & 0xffff) | least(word >> 16) << 16;
  }
}

FLASHCUTE_DEVICE cute::tfloat32_t round_tf32(float x) {
  auto const bits = std::bit_cast<uint32_t>(x);
  bool const finite = (bits & 0x7f800000u) != 0x7f800000u;
  uint32_t rounded = finite ? (bits + 0x1000u) & 0xffffe000u : bits;
  if ((rounded & 0x7fffffffu) == 0x7f800000u) rounded = bits;
  return cute::tfloat32_t::bitcast(rounded);
}

FLASHCUTE_DEVICE cute::tfloat32_t truncate_tf32(float x) {
  return cute::tfloat32_t::bitcast(std::bit_cast<uint32_t>(x) & 0xffffe000u);
}

FLASHCUTE_DEVICE cute::tfloat32_t as_tf32(float x) { return cute::tfloat32_t::bitcast(std::bit_cast<uint32_t>(x)); }

template <class Element>
FLASHCUTE_DEVICE uint32_t add_zero_times(uint32_t word, uint32_t sum) {
  if constexpr (std::is_same_v<Element, float>) {
    return std::bit_cast<uint32_t>(0 * std::bit_cast<float>(word) + std::bit_cast<float>(sum));
  } else {
    float const* const value = emulation::values<Element>();
    return round_pair<Element>(0 * value[word & 0xffff] + value[sum & 0xffff],
                               0 * value[word >> 16] + value[sum >> 16]);
  }
}

}  // namespace flashcute
