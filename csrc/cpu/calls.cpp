// Calls from Python on plain CPU tensors, without the trips through Python that autograd.Function and torch.ops take.
#include "calls.h"

#include <ATen/TensorOperators.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "norm.h"

namespace fastnorm::cpu {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::ForwardADLevel;
using torch::autograd::variable_list;

// An undefined residual, weight or bias is one that was not given.
struct Call {
  Norm norm;
  Tensor x, residual, weight, bias;
  double eps;
  int64_t dims;  // how many trailing dimensions are normalised

  at::IntArrayRef shape() const { return x.sizes().slice(x.dim() - dims); }
};

std::optional<Tensor> given(const Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; }

// Whether a tensor's memory on the CPU holds its elements: it is no wrapper, and nothing is still to be done to it.
bool is_plain(const Tensor& tensor) {
  static constexpr c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                              c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});
  return (tensor.key_set().raw_repr() & ~plain.raw_repr()) == 0;
}

ForwardResult forward(const Call& call, bool saves_moments) {
  const at::ScalarType dtype = call.x.scalar_type();
  const auto residual_dtype =
      call.residual.defined() ? std::optional(c10::promoteTypes(dtype, call.residual.scalar_type())) : std::nullopt;
  return norm_forward({call.norm, call.x, call.dims, call.residual, given(call.weight), given(call.bias), call.eps,
                       false, std::nullopt, dtype, residual_dtype, saves_moments});
}

// The gradients of x or h, weight and bias as differentiable functions: by the formula, which is in Python.
variable_list gradients_by_formula(const Call& call, const Tensor& dy) {
  pybind11::gil_scoped_acquire gil;
  pybind11::list inputs;
  const auto object = [](const Tensor& t) { return t.defined() ? pybind11::cast(t) : pybind11::none(); };
  inputs.append(object(call.x));
  inputs.append(object(call.weight));
  const char* name = "rms_norm";
  if (call.norm == Norm::layer) {
    inputs.append(object(call.bias));
    name = "layer_norm";
  }
  const auto shape = pybind11::cast(std::vector<int64_t>(call.shape().begin(), call.shape().end()));
  const auto found = pybind11::module_::import("fastnorm.reference")
                         .attr("plain_gradients")(name, inputs, object(dy), shape, call.eps);
  variable_list gradients;
  for (const auto& gradient : found) {
    gradients.push_back(gradient.is_none() ? Tensor() : pybind11::cast<Tensor>(gradient));
  }
  gradients.resize(3);
  return gradients;
}

struct NormFunction : torch::autograd::Function<NormFunction> {
  // The tensors are those of the call once more: this class finds only arguments of its own.
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& residual,
                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                               const Call* call) {
    ForwardResult result = cpu::forward(*call, true);
    ctx->save_for_backward({residual ? result.h : x, call->weight, call->bias, result.mean, result.rstd});
    const auto residual_type = residual ? residual->scalar_type() : at::ScalarType::Undefined;
    ctx->saved_data["options"] = std::vector<int64_t>{static_cast<int64_t>(call->norm), call->dims,
                                                      static_cast<int64_t>(x.scalar_type()),
                                                      static_cast<int64_t>(residual_type)};
    ctx->saved_data["eps"] = call->eps;
    ctx->set_materialize_grads(false);
    return residual ? variable_list{result.y, result.h} : variable_list{result.y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto options = ctx->saved_data["options"].toIntVector();
    const Call call{static_cast<Norm>(options[0]), saved[0], {}, saved[1], saved[2], ctx->saved_data["eps"].toDouble(),
                    options[1]};
    const auto x_type = static_cast<at::ScalarType>(options[2]);
    const auto residual_type = static_cast<at::ScalarType>(options[3]);
    const bool adds = residual_type != at::ScalarType::Undefined;
    const Tensor dy = grads[0], dh = adds ? grads[1] : Tensor();
    variable_list found(5);  // x, residual, weight, bias, call
    const bool is_differentiated = at::GradMode::is_enabled() || ForwardADLevel::try_get_by_idx(0) != nullptr;
    if (dy.defined() && !is_differentiated && is_plain(dy) && (!dh.defined() || is_plain(dh))) {
      fused(ctx, call, dy, dh, saved[3], saved[4], x_type, residual_type, found);
      return found;
    }
    Tensor total = dh;
    if (dy.defined()) {
      auto gradients = gradients_by_formula(call, dy);
      total = dh.defined() ? gradients[0] + dh : gradients[0];
      found[2] = gradients[1];
      found[3] = gradients[2];
    }
    if (total.defined()) {
      found[0] = total.to(x_type);
      found[1] = adds ? total.to(residual_type) : Tensor();
    }
    return found;
  }

 private:
  static void fused(AutogradContext* ctx, const Call& call, const Tensor& dy, const Tensor& dh, const Tensor& mean,
                    const Tensor& rstd, at::ScalarType x_type, at::ScalarType residual_type, variable_list& found) {
    const bool adds = residual_type != at::ScalarType::Undefined;
    size_t index = adds ? 2 : 1;  // among the tensors that were given
    const auto wanted = [&](const Tensor& parameter) {
      return parameter.defined() && ctx->needs_input_grad(index++) ? std::optional(parameter.scalar_type())
                                                                   : std::nullopt;
    };
    const auto dweight_type = wanted(call.weight), dbias_type = wanted(call.bias);
    const BackwardResult result =
        norm_backward({call.norm, dy, dh, call.x, call.dims, given(call.weight), mean, rstd, false, std::nullopt,
                       x_type, adds ? std::optional(residual_type) : std::nullopt, dweight_type, dbias_type});
    found[0] = result.dx;
    if (adds) {
      found[1] = result.dresidual.defined() ? result.dresidual : result.dx;
    }
    found[2] = result.dweight;
    found[3] = result.dbias;
  }
};

