#include "dlpack.hpp"

#include <optional>
#include <unordered_map>

#include <nanobind/ndarray.h>

#include "exceptions.hpp"

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
enum TypeCode : uint8_t { code_int = 0, code_float = 2, code_bfloat = 4 };

nb::object& exporter() {
  static auto* const object = new nb::object;  // never destroyed: the interpreter may be gone by then
  return *object;
}

/// The exchange table of an array's type, or null. Looked up once per type.
ExchangeTable const* exchange_table(nb::handle array) {
  static auto* const known = new std::unordered_map<PyTypeObject*, ExchangeTable const*>;
  PyTypeObject* const type = Py_TYPE(array.ptr());
  if (auto const found = known->find(type); found != known->end()) return found->second;
  ExchangeTable const* table = nullptr;
  nb::object const capsule =
      nb::getattr(nb::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__", nb::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    table = static_cast<ExchangeTable const*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (table != nullptr && table->version.major > supported_major) table = table->previous;
    bool const usable =
        table != nullptr && table->dltensor_from_py_object_no_sync != nullptr && table->current_work_stream != nullptr;
    if (!usable) table = nullptr;
  }
  Py_INCREF(type);  // the map remembers its address
  known->emplace(type, table);
  return table;
}

std::string kind_of(nb::handle object) { return nb::cast<std::string>(nb::str(nb::inst_name(object))); }

/// What a Python exception says, without its traceback.
std::string message_of(nb::python_error const& error) {
  std::string text = nb::cast<std::string>(nb::str(error.value()));
  return nb::cast<std::string>(error.type().attr("__name__")) + ": " + text.substr(0, text.find('\n'));
}

DType dtype_of(char const* argument, nb::dlpack::dtype const& t) {
  if (t.lanes == 1 && t.code == code_float && t.bits == 16) return DType::float16;
  if (t.lanes == 1 && t.code == code_bfloat && t.bits == 16) return DType::bfloat16;
  if (t.lanes == 1 && t.code == code_float && t.bits == 32) return DType::float32;
  if (t.lanes == 1 && t.code == code_float && t.bits == 64) return DType::float64;
  if (t.lanes == 1 && t.code == code_int && t.bits == 32) return DType::int32;
  static constexpr char const* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  std::string const kind = t.code < std::size(kinds) ? kinds[t.code] : "code " + std::to_string(t.code) + ", bits ";
  throw ArgumentError(argument, "dtype float16, bfloat16, float32 or float64", kind + std::to_string(t.bits));
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
                   std::optional<DType> const& dtype) {
  TensorView view;
  view.dtype = dtype ? *dtype : dtype_of(argument, t.dtype);
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

std::optional<DType> named_dtype(nb::handle name) {
  if (name.is_none()) return std::nullopt;
  std::string const text = nb::cast<std::string>(name);
  if (text == "bfloat16") return DType::bfloat16;
  throw ArgumentError("dtype", "bfloat16", text);
}

}  // namespace

void set_exporter(nb::object object) { exporter() = std::move(object); }

Tensor::Tensor(char const* argument, nb::handle array, nb::handle stream) {
  table_ = exchange_table(array);
  if (table_ != nullptr) {
    nb::dlpack::dltensor tensor{};
    if (table_->dltensor_from_py_object_no_sync(array.ptr(), &tensor) != 0) {
      nb::python_error const error;
      throw ArgumentError(argument, "an array that DLPack can describe", message_of(error));
    }
    view_ = view_of(argument, tensor, false, std::nullopt);
    return;
  }
  if (!nb::hasattr(array, "__dlpack__")) {
    throw ArgumentError(argument, "an array that supports DLPack (NumPy, torch, CuPy, JAX, ...)", kind_of(array));
  }
  nb::object exported;
  try {
    exported = exporter()(array, stream);
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
    view_ = view_of(argument, managed->tensor, (managed->flags & flag_read_only) != 0, dtype);
  } else if (PyCapsule_IsValid(capsule_.ptr(), "dltensor")) {
    auto const* managed = static_cast<ManagedTensor const*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    view_ = view_of(argument, managed->tensor, false, dtype);
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
