// Whole calls of the row norms from Python: arguments, outputs, autograd and the kernel's start, without the trips
// through Python that autograd.Function and torch.ops take. The device chooses the kernel: the native one on a CPU, a
// launch plan where Triton serves.
#include <ATen/TensorOperators.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <bit>
#include <limits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "calls.h"
#include "cpu/norm.h"
#include "node.h"
#include "plans.h"

namespace fastnorm {
namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The functions by their numbers: whether they are RMSNorm, and whether they add a residual.
enum Operation : int64_t { rms = 1, add = 2 };
constexpr std::array names{"fastnorm::layer_norm", "fastnorm::rms_norm", "fastnorm::add_layer_norm",
                           "fastnorm::add_rms_norm"};

// What stays the same from the forward to the backward.
struct Options {
  bool on_triton, subtract_mean, zero_centered;
  int64_t dims;  // how many trailing dimensions are normalised
  double eps;
  optional<ScalarType> cast_dtype;
  ScalarType x_dtype;
  optional<ScalarType> residual_dtype;  // of the residual; none without one

  cpu::Norm norm() const { return subtract_mean ? cpu::Norm::layer : cpu::Norm::rms; }

  // For saved_data, which holds no structs.
  std::vector<int64_t> packed() const {
    const auto type = [](const optional<ScalarType>& t) { return t ? static_cast<int64_t>(*t) : -1; };
    return {on_triton,        subtract_mean, zero_centered,       dims, std::bit_cast<int64_t>(eps),
            type(cast_dtype), type(x_dtype), type(residual_dtype)};
  }

  static Options unpacked(const std::vector<int64_t>& values) {
    const auto type = [](int64_t t) { return t < 0 ? std::nullopt : optional(static_cast<ScalarType>(t)); };
    return {values[0] != 0,  values[1] != 0,   values[2] != 0, values[3], std::bit_cast<double>(values[4]),
            type(values[5]), *type(values[6]), type(values[7])};
  }
};

// An undefined residual, weight or bias is one that was not given.
struct Call {
  Options options;
  Tensor x, residual, weight, bias;
  ScalarType out_dtype;
  optional<ScalarType> stream_dtype;  // of h; none without a residual

  at::IntArrayRef shape() const { return x.sizes().slice(x.dim() - options.dims); }
};

cpu::ForwardResult forward(const Call& call, bool saves_moments) {
  const Options& o = call.options;
  if (!o.on_triton) {
    return cpu::norm_forward({o.norm(), call.x, o.dims, call.residual, given(call.weight), given(call.bias), o.eps,
                              o.zero_centered, o.cast_dtype, call.out_dtype, call.stream_dtype, saves_moments});
  }
  const auto results =
      plans::call("row_norm_forward", {call.x, call.residual, o.dims, call.weight, call.bias, o.eps, o.subtract_mean,
                                       o.zero_centered, o.cast_dtype, optional(call.out_dtype), call.stream_dtype});
  return {results.at(0), results.at(1), results.at(2), results.at(3)};
}

// The gradients of x or h, weight and bias as differentiable functions: by the formula, which is in Python.
variable_list gradients_by_formula(const Options& o, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                   const Tensor& dy) {
  const pybind11::gil_scoped_acquire gil;
  const auto cast_dtype = o.cast_dtype ? pybind11::cast(*o.cast_dtype) : pybind11::none();
  return by_formula("row_norm_gradients", {x, weight, bias}, dy, x.sizes().slice(x.dim() - o.dims).vec(), o.eps,
                    o.subtract_mean, o.zero_centered, cast_dtype);
}

struct RowNormFunction : torch::autograd::Function<RowNormFunction> {
  static constexpr auto name = "RowNormBackward";

  static cpu::ForwardResult forward(const Call& call) {
    cpu::ForwardResult result = fastnorm::forward(call, true);
    const auto save = [&](AutogradContext& ctx) {
      ctx.save_for_backward({result.h.defined() ? result.h : call.x, call.weight, call.bias, result.mean, result.rstd});
      ctx.saved_data["options"] = call.options.packed();
    };
    attach<RowNormFunction>({call.x, call.residual, call.weight, call.bias}, {result.y, result.h}, save);
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2];
    const auto options = Options::unpacked(ctx->saved_data["options"].toIntVector());
    const bool adds = options.residual_dtype.has_value();
    const Tensor dy = grads[0], dh = adds ? grads[1] : Tensor();
    variable_list found(4);  // x, residual, weight, bias
    if (dy.defined() && kernels_take({dy, dh, x, weight, bias, saved[3], saved[4]})) {
      const auto dweight_dtype = wanted(ctx, 2, weight), dbias_dtype = wanted(ctx, 3, bias);
      const auto [dx, dresidual, dweight, dbias] =
          fused(options, dy, dh, x, weight, saved[3], saved[4], dweight_dtype, dbias_dtype);
      found[0] = dx;
      found[1] = !adds ? Tensor() : dresidual.defined() ? dresidual : dx;
      found[2] = dweight;
      found[3] = dbias;
      return found;
    }
    Tensor total = dh;
    if (dy.defined()) {
      auto gradients = gradients_by_formula(options, x, weight, bias, dy);
      total = dh.defined() ? gradients[0] + dh : gradients[0];
      found[2] = gradients[1];
      found[3] = gradients[2];
    }
    if (total.defined()) {
      found[0] = total.to(options.x_dtype);
      found[1] = adds ? total.to(*options.residual_dtype) : Tensor();
    }
    return found;
  }

