// flashcute's exceptions as Python classes.
#pragma once

#include <nanobind/nanobind.h>

namespace flashcute::python {

/// Defines the classes in `m` and translates C++ exceptions into them.
void bind_exceptions(nanobind::module_& m);

/// Whether a Python error is one of flashcute's.
bool is_flashcute_error(nanobind::python_error const& error);

}  // namespace flashcute::python
