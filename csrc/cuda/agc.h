// Launches of adaptive clipping's kernel; free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "agc_plan.h"

namespace fastnorm::cuda {

// Clips the units of gradients that share no memory and have no long units.
void launch_agc(const std::vector<Gradient>& gradients, const AgcRequest& request, cudaStream_t stream);

}  // namespace fastnorm::cuda
