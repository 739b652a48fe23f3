// batch_norm and group_norm on the CPU, for calls from C++: the arguments and results of the operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastnorm::cpu {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;

// y, mask, mean, rstd
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_forward(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& factor,
    double momentum, double eps, at::MemoryFormat memory_format, bool relu, at::ScalarType out_dtype);

// y, mask
std::tuple<at::Tensor, at::Tensor> batch_norm_evaluation(const at::Tensor& x, const OptionalTensor& residual,
                                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                                         const at::Tensor& running_mean, const at::Tensor& running_var,
                                                         double eps, at::MemoryFormat memory_format, bool relu,
                                                         bool wants_mask, at::ScalarType out_dtype);

// dx, dresidual, dweight, dbias
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(
    const at::Tensor& dy, const OptionalTensor& mask, const at::Tensor& x, const OptionalTensor& weight,
    const at::Tensor& mean, const at::Tensor& rstd, bool training, at::MemoryFormat memory_format,
    OptionalDtype dresidual_dtype, OptionalDtype dweight_dtype, OptionalDtype dbias_dtype);

// y, mean, rstd
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_forward(const at::Tensor& x, int64_t groups,
                                                                  const OptionalTensor& weight,
                                                                  const OptionalTensor& bias, double eps,
                                                                  at::MemoryFormat memory_format, bool silu,
                                                                  at::ScalarType out_dtype);

// dx, dweight, dbias
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_backward(
    const at::Tensor& dy, const at::Tensor& x, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias,
    const at::Tensor& mean, const at::Tensor& rstd, at::MemoryFormat memory_format, bool silu,
    OptionalDtype dweight_dtype, OptionalDtype dbias_dtype);

}  // namespace fastnorm::cpu
