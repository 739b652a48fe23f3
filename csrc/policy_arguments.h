// The arguments of multi_tensor_policy as a Policy, checked.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "policy_rules.h"

namespace fastnorm::policy {

// The state's device is the caller's to check.
inline Policy policy_of(const at::Tensor& state, int64_t rule, at::ArrayRef<double> constants, size_t tensors) {
  const auto wanted = constants_of(rule);
  TORCH_CHECK(wanted > 0 && static_cast<int64_t>(constants.size()) == wanted,
              "fastnorm: expected a rule of 0 to 3 with ", "its constants, got rule ", rule, " with ",
              constants.size());
  TORCH_CHECK(state.scalar_type() == at::kDouble && state.dim() == 1 && state.is_contiguous(),
              "fastnorm: expected state as a contiguous vector of float64");
  const int64_t size = state.numel() - HEADER;
  const bool fits = rule == ADAGC ? size == static_cast<int64_t>(tensors) : size >= (rule == AUTOCLIP);
  TORCH_CHECK(fits, "fastnorm: expected state of ", HEADER, " numbers, and one for each ",
              rule == ADAGC ? "tensor" : "norm kept", " behind them, got ", state.numel(), " for ", tensors,
              " tensors");
  Policy policy{state.mutable_data_ptr<double>(), size, {}, static_cast<int>(rule)};
  std::copy(constants.begin(), constants.end(), policy.constants);
  return policy;
}

}  // namespace fastnorm::policy
