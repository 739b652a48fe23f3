// Whole calls of the row norms from Python: arguments, outputs, autograd and the kernel's start, without the trips
// through Python that autograd.Function and torch.ops take. The backend that serves the device computes: a native
// kernel, or a launch plan of Triton's.
#include <ATen/TensorOperators.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <bit>
#include <utility>
#include <vector>

#include "arguments.h"
#include "calls.h"
#include "cpu/row_norm.h"
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

// An operation's number, the index of its name: 2 · kind + is_rms.
enum class Kind { plain, add, gated, modulated };
constexpr std::array names{"fastnorm::layer_norm",           "fastnorm::rms_norm",          "fastnorm::add_layer_norm",
                           "fastnorm::add_rms_norm",         "fastnorm::gated_layer_norm",  "fastnorm::gated_rms_norm",
                           "fastnorm::modulated_layer_norm", "fastnorm::modulated_rms_norm"};
Kind kind_of(int64_t operation) { return static_cast<Kind>(operation / 2); }
bool is_rms_norm(int64_t operation) { return operation % 2 != 0; }

// The options that the forward leaves to the backward.
struct Options {
  bool on_triton, subtract_mean, zero_centered;
  bool silu, norm_before_gate;  // of the gate
  bool has_samples;             // whether weight, bias and x_gate have a row for each sample
  int64_t dims;                 // how many trailing dimensions are normalised
  int64_t groups;               // into which they are cut
  int64_t samples;              // into which the rows are cut
  double eps;
  optional<ScalarType> cast_dtype;
  ScalarType x_dtype;
  optional<ScalarType> residual_dtype;  // of the residual; none without one

  cpu::Norm norm() const { return subtract_mean ? cpu::Norm::layer : cpu::Norm::rms; }

  // As integers, because ctx.saved_data holds no structs.
  std::vector<int64_t> packed() const {
    const auto type = [](const optional<ScalarType>& t) { return t ? static_cast<int64_t>(*t) : -1; };
    const int64_t flags =
        on_triton | subtract_mean << 1 | zero_centered << 2 | silu << 3 | norm_before_gate << 4 | has_samples << 5;
    const auto eps_bits = std::bit_cast<int64_t>(eps);
    return {flags, dims, groups, samples, eps_bits, type(cast_dtype), type(x_dtype), type(residual_dtype)};
  }

  static Options unpacked(const std::vector<int64_t>& values) {
    const auto flag = [&](int bit) { return (values[0] >> bit & 1) != 0; };
    const auto type = [](int64_t t) { return t < 0 ? std::nullopt : optional(static_cast<ScalarType>(t)); };
    return {flag(0),         flag(1),          flag(2),        flag(3),   flag(4),
            flag(5),         values[1],        values[2],      values[3], std::bit_cast<double>(values[4]),
            type(values[5]), *type(values[6]), type(values[7])};
  }
};

// residual, weight, bias, gate and x_gate are undefined where they were not given.
struct Call {
  Options options;
  Tensor x, residual, weight, bias, gate, x_gate;
  ScalarType out_dtype;
  optional<ScalarType> h_dtype;  // of h; none where h is x

  at::IntArrayRef shape() const { return x.sizes().slice(x.dim() - options.dims); }
};

// Whether a parameter of samples must become (samples, columns) first.
bool has_other_shape(const Options& o, const Tensor& parameter) {
  return o.has_samples && parameter.defined() && parameter.dim() != 2;
}

// A parameter as the formula takes it: of samples as rows, (samples, columns).
Tensor rows_of(const Options& o, const Tensor& parameter) {
  return has_other_shape(o, parameter) ? parameter.reshape({o.samples, parameter.sizes().back()}) : parameter;
}

// The same for kernels. Autograd sees the parameters as they were given, and three views by the dispatcher would take
// half of the call's time.
Tensor kernel_rows_of(const Options& o, const Tensor& parameter) {
  if (!has_other_shape(o, parameter)) {
    return parameter;
  }
  // A hook on saved tensors may have returned other sizes, or another layout.
  TORCH_CHECK(parameter.dim() > 0 && parameter.numel() == o.samples * parameter.sizes().back(),
              "fastnorm: expected a scale, shift or gate with a row for each of ", o.samples, " samples, got ",
              parameter.sizes());
  const at::DimVector sizes{o.samples, parameter.sizes().back()};
  const auto strides = at::detail::computeStride(parameter.sizes(), parameter.strides(), sizes);
  if (!strides) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return parameter.reshape(sizes);
  }
  Tensor rows = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(parameter.storage()),
                                                         parameter.key_set(), parameter.dtype());
  rows.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, *strides, parameter.storage_offset());
  return rows;
}

