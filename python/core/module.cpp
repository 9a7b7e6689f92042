// The extension module flashcute._core: flashcute/api.hpp for Python, with C++ exceptions as Python's.
#include "bind.hpp"
#include "exceptions.hpp"

NB_MODULE(_core, m) {
  using namespace flashcute::python;
  // Objects that outlive the interpreter (in a traceback, in a test runner) are no leak of ours to report.
  nanobind::set_leak_warnings(false);
  bind_exceptions(m);
  bind_configs(m);
  bind_facts(m);
  bind_calls(m);
}
