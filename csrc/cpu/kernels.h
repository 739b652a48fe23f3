// The row kernels of every norm. Included by instruction_set.h after vec.h.

template <typename T>
INLINE double square_sum(const T* x, int64_t n) {
  using V = VecOf<T>;
  Sum<V> sum;
  const auto step = [&](int64_t i, int slot, Part part) ALWAYS_INLINE {
    const V value = keep(load(x + i, part), part);
    sum.chain[slot] += value * value;
  };
  each_summed<V>(n, step, sum);
  return sum.total();
}

struct Spread {
  double mean, square_sum;  // of the differences from the mean
};

// Values that are read from memory in every pass; prefetches as many bytes on in the second.
template <typename T>
struct ValuesInMemory {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const T* x;
  int64_t n, ahead;

  INLINE double sum_from(S centre) const {
    Sum<V> sum;
    const auto step = [&](int64_t i, int slot, Part part)
                          ALWAYS_INLINE { sum.chain[slot] += keep(load(x + i, part) - centre, part); };
    each_summed<V>(n, step, sum);
    return sum.total();
  }

  INLINE double square_sum_from(S centre) const {
    Sum<V> squares;
    const auto step = [&](int64_t i, int slot, Part part) ALWAYS_INLINE {
      prefetch(x + i, ahead);
      const V value = keep(load(x + i, part) - centre, part);
      squares.chain[slot] += value * value;
    };
    each_summed<V>(n, step, squares);
    return squares.total();
  }
};

// COUNT whole vectors, a power of two, in registers. Sums are of pairs, then in double.
template <typename V, int COUNT>
struct ValuesInRegisters {
  using S = std::remove_cvref_t<decltype(V{}[0])>;
  static constexpr int64_t n = COUNT * lanes<V>;
  V of[COUNT];

  template <int SIZE>
  static INLINE double sum(const V* terms) {
    if constexpr (SIZE == 1) {
      return Doubles<lanes<F64>>::sum(in_double(*terms));
    } else {
      V pairs[SIZE / 2];
#pragma GCC unroll 8
      for (int i = 0; i < SIZE / 2; ++i) {
        pairs[i] = terms[2 * i] + terms[2 * i + 1];
      }
      return sum<SIZE / 2>(pairs);
    }
  }

  INLINE double sum_from(S centre) const {
    V terms[COUNT];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) {
      terms[i] = of[i] - centre;
    }
    return sum<COUNT>(terms);
  }

  INLINE double square_sum_from(S centre) const {
    V terms[COUNT];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) {
      terms[i] = (of[i] - centre) * (of[i] - centre);
    }
    return sum<COUNT>(terms);
  }
};

// In two passes.
template <typename Values>
INLINE Spread spread_of(const Values& values) {
  using S = typename Values::S;
  const double share = 1.0 / values.n;
  double mean = values.sum_from(S(0)) * share;
  const S centre = static_cast<S>(mean);
  double square_sum = values.square_sum_from(centre);
  if (mean * mean > 64 * square_sum * share) {
    // Far from zero the differences are exact, and a better way to the mean. Nearer to it their errors go one way.
    const double offset = values.sum_from(centre) * share;
    square_sum -= offset * offset * values.n;
    mean = centre + offset;
  }
  return {mean, square_sum};
}

// Chan's formula over blocks that the first-level cache keeps from the first pass to the second.
template <typename T>
INLINE Spread spread(const T* x, int64_t n, int64_t ahead) {
  constexpr int64_t block = 4096;
  if (n <= block) {
    return spread_of(ValuesInMemory<T>{x, n, ahead});
  }
  Spread all = {0, 0};
  for (int64_t first = 0; first < n; first += block) {
    const int64_t size = n - first < block ? n - first : block;
    const Spread part = spread_of(ValuesInMemory<T>{x + first, size, block * static_cast<int64_t>(sizeof(T))});
    const double distance = part.mean - all.mean;
    all.mean += distance * size / (first + size);
    all.square_sum += part.square_sum + distance * distance * first * size / (first + size);
  }
  return all;
}

