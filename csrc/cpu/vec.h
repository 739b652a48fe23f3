// One vector register of float or double: loads, stores, roundings. Included once for each instruction set, inside that
// set's namespace, so it has no include guard and includes nothing.
#define INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE __attribute__((always_inline))

typedef float F32 __attribute__((vector_size(VECTOR_BYTES)));
typedef double F64 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t I64 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(VECTOR_BYTES / 2)));

template <typename T>
struct Compute {
  using S = float;
  using Vec = F32;
  using Index = I32;
};
template <>
struct Compute<double> {
  using S = double;
  using Vec = F64;
  using Index = I64;
};
template <typename T>
using ComputeType = typename Compute<T>::S;
template <typename T>
using VecOf = typename Compute<T>::Vec;
template <typename V>
constexpr int lanes = sizeof(V) / sizeof(V{}[0]);

// Fetches what lies some bytes on, the next row, while the processor is busy with this one. Any address will do.
INLINE void prefetch(const void* p, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes), 0, 2);
}

template <typename V>
INLINE V read(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

INLINE U32 widen(U16 v) {
#if VECTOR_BYTES == 64  // gcc 12 takes five instructions for this conversion
  return reinterpret_cast<U32>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(v)));
#else
  return __builtin_convertvector(v, U32);
#endif
}

INLINE F32 from_bf16(U16 v) { return reinterpret_cast<F32>(widen(v) << 16); }

INLINE U16 narrow(U32 v) {
#if VECTOR_BYTES == 64  // as above, and a 16-bit permutation is slower
  return reinterpret_cast<U16>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, U16);
#endif
}

INLINE U16 to_bf16(F32 v) {
  const U32 bits = reinterpret_cast<U32>(v);
  return narrow((v != v ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE F32 from_half(U16 v) {
#if VECTOR_BYTES == 64
  return reinterpret_cast<F32>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(v)));
#elif VECTOR_BYTES == 32
  return reinterpret_cast<F32>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(v)));
#else
  const U32 wide = widen(v);
  // Scaling by 2^112 moves the exponent from half's bias to float's, and normalises subnormal halves on the way.
  const F32 scaled = reinterpret_cast<F32>((wide & 0x7fff) << 13) * 0x1p112f;
  const U32 special = reinterpret_cast<U32>((wide & 0x7c00) == 0x7c00) & 0x7f800000;
  return reinterpret_cast<F32>(reinterpret_cast<U32>(scaled) | special | ((wide & 0x8000) << 16));
#endif
}

