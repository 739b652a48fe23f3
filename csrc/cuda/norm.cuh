// ‖x‖_p as terms that are added up, or compared, and a root that is taken of their total.
#pragma once

#include <cfloat>
#include <cmath>

#include "elements.cuh"

namespace fastnorm::cuda {

// KIND is a norm's kind, or ANY_KIND where only `kind` tells it.
template <int KIND>
struct Norm {
  double p;
  int kind;

  __device__ __forceinline__ int of() const { return KIND == ANY_KIND ? kind : KIND; }

  // |x|^p: in float32 for the kinds that `fits` can judge, in float64 for all.
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

  // A NaN on either side is the result.
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

  // Whether a float32 sum of a few terms is right: squares of 1e30 overflow, and those of 1e-30 vanish. Above 2^-100,
  // what underflow took from a few terms, 2^-149 each, is below half a unit in the last place.
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

  // The norm of norms whose totals these are: for p = 0, how many of them are not zero.
  __device__ __forceinline__ double term_of_total(double total) const {
    return of() == NONZEROS ? static_cast<double>(total != 0.0) : total;
  }
};

// The terms of one pack in float64, in a loop: unrolled, they would be most of a kernel's code.
template <class T, int KIND>
__device__ __forceinline__ double sum_wide(Pack<T> pack, const Norm<KIND>& norm) {
  constexpr int UNROLL = sizeof(T) == 8 && KIND != ANY_KIND ? Pack<T>::SIZE : 1;
  double sum = norm.identity();
#pragma unroll UNROLL
  for (int i = 0; i < Pack<T>::SIZE; ++i) {
    sum = norm(sum, norm.term(static_cast<double>(widen(pack.at[0]))));
    shift(pack);
  }
  return sum;
}

// The terms of a few packs. Short float32 sums, so that the error stays that of a handful of additions; where they
// don't fit, the same elements, which the registers still hold, are added in float64.
template <class T, int COUNT, int KIND>
__device__ __forceinline__ double sum_packs(const Pack<T> (&packs)[COUNT], const Norm<KIND>& norm) {
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
__device__ __forceinline__ double single_term(const T* single, const Norm<KIND>& norm) {
  return single == nullptr ? norm.identity() : norm.term(static_cast<double>(widen(*single)));
}

// This thread's part of a span's terms. Calls keep(i, pack) for every pack.
template <int THREADS, class T, int KIND, class Keep>
__device__ __forceinline__ double sum_span(const Span<T>& span, int thread, const Norm<KIND>& norm, Keep keep) {
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
