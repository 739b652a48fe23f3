// Loops over lists of tensors: in Python they would take longer than the clipping kernels.
#include "lists.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/python_numbers.h>

#include <cstring>
#include <optional>

#include "arguments.h"

namespace fastnorm {
namespace {

using at::Tensor;

// What follows from the dispatch keys alone.
bool has_readable_keys(const Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_nested() && !tensor.is_neg() && !tensor._is_zerotensor();
}

// Fetches the memory of the tensors some places ahead: the objects of thousands don't stay in the L2 cache, and a
// processor looks ahead over few of them by itself.
void prefetch(PyObject** items, Py_ssize_t count, Py_ssize_t i) {
  constexpr Py_ssize_t objects_ahead = 16, tensors_ahead = 8;
  constexpr size_t line = 64;
  if (i + objects_ahead < count) {
    __builtin_prefetch(items[i + objects_ahead]);
    PyObject* const near = items[i + tensors_ahead];
    if (THPVariable_CheckExact(near)) {
      const auto* const impl = reinterpret_cast<const char*>(THPVariable_Unpack(near).unsafeGetTensorImpl());
      for (size_t offset = 0; offset < sizeof(at::TensorImpl); offset += line) {
        __builtin_prefetch(impl + offset);
      }
    }
  }
}

// Calls visit(i, object) for each object of a sequence until it returns false.
template <typename Visit>
void each_object(PyObject* sequence, const Visit& visit) {
  const THPObjectPtr fast(PySequence_Fast(sequence, "expected a sequence of tensors"));
  if (!fast) {
    throw python_error();
  }
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.get()); ++i) {
    prefetch(PySequence_Fast_ITEMS(fast.get()), PySequence_Fast_GET_SIZE(fast.get()), i);
    if (!visit(i, PySequence_Fast_GET_ITEM(fast.get(), i))) {
      return;
    }
  }
}

// Calls visit(i, tensor) for each tensor until it returns false. Raises TypeError for anything else.
template <typename Visit>
void each(PyObject* sequence, const Visit& visit) {
  each_object(sequence, [&](Py_ssize_t i, PyObject* item) {
    TORCH_CHECK_TYPE(THPVariable_Check(item), "expected tensors, but got ", Py_TYPE(item)->tp_name);
    return visit(i, THPVariable_Unpack(item));
  });
}

PyObject* are_plain(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  bool found = true;
  each_object(tensors, [&](Py_ssize_t, PyObject* item) { return found = THPVariable_CheckExact(item); });
  return PyBool_FromLong(found);
  END_HANDLE_TH_ERRORS
}

// A hash of the shapes of a list, in order. The shapes themselves, eight bytes a size, would have to be fetched at
// every call: thousands of tensors leave nothing in the L2 cache.
class ShapeHash {
 public:
  void add(at::IntArrayRef sizes) {
    uint64_t shape = sizes.size(), factor = 1;
    for (const int64_t size : sizes) {
      factor *= 0x9e3779b97f4a7c15;  // odd, so that no factor is even and loses bits; another for each dimension
      shape += (static_cast<uint64_t>(size) + 1) * factor;
    }
    // the shift keeps lists apart that differ in their order alone: without it the sum would be linear
    value_ = (value_ ^ value_ >> 29) * 0xd1342543de82ef95 + shape;
  }

  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 1;
};

// Whether sizes() neither raises nor calls Python.
bool has_sizes(const Tensor& tensor) {
  const auto* const impl = tensor.unsafeGetTensorImpl();
  return !tensor.is_nested() && !impl->is_python_dispatch() && !impl->has_symbolic_sizes_strides();
}

