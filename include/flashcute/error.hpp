// The exceptions of the library: every failure that a caller can cause or meet is one of these. The message of an
// ArgumentError names the argument, what came and what is allowed.
#pragma once

#include <stdexcept>
#include <string>

namespace flashcute {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A tensor or option is wrong: rank, dtype, shape, strides, device, value.
class ArgumentError : public Error {
 public:
  using Error::Error;

  /// "q: expected 4 dimensions, got 3 (shape (2, 5, 64))" and the like.
  ArgumentError(std::string const& argument, std::string const& allowed, std::string const& got,
                std::string const& hint = {})
      : Error(argument + ": expected " + allowed + ", got " + got + (hint.empty() ? "" : ". " + hint)) {}
};

/// A kernel configuration breaks a rule, or does not fit the tensors or the device.
class ConfigError : public Error {
 public:
  using Error::Error;
};

/// Legal input that no kernel covers yet; the message names what to use instead.
class UnsupportedError : public Error {
 public:
  using Error::Error;
};

/// No usable device: no driver, too old a driver, too old a GPU.
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// A call of the CUDA driver failed; the message carries the call, the kernel and the grid.
class DriverError : public Error {
 public:
  using Error::Error;
};

/// Run-time compilation failed; the message carries the compiler's log.
class CompileError : public Error {
 public:
  using Error::Error;
};

/// The folder of the disk cache is unsafe to use.
class CacheError : public Error {
 public:
  using Error::Error;
};

}  // namespace flashcute
