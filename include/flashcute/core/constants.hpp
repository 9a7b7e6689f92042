// Constants of the change of base that GPU kernels and the CPU backend share: softmax is computed in base 2.
#pragma once

namespace flashcute {

template <class T>
constexpr T log2_e = static_cast<T>(0x1.71547652b82fep+0);

template <class T>
constexpr T ln2 = static_cast<T>(0x1.62e42fefa39efp-1);

}  // namespace flashcute
