// The row norms on the CPU, for calls from C++: layer_norm and rms_norm, alone, after a residual addition, or with a
// gate.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "rows.h"

namespace fastnorm::cpu {

// x, residual and gate have one shape, whose last `dims` dimensions are normalised, in `groups` equal parts; weight and
// bias have the sizes of those. Any strides. residual and gate are undefined without one; there are never both.
struct ForwardCall {
  Norm norm;
  at::Tensor x, residual, gate;
  int64_t dims, groups;
  std::optional<at::Tensor> weight, bias;
  double eps;
  bool zero_centered, silu, norm_before_gate;
  std::optional<at::ScalarType> cast_dtype;
  at::ScalarType out_dtype;
  std::optional<at::ScalarType> residual_dtype;
  bool saves_statistics = true;
};

// y and h: x's shape, contiguous; mean and rstd: (rows · groups,). h is undefined without a residual, mean for
// rms_norm, mean and rstd where they are not saved.
struct ForwardResult {
  at::Tensor y, h, mean, rstd;
};

ForwardResult norm_forward(ForwardCall call);

// x: x or h of the forward. dh, gate and mean may be undefined; an output without a dtype is left out. The bias is read
// where the norm comes before the gate.
struct BackwardCall {
  Norm norm;
  at::Tensor dy, dh, x, gate;
  int64_t dims, groups;
  std::optional<at::Tensor> weight, bias;
  at::Tensor mean, rstd;
  bool zero_centered, silu, norm_before_gate;
  std::optional<at::ScalarType> cast_dtype;
  at::ScalarType x_dtype;
  std::optional<at::ScalarType> residual_dtype;
  std::optional<at::ScalarType> dweight_dtype;
  std::optional<at::ScalarType> dbias_dtype;
};

// dx, dresidual, dgate: x's shape; dweight, dbias: the normalised shape; all contiguous. Outputs that are not wanted
// are undefined, and so are a dresidual that equals dx, and a dgate without a gate.
struct BackwardResult {
  at::Tensor dx, dresidual, dgate, dweight, dbias;
};

// The order in which dweight and dbias are summed follows from the shape alone, not from the number of threads.
BackwardResult norm_backward(BackwardCall call);

}  // namespace fastnorm::cpu