INLINE U16 to_half(F32 v) {
#if VECTOR_BYTES == 64
  return reinterpret_cast<U16>(_mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif VECTOR_BYTES == 32
  return reinterpret_cast<U16>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const U32 bits = reinterpret_cast<U32>(v);
  const U32 size = bits & 0x7fffffff;
  const U32 normal = (size + 0xfff + ((size >> 13) & 1) - (112u << 23)) >> 13;
  // One unit in the last place of 0.5f is one of the subnormal halves, so the addition rounds to them.
  const U32 subnormal = reinterpret_cast<U32>(reinterpret_cast<F32>(size) + 0.5f) - 0x3f000000;
  const U32 is_small = reinterpret_cast<U32>(size < 0x38800000);
  const U32 is_large = reinterpret_cast<U32>(size >= 0x477ff000);
  const U32 nan = reinterpret_cast<U32>(size > 0x7f800000) & 0x200;
  const U32 finite = (subnormal & is_small) | (normal & ~is_small);
  return narrow((finite & ~is_large) | (is_large & (0x7c00 | nan)) | ((bits >> 16) & 0x8000));
#endif
}

INLINE F32 load_vec(const float* p) { return read<F32>(p); }
INLINE F64 load_vec(const double* p) { return read<F64>(p); }
INLINE F32 load_vec(const Bf16* p) { return from_bf16(read<U16>(p)); }
INLINE F32 load_vec(const Half* p) { return from_half(read<U16>(p)); }

template <typename V>
INLINE void write(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
INLINE void store_vec(float* p, F32 v) { write(p, v); }
INLINE void store_vec(double* p, F64 v) { write(p, v); }
INLINE void store_vec(Bf16* p, F32 v) { write(p, to_bf16(v)); }
INLINE void store_vec(Half* p, F32 v) { write(p, to_half(v)); }

// The lanes [skip, count) of a vector are the ones that a step works for; all of them but at a row's end.
struct Part {
  int count, skip;
};

#if VECTOR_BYTES == 64
// The first `count` elements of a vector; the processor does not touch what lies behind them.
INLINE F32 load_first(const float* p, int count) {
  return reinterpret_cast<F32>(_mm512_maskz_loadu_ps((1u << count) - 1, p));
}
INLINE F64 load_first(const double* p, int count) {
  return reinterpret_cast<F64>(_mm512_maskz_loadu_pd((1u << count) - 1, p));
}
INLINE U16 load_first(const void* p, int count) {
  return reinterpret_cast<U16>(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
}
INLINE F32 load_first(const Bf16* p, int count) { return from_bf16(load_first(static_cast<const void*>(p), count)); }
INLINE F32 load_first(const Half* p, int count) { return from_half(load_first(static_cast<const void*>(p), count)); }

INLINE void store_first(float* p, F32 v, int count) {
  _mm512_mask_storeu_ps(p, (1u << count) - 1, reinterpret_cast<__m512>(v));
}
INLINE void store_first(double* p, F64 v, int count) {
  _mm512_mask_storeu_pd(p, (1u << count) - 1, reinterpret_cast<__m512d>(v));
}
INLINE void store_first(void* p, U16 v, int count) {
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, reinterpret_cast<__m256i>(v));
}
INLINE void store_first(Bf16* p, F32 v, int count) { store_first(static_cast<void*>(p), to_bf16(v), count); }
INLINE void store_first(Half* p, F32 v, int count) { store_first(static_cast<void*>(p), to_half(v), count); }
#else
template <typename T>
INLINE VecOf<T> load_first(const T* p, int count) {
  T tile[lanes<VecOf<T>>] = {};
  __builtin_memcpy(tile, p, count * sizeof(T));
  return load_vec(tile);
}

template <typename T>
INLINE void store_first(T* p, VecOf<T> v, int count) {
  T tile[lanes<VecOf<T>>];
  store_vec(tile, v);
  __builtin_memcpy(p, tile, count * sizeof(T));
}
#endif

// Reads no byte past the row; lanes from count on are zero, those below skip are what lies there.
template <typename T>
INLINE VecOf<T> load(const T* p, Part part) {
  return part.count == lanes<VecOf<T>> ? load_vec(p) : load_first(p, part.count);
}

// Writes the lanes below skip again.
template <typename T>
INLINE void store(T* p, VecOf<T> v, Part part) {
  part.count == lanes<VecOf<T>> ? store_vec(p, v) : store_first(p, v, part.count);
}

#if VECTOR_BYTES == 64
INLINE void stream(void* p, F32 v) { _mm512_stream_ps(static_cast<float*>(p), reinterpret_cast<__m512>(v)); }
INLINE void stream(void* p, F64 v) { _mm512_stream_pd(static_cast<double*>(p), reinterpret_cast<__m512d>(v)); }
INLINE void stream(void* p, U16 v) { _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(v)); }
#elif VECTOR_BYTES == 32
INLINE void stream(void* p, F32 v) { _mm256_stream_ps(static_cast<float*>(p), reinterpret_cast<__m256>(v)); }
INLINE void stream(void* p, F64 v) { _mm256_stream_pd(static_cast<double*>(p), reinterpret_cast<__m256d>(v)); }
INLINE void stream(void* p, U16 v) { _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(v)); }
#else
template <typename V>
INLINE void stream(void* p, V v) {
  write(p, v);
}
#endif
INLINE void stream_vec(float* p, F32 v) { stream(p, v); }
INLINE void stream_vec(double* p, F64 v) { stream(p, v); }
INLINE void stream_vec(Bf16* p, F32 v) { stream(p, to_bf16(v)); }
INLINE void stream_vec(Half* p, F32 v) { stream(p, to_half(v)); }

// As store, for an element of a strip. Fetches what will be overwritten next, unless that goes past the caches, as it
// only may where MAY_STREAM.
template <bool MAY_STREAM, typename T>
INLINE void store_to(const Strip& strip, T* p, VecOf<T> v, Part part) {
  if (MAY_STREAM && strip.streams && part.count == lanes<VecOf<T>>) {
    stream_vec(p, v);
  } else {
    prefetch(p, strip.ahead);
    store(p, v, part);
  }
}

// Zeroes the lanes that are not the step's.
template <typename V>
INLINE V keep(V v, Part part) {
  using Index = std::conditional_t<sizeof(v[0]) == sizeof(double), I64, I32>;
  if (part.count == lanes<V> && part.skip == 0) {
    return v;
  }
  Index lane;
  for (int i = 0; i < lanes<V>; ++i) {
    lane[i] = i;
  }
  return reinterpret_cast<V>(reinterpret_cast<Index>(v) & (lane < part.count) & (lane >= part.skip));
}

INLINE F32 round_to(F32 v, Dtype dtype) {
  if (dtype == Dtype::bf16) {
    return from_bf16(to_bf16(v));
  }
  return dtype == Dtype::f16 ? from_half(to_half(v)) : v;
}

