// The launch of adaptive clipping's kernel. Free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "agc_plan.h"

namespace fastnorm::cuda {

// Clips the units of gradients. These must not share memory, and none of their units is long (agc_plan.h).
void launch_agc(const std::vector<Gradient>& gradients, const AgcRequest& request, cudaStream_t stream);

}  // namespace fastnorm::cuda
