// The kernels of norms and clipping: reductions of |x|^p, scaling and clamping of a run, which is a number of elements
// that lie one after the other in memory. Included by instruction_set.h after exp.h.
INLINE F32 magnitude(F32 v) { return reinterpret_cast<F32>(reinterpret_cast<U32>(v) & 0x7fffffffu); }
INLINE F64 magnitude(F64 v) { return reinterpret_cast<F64>(reinterpret_cast<U64>(v) & 0x7fffffffffffffffull); }

// Calls step(doubles, chain) for a vector of doubles, or for the two halves of a vector of floats.
template <typename Step>
INLINE void in_double(F64 v, int slot, Step step) {
  step(v, 2 * slot);
}
template <typename Step>
INLINE void in_double(F32 v, int slot, Step step) {
  HalfOfF32 halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  step(to_double(halves[0]), 2 * slot);
  step(to_double(halves[1]), 2 * slot + 1);
}

// A run is cut into four sections that are read side by side: a core fetches memory much faster from several places.
constexpr int sections = 4;

template <typename T>
INLINE int64_t section_length(int64_t n) {
  constexpr int width = lanes<VecOf<T>>;
  return n / (sections * width) * width;
}

constexpr int chains = 2 * sections;  // of additions that don't wait for each other

// Calls step(|x|, chain) for the vectors of a run, in double. The last vector is filled up with `neutral`.
template <typename T, typename Step>
INLINE void each_magnitude(const T* x, int64_t n, double neutral, Step step) {
  constexpr int width = lanes<VecOf<T>>;
  const int64_t length = section_length<T>(n);
  for (int64_t i = 0; i < length; i += width) {
#pragma GCC unroll 4
    for (int section = 0; section < sections; ++section) {
      const T* p = x + section * length + i;
      prefetch(p, 1024);
      in_double(magnitude(load_vec(p)), section, step);
    }
  }
  int64_t i = sections * length;
  for (; i + width <= n; i += width) {
    in_double(magnitude(load_vec(x + i)), 0, step);
  }
  if (i < n) {
    const int count = static_cast<int>(n - i);
    VecOf<T> last = magnitude(load(x + i, ActiveLanes{0, count}));
    for (int lane = count; lane < width; ++lane) {
      last[lane] = static_cast<ComputeType<T>>(neutral);
    }
    in_double(last, 0, step);
  }
}

INLINE double sum_of_chains(const F64 (&chain)[chains]) {
  const F64 sum = ((chain[0] + chain[1]) + (chain[2] + chain[3])) + ((chain[4] + chain[5]) + (chain[6] + chain[7]));
  return HorizontalSum<lanes<F64>>::sum(sum);
}

template <typename T>
double reduce_sum(const void* x, int64_t n, double, double) {
  F64 sum[chains] = {};
  each_magnitude(static_cast<const T*>(x), n, 0, [&](F64 v, int chain) ALWAYS_INLINE { sum[chain] += v; });
  return sum_of_chains(sum);
}

// Squares of floats are exact in double and can't leave its range.
template <typename T>
double reduce_squares(const void* x, int64_t n, double, double) {
  F64 sum[chains] = {};
  each_magnitude(static_cast<const T*>(x), n, 0, [&](F64 v, int chain) ALWAYS_INLINE { sum[chain] += v * v; });
  return sum_of_chains(sum);
}

template <typename T>
double reduce_nonzeros(const void* x, int64_t n, double, double) {
  I64 count[chains] = {};
  each_magnitude(static_cast<const T*>(x), n, 0,
                 [&](F64 v, int chain) ALWAYS_INLINE { count[chain] -= reinterpret_cast<I64>(v != 0); });
  int64_t sum = 0;
  for (const I64& each : count) {
    for (int lane = 0; lane < lanes<F64>; ++lane) {
      sum += each[lane];
    }
  }
  return static_cast<double>(sum);
}

// The largest or the smallest |x|. Comparisons drop NaN, so NaNs are recorded separately.
template <typename T, bool LARGEST>
double reduce_extreme(const void* x, int64_t n, double, double) {
  constexpr double neutral = LARGEST ? 0.0 : std::numeric_limits<double>::infinity();
  F64 extreme[chains];
  I64 nan[chains] = {};
  for (F64& each : extreme) {
    each = F64{} + neutral;
  }
  each_magnitude(static_cast<const T*>(x), n, neutral, [&](F64 v, int chain) ALWAYS_INLINE {
    extreme[chain] = (LARGEST ? v > extreme[chain] : v < extreme[chain]) ? v : extreme[chain];
    nan[chain] |= reinterpret_cast<I64>(v != v);
  });
  double result = neutral;
  bool has_nan = false;
  for (int chain = 0; chain < chains; ++chain) {
    for (int lane = 0; lane < lanes<F64>; ++lane) {
      const double value = extreme[chain][lane];
      result = (LARGEST ? value > result : value < result) ? value : result;
      has_nan |= nan[chain][lane] != 0;
    }
  }
  return has_nan ? std::numeric_limits<double>::quiet_NaN() : result;
}