// Whether only the CPU's own kernels and autograd have a say in a call: no mode, transform, trace or wrapper looks on.
bool nobody_looks_on() {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  return (tls.included_.raw_repr() & ~c10::default_included_set.raw_repr()) == 0 &&
         !at::impl::torch_function_mode_enabled() &&
         ForwardADLevel::try_get_by_idx(0) == nullptr;
}

bool takes(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

// Takes a plain CPU tensor of a known dtype into `out`; false for anything else. None leaves an optional one undefined.
bool unpack(PyObject* object, bool optional, Tensor& out) {
  if (optional && object == Py_None) {
    return true;
  }
  if (!THPVariable_CheckExact(object)) {
    return false;
  }
  out = THPVariable_Unpack(object);
  return is_plain(out) && takes(out.scalar_type());
}

// Whether a sequence of plain integers is the tensor's last dimensions; counts them.
bool unpack_shape(PyObject* object, const Tensor& x, int64_t& dims) {
  if (!PyTuple_Check(object) && !PyList_Check(object)) {
    return false;
  }
  dims = PySequence_Fast_GET_SIZE(object);
  if (dims == 0 || dims > x.dim()) {
    return false;
  }
  for (int64_t i = 0; i < dims; ++i) {
    PyObject* size = PySequence_Fast_GET_ITEM(object, i);
    if (!PyLong_CheckExact(size) || PyLong_AsLongLong(size) != x.size(x.dim() - dims + i)) {
      PyErr_Clear();  // a number beyond 64 bits
      return false;
    }
  }
  return true;
}

bool unpack_eps(PyObject* object, at::ScalarType type, double& eps) {
  if (object == Py_None) {
    eps = type == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
    return true;
  }
  if (!PyFloat_CheckExact(object)) {
    return false;
  }
  eps = PyFloat_AS_DOUBLE(object);
  return true;
}

// Reads (x, [residual,] shape, weight, [bias,] eps).
bool unpack(Norm norm, bool adds, PyObject* const* args, Call& call) {
  if (!unpack(*args++, false, call.x) || (adds && !unpack(*args++, false, call.residual)) ||
      !unpack_shape(*args++, call.x, call.dims) || !unpack(*args++, true, call.weight) ||
      (norm == Norm::layer && !unpack(*args++, true, call.bias)) || call.x.numel() == 0) {
    return false;
  }
  const bool fits = (!adds || call.residual.sizes() == call.x.sizes()) &&
                    (!call.weight.defined() || call.weight.sizes() == call.shape()) &&
                    (!call.bias.defined() || call.bias.sizes() == call.shape());
  const auto type = adds ? c10::promoteTypes(call.x.scalar_type(), call.residual.scalar_type()) : call.x.scalar_type();
  return fits && (norm == Norm::rms || *args != Py_None) && unpack_eps(*args, type, call.eps) && nobody_looks_on();
}

bool requires_grad(const Call& call) {
  const auto wants = [](const Tensor& t) { return t.defined() && t.requires_grad(); };
  return at::GradMode::is_enabled() &&
         (wants(call.x) || wants(call.residual) || wants(call.weight) || wants(call.bias));
}

template <Norm norm, bool adds>
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t expected = 4 + (adds ? 1 : 0) + (norm == Norm::layer ? 1 : 0);
  Call call{norm, {}, {}, {}, {}, 0, 0};
  if (count != expected || !unpack(norm, adds, args, call)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor y, h;
  {
    pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION(norm == Norm::rms ? (adds ? "fastnorm::add_rms_norm" : "fastnorm::rms_norm")
                                      : (adds ? "fastnorm::add_layer_norm" : "fastnorm::layer_norm"),
                    std::vector<c10::IValue>({call.x}));
    if (requires_grad(call)) {
      const Call* that = &call;
      auto outputs = NormFunction::apply(call.x, given(call.residual), given(call.weight), given(call.bias), that);
      y = std::move(outputs[0]);
      h = adds ? std::move(outputs[1]) : Tensor();
    } else {
      ForwardResult result = forward(call, false);
      y = std::move(result.y);
      h = std::move(result.h);
    }
  }
  if constexpr (adds) {
    return Py_BuildValue("NN", THPVariable_Wrap(std::move(y)), THPVariable_Wrap(std::move(h)));
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

template <Norm norm, bool adds>
PyMethodDef method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run<norm, adds>)), METH_FASTCALL, doc};
}

}  // namespace

int add_calls(PyObject* module) {
  static PyMethodDef methods[] = {
      method<Norm::layer, false>("layer_norm", "layer_norm(x, normalized_shape, weight, bias, eps)"),
      method<Norm::rms, false>("rms_norm", "rms_norm(x, normalized_shape, weight, eps)"),
      method<Norm::layer, true>("add_layer_norm", "add_layer_norm(x, residual, normalized_shape, weight, bias, eps)"),
      method<Norm::rms, true>("add_rms_norm", "add_rms_norm(x, residual, normalized_shape, weight, eps)"),
      {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, methods);
}

}  // namespace fastnorm::cpu