cpu::ForwardResult forward(const Call& call, bool saves_statistics) {
  const Options& o = call.options;
  const Tensor x_gate = kernel_rows_of(o, call.x_gate), weight = kernel_rows_of(o, call.weight),
               bias = kernel_rows_of(o, call.bias);
  if (!o.on_triton) {
    return cpu::norm_forward({o.norm(), call.x, call.residual, call.gate, x_gate, o.dims, o.groups, o.samples,
                              as_optional(weight), as_optional(bias), o.eps, o.zero_centered, o.silu,
                              o.norm_before_gate, o.cast_dtype, call.out_dtype, call.h_dtype, saves_statistics});
  }
  const auto results =
      plans::call("row_norm_forward", {call.x, call.residual, call.gate, x_gate, o.dims, o.groups, o.samples, weight,
                                       bias, o.eps, o.subtract_mean, o.zero_centered, o.silu, o.norm_before_gate,
                                       o.cast_dtype, optional(call.out_dtype), call.h_dtype});
  return {results.at(0), results.at(1), results.at(2), results.at(3)};
}

// What autograd keeps for the backward. h is x of the forward where that made no h; x is kept with an x_gate alone.
struct Saved {
  Tensor h, x, weight, bias, gate, x_gate, mean, rstd;

  variable_list list() const { return {h, x, weight, bias, gate, x_gate, mean, rstd}; }
  static Saved from(const variable_list& t) { return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]}; }
};

// The gradients of x, residual, weight, bias, gate and x_gate by the formula in fastnorm.reference, which can be
// differentiated again. dy or dh may be undefined.
variable_list gradients_by_formula(const Options& o, const Saved& s, const Tensor& dy, const Tensor& dh) {
  const pybind11::gil_scoped_acquire gil;
  const auto shape = s.h.sizes().slice(s.h.dim() - o.dims).vec();
  return reference_gradients("row_norm_gradients",
                             {s.h, rows_of(o, s.weight), rows_of(o, s.bias), s.gate, s.x, rows_of(o, s.x_gate)}, dy, dh,
                             pybind11::make_tuple(o.x_dtype, or_none(o.residual_dtype)), shape, o.eps, o.subtract_mean,
                             o.zero_centered, or_none(o.cast_dtype), o.groups, o.silu, o.norm_before_gate);
}

// Calls body(gradient, sizes) for the gradients of parameters that were given in another shape.
template <typename Body>
void each_of_other_shape(const Options& o, const Saved& s, variable_list& gradients, const Body& body) {
  for (const auto& [place, given] : {std::pair(2, &s.weight), std::pair(3, &s.bias), std::pair(5, &s.x_gate)}) {
    if (has_other_shape(o, *given) && gradients[place].defined()) {
      body(gradients[place], given->sizes());
    }
  }
}

struct RowNormFunction : torch::autograd::Function<RowNormFunction> {
  static constexpr auto name = "RowNormBackward";

