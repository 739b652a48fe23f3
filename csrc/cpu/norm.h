// The row norms, layer_norm and rms_norm, plain and with a residual added first: all but the kernels of single rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "rows.h"

namespace fastnorm::cpu {

enum class Norm { rms, layer };

// x and residual are of one shape, whose last `dims` dimensions are normalised; weight and bias have their sizes. All
// strides will do. An undefined residual means that there is none.
struct ForwardCall {
  Norm norm;
  at::Tensor x;
  int64_t dims;
  at::Tensor residual;
  std::optional<at::Tensor> weight, bias;
  double eps;
  bool zero_centered;
  std::optional<at::ScalarType> cast_dtype;
  at::ScalarType out_dtype;
  std::optional<at::ScalarType> residual_dtype;
  bool saves_moments = true;
};

// y and h: x's shape, contiguous; mean, rstd: (rows,). h only with a residual; mean only for layer_norm; moments only
// where they are saved.
struct ForwardResult {
  at::Tensor y, h, mean, rstd;
};

ForwardResult norm_forward(ForwardCall call);

// x is what was normalised; dh, mean, the dtypes of absent outputs may be missing.
struct BackwardCall {
  Norm norm;
  at::Tensor dy, dh, x;
  int64_t dims;
  std::optional<at::Tensor> weight;
  at::Tensor mean, rstd;
  bool zero_centered;
  std::optional<at::ScalarType> cast_dtype;
  at::ScalarType x_dtype;
  std::optional<at::ScalarType> residual_dtype;
  std::optional<at::ScalarType> dweight_dtype;
  std::optional<at::ScalarType> dbias_dtype;
};

// dx, dresidual: x's shape; dweight, dbias: that of what is normalised; all contiguous. Undefined where not wanted,
// dresidual also where it equals dx.
struct BackwardResult {
  at::Tensor dx, dresidual, dweight, dbias;
};

// dweight and dbias are summed in an order that depends on the shape alone, not on the number of threads.
BackwardResult norm_backward(BackwardCall call);

}  // namespace fastnorm::cpu
