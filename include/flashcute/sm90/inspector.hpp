// The inspecting warps: they look for NaN and infinity in partial blocks of V before these are multiplied.
#pragma once

#include "flashcute/device/nonfinite.hpp"
#include "flashcute/sm90/pipeline.hpp"

namespace flashcute::sm90 {

/// Run by warps of the loading warpgroup, from the second on. A row that does not see a key multiplies its value by 0,
/// and 0 * NaN is NaN: values of a partial block of V that are not finite become 0 before the product, and a flag of
/// the tile records it.
template <ForwardConfig C, class Mask>
class Inspector {
  using L = ForwardLayout<C, Mask>;
  using Storage = typename L::SharedStorage;
  using Element = typename L::Element;

 public:
  FLASHCUTE_DEVICE static void run(Storage& smem) {
    for (RingPosition<C.stages> position;; position.advance()) {
      barrier_wait(smem.v_landed[position.place], position.parity);
      auto const [place, tile] = smem.inspections[position.place];
      if (place < 0) return;
      Element* const v = smem.v[place];
      FiniteCheck<Element> check;
      for_each_part(v, [&](Element* words) { check.template look_at<16>(words); });
      if (warp_any(!check.all_finite())) {
        smem.dropped[tile] = true;
        for_each_part(v, [](Element* words) { zero_nonfinite(words); });
        publish_to_products();
      }
      reconverge();  // one lane arrives for the warp: all its lanes have read the inspection and written V
      if (thread_index() % 32 == 0) barrier_arrive(smem.v_full[place]);
    }
  }

 private:
  /// Calls f(place) for each 16 bytes of a block of V that are this thread's part.
  template <class F>
  FLASHCUTE_DEVICE static void for_each_part(Element* v, F const& f) {
    constexpr int vector = 16 / sizeof(Element);
    int const thread = thread_of_warpgroup() - 32;  // of those that inspect
#pragma unroll 2
    for (int i = vector * thread; i < C.block_n * C.head_dim_v; i += vector * 32 * L::inspecting_warps) f(v + i);
  }
};

}  // namespace flashcute::sm90
