#include "arguments.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <limits>

namespace fastnorm {
namespace {

using at::Tensor;
using c10::DispatchKey;
using torch::autograd::ForwardADLevel;

bool is_differentiated_forward() { return ForwardADLevel::try_get_by_idx(0) != nullptr; }

bool is_dispatched_plainly() {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  return (tls.included_.raw_repr() & ~c10::default_included_set.raw_repr()) == 0;
}

bool has_rule(const char* aten_operator, DispatchKey key) {
  const auto found = c10::Dispatcher::singleton().findSchema({aten_operator, ""});
  return found && found->hasKernelForDispatchKey(key);
}

}  // namespace

std::optional<bool> on_triton(int64_t served, const Tensor& x) {
  if (served & (x.is_cpu() ? triton_on_cpu : triton_on_gpu)) {
    return true;
  }
  return x.is_cpu() && (served & native_on_cpu) ? std::optional(false) : std::nullopt;
}

bool is_plain(const Tensor& tensor) {
  static constexpr c10::DispatchKeySet on_cpu(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU, DispatchKey::ADInplaceOrView});
  static constexpr c10::DispatchKeySet on_gpu(
      {DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA, DispatchKey::ADInplaceOrView});
  const auto plain = tensor.is_cpu() ? on_cpu : on_gpu;
  return (tensor.key_set().raw_repr() & ~plain.raw_repr()) == 0;
}

bool is_not_intercepted() {
  return is_dispatched_plainly() && !at::impl::torch_function_mode_enabled() && !is_differentiated_forward();
}

bool kernels_can_take(c10::ArrayRef<Tensor> tensors) {
  return !at::GradMode::is_enabled() && !is_differentiated_forward() && is_dispatched_plainly() &&
         std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return !t.defined() || is_plain(t); });
}

bool any_requires_grad(c10::ArrayRef<Tensor> tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}

bool autocasts(const char* aten_operator, const Tensor& x) {
  return at::autocast::is_autocast_enabled(x.device().type()) && x.scalar_type() != at::kDouble &&
         has_rule(aten_operator, x.is_cpu() ? DispatchKey::AutocastCPU : DispatchKey::AutocastCUDA);
}

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

bool unpack(PyObject* object, Tensor& out) {
  if (!THPVariable_CheckExact(object)) {
    return false;
  }
  out = THPVariable_Unpack(object);
  return (out.is_cpu() || out.is_cuda()) && is_plain(out) && is_supported(out.scalar_type());
}

bool unpack_optional(PyObject* object, at::IntArrayRef sizes, at::Device device, Tensor& out) {
  return object == Py_None || (unpack(object, out) && out.sizes() == sizes && out.device() == device);
}

bool unpack_bool(PyObject* object, bool& out) {
  out = object == Py_True;
  return PyBool_Check(object);
}

bool unpack_dtype(PyObject* object, std::optional<at::ScalarType>& out) {
  if (object == Py_None) {
    return true;
  }
  if (!THPDtype_Check(object)) {
    return false;
  }
  out = reinterpret_cast<THPDtype*>(object)->scalar_type;
  return is_supported(*out);
}

bool unpack_float(PyObject* object, double& out) {
  if (!PyFloat_CheckExact(object)) {
    return false;
  }
  out = PyFloat_AS_DOUBLE(object);
  return true;
}

bool unpack_eps(PyObject* object, bool has_default, at::ScalarType type, double& out) {
  if (object == Py_None) {
    out = type == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
    return has_default;
  }
  return unpack_float(object, out);
}

std::optional<at::ScalarType> gradient_dtype(const torch::autograd::AutogradContext* ctx, size_t index,
                                             const Tensor& input) {
  return input.defined() && ctx->needs_input_grad(index) ? std::optional(input.scalar_type()) : std::nullopt;
}

std::optional<Tensor> as_optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

pybind11::list list_of(c10::ArrayRef<Tensor> tensors) {
  pybind11::list objects;
  for (const Tensor& tensor : tensors) {
    objects.append(tensor.defined() ? pybind11::cast(tensor) : pybind11::none());
  }
  return objects;
}

pybind11::object or_none(const std::optional<at::ScalarType>& type) {
  return type ? pybind11::cast(*type) : pybind11::none();
}

}  // namespace fastnorm
