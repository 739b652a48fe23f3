// Adaptive gradient clipping (Brock et al. 2021) as timm has it.
#pragma once

namespace fastnorm::cuda {

// Whether a unit's gradient is clipped, and what by. Where either norm is NaN it is, and becomes NaN.
__device__ __forceinline__ bool clip_unit(double gradient, double parameter, double clip_factor, double eps,
                                          double& coefficient) {
  const double max_norm = (parameter < eps ? eps : parameter) * clip_factor;
  coefficient = max_norm / (gradient < 1e-6 ? 1e-6 : gradient);
  return !(gradient < max_norm);
}

}  // namespace fastnorm::cuda
