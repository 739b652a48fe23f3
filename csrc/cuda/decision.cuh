// The last block of a list as the team that decides for a clip policy (policy_rules.h).
#pragma once

#include "p_norm.cuh"
#include "reduce.cuh"

namespace fastnorm::cuda {

__device__ __forceinline__ void write(void* target, uint32_t i, double value, bool wide) {
  if (wide) {
    static_cast<double*>(target)[i] = value;
  } else {
    static_cast<float*>(target)[i] = static_cast<float>(value);
  }
}

// How many of the values, none of which is negative, have bits up to these. Every thread gets the result.
__device__ __forceinline__ int64_t count_up_to(const double* values, int64_t count, int64_t bits) {
  __shared__ uint32_t of_warps[BLOCK / WARP];
  const int lane = threadIdx.x % WARP;
  uint32_t found = 0;
  for (int64_t first = threadIdx.x - lane; first < count; first += BLOCK) {
    const bool is_below = first + lane < count && __double_as_longlong(values[first + lane]) <= bits;
    found += __popc(__ballot_sync(0xffffffff, is_below));
  }
  __syncthreads();  // the counts of an earlier call may still be read
  if (lane == 0) {
    of_warps[threadIdx.x / WARP] = found;
  }
  __syncthreads();
  int64_t sum = 0;
#pragma unroll
  for (int warp = 0; warp < BLOCK / WARP; ++warp) {
    sum += of_warps[warp];
  }
  return sum;
}

template <int KIND, int N>
struct Decision {
  const NormArguments<N>& a;
  const PNorm<KIND>& p_norm;
  double rounded_total;

  __device__ __forceinline__ double total() const { return rounded_total; }
  __device__ __forceinline__ int64_t tensors() const { return a.tensors; }
  __device__ __forceinline__ bool is_first() const { return threadIdx.x == 0; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ bool any(bool flag) const { return __syncthreads_or(flag); }

  // Other blocks have written the norms, so that they are read as reduce_stored reads.
  __device__ __forceinline__ double norm(int64_t i) const {
    return a.wide ? __ldcg(static_cast<const double*>(a.norms) + i) : __ldcg(static_cast<const float*>(a.norms) + i);
  }

  template <class Body>
  __device__ __forceinline__ void each(int64_t count, Body body) const {
    for (int64_t i = threadIdx.x; i < count; i += BLOCK) {
      body(i);
    }
  }

  template <class Value>
  __device__ __forceinline__ double norm_of(Value value) const {
    double sum = p_norm.identity();
    each(tensors(), [&](int64_t i) { sum = p_norm(sum, p_norm.term(value(i))); });
    return p_norm.root(reduce_block(sum, p_norm, p_norm.identity()));
  }

  // Bisects the bits of float64, which are in the order of the values, for a number that as many values reach at most
  // as are sought. Mostly it lies between two values, and is found in few steps.
  __device__ __forceinline__ void neighbours(const double* values, int64_t count, int64_t rank, double& low,
                                             double& high) const {
    int64_t below = -1, reached = __double_as_longlong(INFINITY), found = count;
    while (reached - below > 1 && found != rank + 1) {
      const int64_t middle = below + (reached - below) / 2, here = count_up_to(values, count, middle);
      if (here > rank) {
        reached = middle;
        found = here;
      } else {
        below = middle;
      }
    }
    double largest = 0, next = INFINITY;
    each(count, [&](int64_t i) {
      const double value = values[i];
      if (__double_as_longlong(value) <= reached) {
        largest = fmax(largest, value);
      } else {
        next = fmin(next, value);
      }
    });
    low = reduce_block(largest, [](double x, double y) { return fmax(x, y); }, 0.0);
    next = reduce_block(next, [](double x, double y) { return fmin(x, y); }, static_cast<double>(INFINITY));
    high = found > rank + 1 || next == INFINITY ? low : next;
  }

  __device__ __forceinline__ bool write(int64_t i, double coefficient) const {
    cuda::write(a.coefficient, i, coefficient, a.wide);
    return (a.wide ? coefficient : static_cast<float>(coefficient)) < 1;
  }

  __device__ __forceinline__ void write_skip(bool skip) const { *a.nonfinite = skip; }
};

}  // namespace fastnorm::cuda