  static cpu::ForwardResult forward(const Call& call) {
    cpu::ForwardResult result = fastnorm::forward(call, true);
    if (!call.gate.defined() || call.options.norm_before_gate) {  // else they are not x's, but x · act(gate)'s
      tell_statistics(call.x, result.mean, result.rstd, call.options.eps);
    }
    const auto save = [&](AutogradContext& ctx) {
      const Tensor& h = result.h.defined() ? result.h : call.x;
      const Tensor x = call.x_gate.defined() ? call.x : Tensor();
      const Saved saved{h, x, call.weight, call.bias, call.gate, call.x_gate, result.mean, result.rstd};
      ctx.save_for_backward(saved.list());
      ctx.saved_data["options"] = call.options.packed();
    };
    // y's parameters don't lead to h
    const bool h_is_result = result.h.defined() && any_requires_grad({call.x, call.residual, call.x_gate});
    attach<RowNormFunction>({call.x, call.residual, call.weight, call.bias, call.gate, call.x_gate},
                            {result.y, h_is_result ? result.h : Tensor()}, save);
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = Saved::from(ctx->get_saved_variables());
    const auto options = Options::unpacked(ctx->saved_data["options"].toIntVector());
    const bool adds = options.residual_dtype.has_value(), makes_h = adds || saved.x_gate.defined();
    const Tensor dy = grads[0], dh = makes_h ? grads[1] : Tensor();
    variable_list gradients(6);  // x, residual, weight, bias, gate, x_gate
    if (dy.defined() && kernels_can_take({dy, dh, saved.h, saved.x, saved.weight, saved.bias, saved.gate, saved.x_gate,
                                          saved.mean, saved.rstd})) {
      const cpu::GradientDtypes dtypes{options.x_dtype, options.residual_dtype, gradient_dtype(ctx, 2, saved.weight),
                                       gradient_dtype(ctx, 3, saved.bias)};
      const auto [dx, dresidual, dgate, dx_gate, dweight, dbias] = by_kernels(options, saved, dy, dh, dtypes);
      gradients[0] = dx;
      gradients[1] = !adds ? Tensor() : dresidual.defined() ? dresidual : dx;
      gradients[2] = dweight;
      gradients[3] = dbias;
      gradients[4] = dgate;
      gradients[5] = dx_gate;
      each_of_other_shape(options, saved, gradients, [](Tensor& gradient, at::IntArrayRef sizes) {
        gradient.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);  // new and contiguous, and nobody else's
      });
    } else if (dy.defined() || dh.defined()) {
      gradients = gradients_by_formula(options, saved, dy, dh);
      each_of_other_shape(options, saved, gradients,
                          [](Tensor& gradient, at::IntArrayRef sizes) { gradient = gradient.view(sizes); });
    }
    return gradients;
  }

 private:
  static cpu::BackwardResult by_kernels(const Options& o, const Saved& s, const Tensor& dy, const Tensor& dh,
                                        const cpu::GradientDtypes& dtypes) {
    const Tensor x_gate = kernel_rows_of(o, s.x_gate), weight = kernel_rows_of(o, s.weight),
                 bias = kernel_rows_of(o, s.bias);
    if (!o.on_triton) {
      return cpu::norm_backward({o.norm(), dy, dh, s.h, s.x, s.gate, x_gate, o.dims, o.groups, o.samples,
                                 as_optional(weight), as_optional(bias), s.mean, s.rstd, o.zero_centered, o.silu,
                                 o.norm_before_gate, o.cast_dtype, dtypes});
    }
    const auto call = [](const auto&... arguments) { return plans::call("row_norm_backward", {arguments...}); };
    const auto results = call(dy, dh, s.h, s.x, s.gate, x_gate, o.dims, o.groups, o.samples, weight, bias, s.mean,
                              s.rstd, o.zero_centered, o.silu, o.norm_before_gate, o.cast_dtype, optional(dtypes.x),
                              dtypes.residual, dtypes.weight, dtypes.bias);
    return {results.at(0), results.at(1), results.at(2), results.at(3), results.at(4), results.at(5)};
  }
};

