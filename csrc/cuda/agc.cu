// Adaptive gradient clipping: g · max_norm / ‖g‖ for the units of a gradient whose norm reaches
// max_norm = max(‖w‖, eps) · clip_factor.
#include "agc.h"

#include "clip_rule.cuh"
#include "p_norm.cuh"
#include "reduce.cuh"

namespace fastnorm::cuda {
namespace {

// Reduces a value over the THREADS that share a unit: a warp or a block.
template <int THREADS, int KIND>
__device__ __forceinline__ double reduce_unit(double value, const PNorm<KIND>& norm) {
  if constexpr (THREADS == WARP) {
    return reduce_warp(value, norm);
  } else {
    return reduce_block(value, norm, norm.identity());
  }
}

template <class T>
__device__ __forceinline__ void multiply(Pack<T>* target, Pack<T> pack, Wide<T> coefficient) {
#pragma unroll
  for (int i = 0; i < Pack<T>::SIZE; ++i) {
    pack.at[i] = narrow<T>(widen(pack.at[i]) * coefficient);
  }
  store(target, pack);
}

// Clips one unit of a gradient. Its first packs are kept in shared memory between the sum and the scaling, each where
// only its own thread reads it; the other packs of a longer unit are read again if it is clipped.
template <int THREADS, class T, int KIND>
__device__ __forceinline__ void clip_span(const Span<T>& span, int thread, const PNorm<KIND>& norm,
                                          double parameter_norm, const AgcArguments& a, uint4* place) {
  constexpr int KEPT = THREADS == WARP ? WARP_PACKS : BLOCK_PACKS;
  auto* const kept = reinterpret_cast<Pack<T>*>(place);
  double sum = sum_span<THREADS>(span, thread, norm, [&](int i, const Pack<T>& pack) {
    if (i < KEPT) {
      store(kept + i, pack);
    }
  });
  double coefficient;
  const double gradient_norm = norm.root(reduce_unit<THREADS>(sum, norm));
  if (!clip_unit(gradient_norm, parameter_norm, a.clip_factor, a.eps, coefficient)) {
    return;
  }
  const Wide<T> factor = static_cast<Wide<T>>(coefficient);
  if (T* single = span.single(thread)) {
    *single = narrow<T>(widen(*single) * factor);
  }
#pragma unroll 4
  for (int i = thread; i < span.count; i += THREADS) {
    multiply(span.packs + i, load(i < KEPT ? kept + i : span.packs + i), factor);
  }
}

template <int THREADS, int KIND>
__device__ __forceinline__ void clip(const AgcArguments& a, int tensor, uint32_t unit, int thread, uint4* place) {
  const PNorm<KIND> norm{a.p, a.kind};
  constexpr int mask = (1 << DTYPE_BITS) - 1;
  const int64_t extent = a.extent[tensor];
  const int64_t first = static_cast<int64_t>(unit) * (extent >> 2 * DTYPE_BITS);
  const int64_t last = first + (extent >> 2 * DTYPE_BITS);
  double parameter_sum = with_dtype(static_cast<int>(extent >> DTYPE_BITS) & mask, [&](auto zero) {
    using T = decltype(zero);
    const Span<T> span(a.parameter[tensor] + first * sizeof(T), a.parameter[tensor] + last * sizeof(T));
    return sum_span<THREADS>(span, thread, norm, [](int, const Pack<T>&) {});
  });
  const double parameter_norm = norm.root(reduce_unit<THREADS>(parameter_sum, norm));
  with_dtype(static_cast<int>(extent) & mask, [&](auto zero) {
    using T = decltype(zero);
    const Span<T> span(a.gradient[tensor] + first * sizeof(T), a.gradient[tensor] + last * sizeof(T));
    clip_span<THREADS>(span, thread, norm, parameter_norm, a, place);
  });
}

// A warp takes a unit whose gradient fits into the warp's shared memory; a block takes a longer one.
template <int KIND>
__global__ void __launch_bounds__(BLOCK, 4) agc_kernel(const __grid_constant__ AgcArguments a) {
  __shared__ uint4 kept[BLOCK_PACKS];
  const int tensor = find_tensor(a.end, a.count);
  const uint32_t block = blockIdx.x - (tensor == 0 ? 0 : a.end[tensor - 1]);
  const int64_t extent = a.extent[tensor];
  const int dtype = static_cast<int>(extent & ((1 << DTYPE_BITS) - 1));
  if ((extent >> 2 * DTYPE_BITS) * item_bytes(dtype) > WARP_PACKS * PACK_BYTES) {
    clip<BLOCK, KIND>(a, tensor, block, threadIdx.x, kept);
    return;
  }
  const uint32_t unit = block * WARPS + threadIdx.x / WARP;
  if (unit < a.units[tensor]) {
    clip<WARP, KIND>(a, tensor, unit, threadIdx.x % WARP, kept + threadIdx.x / WARP * WARP_PACKS);
  }
}

}  // namespace

void launch_agc(const std::vector<Gradient>& gradients, const AgcRequest& request, cudaStream_t stream) {
  cut_agc(gradients, request, [&](const AgcArguments& arguments, uint32_t blocks) {
    if (request.kind == SQUARES) {
      agc_kernel<SQUARES><<<blocks, BLOCK, 0, stream>>>(arguments);
    } else {
      agc_kernel<ANY_KIND><<<blocks, BLOCK, 0, stream>>>(arguments);
    }
  });
}

}  // namespace fastnorm::cuda
