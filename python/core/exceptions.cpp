#include "exceptions.hpp"

#include <string>

#include "flashcute/error.hpp"
#include "text.hpp"

namespace nb = nanobind;

namespace flashcute::python {
namespace {

/// A Python exception class that is both a FlashcuteError and the built-in that fits its meaning.
PyObject* new_exception(nb::module_& m, char const* name, PyObject* base, PyObject* builtin, char const* doc) {
  std::string const qualified = nb::cast<std::string>(m.attr("__name__")) + "." + name;
  nb::object const bases =
      base == nullptr ? nb::borrow(builtin) : nb::object(nb::make_tuple(nb::handle(base), nb::handle(builtin)));
  PyObject* const type = PyErr_NewExceptionWithDoc(qualified.c_str(), doc, bases.ptr(), nullptr);
  if (type == nullptr) throw nb::python_error();
  m.attr(name) = nb::handle(type);
  return type;  // lives as long as the interpreter
}

/// As PyErr_SetString, which raises UnicodeDecodeError where a message quotes a path that is not UTF-8.
void raise(PyObject* type, char const* message) { PyErr_SetObject(type, to_str(message).ptr()); }

struct Exceptions {
  PyObject *any, *argument, *config, *unsupported, *device, *driver, *compile, *cache;
};
Exceptions exceptions;

}  // namespace

void bind_exceptions(nb::module_& m) {
  exceptions.any =
      new_exception(m, "FlashcuteError", nullptr, PyExc_Exception, "Base class of flashcute's exceptions.");
  auto const add = [&](char const* name, PyObject* builtin, char const* doc) {
    return new_exception(m, name, exceptions.any, builtin, doc);
  };
  exceptions.argument =
      add("ArgumentError", PyExc_ValueError, "An argument is wrong; names it, what came, what is allowed.");
  exceptions.config = add("ConfigError", PyExc_ValueError, "A configuration breaks a rule or does not fit.");
  exceptions.unsupported =
      add("UnsupportedError", PyExc_NotImplementedError, "Not covered yet; names what to use instead.");
  exceptions.device = add("DeviceError", PyExc_RuntimeError, "No usable driver or GPU.");
  exceptions.driver = add("DriverError", PyExc_RuntimeError, "A call of the CUDA driver failed.");
  exceptions.compile = add("CompileError", PyExc_RuntimeError, "Run-time compilation failed; carries the log.");
  exceptions.cache = add("CacheError", PyExc_OSError, "The folder of compiled images is unsafe to use.");
  nb::register_exception_translator([](std::exception_ptr const& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (ArgumentError const& e) {
      raise(exceptions.argument, e.what());
    } catch (ConfigError const& e) {
      raise(exceptions.config, e.what());
    } catch (UnsupportedError const& e) {
      raise(exceptions.unsupported, e.what());
    } catch (DeviceError const& e) {
      raise(exceptions.device, e.what());
    } catch (DriverError const& e) {
      raise(exceptions.driver, e.what());
    } catch (CompileError const& e) {
      // Ctrl-C ends the compiler's processes: what is meant is KeyboardInterrupt, which Python has yet to raise.
      if (PyErr_CheckSignals() == 0) raise(exceptions.compile, e.what());
    } catch (CacheError const& e) {
      raise(exceptions.cache, e.what());
    } catch (Error const& e) {
      raise(exceptions.any, e.what());
    }
  });
}

bool is_flashcute_error(nb::python_error const& error) { return error.matches(exceptions.any); }

}  // namespace flashcute::python
