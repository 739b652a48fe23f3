#include "plans.h"

#include <c10/core/DeviceGuard.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/MemoryFormat.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "arguments.h"
#include "launch_plan.h"

namespace fastnorm::plans {
namespace {

namespace py = pybind11;
using at::Tensor;

// Everything that the launches of a call depend on, as bytes: of a tensor its dtype, device, sizes, strides, its
// address modulo 16, and whether its storage is below 2 GiB. A superset of what Triton specialises kernels on and of
// what launchers look at.
class Key {
 public:
  explicit Key(std::string_view name) {
    words_.reserve(512);
    words_ = name;
  }

  void add(int64_t value) { words_.append(reinterpret_cast<const char*>(&value), sizeof(value)); }

  void add(char kind, int64_t value) {
    words_.push_back(kind);
    add(value);
  }

  void add(const Tensor& tensor) {
    add('T', static_cast<int64_t>(tensor.scalar_type()) | tensor.dim() << 8 | tensor.device().index() << 16);
    for (const int64_t size : tensor.sizes()) {
      add(size);
    }
    for (const int64_t stride : tensor.strides()) {
      add(stride);
    }
    TORCH_CHECK(tensor.unsafeGetTensorImpl()->storage_initialized(),
                "fastnorm: the memory of a tensor is gone: its storage was resized to 0");
    // on AMD, Triton specialises kernels on storages below 2 GiB
    add(static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16) |
        (tensor.storage().nbytes() < (size_t{1} << 31) ? 16 : 0));
  }

  const std::string& words() const { return words_; }

 private:
  std::string words_;
};

struct Call {
  explicit Call(const char* operator_name) : name(operator_name), key(operator_name) {
    tensors.reserve(16);  // a row norm's inputs, results and temporaries: growing takes longer than adding one
  }

  void add(const Argument& argument) {
    std::visit([this](const auto& value) { add_value(value); }, argument);
  }

  const char* name;
  Key key;
  std::vector<Tensor> tensors;

