// std::string between C++ and Python, in place of nanobind/stl/string.h, which raises UnicodeError for what is not
// UTF-8: names of files and variables' values need not be. They are text to read here, so such bytes and lone
// surrogates come out as escapes. (Names of files that are to be opened travel as bytes.)
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <string_view>

namespace flashcute::python {

inline nanobind::object to_str(std::string_view text) {
  auto const size = static_cast<Py_ssize_t>(text.size());
  return nanobind::steal(PyUnicode_DecodeUTF8(text.data(), size, "backslashreplace"));
}

}  // namespace flashcute::python

template <>
struct nanobind::detail::type_caster<std::string> {
  NB_TYPE_CASTER(std::string, const_name("str"))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    if (!PyUnicode_Check(source.ptr())) return false;
    object const bytes = steal(PyUnicode_AsEncodedString(source.ptr(), "utf-8", "backslashreplace"));
    if (!bytes.is_valid()) {
      PyErr_Clear();
      return false;
    }
    value.assign(PyBytes_AS_STRING(bytes.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(bytes.ptr())));
    return true;
  }

  static handle from_cpp(std::string const& text, rv_policy, cleanup_list*) noexcept {
    return flashcute::python::to_str(text).release();
  }
};
