// The whole call of rms_norm_many from Python, as row_norm_calls.cpp has those of the row norms: RMSNorm of several
// inputs, each with the same rotary embedding behind it, by one autograd node.
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <utility>
#include <vector>

#include "arguments.h"
#include "calls.h"
#include "cpu/rms_norm_many.h"
#include "node.h"
#include "plans.h"
#include "statistics.h"

namespace fastnorm {
namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The options that the forward leaves to the backward.
struct Options {
  bool on_triton, interleaved, zero_centered;
  int64_t sequence_dim;
  double eps;
  optional<ScalarType> cast_dtype;

  // As integers, because ctx.saved_data holds no structs.
  std::vector<int64_t> packed() const {
    return {on_triton,
            interleaved,
            zero_centered,
            sequence_dim,
            std::bit_cast<int64_t>(eps),
            cast_dtype ? static_cast<int64_t>(*cast_dtype) : -1};
  }

  static Options unpacked(const std::vector<int64_t>& values) {
    const auto cast_dtype = values[5] < 0 ? std::nullopt : optional(static_cast<ScalarType>(values[5]));
    return {values[0] != 0, values[1] != 0, values[2] != 0, values[3], std::bit_cast<double>(values[4]), cast_dtype};
  }
};

// weights: undefined where there is none. cos, sin: (S, r) or (B or 1, S, r); undefined without a rotation.
struct Call {
  Options options;
  variable_list xs, weights;
  Tensor cos, sin;
  ScalarType out_dtype;
};

// The dimension of x along which cos and sin differ.
int64_t sequence_dim_of(const Tensor& x, int64_t dim) { return dim < 0 ? dim + x.dim() : dim; }

// cos or sin as a view (*x.shape[:-1], r) without a copy. Made by hand: operations would take longer.
Tensor expanded(const Tensor& factor, const Tensor& x, int64_t sequence_dim) {
  at::DimVector sizes(x.sizes()), strides(x.dim(), 0);
  sizes.back() = factor.size(-1);
  strides.back() = factor.stride(-1);
  strides[sequence_dim_of(x, sequence_dim)] = factor.stride(-2);
  if (factor.dim() == 3 && factor.size(0) > 1) {
    strides[0] = factor.stride(0);
  }
  Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(factor.storage()),
                                                         factor.key_set(), factor.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(factor.storage_offset());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return view;
}

// Of each x; empty without a rotation.
variable_list expanded(const Tensor& factor, const variable_list& xs, int64_t sequence_dim) {
  variable_list views;
  if (factor.defined()) {
    views.reserve(xs.size());
    for (const Tensor& x : xs) {
      views.push_back(expanded(factor, x, sequence_dim));
    }
  }
  return views;
}

struct Results {
  variable_list ys, rstds;
};

Results forward(const Call& call, bool saves_statistics) {
  const Options& o = call.options;
  const variable_list cos = expanded(call.cos, call.xs, o.sequence_dim);
  const variable_list sin = expanded(call.sin, call.xs, o.sequence_dim);
  const variable_list found =
      o.on_triton ? plans::call("rms_norm_many_forward", {call.xs, call.weights, cos, sin, o.interleaved, o.eps,
                                                          o.zero_centered, o.cast_dtype, optional(call.out_dtype)})
                  : cpu::rms_norm_many(call.xs, call.weights, cos, sin, o.interleaved, o.eps, o.zero_centered,
                                       o.cast_dtype, call.out_dtype, saves_statistics);
  const size_t n = call.xs.size();
  TORCH_CHECK(found.size() == 2 * n, "fastnorm: rms_norm_many_forward returned ", found.size(), " tensors");
  return {{found.begin(), found.begin() + n}, {found.begin() + n, found.end()}};
}

// What autograd keeps for the backward.
struct Saved {
  variable_list xs, weights, rstds;
  Tensor cos, sin;

  variable_list list() const {
    variable_list tensors{cos, sin};
    tensors.reserve(2 + 3 * xs.size());
    for (const auto* of_inputs : {&xs, &weights, &rstds}) {
      tensors.insert(tensors.end(), of_inputs->begin(), of_inputs->end());
    }
    return tensors;
  }

