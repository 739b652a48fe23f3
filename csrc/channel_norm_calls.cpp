// Whole calls of batch_norm and group_norm from Python: arguments, outputs, autograd and the kernel's start, without
// the trips through Python that autograd.Function and torch.ops take. The backend that serves the device computes.
#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "calls.h"
#include "cpu/channel_norms.h"
#include "node.h"
#include "plans.h"
#include "statistics.h"

namespace fastnorm {
namespace {

using at::MemoryFormat;
using at::ScalarType;
using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- group_norm

struct GroupOptions {
  bool on_triton, silu;
  int64_t groups;
  MemoryFormat format;
  double eps;
};

struct GroupCall {
  GroupOptions options;
  Tensor x, weight, bias;
  ScalarType out_dtype;
};

using GroupForward = std::tuple<Tensor, Tensor, Tensor>;  // y, mean, rstd

GroupForward group_forward(const GroupCall& call) {
  const GroupOptions& o = call.options;
  if (!o.on_triton) {
    return cpu::group_norm_forward(call.x, o.groups, as_optional(call.weight), as_optional(call.bias), o.eps, o.format,
                                   o.silu, call.out_dtype);
  }
  const auto results = plans::call("group_norm_forward", {call.x, o.groups, call.weight, call.bias, o.eps, o.format,
                                                          o.silu, optional(call.out_dtype)});
  return {results.at(0), results.at(1), results.at(2)};
}

struct GroupNormFunction : torch::autograd::Function<GroupNormFunction> {
  static constexpr auto name = "GroupNormBackward";

