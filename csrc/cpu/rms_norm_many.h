// RMSNorm of several inputs on the CPU, for calls from C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace fastnorm::cpu {

// RMSNorm of each input over its last dimension, and then its rotation: the ys, then the rstds, undefined where they
// are not saved. weights: undefined where there is none; cos and sin: empty, or for each input its shape but for the
// last dimension.
std::vector<at::Tensor> rms_norm_many(at::TensorList inputs, at::TensorList weights, at::TensorList cos,
                                      at::TensorList sin, bool interleaved, double eps, bool zero_centered,
                                      std::optional<at::ScalarType> cast_dtype, at::ScalarType out_dtype,
                                      bool saves_statistics = true);

// The dxs, then the wanted dweights.
std::vector<at::Tensor> rms_norm_many_gradients(at::TensorList grads, at::TensorList inputs, at::TensorList weights,
                                                at::TensorList rstds, at::TensorList cos, at::TensorList sin,
                                                bool interleaved, bool zero_centered,
                                                std::optional<at::ScalarType> cast_dtype,
                                                const std::vector<bool>& wants_dweight);

}  // namespace fastnorm::cpu