  static Saved from(const variable_list& tensors) {
    const auto begin = tensors.begin() + 2;
    const auto n = static_cast<std::ptrdiff_t>(tensors.size() - 2) / 3;
    return {{begin, begin + n}, {begin + n, begin + 2 * n}, {begin + 2 * n, begin + 3 * n}, tensors[0], tensors[1]};
  }
};

// x₀, w₀, x₁, w₁, …
variable_list pairs(const variable_list& xs, const variable_list& weights) {
  variable_list tensors;
  tensors.reserve(2 * xs.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    tensors.push_back(xs[i]);
    tensors.push_back(weights[i]);
  }
  return tensors;
}

// As `expanded`, of any tensor: a hook of saved tensors may have returned a subclass.
variable_list expanded_by_operations(const Tensor& factor, const variable_list& xs, int64_t sequence_dim) {
  variable_list views;
  for (size_t i = 0; factor.defined() && i < xs.size(); ++i) {
    at::DimVector sizes(xs[i].dim(), 1), expanded_sizes(xs[i].sizes());
    sizes[sequence_dim_of(xs[i], sequence_dim)] = factor.size(-2);
    sizes.back() = expanded_sizes.back() = factor.size(-1);
    if (factor.dim() == 3) {
      sizes[0] = factor.size(0);
    }
    views.push_back(factor.reshape(sizes).expand(expanded_sizes));
  }
  return views;
}

variable_list gradients_by_formula(const Options& o, const Saved& s, const variable_list& dys) {
  const pybind11::gil_scoped_acquire gil;
  const variable_list cos = expanded_by_operations(s.cos, s.xs, o.sequence_dim);
  const variable_list sin = expanded_by_operations(s.sin, s.xs, o.sequence_dim);
  return reference_gradients("rms_norm_many_gradients", pairs(s.xs, s.weights), list_of(dys), list_of(cos),
                             list_of(sin), o.interleaved, o.eps, o.zero_centered, or_none(o.cast_dtype));
}

// Inputs and gradients of the node: x₀, w₀, x₁, w₁, …
struct RMSNormManyFunction : torch::autograd::Function<RMSNormManyFunction> {
  static constexpr auto name = "RMSNormManyBackward";