// Reads normalized_shape: a sequence of integers that are x's last sizes, of which `dims` is the number. Modulated
// norms have None, which is the last.
bool unpack_shape(PyObject* object, Kind kind, const Tensor& x, int64_t& dims) {
  if (kind == Kind::modulated) {
    dims = 1;
    return object == Py_None && x.dim() > 0;
  }
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

// Reads (gate, activation, norm_before_gate, group_size), after the other arguments; call.options.dims is known.
constexpr Py_ssize_t n_gated_arguments = 4;
bool read_gated(PyObject* const* args, Call& call) {
  Options& o = call.options;
  if (!unpack_optional(args[0], call.x.sizes(), call.x.device(), call.gate) || !PyUnicode_CheckExact(args[1]) ||
      !unpack_bool(args[2], o.norm_before_gate) || call.residual.defined()) {
    return false;
  }
  o.silu = PyUnicode_CompareWithASCIIString(args[1], "silu") == 0;
  if (args[3] != Py_None) {
    const int64_t width = c10::multiply_integers(call.shape());
    const int64_t size = PyLong_CheckExact(args[3]) ? PyLong_AsLongLong(args[3]) : 0;
    PyErr_Clear();  // a number beyond 64 bits
    if (size < 1 || width % size != 0) {
      return false;
    }
    o.groups = width / size;
  }
  return o.silu || PyUnicode_CompareWithASCIIString(args[1], "sigmoid") == 0;
}

// Along how many of x's first dimensions a scale, shift or gate differs; −1 where the sizes don't fit. They are x's
// first sizes, ones, and x's last; leading ones may be left out, and of (B, H) the ones between. A dimension of one
// element counts, so that a sample alone is treated as in a batch.
int64_t level_of(at::IntArrayRef sizes, at::IntArrayRef x) {
  const auto dims = static_cast<int64_t>(x.size()), given = static_cast<int64_t>(sizes.size());
  if (given == 0 || given > dims || sizes.back() != x.back()) {
    return -1;
  }
  const bool is_of_batch = given == 2 && dims > 2;
  const auto size = [&](int64_t dim) -> int64_t {
    return is_of_batch ? (dim == 0 ? sizes[0] : 1) : dim < dims - given ? 1 : sizes[dim - (dims - given)];
  };
  const auto fits = [&](int64_t level) {
    for (int64_t dim = 0; dim < dims - 1; ++dim) {
      if (size(dim) != (dim < level ? x[dim] : 1)) {
        return false;
      }
    }
    return true;
  };
  for (int64_t level = 1; given > 1 && level < dims; ++level) {
    if (fits(level)) {
      return level;
    }
  }
  return fits(0) ? 0 : -1;
}

// Reads scale, shift and gate, and how many samples x has; not where one has fewer rows than another, or rows that no
// stride leads along.
bool read_modulated(PyObject* scale, PyObject* shift, PyObject* gate, Call& call) {
  Options& o = call.options;
  o.has_samples = true;
  int64_t level = -1;
  const auto read_one = [&](PyObject* object, Tensor& out) {
    if (object == Py_None) {
      return true;
    }
    if (!unpack(object, out) || out.device() != call.x.device()) {
      return false;
    }
    const int64_t found = level_of(out.sizes(), call.x.sizes());
    if (found < 0 || (level >= 0 && found != level)) {
      return false;
    }
    level = found;
    o.samples = c10::multiply_integers(call.x.sizes().slice(0, level));
    return at::detail::computeStride(out.sizes(), out.strides(), at::IntArrayRef({o.samples, out.sizes().back()}))
        .has_value();
  };
  return read_one(scale, call.weight) && read_one(shift, call.bias) && read_one(gate, call.x_gate);
}

Py_ssize_t n_further_arguments(Kind kind) {
  return kind == Kind::gated ? n_gated_arguments : kind == Kind::modulated ? 1 : 0;
}

// The dtype of y where the caller names none.
ScalarType default_dtype(const Call& call, int64_t operation, bool is_llama) {
  const Options& o = call.options;
  const Kind kind = kind_of(operation);
  const bool is_gated = kind == Kind::gated;
  if (is_llama) {
    const bool ends_with_weight = call.weight.defined() && !(is_gated && o.norm_before_gate);
    return ends_with_weight ? c10::promoteTypes(o.x_dtype, call.weight.scalar_type()) : o.x_dtype;
  }
  // gated and modulated norms have no stock operation whose autocast they would follow
  const bool has_stock = kind == Kind::plain || kind == Kind::add;
  const char* const stock = is_rms_norm(operation) ? "aten::rms_norm" : "aten::layer_norm";
  return has_stock && autocasts(stock, call.x) ? at::kFloat : o.x_dtype;
}

// Reads (operation, served, x, residual, shape, weight, bias, eps, zero_centered, out_dtype, residual_dtype, rounding),
// and then what read_gated reads, or x_gate of a modulated norm.
constexpr Py_ssize_t n_arguments = 12;
bool read(PyObject* const* args, int64_t operation, Call& call) {
  Options& o = call.options;
  const bool is_rms = is_rms_norm(operation);
  const Kind kind = kind_of(operation);
  if (!unpack(args[2], call.x) || call.x.numel() == 0 || !unpack_shape(args[4], kind, call.x, o.dims)) {
    return false;
  }
  const auto device = call.x.device();
  const auto triton = on_triton(PyLong_AsLongLong(args[1]), call.x);
  optional<ScalarType> out_dtype;
  o.groups = o.samples = 1;
  const bool has_parameters = kind == Kind::modulated ? read_modulated(args[5], args[6], args[n_arguments], call)
                                                      : unpack_optional(args[5], call.shape(), device, call.weight) &&
                                                            unpack_optional(args[6], call.shape(), device, call.bias);
  if (!has_parameters || !triton || !unpack_optional(args[3], call.x.sizes(), device, call.residual) ||
      !unpack_bool(args[8], o.zero_centered) || !unpack_dtype(args[9], out_dtype) ||
      !unpack_dtype(args[10], call.h_dtype) || !PyUnicode_CheckExact(args[11])) {
    return false;
  }
  if (kind == Kind::gated && !read_gated(args + n_arguments, call)) {
    return false;
  }
  o.on_triton = *triton;
  o.subtract_mean = !is_rms;
  o.x_dtype = call.x.scalar_type();
  if (call.residual.defined()) {
    o.residual_dtype = call.residual.scalar_type();
    call.h_dtype = call.h_dtype.value_or(c10::promoteTypes(o.x_dtype, *o.residual_dtype));
  } else if (call.x_gate.defined()) {
    call.h_dtype = call.h_dtype.value_or(o.x_dtype);
  } else if (call.h_dtype.value_or(o.x_dtype) != o.x_dtype) {
    return false;  // h would be x in another dtype
  } else {
    call.h_dtype.reset();
  }
  const bool is_llama = PyUnicode_CompareWithASCIIString(args[11], "llama") == 0;
  if (is_llama ? !is_rms || o.has_samples : PyUnicode_CompareWithASCIIString(args[11], "torch") != 0) {
    return false;
  }
  if (is_llama) {
    o.cast_dtype = o.x_dtype;
  }
  call.out_dtype = out_dtype ? *out_dtype : default_dtype(call, operation, is_llama);
  const bool has_double_gate = call.gate.defined() && call.gate.scalar_type() == at::kDouble;
  const bool is_double = has_double_gate || o.x_dtype == at::kDouble || o.residual_dtype == at::kDouble;
  const auto computed = is_double ? at::kDouble : call.h_dtype.value_or(o.x_dtype);
  return unpack_eps(args[7], is_rms, computed, o.eps) && is_not_intercepted();
}

PyObject* row_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const int64_t operation = count > 0 ? PyLong_AsLongLong(args[0]) : 0;
  const Kind kind = kind_of(operation);
  const Py_ssize_t expected = n_arguments + n_further_arguments(kind);
  TORCH_CHECK_TYPE(count == expected, "row_norm takes ", expected, " arguments, but got ", count);
  Call call{};
  if (!read(args, operation, call)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor y, h;
  {
    pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION(names.at(operation), std::vector<c10::IValue>({call.x}));
    const bool records = any_requires_grad({call.x, call.residual, call.weight, call.bias, call.gate, call.x_gate});
    cpu::ForwardResult result = records ? RowNormFunction::forward(call) : forward(call, false);
    y = std::move(result.y);
    h = std::move(result.h);
  }
  if (kind == Kind::plain || kind == Kind::gated) {
    return THPVariable_Wrap(std::move(y));
  }
  // without a residual and an x_gate h is x itself
  PyObject* const h_object = h.defined() ? THPVariable_Wrap(std::move(h)) : Py_NewRef(args[2]);
  return Py_BuildValue("NN", THPVariable_Wrap(std::move(y)), h_object);
  END_HANDLE_TH_ERRORS
}

}  // namespace

int add_row_norm_calls(PyObject* module) {
  static PyMethodDef methods[] = {
      {"row_norm", as_method(&row_norm), METH_FASTCALL,
       "row_norm(operation, served, x, residual, normalized_shape, weight, bias, eps, zero_centered, "
       "out_dtype, residual_dtype, rounding), for a gated one also (gate, activation, norm_before_gate, group_size), "
       "for a modulated one (x_gate,): NotImplemented for what is wrong or not plain"},
      {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, methods);
}

}  // namespace fastnorm
