// Waiting for the GIL without dying of it.
//
// Python before 3.14 ends a thread that asks for the GIL of an interpreter that is shutting down, as a daemon thread
// may: pthread_exit unwinds its stack, and the first noexcept frame in the way, of which nanobind has many, calls
// std::terminate. Here such a thread sleeps until the process is gone, as Python 3.14 has it.
#pragma once

#include <cxxabi.h>
#include <nanobind/nanobind.h>
#include <unistd.h>

#include "flashcute/api.hpp"

namespace flashcute::python {

/// Calls f, which may wait for the GIL. No destructor runs without it: the stack below f is left as it is.
template <class F>
decltype(auto) waiting_for_gil(F&& f) {
  try {
    return f();
  } catch (abi::__forced_unwind const&) {  // pthread_exit; to leave this handler would abort
    while (true) pause();
  }
}

/// The GIL is released while one lives. In place of nanobind's gil_scoped_release, which aborts as said above. What the
/// call reads of the environment is read before: Python sets variables under the GIL.
class ReleaseGil {
 public:
  ReleaseGil() : thread_{PyEval_SaveThread()} {}
  ~ReleaseGil() {
    waiting_for_gil([&] { PyEval_RestoreThread(thread_); });
  }
  ReleaseGil(ReleaseGil const&) = delete;
  ReleaseGil& operator=(ReleaseGil const&) = delete;

 private:
  EnvironmentSnapshot const environment_;
  PyThreadState* const thread_;
};

}  // namespace flashcute::python
