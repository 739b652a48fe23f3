// ‖x‖_p: a term of each element, their sum or extremum, and the root of that.
#pragma once

#include <cfloat>
#include <cmath>

#include "elements.cuh"

namespace fastnorm::cuda {

// KIND is the norm's kind at compile time, or ANY_KIND, and then `kind` is read at run time.
template <int KIND>
struct PNorm {
  double p;
  int kind;

  __device__ __forceinline__ int of() const { return KIND == ANY_KIND ? kind : KIND; }

  // |x|^p, in float32 for the kinds whose sums `fits` can check, in float64 for all.
  __device__ __forceinline__ float term(float x) const {
    switch (of()) {
      case SQUARES:
        return x * x;
      case NONZEROS:
        return x != 0.0f;
      default:
        return fabsf(x);
    }
  }
  __device__ __forceinline__ double term(double x) const {
    switch (of()) {
      case SQUARES:
        return x * x;
      case NONZEROS:
        return x != 0.0;
      case POWERS:
        return exp2(p * log2(fabs(x)));
      default:
        return fabs(x);
    }
  }

  // Adds two sums, or compares two extrema. A NaN in either gives NaN.
  template <class F>
  __device__ __forceinline__ F operator()(F a, F b) const {
    switch (of()) {
      case MAXIMUM:
        return b > a || b != b ? b : a;
      case MINIMUM:
        return b < a || b != b ? b : a;
      default:
        return a + b;
    }
  }

  __device__ __forceinline__ double identity() const { return of() == MINIMUM ? static_cast<double>(INFINITY) : 0.0; }

  // Whether a float32 sum of a few terms is right: squares of 1e30 overflow, and those of 1e-30 underflow. In a sum
  // above 2^-100, a few underflows, which lose at most 2^-149 each, are below half a unit in the last place.
  __device__ __forceinline__ bool fits(float sum) const {
    switch (of()) {
      case SQUARES:
        return sum >= 0x1p-100f && sum <= FLT_MAX;
      case MAGNITUDES:
        return sum <= FLT_MAX;
      case POWERS:
        return false;
      default:
        return true;
    }
  }

  __device__ __forceinline__ double root(double total) const {
    switch (of()) {
      case SQUARES:
        return sqrt(total);
      case POWERS:
        return exp2(log2(total) / p);
      default:
        return total;
    }
  }

  // The term of a tensor in the total norm, from its sum. For p = 0, as in torch, this counts tensors with a norm ≠ 0.
  __device__ __forceinline__ double term_of_total(double total) const {
    return of() == NONZEROS ? static_cast<double>(total != 0.0) : total;
  }
};

// Sums the terms of one pack in float64, in a loop: unrolled, this rare case would be most of a kernel's code.
template <class T, int KIND>
__device__ __forceinline__ double sum_wide(Pack<T> pack, const PNorm<KIND>& norm) {
  constexpr int UNROLL = sizeof(T) == 8 && KIND != ANY_KIND ? Pack<T>::SIZE : 1;
  double sum = norm.identity();
#pragma unroll UNROLL
  for (int i = 0; i < Pack<T>::SIZE; ++i) {
    sum = norm(sum, norm.term(static_cast<double>(widen(pack.at[0]))));
    shift(pack);
  }
  return sum;
}

// Sums the terms of a few packs. The float32 sums are short, so that their error is that of a few additions. Where they
// don't fit float32, the same elements, which are still in registers, are summed in float64.
template <class T, int COUNT, int KIND>
__device__ __forceinline__ double sum_packs(const Pack<T> (&packs)[COUNT], const PNorm<KIND>& norm) {
  constexpr int LANES = 4;
  if (sizeof(T) < 8 && norm.of() != POWERS) {
    float lanes[LANES];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
#pragma unroll
      for (int i = 0; i < Pack<T>::SIZE; ++i) {
        const float term = norm.term(static_cast<float>(widen(packs[k].at[i])));
        float& lane = lanes[i % LANES];
        lane = k == 0 && i < LANES ? term : norm(lane, term);
      }
    }
    const float sum = norm(norm(lanes[0], lanes[1]), norm(lanes[2], lanes[3]));
    if (norm.fits(sum)) {
      return sum;
    }
  }
  double sum = norm.identity();
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    sum = norm(sum, sum_wide(packs[k], norm));
  }
  return sum;
}

template <class T, int KIND>
__device__ __forceinline__ double single_term(const T* single, const PNorm<KIND>& norm) {
  return single == nullptr ? norm.identity() : norm.term(static_cast<double>(widen(*single)));
}

// The sum of this thread's terms of a span. Calls keep(i, pack) for every pack that the thread reads.
template <int THREADS, class T, int KIND, class Keep>
__device__ __forceinline__ double sum_span(const Span<T>& span, int thread, const PNorm<KIND>& norm, Keep keep) {
  constexpr int COUNT = KIND == ANY_KIND ? 1 : 4;  // loads in flight
  double sum = single_term(span.single(thread), norm);
  int i = thread;
  for (; COUNT > 1 && i + (COUNT - 1) * THREADS < span.count; i += COUNT * THREADS) {
    Pack<T> packs[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      packs[k] = load(span.packs + i + k * THREADS);
      keep(i + k * THREADS, packs[k]);
    }
    sum = norm(sum, sum_packs(packs, norm));
  }
#pragma unroll 1
  for (; i < span.count; i += THREADS) {
    const Pack<T> pack[1] = {load(span.packs + i)};
    keep(i, pack[0]);
    sum = norm(sum, sum_packs(pack, norm));
  }
  return sum;
}

}  // namespace fastnorm::cuda
