// rms_norm and add_rms_norm on the CPU: schemas to calls.
#include <torch/library.h>

#include <tuple>

#include "norm.h"

namespace fastnorm::cpu {
namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x, int64_t dims, const optional<Tensor>& weight, double eps,
                                            bool zero_centered, optional<ScalarType> cast_dtype, ScalarType out_dtype) {
  auto [y, h, mean, rstd] =
      norm_forward({Norm::rms, x, dims, {}, weight, {}, eps, zero_centered, cast_dtype, out_dtype, std::nullopt});
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, int64_t dims,
                                             const optional<Tensor>& weight, const Tensor& rstd, bool zero_centered,
                                             optional<ScalarType> cast_dtype, optional<ScalarType> dweight_dtype) {
  auto [dx, dresidual, dweight, dbias] =
      norm_backward({Norm::rms, dy, {}, x, dims, weight, {}, rstd, zero_centered, cast_dtype, x.scalar_type(),
                     std::nullopt, dweight_dtype, std::nullopt});
  return {dx, dweight};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_forward(const Tensor& x, const Tensor& residual, int64_t dims,
                                                        const optional<Tensor>& weight, double eps, bool zero_centered,
                                                        optional<ScalarType> cast_dtype, ScalarType out_dtype,
                                                        ScalarType residual_dtype) {
  auto [y, h, mean, rstd] = norm_forward(
      {Norm::rms, x, dims, residual, weight, {}, eps, zero_centered, cast_dtype, out_dtype, residual_dtype});
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_backward(const Tensor& dy, const optional<Tensor>& dh, const Tensor& h,
                                                         int64_t dims, const optional<Tensor>& weight,
                                                         const Tensor& rstd, bool zero_centered,
                                                         optional<ScalarType> cast_dtype, ScalarType x_dtype,
                                                         ScalarType residual_dtype,
                                                         optional<ScalarType> dweight_dtype) {
  auto [dx, dresidual, dweight, dbias] =
      norm_backward({Norm::rms, dy, dh.value_or(Tensor()), h, dims, weight, {}, rstd, zero_centered, cast_dtype,
                     x_dtype, residual_dtype, dweight_dtype, std::nullopt});
  return {dx, dresidual, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("rms_norm_forward", &rms_norm_forward);
  m.impl("rms_norm_backward", &rms_norm_backward);
  m.impl("add_rms_norm_forward", &add_rms_norm_forward);
  m.impl("add_rms_norm_backward", &add_rms_norm_backward);
}

}  // namespace fastnorm::cpu
