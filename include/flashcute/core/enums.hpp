// The enums that distinguish kernels, each with a table of its enumerators. All code that prints, parses, lists or
// dispatches on an enumerator uses the table.
#pragma once

#include "flashcute/core/std.hpp"

namespace flashcute {

/// A row of an enum's table.
template <class Enum>
struct Enumerator {
  Enum value;
  char const* name;  // as C++ and Python spell it
  char const* word;  // what stands for it in the name of a kernel; "" for nothing
};

/// The table of an enum: `type`, the enum's name, and `rows`, one for each enumerator in order.
template <class Enum>
struct EnumTable;

// Defines an enum and its table from one list with a ROW(name, word) for each enumerator. Because the enum is made from
// the list as well, no enumerator can be without a row.
#define FLASHCUTE_ENUM(TYPE, LIST)                                         \
  enum class TYPE : uint8_t { LIST(FLASHCUTE_ENUMERATOR) };                \
  template <>                                                              \
  struct EnumTable<TYPE> {                                                 \
    using Enum = TYPE;                                                     \
    static constexpr char const* type = #TYPE;                             \
    static constexpr Enumerator<TYPE> rows[] = {LIST(FLASHCUTE_ENUM_ROW)}; \
    static constexpr int32_t count = sizeof(rows) / sizeof(rows[0]);       \
  };
#define FLASHCUTE_ENUMERATOR(NAME, WORD) NAME,
#define FLASHCUTE_ENUM_ROW(NAME, WORD) {Enum::NAME, #NAME, WORD},

/// An enum that FLASHCUTE_ENUM has defined.
template <class T>
concept TabulatedEnum = requires { EnumTable<T>::rows; };

template <TabulatedEnum Enum>
constexpr char const* name_of(Enum value) {
  for (auto const& row : EnumTable<Enum>::rows) {
    if (row.value == value) return row.name;
  }
  return "?";
}

template <TabulatedEnum Enum>
constexpr char const* word_of(Enum value) {
  for (auto const& row : EnumTable<Enum>::rows) {
    if (row.value == value) return row.word;
  }
  return "?";
}

/// Calls f.operator()<value>(): the enumerator as a constant. `f` is instantiated for every enumerator, so an
/// enumerator that it cannot serve does not compile.
template <int32_t row = 0, TabulatedEnum Enum, class F>
constexpr auto with_constant(Enum value, F const& f) {
  using Table = EnumTable<Enum>;
  if constexpr (row + 1 < Table::count) {
    if (value != Table::rows[row].value) return with_constant<row + 1>(value, f);
  }
  return f.template operator()<Table::rows[row].value>();
}

// ---- the enums -----------------------------------------------------------------------------------

// The types that kernels compute with.
#define FLASHCUTE_DTYPES(ROW) \
  ROW(float16, "f16")         \
  ROW(bfloat16, "bf16")       \
  ROW(float32, "f32")         \
  ROW(float64, "f64")
FLASHCUTE_ENUM(DType, FLASHCUTE_DTYPES)

// The element types of tensors: those, int32 for numbers, and booleans of a byte. The first rows equal those of DType.
#define FLASHCUTE_ELEMENT_TYPES(ROW) FLASHCUTE_DTYPES(ROW) ROW(int32, "") ROW(boolean, "")
FLASHCUTE_ENUM(ElementType, FLASHCUTE_ELEMENT_TYPES)

constexpr ElementType element_type(DType t) { return static_cast<ElementType>(t); }
constexpr bool operator==(ElementType a, DType b) { return a == element_type(b); }

/// Bytes of an element.
constexpr int32_t size_of(DType t) {
  switch (t) {
    case DType::float16:
    case DType::bfloat16: return 2;
    case DType::float32: return 4;
    case DType::float64: return 8;
  }
  return 0;
}
constexpr int32_t size_of(ElementType t) {
  if (t == ElementType::boolean) return 1;
  return t == ElementType::int32 ? 4 : size_of(static_cast<DType>(t));
}

// Which kernels: those that every GPU from compute capability 8.0 on runs (cp.async, ldmatrix, mma.sync), or Hopper's
// own (copies by TMA, products by WGMMA, specialised warps).
#define FLASHCUTE_KERNELS(ROW) \
  ROW(sm80, "")                \
  ROW(sm90, "sm90")
FLASHCUTE_ENUM(Kernel, FLASHCUTE_KERNELS)

// How matrices are multiplied. With float32 the tensor cores compute in TF32, which has 10 bits of fraction; tf32x3
// recovers the precision by three products in place of one.
#define FLASHCUTE_MATHS(ROW) \
  ROW(tensor_core, "")       \
  ROW(tf32x3, "tf32x3")      \
  ROW(cuda_core, "cudacore")
FLASHCUTE_ENUM(Math, FLASHCUTE_MATHS)

// How the launches of a call follow each other: each may begin while the one before it ends (programmatic dependent
// launch), or after it.
#define FLASHCUTE_LAUNCHES(ROW) \
  ROW(chained, "")              \
  ROW(separate, "separate")
FLASHCUTE_ENUM(Launches, FLASHCUTE_LAUNCHES)

// Which keys a query sees: policy/mask.hpp has a Mask for each.
#define FLASHCUTE_MASK_KINDS(ROW) \
  ROW(full, "full")               \
  ROW(causal, "causal")           \
  ROW(band, "band")               \
  ROW(mapped, "mapped")
FLASHCUTE_ENUM(MaskKind, FLASHCUTE_MASK_KINDS)

// The forward is one launch.
#define FLASHCUTE_FORWARD_PASSES(ROW) ROW(forward, "")
FLASHCUTE_ENUM(SinglePass, FLASHCUTE_FORWARD_PASSES)

// The backward has several passes, each a launch on a GPU. What a pass computes:
//   queries    delta and dQ of a tile of query rows, in a loop over blocks of keys
//   keys       dK and dV of a tile of keys, in a loop over blocks of queries
//   prepare    delta of a tile of query rows; clears its sums for dQ
//   gradients  as keys; also adds the part of each dQ that comes from its keys to the sums for dQ
//   finish     dQ of a tile of query rows, from its sums
//   sink       the gradient of a head's sink, from LSE and delta
#define FLASHCUTE_BACKWARD_PASSES(ROW) \
  ROW(queries, "queries")              \
  ROW(keys, "keys")                    \
  ROW(prepare, "prepare")              \
  ROW(gradients, "gradients")          \
  ROW(finish, "finish")                \
  ROW(sink, "sink")
FLASHCUTE_ENUM(BackwardPass, FLASHCUTE_BACKWARD_PASSES)

}  // namespace flashcute
