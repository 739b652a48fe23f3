// Vectors of float or double, one register each: loads, stores, conversions, loops over a row, sums. The kernels
// compute in float, or in double for double inputs, and convert 16-bit types as they load and store. instruction_set.h
// includes this file once for each instruction set, inside that set's namespace; so it has no include guard and
// includes nothing.
#define INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE __attribute__((always_inline))

typedef float F32 __attribute__((vector_size(VECTOR_BYTES)));
typedef double F64 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t U64 __attribute__((vector_size(VECTOR_BYTES)));
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

// Prefetches the cache line that lies `bytes` after p, usually in the next row. The address may be invalid.
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
#if VECTOR_BYTES == 64  // gcc 12 emits five instructions for __builtin_convertvector here
  return reinterpret_cast<U32>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(v)));
#elif VECTOR_BYTES == 32  // as many
  return reinterpret_cast<U32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, U32);
#endif
}

INLINE F32 from_bf16(U16 v) { return reinterpret_cast<F32>(widen(v) << 16); }

// Each lane is below 2^16.
INLINE U16 narrow(U32 v) {
#if VECTOR_BYTES == 64  // gcc 12 emits a slower 16-bit permutation for __builtin_convertvector
  return reinterpret_cast<U16>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(v)));
#elif VECTOR_BYTES == 32  // gcc 12 would clear the upper halves first
  const __m256i lanes = reinterpret_cast<__m256i>(v);
  return reinterpret_cast<U16>(_mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1)));
#else
  return __builtin_convertvector(v, U16);
#endif
}

// A bfloat16 in the upper half of each lane; the lower half is not zero.
INLINE U32 rounded_to_bf16(F32 v) {
  const U32 bits = reinterpret_cast<U32>(v);
  const U32 half = 0x7fff + ((bits >> 16) & 1);
#if VECTOR_BYTES == 64
  return v != v ? bits | 0x400000 : bits + half;
#else  // without a blend, which takes as long as three of these; NaN becomes that of all bits
  const U32 is_nan = reinterpret_cast<U32>(v != v);
  return (bits | is_nan) + (half & ~is_nan);
#endif
}

INLINE U16 to_bf16(F32 v) { return narrow(rounded_to_bf16(v) >> 16); }

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
  // One unit in the last place of 0.5f is the smallest subnormal half, so this addition rounds to a subnormal half.
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

// The lanes [begin, end) of a vector that a step works on: all of them, but for the last vector of a row.
struct ActiveLanes {
  int begin, end;
};

#if VECTOR_BYTES == 64
// Loads or stores the first `count` elements of a vector. The processor does not touch the memory after them.
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

// Reads no byte past the row: the lanes from active.end on are zero. The lanes below active.begin are read, too.
template <typename T>
INLINE VecOf<T> load(const T* p, ActiveLanes active) {
  return active.end == lanes<VecOf<T>> ? load_vec(p) : load_first(p, active.end);
}

// Stores the lanes below active.end. Those below active.begin are stored a second time: they must not change by that.
template <typename T>
INLINE void store(T* p, VecOf<T> v, ActiveLanes active) {
  active.end == lanes<VecOf<T>> ? store_vec(p, v) : store_first(p, v, active.end);
}

#if VECTOR_BYTES == 64
INLINE void write_non_temporal(void* p, F32 v) {
  _mm512_stream_ps(static_cast<float*>(p), reinterpret_cast<__m512>(v));
}
INLINE void write_non_temporal(void* p, F64 v) {
  _mm512_stream_pd(static_cast<double*>(p), reinterpret_cast<__m512d>(v));
}
INLINE void write_non_temporal(void* p, U16 v) {
  _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
}
#elif VECTOR_BYTES == 32
INLINE void write_non_temporal(void* p, F32 v) {
  _mm256_stream_ps(static_cast<float*>(p), reinterpret_cast<__m256>(v));
}
INLINE void write_non_temporal(void* p, F64 v) {
  _mm256_stream_pd(static_cast<double*>(p), reinterpret_cast<__m256d>(v));
}
INLINE void write_non_temporal(void* p, U16 v) {
  _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
}
#else
template <typename V>
INLINE void write_non_temporal(void* p, V v) {
  write(p, v);
}
#endif
INLINE void store_non_temporal(float* p, F32 v) { write_non_temporal(p, v); }
INLINE void store_non_temporal(double* p, F64 v) { write_non_temporal(p, v); }
INLINE void store_non_temporal(Bf16* p, F32 v) { write_non_temporal(p, to_bf16(v)); }
INLINE void store_non_temporal(Half* p, F32 v) { write_non_temporal(p, to_half(v)); }

// Stores to p, which lies in the rows `out`: with a non-temporal store where `out` asks for it, otherwise with a normal
// one, which prefetches what will be overwritten next. If MAY_BE_NON_TEMPORAL is false, all stores are normal ones.
template <bool MAY_BE_NON_TEMPORAL, typename T>
INLINE void store_to(const StridedRows& out, T* p, VecOf<T> v, ActiveLanes active) {
  if (MAY_BE_NON_TEMPORAL && out.non_temporal && active.end == lanes<VecOf<T>>) {
    store_non_temporal(p, v);
  } else {
    prefetch(p, out.ahead);
    store(p, v, active);
  }
}

// Zeroes the lanes that are not active.
template <typename V>
INLINE V zero_inactive(V v, ActiveLanes active) {
  using Index = std::conditional_t<sizeof(v[0]) == sizeof(double), I64, I32>;
  if (active.begin == 0 && active.end == lanes<V>) {
    return v;
  }
  Index lane;
  for (int i = 0; i < lanes<V>; ++i) {
    lane[i] = i;
  }
  return reinterpret_cast<V>(reinterpret_cast<Index>(v) & (lane < active.end) & (lane >= active.begin));
}

