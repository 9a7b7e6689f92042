// Array objects as TensorViews, through DLPack. A library that offers DLPack's C exchange table (torch
// does) costs about 0.1 us a tensor; any other goes through `__dlpack__`, called by flashcute/_arrays.py.
#pragma once

#include <nanobind/nanobind.h>

#include "flashcute/api.hpp"

namespace flashcute::python {

namespace nb = nanobind;

struct ExchangeTable;

/// One argument of a call: a view of the array's memory, and what keeps it alive.
class Tensor {
 public:
  /// `stream` is what the caller passed as stream=, None if nothing. Throws ArgumentError, which says `dtypes` where
  /// the array's is one that no argument has.
  Tensor(char const* argument, nb::handle array, nb::handle stream,
         char const* dtypes = "float16, bfloat16, float32 or float64");

  TensorView const& view() const { return view_; }

  /// The stream on which the array's library currently works on the array's device.
  void* current_stream() const;

  /// Throws ArgumentError if nothing orders the library's work on the array before work on `stream`.
  void require_stream(char const* argument, void* stream) const;

 private:
  TensorView view_;
  ExchangeTable const* table_ = nullptr;  // null: exported by __dlpack__
  nb::object capsule_;                    // or a memoryview; frees the export when it goes
  nb::object stream_;                     // what the exporter says is the library's current stream
};

/// Registers `exporter(array, stream) -> (capsule or memoryview, dtype name or None, current stream)`.
void set_exporter(nb::object exporter);

}  // namespace flashcute::python