 private:
  void add_value(const Tensor& tensor) {
    if (!tensor.defined()) {
      return key.add('N', 0);
    }
    tensors.push_back(tensor);
    key.add(tensor);
  }
  void add_value(bool value) { key.add('B', value); }
  void add_value(int64_t value) { key.add('I', value); }
  void add_value(double value) { key.add('F', std::bit_cast<int64_t>(value)); }
  void add_value(std::optional<at::ScalarType> value) {
    key.add(value ? 'D' : 'N', value ? static_cast<int64_t>(*value) : 0);
  }
  void add_value(at::MemoryFormat value) { key.add('M', static_cast<int64_t>(value)); }
  template <typename T>
  void add_value(const std::vector<T>& values) {
    key.add('L', static_cast<int64_t>(values.size()));
    for (const T& value : values) {
      add_value(value);
    }
  }
};

// A launcher's results, and whether it returns them as a list: the results of a `Tensor[]`.
struct Results {
  std::vector<Tensor> tensors;
  bool is_list = false;
};

// What is known of a key: how often it was seen, and its plan, once it is recorded. A null plan that is recorded means
// that only Python can make these calls.
struct Known {
  py::object driver;  // kept alive: its address is in the key
  int64_t calls = 0;
  bool is_recorded = false;
  std::shared_ptr<const Plan> plan;
};

// Guarded by the GIL. Never destroyed, as Python may be gone by then.
constexpr size_t max_keys = 4096;
auto& known_keys() {
  static auto* const all = new std::unordered_map<std::string, Known>;
  return *all;
}

// A function of fastnorm.triton_kernels.plans, looked up once.
py::object& python(const char* name) {
  static auto* const found = new std::unordered_map<std::string_view, py::object>;
  py::object& function = (*found)[name];
  if (!function) {
    function = py::module_::import("fastnorm.triton_kernels.plans").attr(name);
  }
  return function;
}

// Calls the launcher in Python, which returns a tensor, a tuple of tensors and None, or a list of tensors.
Results call_python(const char* name, const py::tuple& arguments) {
  const py::object found = python("launcher_of")(name)(*arguments);
  Results results{{}, py::isinstance<py::list>(found)};
  if (results.is_list || py::isinstance<py::tuple>(found)) {
    for (const auto& result : found) {
      results.tensors.push_back(result.is_none() ? Tensor() : py::cast<Tensor>(result));
    }
  } else {
    results.tensors.push_back(py::cast<Tensor>(found));
  }
  return results;
}

// Runs the plan of a call, or the launcher in Python. `arguments` makes the Python objects, where they are needed.
template <typename Arguments>
Results call(Call& call, const Arguments& arguments) {
  const at::Device device = call.tensors.at(0).device();
  const at::OptionalDeviceGuard guard(device.is_cpu() ? std::nullopt : std::optional(device));
  static PyObject* const device_types[] = {PyUnicode_InternFromString("cpu"), PyUnicode_InternFromString("cuda")};
  const auto state = py::reinterpret_steal<py::object>(
      PyObject_CallOneArg(python("state").ptr(), device_types[device.is_cpu() ? 0 : 1]));
  if (!state) {
    throw py::error_already_set();
  }
  if (state.is_none()) {
    return call_python(call.name, arguments());
  }
  PyObject* const parts = state.ptr();  // driver, device, stream, launcher, calls before the plan is made
  const auto driver = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(parts, 0));
  call.key.add(static_cast<int64_t>(reinterpret_cast<uintptr_t>(driver.ptr())));
  call.key.add(static_cast<int64_t>(PyObject_Hash(PyTuple_GET_ITEM(parts, 1))));
  auto& all = known_keys();
  if (all.size() >= max_keys && !all.contains(call.key.words())) {
    all.clear();
  }
  std::shared_ptr<const Plan> plan;
  Known& known = all[call.key.words()];
  known.driver = driver;
  if (known.is_recorded) {
    plan = known.plan;
  } else if (known.calls++ >= PyLong_AsLongLong(PyTuple_GET_ITEM(parts, 4))) {
    const py::object described = python("record")(call.name, arguments());
    plan = described.is_none() ? nullptr : plan_from(described);
    all[call.key.words()] = {driver, 0, true, plan};  // again by the key: another thread may have cleared the table
  }
  if (plan != nullptr) {
    try {
      return {
          run(*plan, std::move(call.tensors), PyTuple_GET_ITEM(parts, 3), PyLong_AsVoidPtr(PyTuple_GET_ITEM(parts, 2))),
          plan->returns_list};
    } catch (const NoContext&) {
      // the launcher in Python creates a context
    }
  }
  return call_python(call.name, arguments());
}

py::object object_of(const Argument& argument) {
  return std::visit(
      [](const auto& value) -> py::object {
        using T = std::decay_t<decltype(value)>;
        if constexpr (std::is_same_v<T, Tensor>) {
          return value.defined() ? py::cast(value) : py::none();
        } else if constexpr (std::is_same_v<T, std::optional<at::ScalarType>>) {
          return value ? py::cast(*value) : py::none();
        } else if constexpr (std::is_same_v<T, std::vector<Tensor>>) {
          py::list objects;
          for (const Tensor& tensor : value) {
            objects.append(object_of(tensor));
          }
          return objects;
        } else {
          return py::cast(value);
        }
      },
      argument);
}

std::optional<Argument> argument_from(PyObject* object);

// A list of T, or none where an element is something else.
template <typename T>
std::optional<Argument> list_from(PyObject* list) {
  std::vector<T> values;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    const auto argument = argument_from(PyList_GET_ITEM(list, i));
    if (!argument || !std::holds_alternative<T>(*argument)) {
      return std::nullopt;
    }
    values.push_back(std::get<T>(*argument));
  }
  return values;
}