  static variable_list forward(const Call& call) {
    Results results = fastnorm::forward(call, true);
    for (size_t i = 0; i < call.xs.size(); ++i) {
      tell_statistics(call.xs[i], {}, results.rstds[i], call.options.eps);
    }
    const auto save = [&](AutogradContext& ctx) {
      ctx.save_for_backward(Saved{call.xs, call.weights, results.rstds, call.cos, call.sin}.list());
      ctx.saved_data["options"] = call.options.packed();
    };
    variable_list outputs = results.ys;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!any_requires_grad({call.xs[i], call.weights[i]})) {
        outputs[i] = Tensor();
      }
    }
    attach<RMSNormManyFunction>(pairs(call.xs, call.weights), outputs, save);
    return std::move(results.ys);
  }

  static variable_list backward(AutogradContext* ctx, variable_list dys) {
    const variable_list tensors = ctx->get_saved_variables();
    const auto saved = Saved::from(tensors);
    const auto options = Options::unpacked(ctx->saved_data["options"].toIntVector());
    if (!kernels_can_take(tensors) || !kernels_can_take(dys)) {
      return gradients_by_formula(options, saved, dys);
    }
    return by_kernels(*ctx, options, saved, dys);
  }

 private:
  static variable_list by_kernels(const AutogradContext& ctx, const Options& o, const Saved& s,
                                  const variable_list& dys) {
    std::vector<size_t> wanted;
    Saved some{.cos = s.cos, .sin = s.sin};
    variable_list some_dys;
    std::vector<bool> wants_dweight;
    for (size_t i = 0; i < s.xs.size(); ++i) {
      const bool wants_dw = gradient_dtype(&ctx, 2 * i + 1, s.weights[i]).has_value();
      if (dys[i].defined() && (wants_dw || ctx.needs_input_grad(2 * i))) {
        wanted.push_back(i);
        some.xs.push_back(s.xs[i]);
        some.weights.push_back(s.weights[i]);
        some.rstds.push_back(s.rstds[i]);
        some_dys.push_back(dys[i]);
        wants_dweight.push_back(wants_dw);
      }
    }
    variable_list gradients(2 * s.xs.size());
    if (wanted.empty()) {
      return gradients;
    }
    const variable_list found = backward_of(o, some, some_dys, wants_dweight);
    size_t next = wanted.size();  // dweights follow
    for (size_t k = 0; k < wanted.size(); ++k) {
      gradients[2 * wanted[k]] = found.at(k);
      if (wants_dweight[k]) {
        gradients[2 * wanted[k] + 1] = found.at(next++);
      }
    }
    return gradients;
  }

  // What the operator rms_norm_many_backward returns.
  static variable_list backward_of(const Options& o, const Saved& s, const variable_list& dys,
                                   const std::vector<bool>& wants_dweight) {
    const variable_list cos = expanded(s.cos, s.xs, o.sequence_dim), sin = expanded(s.sin, s.xs, o.sequence_dim);
    if (o.on_triton) {
      return plans::call("rms_norm_many_backward", {dys, s.xs, s.weights, s.rstds, cos, sin, o.interleaved,
                                                    o.zero_centered, o.cast_dtype, wants_dweight});
    }
    return cpu::rms_norm_many_gradients(dys, s.xs, s.weights, s.rstds, cos, sin, o.interleaved, o.zero_centered,
                                        o.cast_dtype, wants_dweight);
  }
};

// The elements of a list or tuple; none of anything else.
optional<c10::ArrayRef<PyObject*>> elements(PyObject* object) {
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) {
    return std::nullopt;
  }
  return c10::ArrayRef<PyObject*>(PySequence_Fast_ITEMS(object), PySequence_Fast_GET_SIZE(object));
}

// Reads pairs (x, weight or None), of one dtype and on one device.
bool read_inputs(PyObject* object, Call& call) {
  const auto inputs = elements(object);
  if (!inputs || inputs->empty()) {
    return false;
  }
  call.xs.reserve(inputs->size());
  call.weights.reserve(inputs->size());
  for (PyObject* const input : *inputs) {
    const auto pair = elements(input);
    Tensor& x = call.xs.emplace_back();
    Tensor& weight = call.weights.emplace_back();
    if (!pair || pair->size() != 2 || !unpack((*pair)[0], x) || x.numel() == 0 || x.dim() == 0) {
      return false;
    }
    const Tensor& first = call.xs.front();
    if (x.scalar_type() != first.scalar_type() || x.device() != first.device() ||
        !unpack_optional((*pair)[1], {x.size(-1)}, x.device(), weight)) {
      return false;
    }
  }
  return true;
}

// Whether cos or sin is (S, r) or (B or 1, S, r) for x.
bool fits(const Tensor& factor, const Tensor& x, int64_t given_dim) {
  const int64_t dim = sequence_dim_of(x, given_dim);
  if (dim < 0 || dim >= x.dim() - 1 || factor.size(-2) != x.size(dim) || factor.size(-1) > x.size(-1)) {
    return false;
  }
  return factor.dim() == 2 || (dim > 0 && (factor.size(0) == 1 || factor.size(0) == x.size(0)));
}

