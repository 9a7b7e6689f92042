#include "dlpack.hpp"

#include <algorithm>
#include <bit>
#include <iterator>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <nanobind/ndarray.h>

#include "exceptions.hpp"
#include "gil.hpp"
#include "text.hpp"

namespace flashcute::python {

// DLPack's structures, as far as they are read here. https://dmlc.github.io/dlpack/latest/c_api.html
struct DlpackVersion {
  uint32_t major, minor;
};

struct ExchangeTable {
  DlpackVersion version;
  ExchangeTable const* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* array, nb::dlpack::dltensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

namespace {

struct ManagedTensor {
  nb::dlpack::dltensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct VersionedManagedTensor {
  DlpackVersion version;
  void* context;
  void (*deleter)(VersionedManagedTensor*);
  uint64_t flags;
  nb::dlpack::dltensor tensor;
};

constexpr uint64_t flag_read_only = 1;
constexpr uint32_t supported_major = 1;

enum DeviceCode : int32_t { code_cpu = 1, code_cuda = 2, code_cuda_host = 3, code_cuda_managed = 13 };
enum TypeCode : uint8_t { code_int = 0, code_float = 2, code_bfloat = 4, code_bool = 6 };

nb::object& exporter() {
  static auto* const object = new nb::object;  // never destroyed: the interpreter may be gone by then
  return *object;
}

struct KnownType {
  nb::object reference;  // weak: another type may get the address of one that is gone
  ExchangeTable const* table;
};

struct KnownTypes {
  nb::ft_mutex mutex;  // does something in free-threaded Python only; elsewhere the GIL is held
  std::unordered_map<PyTypeObject*, KnownType> map;
};

KnownTypes& known_types() {
  static auto* const known = new KnownTypes;  // never destroyed: the interpreter may be gone by then
  return *known;
}

ExchangeTable const* find_exchange_table(nb::handle type) {
  nb::object const capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto const* table = static_cast<ExchangeTable const*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table != nullptr && table->version.major > supported_major) table = table->previous;
  bool const usable =
      table != nullptr && table->dltensor_from_py_object_no_sync != nullptr && table->current_work_stream != nullptr;
  return usable ? table : nullptr;
}

/// None or nothing if it is gone.
nb::object referent_of(nb::object const& reference) {
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* referent = nullptr;
  if (PyWeakref_GetRef(reference.ptr(), &referent) < 0) throw nb::python_error();
  return nb::steal(referent);
#else
  return nb::borrow(PyWeakref_GetObject(reference.ptr()));
#endif
}

/// The exchange table of an array's type, or null. Looked up once per type; a new type drops those that are gone.
ExchangeTable const* exchange_table(nb::handle array) {
  PyTypeObject* const type = Py_TYPE(array.ptr());
  nb::handle const object{reinterpret_cast<PyObject*>(type)};
  KnownTypes& known = known_types();
  {
    nb::ft_lock_guard const lock{known.mutex};
    auto const found = known.map.find(type);
    if (found != known.map.end() && referent_of(found->second.reference).is(object)) return found->second.table;
  }
  KnownType entry{nb::steal(PyWeakref_NewRef(object.ptr(), nullptr)), find_exchange_table(object)};
  if (!entry.reference.is_valid()) throw nb::python_error();
  ExchangeTable const* const table = entry.table;
  std::vector<nb::object> later;  // what goes when the lock has, because that may run code of others
  {
    nb::ft_lock_guard const lock{known.mutex};
    for (auto it = known.map.begin(); it != known.map.end();) {
      later.push_back(referent_of(it->second.reference));
      bool const alive = later.back().ptr() == reinterpret_cast<PyObject*>(it->first);
      if (!alive) later.push_back(std::move(it->second.reference));
      it = alive ? std::next(it) : known.map.erase(it);
    }
    known.map.insert_or_assign(type, std::move(entry));
  }
  return table;
}

std::string kind_of(nb::handle object) { return nb::cast<std::string>(nb::str(nb::inst_name(object))); }

/// What a Python exception says, without its traceback.
std::string message_of(nb::python_error const& error) {
  std::string text = nb::cast<std::string>(nb::str(error.value()));
  return nb::cast<std::string>(error.type().attr("__name__")) + ": " + text.substr(0, text.find('\n'));
}

ElementType dtype_of(char const* argument, nb::dlpack::dtype const& t, char const* dtypes) {
  if (t.lanes == 1 && t.code == code_float && t.bits == 16) return ElementType::float16;
  if (t.lanes == 1 && t.code == code_bfloat && t.bits == 16) return ElementType::bfloat16;
  if (t.lanes == 1 && t.code == code_float && t.bits == 32) return ElementType::float32;
  if (t.lanes == 1 && t.code == code_float && t.bits == 64) return ElementType::float64;
  if (t.lanes == 1 && t.code == code_int && t.bits == 32) return ElementType::int32;
  if (t.lanes == 1 && t.code == code_bool && t.bits == 8) return ElementType::boolean;
  static constexpr char const* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  std::string const kind = t.code < std::size(kinds) ? kinds[t.code] : "code " + std::to_string(t.code) + ", bits ";
  throw ArgumentError(argument, std::string("dtype ") + dtypes, kind + std::to_string(t.bits));
}

Device device_of(char const* argument, int32_t type, int32_t index) {
  switch (type) {
    case code_cpu:
    case code_cuda_host: return {DeviceType::cpu, 0};
    case code_cuda:
    case code_cuda_managed: return {DeviceType::cuda, index};
    default:
      throw ArgumentError(argument, "memory of the CPU or of a CUDA device",
                          "DLPack device type " + std::to_string(type));
  }
}

TensorView view_of(char const* argument, nb::dlpack::dltensor const& t, bool read_only,
                   std::optional<ElementType> const& dtype, char const* dtypes) {
  TensorView view;
  view.dtype = dtype ? *dtype : dtype_of(argument, t.dtype, dtypes);
  view.device = device_of(argument, t.device.device_type, t.device.device_id);
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.rank = t.ndim;
  view.read_only = read_only;
  int64_t contiguous = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (i < 4) {
      view.shape[static_cast<size_t>(i)] = t.shape[i];
      view.strides[static_cast<size_t>(i)] = t.strides != nullptr ? t.strides[i] : contiguous;
    }
    contiguous *= t.shape[i];
  }
  return view;
}

/// Of a memoryview, whose format is that of Python's module struct. `dtype`: what the format does not know.
TensorView view_of(char const* argument, Py_buffer const& buffer, std::optional<ElementType> const& dtype,
                   char const* dtypes) {
  std::string_view format = buffer.format;
  bool const big_endian = format.starts_with('>') || format.starts_with('!');
  if (format.starts_with('<') ? std::endian::native != std::endian::little
                              : big_endian && std::endian::native != std::endian::big) {
    throw ArgumentError(argument, "elements in this machine's byte order", "the other ('" + std::string(format) + "')");
  }
  format.remove_prefix(std::min(format.find_first_not_of("@=<>!"), format.size()));
  TensorView view;
  if (dtype) {
    view.dtype = *dtype;
  } else if (format == "e") {
    view.dtype = ElementType::float16;
  } else if (format == "f") {
    view.dtype = ElementType::float32;
  } else if (format == "d") {
    view.dtype = ElementType::float64;
  } else if (format == "i") {
    view.dtype = ElementType::int32;
  } else if (format == "?") {
    view.dtype = ElementType::boolean;
  } else {
    throw ArgumentError(argument, std::string("dtype ") + dtypes,
                        "elements of the buffer format '" + std::string(format) + "'");
  }
  view.data = buffer.buf;
  view.rank = buffer.ndim;
  view.read_only = buffer.readonly != 0;
  for (int i = 0; i < std::min(buffer.ndim, 4); ++i) {
    if (buffer.strides[i] % buffer.itemsize != 0) {
      throw ArgumentError(argument,
                          "strides that are multiples of the element's " + std::to_string(buffer.itemsize) + " bytes",
                          std::to_string(buffer.strides[i]) + " bytes");
    }
    view.shape[static_cast<size_t>(i)] = buffer.shape[i];
    view.strides[static_cast<size_t>(i)] = buffer.strides[i] / buffer.itemsize;
  }
  return view;
}

std::optional<ElementType> named_dtype(nb::handle name) {
  if (name.is_none()) return std::nullopt;
  std::string const text = nb::cast<std::string>(name);
  if (text == "bfloat16") return ElementType::bfloat16;
  throw ArgumentError("dtype", "bfloat16", text);
}

}  // namespace

void set_exporter(nb::object object) { exporter() = std::move(object); }

Tensor::Tensor(char const* argument, nb::handle array, nb::handle stream, char const* dtypes) {
  table_ = exchange_table(array);
  if (table_ != nullptr) {
    nb::dlpack::dltensor tensor{};
    if (table_->dltensor_from_py_object_no_sync(array.ptr(), &tensor) != 0) {
      nb::python_error const error;
      throw ArgumentError(argument, "an array that DLPack can describe", message_of(error));
    }
    view_ = view_of(argument, tensor, false, std::nullopt, dtypes);
    return;
  }
  if (!nb::hasattr(array, "__dlpack__")) {
    throw ArgumentError(argument, "an array that supports DLPack (NumPy, torch, CuPy, JAX, ...)", kind_of(array));
  }
  nb::object exported;
  try {
    exported = waiting_for_gil([&] { return exporter()(array, stream); });
  } catch (nb::python_error const& error) {
    if (is_flashcute_error(error)) throw;
    throw ArgumentError(argument, "an array that DLPack can describe", message_of(error));
  }
  capsule_ = exported[0];
  stream_ = exported[2];
  auto const dtype = named_dtype(exported[1]);
  if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned")) {
    auto const* managed =
        static_cast<VersionedManagedTensor const*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"));
    if (managed->version.major > supported_major) {
      throw ArgumentError(argument, "DLPack version 1 or earlier", "version " + std::to_string(managed->version.major));
    }
    view_ = view_of(argument, managed->tensor, (managed->flags & flag_read_only) != 0, dtype, dtypes);
  } else if (PyCapsule_IsValid(capsule_.ptr(), "dltensor")) {
    auto const* managed = static_cast<ManagedTensor const*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    view_ = view_of(argument, managed->tensor, false, dtype, dtypes);
  } else if (PyMemoryView_Check(capsule_.ptr())) {
    view_ = view_of(argument, *PyMemoryView_GET_BUFFER(capsule_.ptr()), dtype, dtypes);
  } else {
    throw ArgumentError(argument, "a DLPack capsule from __dlpack__", kind_of(capsule_));
  }
}

void* Tensor::current_stream() const {
  if (view_.device.type == DeviceType::cpu) return nullptr;
  if (table_ != nullptr) {
    void* stream = nullptr;
    if (table_->current_work_stream(code_cuda, view_.device.index, &stream) != 0) throw nb::python_error();
    return stream;
  }
  return stream_.is_none() ? nullptr : reinterpret_cast<void*>(nb::cast<std::uintptr_t>(stream_));
}

void Tensor::require_stream(char const* argument, void* stream) const {
  if (view_.device.type == DeviceType::cpu || table_ == nullptr) return;  // __dlpack__ was told the stream
  if (current_stream() == stream) return;
  throw ArgumentError(argument, "an array whose library works on q's stream",
                      "one whose library currently works on another",
                      "Make the streams one, or pass stream= and order the work yourself");
}

}  // namespace flashcute::python
