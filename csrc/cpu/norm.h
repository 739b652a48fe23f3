// What layer_norm and rms_norm, plain and with a residual added first, have in common: all but the row kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "rows.h"

namespace fastnorm::cpu {

enum class Norm { rms, layer };

// Shapes: x, residual: (rows, cols); weight, bias: (cols,). An undefined residual means that there is none.
struct ForwardCall {
  Norm norm;
  const at::Tensor& x;
  at::Tensor residual;
  const std::optional<at::Tensor>& weight;
  std::optional<at::Tensor> bias;
  double eps;
  bool zero_centered;
  std::optional<at::ScalarType> cast_dtype;
  at::ScalarType out_dtype;
  std::optional<at::ScalarType> residual_dtype;
  bool saves_moments = true;
};

struct ForwardResult {
  at::Tensor y, h, mean, rstd;  // h only with a residual; mean only for layer_norm; moments only where they are saved
};

ForwardResult norm_forward(const ForwardCall& call);

// x is what was normalised; dh, mean, the dtypes of absent outputs may be missing.
struct BackwardCall {
  Norm norm;
  const at::Tensor& dy;
  at::Tensor dh;
  const at::Tensor& x;
  const std::optional<at::Tensor>& weight;
  at::Tensor mean;
  const at::Tensor& rstd;
  bool zero_centered;
  std::optional<at::ScalarType> cast_dtype;
  at::ScalarType x_dtype;
  std::optional<at::ScalarType> residual_dtype;
  std::optional<at::ScalarType> dweight_dtype;
  std::optional<at::ScalarType> dbias_dtype;
};

struct BackwardResult {
  at::Tensor dx, dresidual, dweight, dbias;  // undefined where not wanted; dresidual also where it equals dx
};

// dweight and dbias are summed in an order that depends on the shape alone, not on the number of threads.
BackwardResult norm_backward(const BackwardCall& call);

}  // namespace fastnorm::cpu
