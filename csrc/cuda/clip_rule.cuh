// The rule of adaptive gradient clipping (Brock et al. 2021) as timm has it.
#pragma once

namespace fastnorm::cuda {

// Whether a unit's gradient is clipped, and the coefficient. If either norm is NaN, the gradient is clipped to NaN.
__device__ __forceinline__ bool clip_unit(double gradient, double parameter, double clip_factor, double eps,
                                          double& coefficient) {
  const double max_norm = (parameter < eps ? eps : parameter) * clip_factor;
  coefficient = max_norm / (gradient < 1e-6 ? 1e-6 : gradient);
  return !(gradient < max_norm);
}

}  // namespace fastnorm::cuda