// Whole rows between dtypes, and rows of S.
template <typename T, typename S>
void load_row(const void* row, S* out, int64_t n) {
  const T* in = static_cast<const T*>(row);
  if constexpr (sizeof(ComputeType<T>) == sizeof(S)) {
    each_vector<VecOf<T>, 1>(
        0, n, [&](int64_t i, int, Part part) ALWAYS_INLINE { store(out + i, load(in + i, part), part); });
  } else if constexpr (sizeof(T) == sizeof(double)) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<float>(in[i]);
    }
  } else {
    each_vector<F32, 1>(0, n, [&](int64_t i, int, Part part) ALWAYS_INLINE {
      const F32 values = load(in + i, part);
      for (int lane = 0; lane < part.count; ++lane) {
        out[i + lane] = values[lane];
      }
    });
  }
}

template <typename T, typename S>
void store_row(const S* values, void* row, int64_t n) {
  T* out = static_cast<T*>(row);
  if constexpr (sizeof(ComputeType<T>) == sizeof(S)) {
    each_vector<VecOf<T>, 1>(
        0, n, [&](int64_t i, int, Part part) ALWAYS_INLINE { store(out + i, load(values + i, part), part); });
  } else if constexpr (sizeof(T) == sizeof(S) * 2 || sizeof(T) == sizeof(float)) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<T>(values[i]);
    }
  } else {
    each_vector<F32, 1>(0, n, [&](int64_t i, int, Part part) ALWAYS_INLINE {
      F32 narrow = {};
      for (int lane = 0; lane < part.count; ++lane) {
        narrow[lane] = static_cast<float>(values[i + lane]);
      }
      store(out + i, narrow, part);
    });
  }
}

template <typename S>
void add_to_total(const S* partial, double* total, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    total[i] += partial[i];
  }
}

template <typename T>
void add_rows(const void* x, const void* residual, void* h, int64_t n) {
  const T* a = static_cast<const T*>(x);
  const T* b = static_cast<const T*>(residual);
  each_vector<VecOf<T>, 2>(0, n, [&](int64_t i, int, Part part) ALWAYS_INLINE {
    store(static_cast<T*>(h) + i, load(a + i, part) + load(b + i, part), part);
  });
}

// For rows whose float sums overflow though their squares may not; rows with inf or NaN come here too. The mean is
// that of the distances from the first element: exact where all are alike.
template <typename T>
__attribute__((noinline)) Spread spread_in_double(const T* x, int64_t n, bool centred) {
  ComputeType<T> tile[64];
  Spread result = {0, 0};
  load_row<T>(x, tile, 1);
  const double origin = tile[0];
  for (int pass = centred ? 0 : 1; pass < 2; ++pass) {
    double sum = 0;
    for (int64_t first = 0; first < n; first += 64) {
      const int64_t size = n - first < 64 ? n - first : 64;
      load_row<T>(x + first, tile, size);
      for (int64_t i = 0; i < size; ++i) {
        const double value = tile[i] - result.mean;
        sum += pass == 0 ? value / n - origin / n : value * value;
      }
    }
    (pass == 0 ? result.mean : result.square_sum) = pass == 0 ? origin + sum : sum;
  }
  return result;
}

template <typename S>
INLINE S reciprocal_root(double mean_square, double eps) {
  return static_cast<S>(1 / std::sqrt(mean_square + eps));
}

