// WGMMA of 160 columns as an atom of CuTe's kind. CuTe has it too, but only in a header of all widths, and the compiler
// takes 2 s to read that: docs/decisions/0012-compile-cost.md.
#pragma once

#include "flashcute/sm90/instructions.hpp"

namespace flashcute::sm90 {

/// sums (64 x 160, float, in registers) += a (64 x 16, in registers) b (16 x 160 in shared memory, in which columns are
/// contiguous).
template <class Element>
struct Wgmma64x160x16 {};

/// The type's name in PTX. (An asm operand "C" inserts a char array.)
template <class Element>
struct PtxType;
template <>
struct PtxType<cute::half_t> {
  static constexpr char name[] = "f16";
};
template <>
struct PtxType<cute::bfloat16_t> {
  static constexpr char name[] = "bf16";
};

// Sixteen of the accumulators, as operands.
#define FLASHCUTE_SIXTEEN(d)                                                                                      \
  "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3]), "+f"((d)[4]), "+f"((d)[5]), "+f"((d)[6]), "+f"((d)[7]), \
      "+f"((d)[8]), "+f"((d)[9]), "+f"((d)[10]), "+f"((d)[11]), "+f"((d)[12]), "+f"((d)[13]), "+f"((d)[14]),      \
      "+f"((d)[15])

/// What CuTe calls to multiply by this atom. It passes the accumulators twice.
template <class Element, class SumsEngine, class SumsLayout, class AEngine, class ALayout, class BEngine, class BLayout>
FLASHCUTE_DEVICE void mma_unpack(cute::MMA_Traits<Wgmma64x160x16<Element>> const& mma,
                                 cute::Tensor<SumsEngine, SumsLayout>& sums, cute::Tensor<AEngine, ALayout> const& a,
                                 cute::Tensor<BEngine, BLayout> const& b,
                                 cute::Tensor<SumsEngine, SumsLayout> const& /*sums*/) {
  static_assert(decltype(cute::cosize(sums.layout()))::value == 80 && decltype(cute::size(a))::value == 8);
  float* const d = sums.data();
  auto const words = cute::recast<uint32_t>(a);
  uint64_t const descriptor = cute::recast<uint64_t>(b)(0);
  asm volatile(
      "{\n"
      ".reg .pred accumulates;\n"
      "setp.ne.b32 accumulates, %85, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n160k16.f32.%86.%86 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "
      "{%80, %81, %82, %83}, %84, accumulates, 1, 1, 1;\n"
      "}\n"
      : FLASHCUTE_SIXTEEN(d), FLASHCUTE_SIXTEEN(d + 16), FLASHCUTE_SIXTEEN(d + 32), FLASHCUTE_SIXTEEN(d + 48),
        FLASHCUTE_SIXTEEN(d + 64)
      : "r"(words(0)), "r"(words(1)), "r"(words(2)), "r"(words(3)), "l"(descriptor),
        "r"(static_cast<int32_t>(mma.accumulate_)), "C"(PtxType<Element>::name));
}

#undef FLASHCUTE_SIXTEEN

}  // namespace flashcute::sm90

template <class Element>
struct cute::MMA_Traits<flashcute::sm90::Wgmma64x160x16<Element>> {
  using ValTypeD = float;
  using ValTypeA = Element;
  using ValTypeB = Element;
  using ValTypeC = float;
  using FrgTypeB = GMMA::smem_desc<GMMA::Major::MN>;
  using Shape_MNK = Shape<_64, Int<160>, _16>;
  using ThrID = Layout<_128>;
  using ALayout = GMMA::ALayout_64x16;
  using BLayout = GMMA::ABLayout<160, 16>;
  using CLayout = GMMA::CLayout_64xN<160>;

  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};
