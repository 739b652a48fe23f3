// Access to a tensor's elements: packs of 16 bytes between 16-byte boundaries, single elements before and behind those;
// and the lookup of the chunk that a block works on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "plan.h"

namespace fastnorm::cuda {

// 16 bytes of elements, loaded and stored by one instruction.
template <class T>
struct alignas(PACK_BYTES) Pack {
  static constexpr int SIZE = PACK_BYTES / sizeof(T);
  T at[SIZE];
};

template <class T>
__device__ __forceinline__ Pack<T> load(const Pack<T>* source) {
  const uint4 bits = *reinterpret_cast<const uint4*>(source);
  return reinterpret_cast<const Pack<T>&>(bits);
}

template <class T>
__device__ __forceinline__ void store(Pack<T>* target, const Pack<T>& pack) {
  *reinterpret_cast<uint4*>(target) = reinterpret_cast<const uint4&>(pack);
}

// Drops the first element.
__device__ __forceinline__ void shift(Pack<float>& pack) {
  uint4& bits = reinterpret_cast<uint4&>(pack);
  bits = {bits.y, bits.z, bits.w, bits.w};
}
__device__ __forceinline__ void shift(Pack<double>& pack) { pack.at[0] = pack.at[1]; }
template <class T>
__device__ __forceinline__ void shift(Pack<T>& pack) {
  uint4& bits = reinterpret_cast<uint4&>(pack);
  bits.x = __funnelshift_r(bits.x, bits.y, 16);
  bits.y = __funnelshift_r(bits.y, bits.z, 16);
  bits.z = __funnelshift_r(bits.z, bits.w, 16);
  bits.w >>= 16;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
using Wide = decltype(widen(T()));

// Rounds once, to the type in memory.
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <class T>
__device__ __forceinline__ T narrow(double x) {
  return x;
}

// The elements from any address to another: `head` single ones, `count` whole packs, `tail` single ones.
template <class T>
struct Span {
  T* begin;
  Pack<T>* packs;
  T* end;
  int head;
  int tail;
  int count;  // of packs, below 2^31

  __device__ __forceinline__ Span(uint64_t from, uint64_t to) {
    constexpr uint64_t below = PACK_BYTES - 1;
    const uint64_t first = min((from + below) & ~below, to);
    const uint64_t last = max(to & ~below, first);
    begin = reinterpret_cast<T*>(from);
    packs = reinterpret_cast<Pack<T>*>(first);
    end = reinterpret_cast<T*>(to);
    head = static_cast<int>((first - from) / sizeof(T));
    tail = static_cast<int>((to - last) / sizeof(T));
    count = static_cast<int>((last - first) / PACK_BYTES);
  }

  // The single element of this thread, if it has one. A span has fewer single elements than a warp has threads.
  __device__ __forceinline__ T* single(int thread) const {
    return thread < head ? begin + thread : thread < head + tail ? end - (head + tail) + thread : nullptr;
  }
};

// Calls call(T()) with the type of a dtype.
template <class Call>
__device__ __forceinline__ auto with_dtype(int dtype, Call call) {
  switch (dtype) {
    case FLOAT32:
      return call(float());
    case FLOAT64:
      return call(double());
    case FLOAT16:
      return call(__half());
    default:
      return call(__nv_bfloat16());
  }
}

// The tensor that this block works on, by binary search; end[i] is the number of blocks of the tensors up to i.
__device__ __forceinline__ int find_tensor(const uint32_t* end, int count) {
  int low = 0;
  int high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (blockIdx.x < end[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The part of a tensor that this block works on.
struct Chunk {
  int tensor;  // of the launch
  int chunks;  // of the tensor
  int index;   // of the chunk in the tensor
  int dtype;
  uint64_t from;
  uint64_t to;
};

template <int N>
__device__ __forceinline__ Chunk find_chunk(const Table<N>& table) {
  const int tensor = find_tensor(table.end, table.count);
  const uint32_t before = tensor == 0 ? 0 : table.end[tensor - 1];
  const uint64_t address = table.address[tensor];
  const int64_t extent = table.extent[tensor];
  Chunk chunk;
  chunk.tensor = tensor;
  chunk.chunks = static_cast<int>(table.end[tensor] - before);
  chunk.index = static_cast<int>(blockIdx.x - before);
  chunk.dtype = static_cast<int>(extent & ((1 << DTYPE_BITS) - 1));
  const uint64_t bytes = static_cast<uint64_t>(extent >> DTYPE_BITS) * item_bytes(chunk.dtype);
  const uint64_t from = (address & ~uint64_t(PACK_BYTES - 1)) + uint64_t(chunk.index) * table.chunk_bytes;
  chunk.from = max(from, address);
  chunk.to = min(from + table.chunk_bytes, address + bytes);
  return chunk;
}

}  // namespace fastnorm::cuda