// log2(x) for finite x > 0, with a relative or absolute error of about 1e-15.
INLINE F64 log2_of(F64 x) {
  const auto is_subnormal = x < 0x1p-1022;
  x = is_subnormal ? x * 0x1p54 : x;
  const U64 bits = reinterpret_cast<U64>(x);
  // Chosen so that the mantissa lies between √½ and √2. Adding 1024 keeps the exponent from being negative.
  const U64 exponent = (bits - 0x3fe6a09e667f3bcdull + (1024ull << 52)) >> 52;
  const F64 mantissa = reinterpret_cast<F64>(bits - ((exponent - 1024) << 52));
  const F64 whole =
      reinterpret_cast<F64>(exponent | 0x4330000000000000ull) - (0x1p52 + 1024) - (is_subnormal ? F64{} + 54 : F64{});
  // 2 · artanh(s), a series in s² < 0.0295
  const F64 s = (mantissa - 1) / (mantissa + 1);
  const F64 square = s * s;
  F64 series = F64{} + 1.0 / 19;
#pragma GCC unroll 9
  for (int k = 17; k > 0; k -= 2) {
    series = series * square + 1.0 / k;
  }
  return whole + s * series * 2.8853900817779268147;  // 2 / ln 2
}

// 2^y; zero below the normal numbers and inf above them.
INLINE F64 exp2_of(F64 y) {
  const auto is_small = y < -1022;
  const auto is_large = y >= 1023.5;
  const F64 inside = is_small | is_large ? F64{} : y;
  const F64 shifted = inside + 0x1.8p52;  // leaves the nearest integer in the low bits
  const F64 value = scaled_exp((inside - (shifted - 0x1.8p52)) * 0.69314718055994530942, shifted);
  const F64 infinity = F64{} + std::numeric_limits<double>::infinity();
  return y != y ? y : is_small ? F64{} : is_large ? infinity : value;
}

// v^p for v >= 0.
INLINE F64 power(F64 v, double p) {
  const F64 infinity = F64{} + std::numeric_limits<double>::infinity();
  const F64 inside = exp2_of(p * log2_of(v));
  const F64 of_zero = p > 0 ? F64{} : infinity;
  const F64 of_infinity = p > 0 ? infinity : F64{};
  return v != v ? v : v == 0 ? of_zero : v == infinity ? of_infinity : inside;
}

template <typename T>
double reduce_powers(const void* x, int64_t n, double p, double divisor) {
  F64 sum[chains] = {};
  const double neutral = p < 0 ? std::numeric_limits<double>::infinity() : 0.0;
  if (divisor == 1) {
    each_magnitude(static_cast<const T*>(x), n, neutral,
                   [&](F64 v, int chain) ALWAYS_INLINE { sum[chain] += power(v, p); });
  } else {
    each_magnitude(static_cast<const T*>(x), n, neutral,
                   [&](F64 v, int chain) ALWAYS_INLINE { sum[chain] += power(v / divisor, p); });
  }
  return sum_of_chains(sum);
}

// Replaces each vector v of a run by f(v).
template <typename T, typename Function>
INLINE void each_in_place(T* x, int64_t n, Function f) {
  constexpr int width = lanes<VecOf<T>>;
  const int64_t length = section_length<T>(n);
  for (int64_t i = 0; i < length; i += width) {
#pragma GCC unroll 4
    for (int section = 0; section < sections; ++section) {
      T* p = x + section * length + i;
      store_vec(p, f(load_vec(p)));
    }
  }
  for (int64_t i = sections * length; i < n; i += width) {
    const ActiveLanes active{0, n - i < width ? static_cast<int>(n - i) : width};
    store(x + i, f(load(x + i, active)), active);
  }
}

template <typename T>
void scale(void* x, int64_t n, double coefficient) {
  const auto factor = static_cast<ComputeType<T>>(coefficient);
  each_in_place(static_cast<T*>(x), n, [=](VecOf<T> v) ALWAYS_INLINE { return v * factor; });
}

// A block in which nothing is clamped is not written.
template <typename T>
void clamp(void* x, int64_t n, double bound) {
  using V = VecOf<T>;
  const auto high = static_cast<ComputeType<T>>(bound);
  constexpr int64_t block = 1024;
  for (int64_t first = 0; first < n; first += block) {
    T* run = static_cast<T*>(x) + first;
    const int64_t size = n - first < block ? n - first : block;
    V largest = {};
    each_vector<V, 4>(0, size, [&](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
      const V v = magnitude(load(run + i, active));
      largest = v > largest ? v : largest;
    });
    bool writes = false;
    for (int lane = 0; lane < lanes<V>; ++lane) {
      writes |= largest[lane] > high;
    }
    if (writes) {
      const V low = V{} - high;
      const V top = V{} + high;
      each_in_place(run, size, [=](V v) ALWAYS_INLINE {
        v = v < low ? low : v;
        return v > top ? top : v;
      });
    }
  }
}

template <typename T>
constexpr RunKernels run_kernels_of = {{reduce_sum<T>, reduce_squares<T>, reduce_powers<T>, reduce_extreme<T, true>,
                                        reduce_extreme<T, false>, reduce_nonzeros<T>},
                                       scale<T>,
                                       clamp<T>};
