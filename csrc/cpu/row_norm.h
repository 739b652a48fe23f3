// The row norms on the CPU, for calls from C++: layer_norm and rms_norm, alone or after a residual addition.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "rows.h"

namespace fastnorm::cpu {

enum class Norm { rms, layer };

// x and residual have one shape, whose last `dims` dimensions are normalised; weight and bias have the sizes of those.
// Any strides. Without a residual it is undefined.
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
  bool saves_statistics = true;
};

// y and h: x's shape, contiguous; mean and rstd: (rows,). h is undefined without a residual, mean for rms_norm, mean
// and rstd where they are not saved.
struct ForwardResult {
  at::Tensor y, h, mean, rstd;
};

ForwardResult norm_forward(ForwardCall call);

// x is what was normalised: x or h of the forward. dh and mean may be undefined; an output without a dtype is left out.
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

// dx, dresidual: x's shape; dweight, dbias: the normalised shape; all contiguous. Outputs that are not wanted are
// undefined, and so is a dresidual that equals dx.
struct BackwardResult {
  at::Tensor dx, dresidual, dweight, dbias;
};

// The order in which dweight and dbias are summed follows from the shape alone, not from the number of threads.
BackwardResult norm_backward(BackwardCall call);

}  // namespace fastnorm::cpu
