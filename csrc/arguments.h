// What the whole calls from Python (calls.h) share: unpacking of arguments, and the checks whether kernels may serve a
// call directly, without PyTorch's dispatcher.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

namespace fastnorm {

// Which backend serves which device, as fastnorm.backend says at each call; `native_named`: the user asked for native.
enum Served : int64_t { native_on_cpu = 1, triton_on_cpu = 2, triton_on_gpu = 4, native_named = 8 };

// Whether Triton serves the tensor (true) or a native kernel (false); none where neither does and Python must decide.
std::optional<bool> on_triton(int64_t served, const at::Tensor& x);

// Whether a tensor is an ordinary one on the CPU or a GPU, whose memory holds its elements: no wrapper subclass, no
// wrapper of a transform, no lazy conjugate or negative.
bool is_plain(const at::Tensor& tensor);

// Whether a call concerns kernels and autograd alone: no mode, functional transform or trace intercepts it.
bool is_not_intercepted();

// In a backward: whether kernels can take these gradients and saved tensors, which hooks may have replaced, nothing
// intercepts the call, and its results need no gradients themselves.
bool kernels_can_take(c10::ArrayRef<at::Tensor> tensors);

bool any_requires_grad(c10::ArrayRef<at::Tensor> tensors);

// Whether autocast makes the result of this aten operator float32. fastnorm.ops.arguments has the same rule in Python.
bool autocasts(const char* aten_operator, const at::Tensor& x);

// Whether kernels support the dtype: one of the four.
bool is_supported(at::ScalarType type);

// Each reads an argument into `out` and returns true, or false for an argument that is wrong or left to Python.
bool unpack(PyObject* object, at::Tensor& out);  // a plain tensor of a known dtype
bool unpack_optional(PyObject* object, at::IntArrayRef sizes, at::Device device, at::Tensor& out);  // or None
bool unpack_bool(PyObject* object, bool& out);
bool unpack_dtype(PyObject* object, std::optional<at::ScalarType>& out);  // a known one, or None
bool unpack_float(PyObject* object, double& out);
// A float, or None where there is a default: the machine epsilon of what kernels compute in for inputs of this dtype.
bool unpack_eps(PyObject* object, bool has_default, at::ScalarType type, double& out);

// The dtype of the gradient of the node's input number `index`; none if the input is undefined or needs no gradient.
std::optional<at::ScalarType> gradient_dtype(const torch::autograd::AutogradContext* ctx, size_t index,
                                             const at::Tensor& input);

// None for an undefined tensor.
std::optional<at::Tensor> as_optional(const at::Tensor& tensor);

inline PyCFunction as_method(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// A list in Python, with None for undefined tensors. Needs the GIL.
pybind11::list list_of(c10::ArrayRef<at::Tensor> tensors);

// None without a dtype.
pybind11::object or_none(const std::optional<at::ScalarType>& type);

// The gradients that a function of fastnorm.reference returns, function(inputs, dy, *options): made of PyTorch's
// operations, so that they can be differentiated again. Undefined where it returns None. Needs the GIL.
template <typename... Options>
torch::autograd::variable_list reference_gradients(const char* function, c10::ArrayRef<at::Tensor> inputs,
                                                   Options&&... dy_and_options) {
  namespace py = pybind11;
  const auto found = py::module_::import("fastnorm.reference").attr(function)(list_of(inputs), dy_and_options...);
  torch::autograd::variable_list gradients;
  for (const auto& gradient : found) {
    gradients.push_back(gradient.is_none() ? at::Tensor() : py::cast<at::Tensor>(gradient));
  }
  return gradients;
}

}  // namespace fastnorm
