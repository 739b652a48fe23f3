// Norms of a list of tensors, and changes of its elements in place: scaling, clamping, adaptive clipping of long units.
#include "multi_tensor.h"

#include "clip_rule.cuh"
#include "decision.cuh"
#include "p_norm.cuh"
#include "reduce.cuh"

namespace fastnorm::cuda {
namespace {

// The clip coefficient min(max_norm / (total + 1e-6), 1) or NaN, from the total norm as rounded for the caller.
template <int N>
__device__ __forceinline__ void write_total(const NormArguments<N>& a, double total) {
  if (!a.wide) {
    total = static_cast<float>(total);
  }
  const double ratio = a.max_norm / (total + 1e-6);
  write(a.total, 0, total, a.wide);
  write(a.coefficient, 0, ratio > 1.0 ? 1.0 : ratio, a.wide);
  *a.nonfinite = isfinite(total) ? 0.0f : 1.0f;
}

constexpr int RESIDENT = 4;  // blocks on a multiprocessor: enough warps to keep loads in flight

// Each block sums a chunk. The last block of a tensor to finish sums the tensor's chunks, the last of all the tensors;
// with a POLICY it also decides.
template <int KIND, bool POLICY, int N>
__global__ void __launch_bounds__(BLOCK, RESIDENT) norm_kernel(const __grid_constant__ NormArguments<N> a) {
  const PNorm<KIND> norm{a.p, a.kind};
  const Chunk chunk = find_chunk(a.table);
  double sum = with_dtype(chunk.dtype, [&](auto zero) {
    const Span<decltype(zero)> span(chunk.from, chunk.to);
    return sum_span<BLOCK>(span, threadIdx.x, norm, [](int, const auto&) {});
  });
  sum = reduce_block(sum, norm, norm.identity());
  const uint32_t tensor = a.first + chunk.tensor;
  if (chunk.chunks > 1) {
    if (threadIdx.x == 0) {
      a.partials[blockIdx.x] = sum;
    }
    if (!arrives_last(a.tickets + tensor, chunk.chunks)) {
      return;
    }
    sum = reduce_stored(a.partials + (blockIdx.x - chunk.index), chunk.chunks, norm, norm.identity());
  }
  if (threadIdx.x == 0) {
    write(a.norms, tensor, norm.root(sum), a.wide);
    a.sums[tensor] = norm.term_of_total(sum);
  }
  if (!arrives_last(a.tickets + a.tensors, a.tensors)) {
    return;
  }
  const double total = reduce_stored(a.sums, a.tensors, norm, norm.identity());
  if constexpr (POLICY) {
    Decision<KIND, N> decision{a, norm, a.wide ? norm.root(total) : static_cast<float>(norm.root(total))};
    if (threadIdx.x == 0) {
      write(a.total, 0, decision.total(), a.wide);
    }
    policy::decide(a.policy, decision);
  } else if (threadIdx.x == 0) {
    write_total(a, norm.root(total));
  }
}

// x · c, rounded once; writes nothing if c ≥ 1.
struct Scale {
  double coefficient;

  template <int N>
  __device__ __forceinline__ bool prepare(const ChangeArguments<N>& a, int tensor) {
    const uint32_t i = a.per_tensor ? a.first + tensor : 0;
    coefficient = a.wide ? static_cast<const double*>(a.coefficient)[i] : static_cast<const float*>(a.coefficient)[i];
    return !(coefficient >= 1.0);
  }
  template <class T>
  __device__ __forceinline__ bool apply(T& x) const {
    x = narrow<T>(widen(x) * static_cast<Wide<T>>(coefficient));
    return true;
  }
};

// Clamps to [−bound, bound]. A NaN stays; a bound of NaN gives NaN.
struct Clamp {
  double bound;

  template <int N>
  __device__ __forceinline__ bool prepare(const ChangeArguments<N>& a, int) {
    bound = a.bound;
    return true;
  }
  template <class T>
  __device__ __forceinline__ bool apply(T& x) const {
    const Wide<T> high = static_cast<Wide<T>>(bound), old = widen(x);
    Wide<T> value = old < -high || high != high ? -high : old;
    value = value > high ? high : value;
    x = narrow<T>(value);
    return !(value == old);
  }
};

// g · max_norm / ‖g‖ for the units whose norm reaches max_norm.
struct ClipUnits {
  double coefficient;

