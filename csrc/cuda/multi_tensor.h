// Launches of the kernels over lists of tensors. Free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace fastnorm::cuda {

// Norms of all tensors, the total norm, the clip coefficient and whether the total is finite.
void launch_norm(const std::vector<Item>& items, const NormRequest& request, cudaStream_t stream);

// Changes all elements in place. No two items may share memory.
void launch_change(Change kind, const std::vector<Item>& items, const ChangeRequest& request, cudaStream_t stream);

}  // namespace fastnorm::cuda