// Reads (cos, sin, sequence_dim): both None, or both tensors. The inputs are known.
bool read_rotation(PyObject* const* args, Call& call) {
  if (!PyLong_CheckExact(args[2])) {
    return false;
  }
  if (args[0] == Py_None || args[1] == Py_None) {
    return args[0] == args[1];
  }
  if (!unpack(args[0], call.cos) || !unpack(args[1], call.sin)) {
    return false;
  }
  int64_t& dim = call.options.sequence_dim;
  dim = PyLong_AsLongLong(args[2]);
  if (dim == -1 && PyErr_Occurred()) {
    PyErr_Clear();  // a number beyond 64 bits
    return false;
  }
  const Tensor& cos = call.cos;
  const auto device = call.xs.front().device();
  if ((cos.dim() != 2 && cos.dim() != 3) || call.sin.sizes() != cos.sizes() || cos.size(-1) == 0 ||
      cos.size(-1) % 2 != 0 || cos.device() != device || call.sin.device() != device ||
      any_requires_grad({cos, call.sin})) {
    return false;
  }
  return std::all_of(call.xs.begin(), call.xs.end(), [&](const Tensor& x) { return fits(cos, x, dim); });
}

// The dtype of all ys; none where they differ.
optional<ScalarType> common_dtype(const Call& call, bool is_llama) {
  optional<ScalarType> common;
  for (size_t i = 0; i < call.xs.size(); ++i) {
    const ScalarType x_dtype = call.xs[i].scalar_type();
    const auto dtype = !is_llama                   ? (autocasts("aten::rms_norm", call.xs[i]) ? at::kFloat : x_dtype)
                       : call.weights[i].defined() ? c10::promoteTypes(x_dtype, call.weights[i].scalar_type())
                                                   : x_dtype;
    if (common.value_or(dtype) != dtype) {
      return std::nullopt;
    }
    common = dtype;
  }
  return common;
}

// Reads (served, inputs, cos, sin, sequence_dim, interleaved, eps, zero_centered, out_dtype, rounding).
constexpr Py_ssize_t n_arguments = 10;
bool read(PyObject* const* args, Call& call) {
  Options& o = call.options;
  optional<ScalarType> out_dtype;
  if (!read_inputs(args[1], call) || !read_rotation(args + 2, call) || !unpack_bool(args[5], o.interleaved) ||
      !unpack_bool(args[7], o.zero_centered) || !unpack_dtype(args[8], out_dtype) || !PyUnicode_CheckExact(args[9])) {
    return false;
  }
  const bool is_llama = PyUnicode_CompareWithASCIIString(args[9], "llama") == 0;
  if (!is_llama && PyUnicode_CompareWithASCIIString(args[9], "torch") != 0) {
    return false;
  }
  const Tensor& x = call.xs.front();
  if (is_llama) {
    o.cast_dtype = x.scalar_type();
  }
  out_dtype = out_dtype ? out_dtype : common_dtype(call, is_llama);
  const auto triton = on_triton(PyLong_AsLongLong(args[0]), x);
  if (!out_dtype || !triton) {
    return false;
  }
  call.out_dtype = *out_dtype;
  o.on_triton = *triton;
  return unpack_eps(args[6], true, x.scalar_type(), o.eps) && is_not_intercepted();
}

PyObject* rms_norm_many(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == n_arguments, "rms_norm_many takes ", n_arguments, " arguments, but got ", count);
  Call call{};
  if (!read(args, call)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  variable_list ys;
  {
    pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("fastnorm::rms_norm_many", std::vector<c10::IValue>(call.xs.begin(), call.xs.end()));
    const bool records = any_requires_grad(call.xs) || any_requires_grad(call.weights);
    ys = records ? RMSNormManyFunction::forward(call) : forward(call, false).ys;
  }
  PyObject* const results = PyTuple_New(static_cast<Py_ssize_t>(ys.size()));
  for (size_t i = 0; i < ys.size() && results != nullptr; ++i) {
    PyTuple_SET_ITEM(results, static_cast<Py_ssize_t>(i), THPVariable_Wrap(std::move(ys[i])));
  }
  return results;
  END_HANDLE_TH_ERRORS
}

}  // namespace

int add_rms_norm_many_call(PyObject* module) {
  static PyMethodDef methods[] = {
      {"rms_norm_many", as_method(&rms_norm_many), METH_FASTCALL,
       "rms_norm_many(served, inputs, cos, sin, sequence_dim, interleaved, eps, zero_centered, out_dtype, rounding): "
       "NotImplemented for what is wrong or not plain"},
      {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, methods);
}

}  // namespace fastnorm
