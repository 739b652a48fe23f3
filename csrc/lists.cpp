// Loops over lists of tensors: in Python they would take longer than the clipping kernels.
#include "lists.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "arguments.h"

namespace fastnorm {
namespace {

using at::Tensor;

bool is_readable(const Tensor& tensor, const Tensor& first) {
  return tensor.layout() == at::kStrided && !tensor.is_nested() && !tensor.is_neg() && !tensor._is_zerotensor() &&
         tensor.device() == first.device() && is_supported(tensor.scalar_type()) &&
         tensor.is_non_overlapping_and_dense();
}

// Calls visit(i, object) for each object of a sequence until it returns false.
template <typename Visit>
void each_object(PyObject* sequence, const Visit& visit) {
  const THPObjectPtr fast(PySequence_Fast(sequence, "expected a sequence of tensors"));
  if (!fast) {
    throw python_error();
  }
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.get()); ++i) {
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

PyObject* all_readable(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  bool found = true;
  Tensor first;
  each_object(tensors, [&](Py_ssize_t i, PyObject* item) {
    if (!THPVariable_CheckExact(item)) {
      return found = false;
    }
    const Tensor& tensor = THPVariable_Unpack(item);
    if (i == 0) {  // not each time: copies of handles count their owners
      first = tensor;
    }
    return found = is_readable(tensor, first);
  });
  return PyBool_FromLong(found);
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

// The number of dimensions and the sizes of each tensor, as bytes: `known` itself, which is a key or None, if it has
// them. None where sizes() of one would raise or call Python.
PyObject* shape_key(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "shape_key(tensors, known)");
  PyObject* const known = arguments[1];
  const bool has_known = PyBytes_Check(known);
  const auto* const known_key = has_known ? reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(known)) : nullptr;
  const size_t known_size = has_known ? PyBytes_GET_SIZE(known) / sizeof(int64_t) : 0;
  size_t same = 0;  // numbers of the key that are those of `known`; `key` stays empty as long as all are
  std::vector<int64_t> key;
  bool has_sizes = true;
  each(arguments[0], [&](Py_ssize_t, const Tensor& tensor) {
    const auto* const impl = tensor.unsafeGetTensorImpl();
    has_sizes = !tensor.is_nested() && !impl->is_python_dispatch() && !impl->has_symbolic_sizes_strides();
    if (!has_sizes) {
      return false;
    }
    const auto sizes = tensor.sizes();
    const auto dims = static_cast<int64_t>(sizes.size());
    if (key.empty() && same + 1 + sizes.size() <= known_size && known_key[same] == dims &&
        std::equal(sizes.begin(), sizes.end(), known_key + same + 1)) {
      same += 1 + sizes.size();
      return true;
    }
    if (key.empty()) {
      key.assign(known_key, known_key + same);
    }
    key.push_back(dims);
    key.insert(key.end(), sizes.begin(), sizes.end());
    return true;
  });
  if (!has_sizes) {
    Py_RETURN_NONE;
  }
  if (key.empty()) {
    if (has_known && same == known_size) {
      return Py_NewRef(known);
    }
    key.assign(known_key, known_key + same);
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(key.data()),
                                   static_cast<Py_ssize_t>(key.size() * sizeof(int64_t)));
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
      {"all_readable", all_readable, METH_O,
       "all_readable(tensors): whether all are plain tensors that kernels can read as they lie, on one device"},
      {"are_plain", are_plain, METH_O, "are_plain(tensors): whether all are plain tensors or parameters"},
      {"gradients", gradients, METH_O, "gradients(parameters): their gradients, of those that have one"},
      {"shape_key", as_method(&shape_key), METH_FASTCALL,
       "shape_key(tensors, known): their shapes as bytes, `known` itself if it has them; None where only Python can "
       "tell"},
      {"list_key", list_key, METH_O, "list_key(tensors): addresses, sizes and dtypes as bytes"},
      {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, methods);
}

}  // namespace fastnorm