// By way of float, as PyTorch converts.
INLINE F64 round_to(F64 v, Dtype dtype) {
  if (dtype == Dtype::f64) {
    return v;
  }
  F32 narrow = {};
  for (int i = 0; i < lanes<F64>; ++i) {
    narrow[i] = static_cast<float>(v[i]);
  }
  narrow = round_to(narrow, dtype);
  for (int i = 0; i < lanes<F64>; ++i) {
    v[i] = narrow[i];
  }
  return v;
}

// Calls step(i, slot, part) for the vectors of a row's elements [begin, end); slots are independent chains of sums.
// The last vector reaches back where the row is long enough: that is faster than a partial one.
template <typename V, int UNROLL, typename Step>
INLINE void each_vector(int64_t begin, int64_t end, Step step) {
  constexpr int width = lanes<V>;
  int64_t i = begin;
  for (; i + UNROLL * width <= end; i += UNROLL * width) {
#pragma GCC unroll 8
    for (int slot = 0; slot < UNROLL; ++slot) {
      step(i + slot * width, slot, Part{width, 0});
    }
  }
  for (; i + width <= end; i += width) {
    step(i, 0, Part{width, 0});
  }
  if (i < end && end >= width) {
    step(end - width, 0, Part{width, static_cast<int>(i - (end - width))});
  } else if (i < end) {
    step(i, 0, Part{static_cast<int>(end - i), 0});
  }
}

// Adds the halves of a vector until one number is left.
template <int N>
struct Doubles {
  typedef double Vec __attribute__((vector_size(N * sizeof(double))));
  static INLINE double sum(Vec v) {
    typename Doubles<N / 2>::Vec halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    return Doubles<N / 2>::sum(halves[0] + halves[1]);
  }
};
template <>
struct Doubles<1> {
  typedef double Vec;
  static INLINE double sum(double v) { return v; }
};

// The sums of as many vectors as they have lanes, each as Doubles has it.
INLINE F64 totals(const F64 (&vectors)[lanes<F64>]) {
#if VECTOR_BYTES == 64
  // Of a and b, whose sums take 2 · width adjacent lanes each: their halves added, a's sums before b's.
  const auto folded = [](F64 a, F64 b, int width) ALWAYS_INLINE {
    const I64 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const I64 first = lane / width * 2 * width + lane % width;
    return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + width);
  };
  F64 fours[4], twos[2];
  for (int i = 0; i < 4; ++i) {
    fours[i] = folded(vectors[2 * i], vectors[2 * i + 1], 4);
  }
  for (int i = 0; i < 2; ++i) {
    twos[i] = folded(fours[2 * i], fours[2 * i + 1], 2);
  }
  return folded(twos[0], twos[1], 1);
#else
  F64 sums;
  for (int i = 0; i < lanes<F64>; ++i) {
    sums[i] = Doubles<lanes<F64>>::sum(vectors[i]);
  }
  return sums;
#endif
}

typedef float HalfOfF32 __attribute__((vector_size(VECTOR_BYTES / 2)));

INLINE F64 to_double(HalfOfF32 v) {
#if VECTOR_BYTES == 64  // gcc 12 converts in quarters and puts them together again
  return reinterpret_cast<F64>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(v)));
#elif VECTOR_BYTES == 32
  return reinterpret_cast<F64>(_mm256_cvtps_pd(reinterpret_cast<__m128>(v)));
#else
  return __builtin_convertvector(v, F64);
#endif
}

// The sum of a vector's halves where its lanes are float.
template <typename V>
INLINE F64 in_double(V v) {
  if constexpr (sizeof(v[0]) == sizeof(double)) {
    return v;
  } else {
    HalfOfF32 halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    return to_double(halves[0]) + to_double(halves[1]);
  }
}

// A sum of many vectors: short chains of additions in S, which flush() adds up in double.
template <typename V>
struct Sum {
  static constexpr int chains = 4;
  V chain[chains] = {};
  F64 flushed = {};

  INLINE void flush() {
    flushed += in_double((chain[0] + chain[1]) + (chain[2] + chain[3]));
    for (V& each : chain) {
      each = V{};
    }
  }

  INLINE double total() const { return Doubles<lanes<F64>>::sum(flushed); }
};

// each_vector over a row for sums: flushes them every so often, which keeps their error from growing with n.
template <typename V, typename Step, typename... Sums>
INLINE void each_summed(int64_t n, Step step, Sums&... sums) {
  constexpr int64_t size = 1024;
  for (int64_t first = 0; first < n; first += size) {
    each_vector<V, Sum<V>::chains>(first, n - first < size ? n : first + size, step);
    (sums.flush(), ...);
  }
}