// y = x · rstd · w with rstd = 1/√(mean(x²) + eps).
template <typename T>
Moments<ComputeType<T>> rms_norm_forward(const ForwardRow<ComputeType<T>>& row) {
  using S = ComputeType<T>;
  const auto r = row;  // a copy, which the stores below can't be thought to change
  const T* x = static_cast<const T*>(r.x);
  T* y = static_cast<T*>(r.y);
  double sum = square_sum(x, r.n);
  if (!std::isfinite(sum)) {
    sum = spread_in_double(x, r.n, false).square_sum;
  }
  const S rstd = reciprocal_root<S>(sum / r.n, r.eps);
  const auto finish = [&](auto rounds) ALWAYS_INLINE {
    each_vector<VecOf<T>, 2>(0, r.n, [=](int64_t i, int, Part part) ALWAYS_INLINE {
      prefetch(x + i, r.x_ahead);
      prefetch(y + i, r.y_ahead);
      const auto x_hat = load(x + i, part) * rstd;
      store(y + i, (rounds ? round_to(x_hat, r.cast) : x_hat) * load(r.weight + i, part), part);
    });
  };
  r.cast == dtype_of<S> ? finish(std::false_type()) : finish(std::true_type());
  return {0, rstd};
}

template <typename V, typename S>
INLINE void add_to_column(S* column, V value, bool first, Part part) {
  store(column, first ? value : load(column, part) + keep(value, part), part);
}

// dx = (w·dy − x̂ · mean(x̂ · w·dy)) · rstd + dh;  dweight += dy · x̂.
template <typename T>
void rms_norm_backward(const BackwardRow<ComputeType<T>>& row) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const auto r = row;  // as above
  const T* x = static_cast<const T*>(r.x);
  const T* dy = static_cast<const T*>(r.dy);
  const T* dh = static_cast<const T*>(r.dh);
  T* dx = static_cast<T*>(r.dx);
  const S rstd = r.moments.rstd;
  Sum<V> sum;
  const auto step = [&](int64_t i, int slot, Part part) ALWAYS_INLINE {
    sum.chain[slot] += keep((load(x + i, part) * rstd) * (load(dy + i, part) * load(r.weight + i, part)), part);
  };
  each_summed<V>(r.n, step, sum);
  const S along = static_cast<S>(sum.total() / r.n) * rstd;
  each_vector<V, 2>(0, r.n, [=](int64_t i, int, Part part) ALWAYS_INLINE {
    const V x_hat = load(x + i, part) * rstd;
    const V grad = load(dy + i, part);
    prefetch(x + i, r.x_ahead);
    prefetch(dy + i, r.dy_ahead);
    prefetch(dx + i, r.dx_ahead);  // the processor reads what it will overwrite
    V result = grad * load(r.weight + i, part) * rstd - x_hat * along;
    if (dh) {
      result += load(dh + i, part);
    }
    store(dx + i, result, part);
    if (r.dweight) {
      add_to_column(r.dweight + i, grad * round_to(x_hat, r.cast), r.first, part);
    }
  });
}

// What makes x_hat of a row's values.
template <typename S>
struct Scaling {
  S mean, rstd;
  S lost;  // where the mean is far from zero, rounding it costs more than all the rest; what it lost is added back

  template <typename T>
  static INLINE Scaling of(Spread all, const ForwardRow<S>& row) {
    if (!std::isfinite(all.square_sum)) {
      all = spread_in_double(static_cast<const T*>(row.x), row.n, true);
    }
    const S mean = static_cast<S>(all.mean), rstd = reciprocal_root<S>(all.square_sum / row.n, row.eps);
    return {mean, rstd, static_cast<S>((mean - all.mean) * rstd)};
  }

  template <typename V>
  INLINE V x_hat(V x) const {
    return (x - mean) * rstd + lost;
  }
};

// A row of COUNT whole vectors: it stays in registers from its one load on.
template <typename T, int COUNT>
INLINE Moments<ComputeType<T>> narrow_layer_norm_forward(const ForwardRow<ComputeType<T>>& r) {
  constexpr int width = lanes<VecOf<T>>;
  const T* x = static_cast<const T*>(r.x);
  T* y = static_cast<T*>(r.y);
  ValuesInRegisters<VecOf<T>, COUNT> values;
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) {
    values.of[i] = load_vec(x + i * width);
  }
  const auto scaling = Scaling<ComputeType<T>>::template of<T>(spread_of(values), r);
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) {
    const int at = i * width;
    store_vec(y + at, scaling.x_hat(values.of[i]) * load_vec(r.weight + at) + load_vec(r.bias + at));
  }
  return {scaling.mean, scaling.rstd};
}