 private:
  static cpu::BackwardResult fused(const Options& o, const Tensor& dy, const Tensor& dh, const Tensor& x,
                                   const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                   optional<ScalarType> dweight_dtype, optional<ScalarType> dbias_dtype) {
    if (!o.on_triton) {
      return cpu::norm_backward({o.norm(), dy, dh, x, o.dims, given(weight), mean, rstd, o.zero_centered, o.cast_dtype,
                                 o.x_dtype, o.residual_dtype, dweight_dtype, dbias_dtype});
    }
    const auto results =
        plans::call("row_norm_backward", {dy, dh, x, o.dims, weight, mean, rstd, o.zero_centered, o.cast_dtype,
                                          optional(o.x_dtype), o.residual_dtype, dweight_dtype, dbias_dtype});
    return {results.at(0), results.at(1), results.at(2), results.at(3)};
  }
};

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

// None is the machine epsilon of the type computed in, for RMSNorm only.
bool unpack_eps(PyObject* object, bool has_default, ScalarType type, double& eps) {
  if (object == Py_None) {
    eps = type == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
    return has_default;
  }
  return unpack_float(object, eps);
}

// Reads (operation, served, x, residual, shape, weight, bias, eps, zero_centered, out_dtype, residual_dtype, rounding).
constexpr Py_ssize_t n_arguments = 12;
bool read(PyObject* const* args, int64_t operation, Call& call) {
  Options& o = call.options;
  const bool is_rms = operation & rms;
  if (!unpack(args[2], call.x) || call.x.numel() == 0 || !unpack_shape(args[4], call.x, o.dims)) {
    return false;
  }
  const auto device = call.x.device();
  const auto triton = on_triton(PyLong_AsLongLong(args[1]), call.x);
  optional<ScalarType> out_dtype;
  if (!triton || !unpack_optional(args[3], call.x.sizes(), device, call.residual) ||
      !unpack_optional(args[5], call.shape(), device, call.weight) ||
      !unpack_optional(args[6], call.shape(), device, call.bias) || !unpack_bool(args[8], o.zero_centered) ||
      !unpack_dtype(args[9], out_dtype) || !unpack_dtype(args[10], call.stream_dtype) ||
      !PyUnicode_CheckExact(args[11])) {
    return false;
  }
  o.on_triton = *triton;
  o.subtract_mean = !is_rms;
  o.x_dtype = call.x.scalar_type();
  if (call.residual.defined()) {
    o.residual_dtype = call.residual.scalar_type();
    call.stream_dtype = call.stream_dtype.value_or(c10::promoteTypes(o.x_dtype, *o.residual_dtype));
  } else if (call.stream_dtype.value_or(o.x_dtype) != o.x_dtype) {
    return false;  // h is x in another dtype
  } else {
    call.stream_dtype.reset();
  }
  if (PyUnicode_CompareWithASCIIString(args[11], "llama") == 0 && is_rms) {
    o.cast_dtype = o.x_dtype;
    const auto promoted = call.weight.defined() ? c10::promoteTypes(o.x_dtype, call.weight.scalar_type()) : o.x_dtype;
    call.out_dtype = out_dtype.value_or(promoted);
  } else if (PyUnicode_CompareWithASCIIString(args[11], "torch") == 0) {
    const char* const stock = is_rms ? "aten::rms_norm" : "aten::layer_norm";
    call.out_dtype = out_dtype.value_or(autocasts(stock, call.x) ? at::kFloat : o.x_dtype);
  } else {
    return false;
  }
  return unpack_eps(args[7], is_rms, call.stream_dtype.value_or(o.x_dtype), o.eps) && nobody_looks_on();
}

PyObject* row_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == n_arguments, "row_norm takes ", n_arguments, " arguments, but got ", count);
  const int64_t operation = PyLong_AsLongLong(args[0]);
  Call call{};
  if (!read(args, operation, call)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor y, h;
  {
    pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION(names.at(operation), std::vector<c10::IValue>({call.x}));
    cpu::ForwardResult result = any_requires_grad({call.x, call.residual, call.weight, call.bias})
                                    ? RowNormFunction::forward(call)
                                    : forward(call, false);
    y = std::move(result.y);
    h = std::move(result.h);
  }
  if (!(operation & add)) {
    return THPVariable_Wrap(std::move(y));
  }
  // without a residual h is x
  PyObject* const stream = h.defined() ? THPVariable_Wrap(std::move(h)) : Py_NewRef(args[2]);
  return Py_BuildValue("NN", THPVariable_Wrap(std::move(y)), stream);
  END_HANDLE_TH_ERRORS
}

}  // namespace

int add_row_norm_calls(PyObject* module) {
  static PyMethodDef methods[] = {
      {"row_norm", as_method(&row_norm), METH_FASTCALL,
       "row_norm(operation, served, x, residual, normalized_shape, weight, bias, eps, zero_centered, "
       "out_dtype, residual_dtype, rounding): NotImplemented for what is wrong or not plain"},
      {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, methods);
}

}  // namespace fastnorm
