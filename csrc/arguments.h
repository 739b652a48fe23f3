// What the calls from Python share: arguments unpacked, and who may look on.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <initializer_list>
#include <optional>

namespace fastnorm {

// Who serves which device, as fastnorm.backend says at each call; and whether native kernels are what the user named.
enum Served : int64_t { native_on_cpu = 1, triton_on_cpu = 2, triton_on_gpu = 4, native_named = 8 };

// Whether Triton serves the tensor, or else a native kernel; none where Python must look.
std::optional<bool> on_triton(int64_t served, const at::Tensor& x);

// Whether a tensor's memory holds its elements, on the CPU or on a GPU: it is no wrapper, and nothing is still to be
// done to it.
bool is_plain(const at::Tensor& tensor);

// Whether only kernels and autograd have a say in a call: no mode, transform, trace or wrapper looks on.
bool nobody_looks_on();

// In a backward: whether kernels can take these gradients and saved tensors, which hooks may have changed, and nobody
// looks on or wants to differentiate what becomes of them.
bool kernels_take(std::initializer_list<at::Tensor> tensors);

bool any_requires_grad(std::initializer_list<at::Tensor> tensors);

// Whether stock autocast has a float32 result for the operator's input, as fastnorm.ops.arguments says it.
bool autocasts(const char* aten_operator, const at::Tensor& x);

// Whether kernels know the dtype.
bool takes(at::ScalarType type);

// Each reads an argument into `out`; false for one that is wrong, or that Python must look at.
bool unpack(PyObject* object, at::Tensor& out);  // a plain tensor of a known dtype
bool unpack_optional(PyObject* object, at::IntArrayRef sizes, at::Device device, at::Tensor& out);  // or None
bool unpack_bool(PyObject* object, bool& out);
bool unpack_dtype(PyObject* object, std::optional<at::ScalarType>& out);  // a known one, or None
bool unpack_float(PyObject* object, double& out);

// The dtype of a gradient, if it is wanted: that of the node's input number `index`, which may be undefined.
std::optional<at::ScalarType> wanted(const torch::autograd::AutogradContext* ctx, size_t index,
                                     const at::Tensor& input);

std::optional<at::Tensor> given(const at::Tensor& tensor);

inline PyCFunction as_method(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// The gradients that a function of fastnorm.reference finds, function(inputs, dy, *options), as differentiable
// functions of the inputs; undefined where it returns None. Under the GIL.
template <typename... Options>
torch::autograd::variable_list by_formula(const char* function, std::initializer_list<at::Tensor> inputs,
                                          const at::Tensor& dy, Options&&... options) {
  namespace py = pybind11;
  py::list objects;
  for (const at::Tensor& input : inputs) {
    objects.append(input.defined() ? py::cast(input) : py::none());
  }
  const auto found = py::module_::import("fastnorm.reference").attr(function)(objects, dy, options...);
  torch::autograd::variable_list gradients;
  for (const auto& gradient : found) {
    gradients.push_back(gradient.is_none() ? at::Tensor() : py::cast<at::Tensor>(gradient));
  }
  return gradients;
}

}  // namespace fastnorm
