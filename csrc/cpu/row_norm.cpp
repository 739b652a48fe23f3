// The row norms on the CPU: results, checks, and the operators. row_forward.cpp and row_backward.cpp loop over the
// rows; row_kernels.h has the kernels, which work on one row, and narrow_row_kernels.h those that work on several.
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <tuple>

#include "row_loops.h"

namespace fastnorm::cpu {
namespace {

at::IntArrayRef normalized_sizes(const at::Tensor& x, int64_t dims) { return x.sizes().slice(x.dim() - dims); }

int64_t count_rows(const at::Tensor& x, int64_t dims) {
  return c10::multiply_integers(x.sizes().slice(0, x.dim() - dims));
}

at::DimVector sizes_per_sample(const at::Tensor& x, int64_t dims, int64_t samples) {
  at::DimVector sizes(normalized_sizes(x, dims));
  sizes.insert(sizes.begin(), samples);
  return sizes;
}

ForwardResult make_results(const ForwardCall& call, at::ScalarType statistics_dtype) {
  ForwardResult result;
  result.y = empty(call.x.sizes(), call.out_dtype);
  if (call.residual_dtype) {
    result.h = empty(call.x.sizes(), *call.residual_dtype);
  }
  if (call.saves_statistics) {
    const int64_t count = count_rows(call.x, call.dims) * call.groups;
    result.rstd = empty({count}, statistics_dtype);
    if (call.norm == Norm::layer) {
      result.mean = empty({count}, statistics_dtype);
    }
  }
  return result;
}

BackwardResult make_results(const BackwardCall& call) {
  const auto optional = [](at::IntArrayRef sizes, std::optional<at::ScalarType> type) {
    return type ? empty(sizes, *type) : at::Tensor();
  };
  const auto like = [](const at::Tensor& tensor) {
    return tensor.defined() ? empty(tensor.sizes(), tensor.scalar_type()) : at::Tensor();
  };
  const auto parameter = [&](const std::optional<at::Tensor>& given, std::optional<at::ScalarType> type) {
    if (given && given->defined()) {
      return optional(given->sizes(), type);
    }
    return call.samples == 1 ? optional(normalized_sizes(call.h, call.dims), type)
                             : optional(sizes_per_sample(call.h, call.dims, call.samples), type);
  };
  const bool dx_serves = call.dtypes.residual == call.dtypes.x && !call.x_gate.defined();
  BackwardResult result;
  result.dx = empty(call.h.sizes(), call.dtypes.x);
  result.dresidual = optional(call.h.sizes(), dx_serves ? std::nullopt : call.dtypes.residual);
  result.dgate = like(call.gate);
  result.dx_gate = like(call.x_gate);
  result.dweight = parameter(call.weight, call.dtypes.weight);
  result.dbias = parameter(call.bias, call.dtypes.bias);
  return result;
}

bool is_double(const at::Tensor& tensor) { return tensor.defined() && tensor.scalar_type() == at::kDouble; }

// Checks what is normalised before the other tensors, whose expected shapes follow from it.
void check_input(const at::Tensor& x, int64_t dims) {
  TORCH_CHECK(dims > 0 && dims <= x.dim() && c10::multiply_integers(normalized_sizes(x, dims)) > 0,
              "fastnorm: expected x with elements in its last ", dims, " dimensions, got ", x.sizes());
  check_tensor(x, "x", x.sizes());
}

// x: what is normalised.
template <typename Call>
void check_rotation(const Call& call, const at::Tensor& x, std::optional<at::ScalarType> residual_dtype) {
  TORCH_CHECK(call.cos.defined() == call.sin.defined(), "fastnorm: expected cos with sin, and only with it");
  if (!call.cos.defined()) {
    return;
  }
  const bool is_plain_rms_norm = call.norm == Norm::rms && gate_of(call) == Gate::none && !residual_dtype && !call.bias;
  TORCH_CHECK(is_plain_rms_norm && call.dims == 1 && call.groups == 1 && call.samples == 1,
              "fastnorm: no kernel for a rotation but of rms_norm's rows, without a gate, residual or bias");
  at::DimVector sizes(x.sizes());
  sizes.back() = call.cos.dim() == 0 ? 0 : call.cos.size(-1);
  TORCH_CHECK(sizes.back() > 0 && sizes.back() % 2 == 0 && sizes.back() <= x.size(-1),
              "fastnorm: expected cos with an even number of columns, at most ", x.size(-1), ", got ",
              call.cos.sizes());
  check_tensor(call.cos, "cos", sizes);
  check_tensor(call.sin, "sin", sizes);
}

// x: what is normalised.
template <typename Call>
void check_features(const Call& call, const at::Tensor& x, std::optional<at::ScalarType> residual_dtype) {
  TORCH_CHECK(call.norm == Norm::rms || !call.cast_dtype, "fastnorm: no kernel for cast_dtype with subtract_mean");
  const int64_t width = c10::multiply_integers(normalized_sizes(x, call.dims)), n_rows = count_rows(x, call.dims);
  TORCH_CHECK(call.groups > 0 && width % call.groups == 0, "fastnorm: expected a number of groups that divides ", width,
              ", got ", call.groups);
  TORCH_CHECK(!call.gate.defined() || !residual_dtype, "fastnorm: no kernel for a gate with a residual");
  TORCH_CHECK(call.samples > 0 && n_rows % call.samples == 0, "fastnorm: expected a number of samples that divides ",
              n_rows, " rows, got ", call.samples);
  TORCH_CHECK(
      (call.samples == 1 && !call.x_gate.defined()) || (call.groups == 1 && !call.gate.defined() && !call.cast_dtype),
      "fastnorm: no kernel for samples or an x_gate with groups, a gate or cast_dtype");
  if (call.gate.defined()) {
    check_tensor(call.gate, "gate", x.sizes());
  }
  const auto check = [&](const at::Tensor& parameter, const char* name) {
    if (!parameter.defined()) {
      return;
    }
    if (call.samples == 1 && parameter.dim() == call.dims) {
      check_tensor(parameter, name, normalized_sizes(x, call.dims));
    } else {
      check_tensor(parameter, name, sizes_per_sample(x, call.dims, call.samples));
    }
  };
  check(call.weight.value_or(at::Tensor()), "weight");
  check(call.bias.value_or(at::Tensor()), "bias");
  check(call.x_gate, "x_gate");
  check_rotation(call, x, residual_dtype);
}

// weight, bias and x_gate as the kernels read them: (samples, cols) with adjacent columns, or contiguous.
template <typename Call>
void view_parameters(Call& call) {
  const auto view = [&](const std::optional<at::Tensor>& parameter) {
    const bool has_rows = call.samples > 1 && parameter && parameter->defined();
    return has_rows ? rows_of_samples(*parameter) : contiguous(parameter);
  };
  call.weight = view(call.weight);
  call.bias = view(call.bias);
  call.x_gate = *view(call.x_gate);
}

}  // namespace

ForwardResult norm_forward(ForwardCall call) {
  check_input(call.x, call.dims);
  if (call.residual.defined()) {
    check_tensor(call.residual, "residual", call.x.sizes());
  }
  TORCH_CHECK((call.residual.defined() || call.x_gate.defined()) == call.residual_dtype.has_value(),
              "fastnorm: expected residual_dtype with a residual or an x_gate, and only with one");
  check_features(call, call.x, call.residual_dtype);
  const bool in_double =
      is_double(call.x) || is_double(call.residual) || is_double(call.gate) || call.residual_dtype == at::kDouble;
  ForwardResult result = make_results(call, in_double ? at::kDouble : at::kFloat);
  const RowLevels levels({&call.x, &call.residual, &call.gate, &call.cos, &call.sin}, call.dims);
  view_parameters(call);
  run_forward(call, result, levels, in_double);
  return result;
}

BackwardResult norm_backward(BackwardCall call) {
  check_input(call.h, call.dims);
  check_tensor(call.dy, "dy", call.h.sizes());
  if (call.dh.defined()) {
    TORCH_CHECK(!call.gate.defined(), "fastnorm: no kernel for a gate with a residual");
    check_tensor(call.dh, "dh", call.h.sizes());
  }
  TORCH_CHECK(call.x.defined() == call.x_gate.defined(), "fastnorm: expected x with an x_gate, and only with one");
  if (call.x.defined()) {
    check_tensor(call.x, "x", call.h.sizes());
    TORCH_CHECK(call.x.scalar_type() == call.dtypes.x, "fastnorm: expected x in ", call.dtypes.x, ", got ",
                call.x.scalar_type());
  }
  check_features(call, call.h, call.dtypes.residual);
  const bool in_double =
      is_double(call.h) || is_double(call.gate) || call.dtypes.x == at::kDouble || call.dtypes.residual == at::kDouble;
  const at::ScalarType statistics_dtype = in_double ? at::kDouble : at::kFloat;
  const int64_t count = count_rows(call.h, call.dims) * call.groups;
  check_statistics(call.rstd, "rstd", {count}, statistics_dtype);
  if (call.norm == Norm::layer) {
    check_statistics(call.mean, "mean", {count}, statistics_dtype);
  }
  BackwardResult result = make_results(call);
  const RowLevels levels({&call.dy, &call.dh, &call.h, &call.x, &call.gate, &call.cos, &call.sin}, call.dims);
  view_parameters(call);
  run_backward(call, result, levels, in_double);
  return result;
}

namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;

Tensor or_undefined(const optional<Tensor>& tensor) { return tensor.value_or(Tensor()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> row_norm_forward(
    const Tensor& x, const optional<Tensor>& residual, const optional<Tensor>& gate, const optional<Tensor>& x_gate,
    int64_t dims, int64_t groups, int64_t samples, const optional<Tensor>& weight, const optional<Tensor>& bias,
    double eps, bool subtract_mean, bool zero_centered, bool silu, bool norm_before_gate,
    optional<ScalarType> cast_dtype, ScalarType out_dtype, optional<ScalarType> residual_dtype) {
  auto [y, h, mean, rstd] =
      norm_forward({subtract_mean ? Norm::layer : Norm::rms, x, or_undefined(residual), or_undefined(gate),
                    or_undefined(x_gate), dims, groups, samples, weight, bias, eps, zero_centered, silu,
                    norm_before_gate, cast_dtype, out_dtype, residual_dtype});
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_norm_backward(
    const Tensor& dy, const optional<Tensor>& dh, const Tensor& h, const optional<Tensor>& x,
    const optional<Tensor>& gate, const optional<Tensor>& x_gate, int64_t dims, int64_t groups, int64_t samples,
    const optional<Tensor>& weight, const optional<Tensor>& bias, const optional<Tensor>& mean, const Tensor& rstd,
    bool zero_centered, bool silu, bool norm_before_gate, optional<ScalarType> cast_dtype, ScalarType x_dtype,
    optional<ScalarType> residual_dtype, optional<ScalarType> dweight_dtype, optional<ScalarType> dbias_dtype) {
  auto [dx, dresidual, dgate, dx_gate, dweight, dbias] =
      norm_backward({mean ? Norm::layer : Norm::rms,
                     dy,
                     or_undefined(dh),
                     h,
                     or_undefined(x),
                     or_undefined(gate),
                     or_undefined(x_gate),
                     dims,
                     groups,
                     samples,
                     weight,
                     bias,
                     or_undefined(mean),
                     rstd,
                     zero_centered,
                     silu,
                     norm_before_gate,
                     cast_dtype,
                     {x_dtype, residual_dtype, dweight_dtype, dbias_dtype}});
  return {dx, dresidual, dgate, dx_gate, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("row_norm_forward", &row_norm_forward);
  m.impl("row_norm_backward", &row_norm_backward);
}

}  // namespace fastnorm::cpu
