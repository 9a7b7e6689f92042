// What each file of the bindings adds to the module, and the conversions that they share.
#pragma once

// The same conversions in every file: they are templates that one file would otherwise define differently from another.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "flashcute/api.hpp"
#include "text.hpp"

namespace flashcute::python {

void bind_configs(nanobind::module_& m);  // ForwardConfig, BackwardConfig, and the functions that tell of them
void bind_facts(nanobind::module_& m);    // Explanation, and what the build, the machine and the disk cache have
void bind_calls(nanobind::module_& m);    // what takes arrays

}  // namespace flashcute::python
