// layer_norm and add_layer_norm on the CPU: schemas to calls.
#include <torch/library.h>

#include <tuple>

#include "norm.h"

namespace fastnorm::cpu {
namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, int64_t dims, const optional<Tensor>& weight,
                                                      const optional<Tensor>& bias, double eps, bool zero_centered,
                                                      ScalarType out_dtype) {
  auto [y, h, mean, rstd] =
      norm_forward({Norm::layer, x, dims, {}, weight, bias, eps, zero_centered, std::nullopt, out_dtype, std::nullopt});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x, int64_t dims,
                                                       const optional<Tensor>& weight, const Tensor& mean,
                                                       const Tensor& rstd, bool zero_centered,
                                                       optional<ScalarType> dweight_dtype,
                                                       optional<ScalarType> dbias_dtype) {
  auto [dx, dresidual, dweight, dbias] =
      norm_backward({Norm::layer, dy, {}, x, dims, weight, mean, rstd, zero_centered, std::nullopt, x.scalar_type(),
                     std::nullopt, dweight_dtype, dbias_dtype});
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x, const Tensor& residual,
                                                                  int64_t dims, const optional<Tensor>& weight,
                                                                  const optional<Tensor>& bias, double eps,
                                                                  bool zero_centered, ScalarType out_dtype,
                                                                  ScalarType residual_dtype) {
  auto [y, h, mean, rstd] = norm_forward(
      {Norm::layer, x, dims, residual, weight, bias, eps, zero_centered, std::nullopt, out_dtype, residual_dtype});
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& dy, const optional<Tensor>& dh, const Tensor& h, int64_t dims, const optional<Tensor>& weight,
    const Tensor& mean, const Tensor& rstd, bool zero_centered, ScalarType x_dtype, ScalarType residual_dtype,
    optional<ScalarType> dweight_dtype, optional<ScalarType> dbias_dtype) {
  auto [dx, dresidual, dweight, dbias] =
      norm_backward({Norm::layer, dy, dh.value_or(Tensor()), h, dims, weight, mean, rstd, zero_centered, std::nullopt,
                     x_dtype, residual_dtype, dweight_dtype, dbias_dtype});
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("layer_norm_forward", &layer_norm_forward);
  m.impl("layer_norm_backward", &layer_norm_backward);
  m.impl("add_layer_norm_forward", &add_layer_norm_forward);
  m.impl("add_layer_norm_backward", &add_layer_norm_backward);
}

}  // namespace fastnorm::cpu