INLINE F32 round_to(F32 v, Dtype dtype) {
  if (dtype == Dtype::bf16) {
    return from_bf16(to_bf16(v));
  }
  return dtype == Dtype::f16 ? from_half(to_half(v)) : v;
}

// Rounds to float first, as PyTorch's conversions do.
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

// Calls step(i, slot, active) for the vectors of a row's elements [begin, end), UNROLL at a time. `slot` counts those:
// a sum for each slot makes chains of additions that don't wait for each other. Where the row is long enough, the last
// vector starts before the last full one ends, and its first lanes are inactive: faster than a partial load.
template <typename V, int UNROLL, typename Step>
INLINE void each_vector(int64_t begin, int64_t end, Step step) {
  constexpr int width = lanes<V>;
  int64_t i = begin;
  for (; i + UNROLL * width <= end; i += UNROLL * width) {
#pragma GCC unroll 8
    for (int slot = 0; slot < UNROLL; ++slot) {
      step(i + slot * width, slot, ActiveLanes{0, width});
    }
  }
  for (; i + width <= end; i += width) {
    step(i, 0, ActiveLanes{0, width});
  }
  if (i < end && end >= width) {
    step(end - width, 0, ActiveLanes{static_cast<int>(i - (end - width)), width});
  } else if (i < end) {
    step(i, 0, ActiveLanes{0, static_cast<int>(end - i)});
  }
}

// The sum of a vector of N doubles: adds its halves until one number is left.
template <int N>
struct HorizontalSum {
  typedef double Vec __attribute__((vector_size(N * sizeof(double))));
  static INLINE double sum(Vec v) {
    typename HorizontalSum<N / 2>::Vec halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    return HorizontalSum<N / 2>::sum(halves[0] + halves[1]);
  }
};
template <>
struct HorizontalSum<1> {
  typedef double Vec;
  static INLINE double sum(double v) { return v; }
};

// Sums as many vectors as each has lanes; lane i is the sum of vector i, added in the order of HorizontalSum.
INLINE F64 horizontal_sums(const F64 (&vectors)[lanes<F64>]) {
#if VECTOR_BYTES == 64
  // In a and b each partial sum takes 2 · width adjacent lanes. Adds the halves of each; a's results come before b's.
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
    sums[i] = HorizontalSum<lanes<F64>>::sum(vectors[i]);
  }
  return sums;
#endif
}

typedef float HalfOfF32 __attribute__((vector_size(VECTOR_BYTES / 2)));

INLINE F64 to_double(HalfOfF32 v) {
#if VECTOR_BYTES == 64  // gcc 12 would convert quarters and join them
  return reinterpret_cast<F64>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(v)));
#elif VECTOR_BYTES == 32
  return reinterpret_cast<F64>(_mm256_cvtps_pd(reinterpret_cast<__m128>(v)));
#else
  return __builtin_convertvector(v, F64);
#endif
}

INLINE HalfOfF32 to_float(F64 v) {
#if VECTOR_BYTES == 64  // as in to_double
  return reinterpret_cast<HalfOfF32>(_mm512_maskz_cvtpd_ps(0xff, reinterpret_cast<__m512d>(v)));
#else
  return __builtin_convertvector(v, HalfOfF32);
#endif
}

// A double, or a vector of them, rounded to S: one number, or an array of a number for each lane.
template <typename S, typename D>
struct Rounded {
  S value;

  explicit INLINE Rounded(D v) : value(static_cast<S>(v)) {}
  INLINE D in_double() const { return value; }
};
template <>
struct Rounded<float, F64> {
  float value[lanes<F64>];

  explicit INLINE Rounded(F64 v) { write(value, to_float(v)); }
  INLINE F64 in_double() const { return to_double(read<HalfOfF32>(value)); }
};
template <>
struct Rounded<double, F64> {
  double value[lanes<F64>];

  explicit INLINE Rounded(F64 v) { write(value, v); }
  INLINE F64 in_double() const { return read<F64>(value); }
};

// Whether a comparison holds, or that of any lanes.
INLINE bool any(bool holds) { return holds; }
INLINE bool any(I64 holds) {
#if VECTOR_BYTES == 64
  return _mm512_movepi64_mask(reinterpret_cast<__m512i>(holds)) != 0;
#elif VECTOR_BYTES == 32
  return _mm256_movemask_pd(reinterpret_cast<__m256d>(holds)) != 0;
#else
  return (holds[0] | holds[1]) != 0;
#endif
}

INLINE F64 square_root(F64 v) {
#if VECTOR_BYTES == 64
  return reinterpret_cast<F64>(_mm512_maskz_sqrt_pd(0xff, reinterpret_cast<__m512d>(v)));
#elif VECTOR_BYTES == 32
  return reinterpret_cast<F64>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(v)));
#else
  return F64{std::sqrt(v[0]), std::sqrt(v[1])};
#endif
}

// A vector as doubles; of a vector of floats, the sum of its two halves.
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

// A sum of many vectors: short chains of additions in the vectors' own type, which flush() adds to a sum in double.
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

  INLINE double total() const { return HorizontalSum<lanes<F64>>::sum(flushed); }
};

// each_vector over a row for sums. Flushes them every 1024 elements, so that their error doesn't grow with n.
template <typename V, typename Step, typename... Sums>
INLINE void each_summed(int64_t n, Step step, Sums&... sums) {
  constexpr int64_t size = 1024;
  for (int64_t first = 0; first < n; first += size) {
    each_vector<V, Sum<V>::chains>(first, n - first < size ? n : first + size, step);
    (sums.flush(), ...);
  }
}
