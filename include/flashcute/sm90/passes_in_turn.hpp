// How the passes of Hopper's gradients follow each other in a stream. A pass that begins early loads what the call was
// given, which was there before `prepare` began, and then waits for the pass before it.
//
// Every thread block waits, so that a pass is not done before the one before it is: then the end of `finish` is the end
// of all, which is what the next work of the stream waits for.
#pragma once

#include "flashcute/core/backward_config.hpp"
#include "flashcute/sm90/instructions.hpp"

namespace flashcute::sm90 {

template <BackwardConfig C>
struct PassesInTurn {
  /// Lets the next pass begin, once all thread blocks of this one have come here.
  FLASHCUTE_DEVICE static void begin_next() {
    if constexpr (C.launches == Launches::chained) allow_next_launch();
  }

  /// This thread waits for the end of the pass before.
  FLASHCUTE_DEVICE static void await_before() {
    if constexpr (C.launches == Launches::chained) await_launch_before();
  }
};

}  // namespace flashcute::sm90
