// Reductions in a fixed order: over a warp, over a block, and over blocks by the block that finishes last.
#pragma once

#include <cstdint>

#include "plan.h"

namespace fastnorm::cuda {

constexpr int WARP = 32;

// Every lane gets the same result: both lanes of each exchange combine the same two values.
template <class Combine>
__device__ __forceinline__ double reduce_warp(double value, Combine combine) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, lanes));
  }
  return value;
}

// Every thread of the block gets the result.
template <class Combine>
__device__ __forceinline__ double reduce_block(double value, Combine combine, double identity) {
  __shared__ double of_warps[BLOCK / WARP];
  const int lane = threadIdx.x % WARP;
  value = reduce_warp(value, combine);
  __syncthreads();  // the results of an earlier reduction may still be read
  if (lane == 0) {
    of_warps[threadIdx.x / WARP] = value;
  }
  __syncthreads();
  return reduce_warp(lane < BLOCK / WARP ? of_warps[lane] : identity, combine);
}

// Reduces values that other blocks have stored: each thread its own in their order, then over the block.
template <class Combine>
__device__ __forceinline__ double reduce_stored(const double* values, uint32_t count, Combine combine,
                                                double identity) {
  double value = identity;
  for (uint32_t i = threadIdx.x; i < count; i += BLOCK) {
    value = combine(value, __ldcg(values + i));  // from the L2 cache: L1 is not coherent
  }
  return reduce_block(value, combine, identity);
}

// Whether this block is the last of `arrivals` blocks to call this. It then sees what thread 0 of the others stored
// before their calls.
__device__ __forceinline__ bool arrives_last(uint32_t* ticket, uint32_t arrivals) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(ticket, arrivals - 1) == arrivals - 1;  // wraps to zero, for the next use
  }
  __syncthreads();
  if (last) {
    __threadfence();
  }
  return last;
}

}  // namespace fastnorm::cuda