  static Tensor forward(const GroupCall& call) {
    const auto [y, mean, rstd] = group_forward(call);
    tell_statistics(call.x, mean, rstd, call.options.eps);
    const auto save = [&, mean = mean, rstd = rstd](AutogradContext& ctx) {
      const GroupOptions& o = call.options;
      ctx.save_for_backward({call.x, call.weight, call.bias, mean, rstd});
      ctx.saved_data["options"] = std::vector<int64_t>{o.on_triton, o.silu, o.groups, static_cast<int64_t>(o.format)};
      ctx.saved_data["eps"] = o.eps;
    };
    attach<GroupNormFunction>({call.x, call.weight, call.bias}, {y}, save);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &x = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3],
                 &rstd = saved[4];
    if (!dy.defined()) {
      return variable_list(3);
    }
    const auto o = ctx->saved_data["options"].toIntVector();
    const bool on_triton = o[0], silu = o[1];
    const auto format = static_cast<MemoryFormat>(o[3]);
    if (!kernels_can_take({dy, x, weight, bias, mean, rstd})) {
      const pybind11::gil_scoped_acquire gil;
      return reference_gradients("group_norm_gradients", {x, weight, bias}, dy, o[2], ctx->saved_data["eps"].toDouble(),
                                 silu);
    }
    const auto dweight_dtype = gradient_dtype(ctx, 1, weight), dbias_dtype = gradient_dtype(ctx, 2, bias);
    if (on_triton) {
      return plans::call("group_norm_backward",
                         {dy, x, o[2], weight, bias, mean, rstd, format, silu, dweight_dtype, dbias_dtype});
    }
    auto [dx, dweight, dbias] = cpu::group_norm_backward(dy, x, o[2], as_optional(weight), as_optional(bias), mean,
                                                         rstd, format, silu, dweight_dtype, dbias_dtype);
    return {dx, dweight, dbias};
  }
};

// Reads (served, x, num_groups, weight, bias, eps, silu).
bool read(PyObject* const* args, GroupCall& call) {
  GroupOptions& o = call.options;
  Tensor& x = call.x;
  if (!unpack(args[1], x) || x.numel() == 0 || x.dim() < 2 || !PyLong_CheckExact(args[2])) {
    return false;
  }
  o.groups = PyLong_AsLongLong(args[2]);
  const auto triton = on_triton(PyLong_AsLongLong(args[0]), x);
  if (PyErr_Occurred() || o.groups < 1 || x.size(1) % o.groups != 0 || x.numel() == x.size(0) * o.groups || !triton ||
      !unpack_optional(args[3], {x.size(1)}, x.device(), call.weight) ||
      !unpack_optional(args[4], {x.size(1)}, x.device(), call.bias) || !unpack_float(args[5], o.eps) ||
      !unpack_bool(args[6], o.silu)) {
    PyErr_Clear();  // a number beyond 64 bits
    return false;
  }
  o.on_triton = *triton;
  o.format = x.suggest_memory_format();
  call.out_dtype = autocasts("aten::group_norm", x) ? at::kFloat : x.scalar_type();
  return is_not_intercepted();
}

PyObject* group_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7, "group_norm takes 7 arguments, but got ", count);
  GroupCall call{};
  if (!read(args, call)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("fastnorm::group_norm", std::vector<c10::IValue>({call.x}));
    y = any_requires_grad({call.x, call.weight, call.bias}) ? GroupNormFunction::forward(call)
                                                            : std::get<0>(group_forward(call));
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// ---- batch_norm

struct BatchOptions {
  bool on_triton, training, relu;
  MemoryFormat format;
  double eps;
  optional<ScalarType> residual_dtype;
};

struct BatchCall {
  BatchOptions options;
  Tensor x, residual, weight, bias, running_mean, running_var, factor;
  double momentum;
  ScalarType out_dtype;
};

// `scale` is rstd in training. In evaluation it is the running variance: only a backward needs rstd, at a launch.
struct BatchForward {
  Tensor y, mask, mean, scale;
};

BatchForward batch_forward(const BatchCall& call, bool needs_gradients) {
  const BatchOptions& o = call.options;
  if (o.training && o.on_triton) {
    auto results = plans::call("batch_norm_forward",
                               {call.x, call.residual, call.weight, call.bias, call.running_mean, call.running_var,
                                call.factor, call.momentum, o.eps, o.format, o.relu, optional(call.out_dtype)});
    return {results.at(0), results.at(1), results.at(2), results.at(3)};
  }
  if (o.training) {
    auto [y, mask, mean, rstd] =
        cpu::batch_norm_forward(call.x, as_optional(call.residual), as_optional(call.weight), as_optional(call.bias),
                                as_optional(call.running_mean), as_optional(call.running_var), as_optional(call.factor),
                                call.momentum, o.eps, o.format, o.relu, call.out_dtype);
    return {y, mask, mean, rstd};
  }
  if (o.on_triton) {
    auto results = plans::call("batch_norm_evaluation",
                               {call.x, call.residual, call.weight, call.bias, call.running_mean, call.running_var,
                                o.eps, o.format, o.relu, needs_gradients, optional(call.out_dtype)});
    return {results.at(0), results.at(1), call.running_mean, call.running_var};
  }
  auto [y, mask] = cpu::batch_norm_evaluation(call.x, as_optional(call.residual), as_optional(call.weight),
                                              as_optional(call.bias), call.running_mean, call.running_var, o.eps,
                                              o.format, o.relu, needs_gradients, call.out_dtype);
  return {y, mask, call.running_mean, call.running_var};
}

struct BatchNormFunction : torch::autograd::Function<BatchNormFunction> {
  static constexpr auto name = "BatchNormBackward";

  static Tensor forward(const BatchCall& call) {
    const BatchForward result = batch_forward(call, true);
    if (call.options.training) {
      tell_statistics(call.x, result.mean, result.scale, call.options.eps);
    }
    const auto save = [&](AutogradContext& ctx) {
      const BatchOptions& o = call.options;
      ctx.save_for_backward({call.x, call.weight, call.bias, result.mean, result.scale, result.mask});
      ctx.saved_data["options"] = std::vector<int64_t>{o.on_triton, o.training, static_cast<int64_t>(o.format),
                                                       o.residual_dtype ? static_cast<int64_t>(*o.residual_dtype) : -1};
      ctx.saved_data["eps"] = o.eps;
    };
    attach<BatchNormFunction>({call.x, call.residual, call.weight, call.bias}, {result.y}, save);
    return result.y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &x = saved[0], &weight = saved[1], &bias = saved[2], &mask = saved[5];
    Tensor mean = saved[3], scale = saved[4];
    if (!dy.defined()) {
      return variable_list(4);
    }
    const auto o = ctx->saved_data["options"].toIntVector();
    const bool on_triton = o[0], training = o[1];
    const auto format = static_cast<MemoryFormat>(o[2]);
    const double eps = ctx->saved_data["eps"].toDouble();
    optional<ScalarType> residual_dtype;
    if (o[3] >= 0 && ctx->needs_input_grad(1)) {
      residual_dtype = static_cast<ScalarType>(o[3]);
    }
    const auto dweight_dtype = gradient_dtype(ctx, 2, weight), dbias_dtype = gradient_dtype(ctx, 3, bias);
    if (!kernels_can_take({dy, x, weight, bias, mean, scale, mask})) {
      const pybind11::gil_scoped_acquire gil;
      const auto dtype = residual_dtype ? pybind11::cast(*residual_dtype) : pybind11::none();
      const auto object = [](const Tensor& t) { return t.defined() ? pybind11::cast(t) : pybind11::none(); };
      const auto running = training ? pybind11::object(pybind11::none()) : pybind11::make_tuple(mean, scale);
      return reference_gradients("batch_norm_gradients", {x, weight, bias}, dy, object(mask), running, format, eps,
                                 dtype);
    }
    if (!training) {
      const auto stat = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      mean = mean.to(stat);
      scale = at::rsqrt(scale.to(stat) + eps);
    }
    // without a ReLU dresidual is dy
    const auto written_dtype = mask.defined() ? residual_dtype : std::nullopt;
    variable_list gradients(4);  // x, residual, weight, bias
    if (on_triton) {
      auto results = plans::call("batch_norm_backward", {dy, mask, x, weight, mean, scale, training, format,
                                                         written_dtype, dweight_dtype, dbias_dtype});
      std::move(results.begin(), results.end(), gradients.begin());
    } else {
      std::tie(gradients[0], gradients[1], gradients[2], gradients[3]) =
          cpu::batch_norm_backward(dy, as_optional(mask), x, as_optional(weight), mean, scale, training, format,
                                   written_dtype, dweight_dtype, dbias_dtype);
    }
    if (residual_dtype && !written_dtype) {
      gradients[1] = dy.to(*residual_dtype);
    }
    return gradients;
  }
};

// The memory format that torch.nn.functional.batch_norm gives y; fastnorm.views has the same rule in Python.
MemoryFormat batch_norm_format(const Tensor& x) {
  if ((x.dim() != 4 && x.dim() != 5) || x.is_contiguous()) {
    return MemoryFormat::Contiguous;
  }
  const auto last = x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
  return x.is_contiguous(last) ? last : x.suggest_memory_format();
}

// momentum: a number, or a tensor `factor` on x's device that the kernel reads.
bool unpack_momentum(PyObject* object, const Tensor& x, BatchCall& call) {
  if (unpack_float(object, call.momentum)) {
    return true;
  }
  return unpack(object, call.factor) && call.factor.dim() == 0 && call.factor.scalar_type() == at::kFloat &&
         call.factor.device() == x.device() && !call.factor.requires_grad();
}

// Reads (served, x, running_mean, running_var, weight, bias, training, momentum, eps, residual, relu).
bool read(PyObject* const* args, int64_t served, BatchCall& call) {
  BatchOptions& o = call.options;
  Tensor& x = call.x;
  if (!unpack(args[1], x) || x.numel() == 0 || x.dim() < 2) {
    return false;
  }
  const auto channels = x.size(1);
  const auto device = x.device();
  const auto triton = on_triton(served, x);
  const auto is_statistic = [](const Tensor& t) { return !t.defined() || (t.is_contiguous() && !t.requires_grad()); };
  if (!triton || !unpack_optional(args[2], {channels}, device, call.running_mean) ||
      !unpack_optional(args[3], {channels}, device, call.running_var) ||
      !unpack_optional(args[4], {channels}, device, call.weight) ||
      !unpack_optional(args[5], {channels}, device, call.bias) || !unpack_bool(args[6], o.training) ||
      !unpack_momentum(args[7], x, call) || !unpack_float(args[8], o.eps) ||
      !unpack_optional(args[9], x.sizes(), device, call.residual) || !unpack_bool(args[10], o.relu) ||
      !is_statistic(call.running_mean) || !is_statistic(call.running_var)) {
    return false;
  }
  const bool has_statistics = call.running_mean.defined() && call.running_var.defined();
  const bool has_one = call.running_mean.defined() != call.running_var.defined();
  if (has_one || (o.training ? x.numel() == channels || o.eps <= 0 : !has_statistics || !(o.eps >= 0)) ||
      autocasts("aten::batch_norm", x)) {
    return false;
  }
  o.on_triton = *triton;
  o.format = batch_norm_format(x);
  call.out_dtype = x.scalar_type();
  if (call.residual.defined()) {
    o.residual_dtype = call.residual.scalar_type();
    call.out_dtype = c10::promoteTypes(call.out_dtype, *o.residual_dtype);
    if (call.out_dtype == at::kDouble && x.scalar_type() != at::kDouble) {
      return false;  // statistics would have to be float64 too
    }
  }
  return is_not_intercepted();
}

// Whether PyTorch's own CPU kernel takes these dtypes: all are x's, or all but a 16-bit x are float32, of which the
// weight is one. fastnorm.reference has the same rule in Python.
bool stock_takes(const BatchCall& call) {
  const auto all_are = [&](ScalarType type) {
    const auto is = [&](const Tensor& t) { return !t.defined() || t.scalar_type() == type; };
    return is(call.running_mean) && is(call.running_var) && is(call.weight) && is(call.bias);
  };
  return all_are(call.x.scalar_type()) || (call.x.element_size() == 2 && call.weight.defined() && all_are(at::kFloat));
}

PyObject* batch_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 11, "batch_norm takes 11 arguments, but got ", count);
  const int64_t served = PyLong_AsLongLong(args[0]);
  BatchCall call{};
  if (!read(args, served, call)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const BatchOptions& o = call.options;
  // evaluation without activation and residual: PyTorch's own CPU kernel is as fast as a copy
  const bool is_stock = !o.on_triton && !o.training && !o.relu && !o.residual_dtype && !(served & native_named);
  if (is_stock && !stock_takes(call)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("fastnorm::batch_norm", std::vector<c10::IValue>({call.x}));
    if (is_stock) {
      y = at::batch_norm(call.x, as_optional(call.weight), as_optional(call.bias), call.running_mean, call.running_var,
                         false, 0.0, o.eps, false);
    } else if (any_requires_grad({call.x, call.residual, call.weight, call.bias})) {
      y = BatchNormFunction::forward(call);
    } else {
      y = batch_forward(call, false).y;
    }
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

}  // namespace

int add_channel_norm_calls(PyObject* module) {
  static PyMethodDef methods[] = {
      {"group_norm", as_method(&group_norm), METH_FASTCALL,
       "group_norm(served, x, num_groups, weight, bias, eps, silu): NotImplemented for what is wrong or not plain"},
      {"batch_norm", as_method(&batch_norm), METH_FASTCALL,
       "batch_norm(served, x, running_mean, running_var, weight, bias, training, momentum, eps, residual, relu): "
       "NotImplemented for what is wrong or not plain"},
      {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, methods);
}

}  // namespace fastnorm
