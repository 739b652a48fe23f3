// The row norms on the CPU, for calls from C++: layer_norm and rms_norm, alone, after a residual addition, with a gate,
// modulated, or, rms_norm, with a rotary embedding behind it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "rows.h"

namespace fastnorm::cpu {

// x, residual and gate have one shape, whose last `dims` dimensions are normalised, in `groups` equal parts; weight,
// bias and x_gate have the sizes of those, or, with one row for each of `samples` equal runs of rows, (samples,
// *sizes). Any strides. residual, gate and x_gate are undefined without one. A gate comes with none of the others, and
// groups with neither samples nor an x_gate. h = residual + x_gate · x. cos and sin rotate y, as a Rotation in rows.h:
// x's shape but for the last dimension, rotary_dim; undefined without a rotation, which comes with none of the others.
struct ForwardCall {
  Norm norm;
  at::Tensor x, residual, gate, x_gate;
  int64_t dims, groups, samples;
  std::optional<at::Tensor> weight, bias;
  double eps;
  bool zero_centered, silu, norm_before_gate;
  std::optional<at::ScalarType> cast_dtype;
  at::ScalarType out_dtype;
  std::optional<at::ScalarType> residual_dtype;  // of h
  bool saves_statistics = true;
  at::Tensor cos = {}, sin = {};
  bool interleaved = false;
};

// y and h: x's shape, contiguous; mean and rstd: (rows · groups,). h is undefined without a residual and an x_gate,
// mean for rms_norm, mean and rstd where they are not saved.
struct ForwardResult {
  at::Tensor y, h, mean, rstd;
};

ForwardResult norm_forward(ForwardCall call);

// Of dx, dresidual, dweight and dbias; an output without one is left out.
struct GradientDtypes {
  at::ScalarType x;
  std::optional<at::ScalarType> residual, weight, bias;
};

// h: x of the forward where that made no h. x is given with an x_gate, and only then. dh, gate, x_gate and mean may be
// undefined. The bias is read where the norm comes before the gate.
struct BackwardCall {
  Norm norm;
  at::Tensor dy, dh, h, x, gate, x_gate;
  int64_t dims, groups, samples;
  std::optional<at::Tensor> weight, bias;
  at::Tensor mean, rstd;
  bool zero_centered, silu, norm_before_gate;
  std::optional<at::ScalarType> cast_dtype;
  GradientDtypes dtypes;
  at::Tensor cos = {}, sin = {};
  bool interleaved = false;
};

// dx, dresidual, dgate: h's shape; dx_gate, dweight, dbias: their parameter's; all contiguous. Outputs that are not
// wanted are undefined, and so are a dresidual that equals dx, and the gradient of a gate or x_gate that isn't there.
struct BackwardResult {
  at::Tensor dx, dresidual, dgate, dx_gate, dweight, dbias;
};

// The order in which a sample's dweight, dbias and dx_gate are summed follows from its shape alone, not from the number
// of threads or samples.
BackwardResult norm_backward(BackwardCall call);

}  // namespace fastnorm::cpu