// Whether kernels can read all tensors, on one device; visits each while that holds.
template <typename Visit>
bool all_readable_and(PyObject* tensors, const Visit& visit) {
  bool found = true;
  std::optional<at::Device> device;
  c10::DispatchKeySet keys;  // of the tensor before, as its dtype: most have the same
  caffe2::TypeMeta dtype;
  each_object(tensors, [&](Py_ssize_t, PyObject* item) {
    if (!THPVariable_CheckExact(item)) {
      return found = false;
    }
    const Tensor& tensor = THPVariable_Unpack(item);
    const at::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    if (impl.key_set() != keys || impl.dtype() != dtype) {
      found = has_readable_keys(tensor) && !impl.is_python_dispatch() && is_supported(tensor.scalar_type());
      keys = impl.key_set();
      dtype = impl.dtype();
    }
    device = device.value_or(impl.device());
    found =
        found && impl.device() == *device && !impl.has_symbolic_sizes_strides() && impl.is_non_overlapping_and_dense();
    if (found) {
      visit(tensor);
    }
    return found;
  });
  return found;
}

// The shapes are compared in the same walk: one of their own takes as long.
PyObject* all_readable(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && (arguments[1] == Py_None || PyLong_Check(arguments[1])),
                   "all_readable(tensors, shapes)");
  if (arguments[1] == Py_None) {
    return PyBool_FromLong(all_readable_and(arguments[0], [](const Tensor&) {}));
  }
  const uint64_t expected = THPUtils_unpackUInt64(arguments[1]);
  ShapeHash shapes;
  const bool found = all_readable_and(arguments[0], [&](const Tensor& tensor) { shapes.add(tensor.sizes()); });
  return PyBool_FromLong(found && shapes.value() == expected);
  END_HANDLE_TH_ERRORS
}

PyObject* gradients(PyObject*, PyObject* parameters) {
  HANDLE_TH_ERRORS
  THPObjectPtr found(PyList_New(0));
  each_object(parameters, [&](Py_ssize_t, PyObject* item) {
    const bool is_plain = THPVariable_CheckExact(item);
    THPObjectPtr grad(is_plain ? THPVariable_Wrap(THPVariable_Unpack(item).grad())
                               : PyObject_GetAttrString(item, "grad"));
    if (!grad || (grad.get() != Py_None && PyList_Append(found.get(), grad.get()) != 0)) {
      throw python_error();
    }
    return true;
  });
  return found.release();
  END_HANDLE_TH_ERRORS
}

PyObject* shape_key(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  ShapeHash shapes;
  bool found = true;
  each(tensors, [&](Py_ssize_t, const Tensor& tensor) {
    found = has_sizes(tensor);
    if (found) {
      shapes.add(tensor.sizes());
    }
    return found;
  });
  if (!found) {
    Py_RETURN_NONE;
  }
  return THPUtils_packUInt64(shapes.value());
  END_HANDLE_TH_ERRORS
}

PyObject* list_key(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  const Py_ssize_t count = PyObject_Size(tensors);
  if (count < 0) {
    throw python_error();
  }
  struct Entry {
    const void* address;
    int64_t size, type;
  };
  THPObjectPtr key(PyBytes_FromStringAndSize(nullptr, count * static_cast<Py_ssize_t>(sizeof(Entry))));
  char* const bytes = PyBytes_AS_STRING(key.get());
  each(tensors, [&](Py_ssize_t i, const Tensor& tensor) {
    const Entry entry{tensor.data_ptr(), tensor.numel(), static_cast<int64_t>(tensor.scalar_type())};
    std::memcpy(bytes + i * sizeof(Entry), &entry, sizeof(Entry));
    return true;
  });
  return key.release();
  END_HANDLE_TH_ERRORS
}

}  // namespace

int add_list_functions(PyObject* module) {
  static PyMethodDef methods[] = {
      {"all_readable", as_method(&all_readable), METH_FASTCALL,
       "all_readable(tensors, shapes): whether all are plain tensors that kernels can read as they lie, on one device; "
       "and, unless it is None, whether `shapes` is their shape_key"},
      {"are_plain", are_plain, METH_O, "are_plain(tensors): whether all are plain tensors or parameters"},
      {"gradients", gradients, METH_O, "gradients(parameters): their gradients, of those that have one"},
      {"shape_key", shape_key, METH_O,
       "shape_key(tensors): a hash of their shapes, of 64 bits; None where only Python can tell"},
      {"list_key", list_key, METH_O, "list_key(tensors): addresses, sizes and dtypes as bytes"},
      {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, methods);
}

}  // namespace fastnorm
