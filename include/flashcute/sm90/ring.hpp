// Rings of stages in shared memory, through which blocks pass from the loading warp to the consumer warpgroups.
#pragma once

#include "flashcute/sm90/instructions.hpp"

namespace flashcute::sm90 {

/// One side's position in a ring of `Stages` stages. A stage's mbarriers change phase once per round.
template <int Stages>
struct RingPosition {
  int place = 0;
  uint32_t parity = 0;

  FLASHCUTE_DEVICE void advance() {
    if (++place == Stages) {
      place = 0;
      parity ^= 1;
    }
  }

  FLASHCUTE_DEVICE RingPosition after() const {
    RingPosition position = *this;
    position.advance();
    return position;
  }
  /// Of the first one: the last of a round that counts as over.
  FLASHCUTE_DEVICE RingPosition before() const {
    return place == 0 ? RingPosition{Stages - 1, parity ^ 1} : RingPosition{place - 1, parity};
  }
};

/// A block in a ring of stages. The matrix descriptor of the first stage is made once; that of `place` is an offset
/// from it.
template <class Element>
struct InRing {
  Element* ring;
  int place;
};

}  // namespace flashcute::sm90