  template <int N>
  __device__ __forceinline__ bool prepare(const ChangeArguments<N>& a, int tensor) {
    const double gradient = a.norms[a.first + tensor], parameter = a.norms[a.tensors + a.first + tensor];
    return clip_unit(gradient, parameter, a.clip_factor, a.eps, coefficient);
  }
  template <class T>
  __device__ __forceinline__ bool apply(T& x) const {
    x = narrow<T>(widen(x) * static_cast<Wide<T>>(coefficient));
    return true;
  }
};

template <class T, class Operation>
__device__ __forceinline__ void change_pack(Pack<T>* target, Pack<T> pack, const Operation& operation) {
  bool changed = false;
#pragma unroll
  for (int k = 0; k < Pack<T>::SIZE; ++k) {
    changed |= operation.apply(pack.at[k]);
  }
  if (changed) {
    store(target, pack);
  }
}

template <class T, class Operation>
__device__ __forceinline__ void change_span(const Span<T>& span, const Operation& operation) {
  constexpr int COUNT = 4;  // loads in flight
  if (T* single = span.single(threadIdx.x)) {
    T x = *single;
    if (operation.apply(x)) {
      *single = x;
    }
  }
  int i = threadIdx.x;
  for (; i + (COUNT - 1) * BLOCK < span.count; i += COUNT * BLOCK) {
    Pack<T> packs[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      packs[k] = load(span.packs + i + k * BLOCK);
    }
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      change_pack(span.packs + i + k * BLOCK, packs[k], operation);
    }
  }
  for (; i < span.count; i += BLOCK) {
    change_pack(span.packs + i, load(span.packs + i), operation);
  }
}

// Each block changes a chunk. Packs that the operation leaves as they are, are not written.
template <class Operation, int N>
__global__ void __launch_bounds__(BLOCK, RESIDENT) change_kernel(const __grid_constant__ ChangeArguments<N> a) {
  Operation operation;
  const Chunk chunk = find_chunk(a.table);
  if (!operation.prepare(a, chunk.tensor)) {
    return;
  }
  with_dtype(chunk.dtype, [&](auto zero) { change_span(Span<decltype(zero)>(chunk.from, chunk.to), operation); });
}

template <class Operation, int N>
void run(const ChangeArguments<N>& arguments, uint32_t blocks, cudaStream_t stream) {
  change_kernel<Operation><<<blocks, BLOCK, 0, stream>>>(arguments);
}

template <int KIND, bool POLICY, int N>
void run(const NormArguments<N>& arguments, uint32_t blocks, cudaStream_t stream) {
  norm_kernel<KIND, POLICY><<<blocks, BLOCK, 0, stream>>>(arguments);
}

template <bool POLICY>
void launch_norm(const std::vector<Item>& items, const NormRequest& request, cudaStream_t stream) {
  if (request.kind == SQUARES && items.size() <= FEW) {
    return cut_norm<FEW>(items, request,
                         [&](const auto& a, uint32_t blocks) { run<SQUARES, POLICY>(a, blocks, stream); });
  }
  cut_norm<MANY>(items, request, [&](const auto& a, uint32_t blocks) {
    switch (request.kind) {
      case SQUARES:
        return run<SQUARES, POLICY>(a, blocks, stream);
      case MAGNITUDES:
        return run<MAGNITUDES, POLICY>(a, blocks, stream);
      case MAXIMUM:
        return run<MAXIMUM, POLICY>(a, blocks, stream);
      default:
        return run<ANY_KIND, POLICY>(a, blocks, stream);
    }
  });
}

}  // namespace

void launch_norm(const std::vector<Item>& items, const NormRequest& request, cudaStream_t stream) {
  request.policy.state == nullptr ? launch_norm<false>(items, request, stream)
                                  : launch_norm<true>(items, request, stream);
}

void launch_change(Change kind, const std::vector<Item>& items, const ChangeRequest& request, cudaStream_t stream) {
  if (kind == SCALE && items.size() <= FEW) {
    return cut_change<FEW>(items, request, [&](const auto& a, uint32_t blocks) { run<Scale>(a, blocks, stream); });
  }
  cut_change<MANY>(items, request, [&](const auto& a, uint32_t blocks) {
    switch (kind) {
      case SCALE:
        return run<Scale>(a, blocks, stream);
      case CLAMP:
        return run<Clamp>(a, blocks, stream);
      case CLIP_UNITS:
        return run<ClipUnits>(a, blocks, stream);
    }
  });
}

}  // namespace fastnorm::cuda