// None for an object that a key can't hold.
std::optional<Argument> argument_from(PyObject* object) {
  if (object == Py_None) {
    return Tensor();
  }
  if (THPVariable_Check(object)) {
    const Tensor& tensor = THPVariable_Unpack(object);
    const bool has_memory = tensor.is_cpu() || tensor.is_cuda();  // meta tensors have none
    return has_memory ? std::optional<Argument>(tensor) : std::nullopt;
  }
  if (PyBool_Check(object)) {
    return object == Py_True;
  }
  if (PyLong_CheckExact(object)) {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();  // beyond 64 bits
      return std::nullopt;
    }
    return value;
  }
  if (PyFloat_CheckExact(object)) {
    return PyFloat_AS_DOUBLE(object);
  }
  if (THPDtype_Check(object)) {
    return std::optional(reinterpret_cast<THPDtype*>(object)->scalar_type);
  }
  if (THPMemoryFormat_Check(object)) {
    return reinterpret_cast<THPMemoryFormat*>(object)->memory_format;
  }
  if (PyList_CheckExact(object)) {
    const bool of_bools = PyList_GET_SIZE(object) > 0 && PyBool_Check(PyList_GET_ITEM(object, 0));
    return of_bools ? list_from<bool>(object) : list_from<Tensor>(object);
  }
  return std::nullopt;
}

PyObject* call_operator(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count > 0 && PyUnicode_Check(arguments[0]), "call_operator(name, *arguments)");
  Call wanted(PyUnicode_AsUTF8(arguments[0]));
  py::tuple objects(count - 1);
  bool is_known = true;
  for (Py_ssize_t i = 1; i < count; ++i) {
    objects[i - 1] = py::reinterpret_borrow<py::object>(arguments[i]);
    const auto argument = argument_from(arguments[i]);
    is_known = is_known && argument;
    if (is_known) {
      wanted.add(*argument);
    }
  }
  const auto results =
      is_known && !wanted.tensors.empty() ? call(wanted, [&] { return objects; }) : call_python(wanted.name, objects);
  const auto& tensors = results.tensors;
  if (tensors.size() == 1 && !results.is_list) {
    return THPVariable_Wrap(tensors[0]);
  }
  py::list wrapped(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    wrapped[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensors[i]));  // None, if it is undefined
  }
  return results.is_list ? wrapped.release().ptr() : PyList_AsTuple(wrapped.ptr());
  END_HANDLE_TH_ERRORS
}

PyObject* clear_plans(PyObject*, PyObject*) {
  known_keys().clear();
  Py_RETURN_NONE;
}

PyObject* plan_count(PyObject*, PyObject*) {
  const auto& all = known_keys();
  return PyLong_FromSsize_t(std::count_if(all.begin(), all.end(), [](const auto& key) { return key.second.plan; }));
}

}  // namespace

std::vector<Tensor> call(const char* name, c10::ArrayRef<Argument> arguments) {
  const py::gil_scoped_acquire gil;
  Call wanted(name);
  for (const Argument& argument : arguments) {
    wanted.add(argument);
  }
  const auto objects_of_all = [&] {
    py::tuple objects(arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) {
      objects[i] = object_of(arguments[i]);
    }
    return objects;
  };
  return call(wanted, objects_of_all).tensors;
}

int add_functions(PyObject* module) {
  static PyMethodDef methods[] = {
      {"call_operator", as_method(&call_operator), METH_FASTCALL,
       "call_operator(name, *arguments): an operator of fastnorm.triton_kernels, by its launch plan"},
      {"clear_plans", clear_plans, METH_NOARGS, "clear_plans(): forgets all launch plans"},
      {"plan_count", plan_count, METH_NOARGS, "plan_count(): how many launch plans there are"},
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(module, methods) != 0) {
    return -1;
  }
  return PyModule_AddObject(module, "LAUNCH_NOTHING", PyLong_FromVoidPtr(launch_nothing()));
}

}  // namespace fastnorm::plans
