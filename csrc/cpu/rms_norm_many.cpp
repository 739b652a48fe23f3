// RMSNorm of several inputs in one call, each with its rotary embedding, and the operators. Each input is a call of its
// own, so that its results don't depend on the others.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "rms_norm_many.h"

#include "row_norm.h"

namespace fastnorm::cpu {
namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;

void check_length(size_t length, const char* name, at::TensorList inputs) {
  TORCH_CHECK(length == inputs.size(), "fastnorm: expected ", inputs.size(), " ", name, ", one for each input, got ",
              length);
}

void check_lists(at::TensorList inputs, at::TensorList weights, at::TensorList cos, at::TensorList sin) {
  check_length(weights.size(), "weights", inputs);
  if (!cos.empty() || !sin.empty()) {
    check_length(cos.size(), "cos", inputs);
    check_length(sin.size(), "sin", inputs);
  }
  for (const Tensor& x : inputs) {
    TORCH_CHECK(x.scalar_type() == inputs[0].scalar_type(), "fastnorm: expected inputs of one dtype, got ",
                inputs[0].scalar_type(), " and ", x.scalar_type());
  }
}

// The tensor of an input, or an undefined one where the list is empty.
Tensor of(at::TensorList tensors, size_t i) { return tensors.empty() ? Tensor() : tensors[i]; }

optional<Tensor> weight_of(at::TensorList weights, size_t i) {
  return weights[i].defined() ? optional(weights[i]) : std::nullopt;
}

}  // namespace

std::vector<Tensor> rms_norm_many(at::TensorList inputs, at::TensorList weights, at::TensorList cos, at::TensorList sin,
                                  bool interleaved, double eps, bool zero_centered, optional<ScalarType> cast_dtype,
                                  ScalarType out_dtype, bool saves_statistics) {
  check_lists(inputs, weights, cos, sin);
  std::vector<Tensor> results(2 * inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    const ForwardResult result = norm_forward({.norm = Norm::rms,
                                               .x = inputs[i],
                                               .dims = 1,
                                               .groups = 1,
                                               .samples = 1,
                                               .weight = weight_of(weights, i),
                                               .eps = eps,
                                               .zero_centered = zero_centered,
                                               .cast_dtype = cast_dtype,
                                               .out_dtype = out_dtype,
                                               .saves_statistics = saves_statistics,
                                               .cos = of(cos, i),
                                               .sin = of(sin, i),
                                               .interleaved = interleaved});
    results[i] = result.y;
    results[inputs.size() + i] = result.rstd;
  }
  return results;
}

std::vector<Tensor> rms_norm_many_gradients(at::TensorList grads, at::TensorList inputs, at::TensorList weights,
                                            at::TensorList rstds, at::TensorList cos, at::TensorList sin,
                                            bool interleaved, bool zero_centered, optional<ScalarType> cast_dtype,
                                            const std::vector<bool>& wants_dweight) {
  check_lists(inputs, weights, cos, sin);
  check_length(grads.size(), "grads", inputs);
  check_length(rstds.size(), "rstds", inputs);
  check_length(wants_dweight.size(), "wants_dweight", inputs);
  std::vector<Tensor> results(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    TORCH_CHECK(!wants_dweight[i] || weights[i].defined(), "fastnorm: expected a weight where its gradient is wanted");
    const auto dweight_dtype = wants_dweight[i] ? optional(weights[i].scalar_type()) : std::nullopt;
    const BackwardResult result =
        norm_backward({.norm = Norm::rms,
                       .dy = grads[i],
                       .h = inputs[i],
                       .dims = 1,
                       .groups = 1,
                       .samples = 1,
                       .weight = weight_of(weights, i),
                       .rstd = rstds[i],
                       .zero_centered = zero_centered,
                       .cast_dtype = cast_dtype,
                       .dtypes = {inputs[i].scalar_type(), std::nullopt, dweight_dtype, std::nullopt},
                       .cos = of(cos, i),
                       .sin = of(sin, i),
                       .interleaved = interleaved});
    results[i] = result.dx;
    if (dweight_dtype) {
      results.push_back(result.dweight);
    }
  }
  return results;
}

namespace {

using Weights = c10::List<optional<Tensor>>;

// With undefined tensors for those that are None.
std::vector<Tensor> defined_or_not(const Weights& weights) {
  std::vector<Tensor> tensors;
  for (const optional<Tensor>& weight : weights) {
    tensors.push_back(weight.value_or(Tensor()));
  }
  return tensors;
}

std::vector<Tensor> rms_norm_many_forward(at::TensorList inputs, const Weights& weights, at::TensorList cos,
                                          at::TensorList sin, bool interleaved, double eps, bool zero_centered,
                                          optional<ScalarType> cast_dtype, ScalarType out_dtype) {
  return rms_norm_many(inputs, defined_or_not(weights), cos, sin, interleaved, eps, zero_centered, cast_dtype,
                       out_dtype);
}

std::vector<Tensor> rms_norm_many_backward(at::TensorList grads, at::TensorList inputs, const Weights& weights,
                                           at::TensorList rstds, at::TensorList cos, at::TensorList sin,
                                           bool interleaved, bool zero_centered, optional<ScalarType> cast_dtype,
                                           const c10::List<bool>& wants_dweight) {
  return rms_norm_many_gradients(grads, inputs, defined_or_not(weights), rstds, cos, sin, interleaved, zero_centered,
                                 cast_dtype, {wants_dweight.begin(), wants_dweight.end()});
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("rms_norm_many_forward", &rms_norm_many_forward);
  m.impl("rms_norm_many_backward", &rms_norm_many_backward);
}

}  // namespace fastnorm::cpu