// y = (x − mean) · rstd · w + b with rstd = 1/√(mean((x − mean)²) + eps).
template <typename T>
Moments<ComputeType<T>> layer_norm_forward(const ForwardRow<ComputeType<T>>& row) {
  const auto r = row;  // as above
  constexpr int64_t width = lanes<VecOf<T>>;
  switch (r.n) {
    case 2 * width:
      return narrow_layer_norm_forward<T, 2>(r);
    case 4 * width:
      return narrow_layer_norm_forward<T, 4>(r);
    case 8 * width:
      return narrow_layer_norm_forward<T, 8>(r);
#if VECTOR_BYTES == 64  // which come with 32 registers
    case 16 * width:
      return narrow_layer_norm_forward<T, 16>(r);
#endif
  }
  const T* x = static_cast<const T*>(r.x);
  T* y = static_cast<T*>(r.y);
  const auto scaling = Scaling<ComputeType<T>>::template of<T>(spread(x, r.n, r.x_ahead), r);
  each_vector<VecOf<T>, 2>(0, r.n, [=](int64_t i, int, Part part) ALWAYS_INLINE {
    prefetch(y + i, r.y_ahead);
    store(y + i, scaling.x_hat(load(x + i, part)) * load(r.weight + i, part) + load(r.bias + i, part), part);
  });
  return {scaling.mean, scaling.rstd};
}

// dx = (w·dy − mean(w·dy) − x̂ · mean(x̂ · w·dy)) · rstd + dh;  dweight += dy · x̂;  dbias += dy.
template <typename T>
void layer_norm_backward(const BackwardRow<ComputeType<T>>& row) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const auto r = row;  // as above
  const T* x = static_cast<const T*>(r.x);
  const T* dy = static_cast<const T*>(r.dy);
  const T* dh = static_cast<const T*>(r.dh);
  T* dx = static_cast<T*>(r.dx);
  const auto [mean, rstd] = r.moments;
  // Of one element, dx is 0: what a fused product is not rounded by must not get through.
  const S scale = r.n == 1 ? 0 : rstd;
  Sum<V> sum, sum_along;
  const auto step = [&, mean = mean, rstd = rstd](int64_t i, int slot, Part part) ALWAYS_INLINE {
    const V grad = keep(load(dy + i, part) * load(r.weight + i, part), part);
    sum.chain[slot] += grad;
    sum_along.chain[slot] += keep((load(x + i, part) - mean) * rstd * grad, part);
  };
  each_summed<V>(r.n, step, sum, sum_along);
  const S level = static_cast<S>(sum.total() / r.n) * scale;
  const S along = static_cast<S>(sum_along.total() / r.n) * scale;
  each_vector<V, 2>(0, r.n, [=, mean = mean, rstd = rstd](int64_t i, int, Part part) ALWAYS_INLINE {
    const V x_hat = (load(x + i, part) - mean) * rstd;
    const V grad = load(dy + i, part);
    prefetch(x + i, r.x_ahead);
    prefetch(dy + i, r.dy_ahead);
    prefetch(dx + i, r.dx_ahead);  // the processor reads what it will overwrite
    V result = grad * load(r.weight + i, part) * scale - (x_hat * along + level);
    if (dh) {
      result += load(dh + i, part);
    }
    store(dx + i, result, part);
    if (r.dweight) {
      add_to_column(r.dweight + i, grad * x_hat, r.first, part);
    }
    if (r.dbias) {
      add_to_column(r.dbias + i, grad, r.first, part);
    }
  });
}

template <typename T>
constexpr RowKernels<ComputeType<T>> kernels_of = {
    {rms_norm_forward<T>, rms_norm_backward<T>}, {layer_norm_forward<T>, layer_norm_backward<T>}, add_rows<T>};
