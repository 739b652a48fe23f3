// The kernels of layer_norm and rms_norm, which work on one row at a time, forward and backward; loads and stores of
// whole rows in another dtype; the residual addition. Included by instruction_set.h after vec.h.

template <typename T>
INLINE double square_sum(const T* x, int64_t n) {
  using V = VecOf<T>;
  Sum<V> sum;
  const auto step = [&](int64_t i, int slot, ActiveLanes active) ALWAYS_INLINE {
    const V value = zero_inactive(load(x + i, active), active);
    sum.chain[slot] += value * value;
  };
  each_summed<V>(n, step, sum);
  return sum.total();
}

// Of one row, or, in vectors of doubles, of several rows.
template <typename D>
struct MomentsIn {
  D mean, m2;  // m2 = Σ (x − mean)²
};
using Moments = MomentsIn<double>;

// Values that every pass reads from memory. The second pass prefetches what lies `ahead` bytes further on.
template <typename T>
struct ValuesInMemory {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const T* x;
  int64_t n, ahead;

  INLINE double sum() const { return sum_from(0); }

  INLINE double sum_from(S centre) const {
    Sum<V> sum;
    const auto step = [&](int64_t i, int slot, ActiveLanes active)
                          ALWAYS_INLINE { sum.chain[slot] += zero_inactive(load(x + i, active) - centre, active); };
    each_summed<V>(n, step, sum);
    return sum.total();
  }

  INLINE double square_sum_from(S centre) const {
    Sum<V> squares;
    const auto step = [&](int64_t i, int slot, ActiveLanes active) ALWAYS_INLINE {
      prefetch(x + i, ahead);
      const V value = zero_inactive(load(x + i, active) - centre, active);
      squares.chain[slot] += value * value;
    };
    each_summed<V>(n, step, squares);
    return squares.total();
  }
};

// COUNT whole vectors, a power of two, kept in registers. Sums are pairwise, and in double within the last vector.
template <typename V, int COUNT>
struct ValuesInRegisters {
  using S = std::remove_cvref_t<decltype(V{}[0])>;
  static constexpr int64_t n = COUNT * lanes<V>;
  V of[COUNT];

  template <int SIZE>
  static INLINE double pairwise_sum(const V* terms) {
    if constexpr (SIZE == 1) {
      return HorizontalSum<lanes<F64>>::sum(in_double(*terms));
    } else {
      V pairs[SIZE / 2];
#pragma GCC unroll 8
      for (int i = 0; i < SIZE / 2; ++i) {
        pairs[i] = terms[2 * i] + terms[2 * i + 1];
      }
      return pairwise_sum<SIZE / 2>(pairs);
    }
  }

  INLINE double sum() const { return pairwise_sum<COUNT>(of); }

  INLINE double sum_from(S centre) const {
    V terms[COUNT];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) {
      terms[i] = of[i] - centre;
    }
    return pairwise_sum<COUNT>(terms);
  }

  INLINE double square_sum_from(S centre) const {
    V terms[COUNT];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) {
      terms[i] = (of[i] - centre) * (of[i] - centre);
    }
    return pairwise_sum<COUNT>(terms);
  }
};

// Two passes: the mean, then Σ (x − mean)². Values of one row have sums in double; those of several rows (NarrowRows)
// have vectors of sums.
template <typename Values>
INLINE auto moments_of(const Values& values) {
  const double n = static_cast<double>(values.n), share = 1 / n;
  auto mean = values.sum() * share;
  const Rounded<typename Values::S, decltype(mean)> centre(mean);
  auto m2 = values.square_sum_from(centre.value);
  const auto is_far = mean * mean > 64 * m2 * share;
  if (any(is_far)) {
    // Far from zero the differences x − centre are exact, and their mean corrects the mean. Near zero they are not
    // exact, and their rounding errors have the same sign.
    const auto offset = values.sum_from(centre.value) * share;
    m2 = is_far ? m2 - offset * offset * n : m2;
    mean = is_far ? centre.in_double() + offset : mean;
  }
  return MomentsIn<decltype(mean)>{mean, m2};
}

// Merges the moments of blocks by Chan's formula. A block stays in the L1 cache from its first pass to its second.
template <typename T>
INLINE Moments moments(const T* x, int64_t n, int64_t ahead) {
  constexpr int64_t block = 4096;
  if (n <= block) {
    return moments_of(ValuesInMemory<T>{x, n, ahead});
  }
  Moments all = {0, 0};
  for (int64_t first = 0; first < n; first += block) {
    const int64_t size = n - first < block ? n - first : block;
    const Moments added = moments_of(ValuesInMemory<T>{x + first, size, block * static_cast<int64_t>(sizeof(T))});
    const double distance = added.mean - all.mean;
    all.mean += distance * size / (first + size);
    all.m2 += added.m2 + distance * distance * first * size / (first + size);
  }
  return all;
}

// load_row and store_row convert whole rows between a dtype and S.
template <typename T, typename S>
void load_row(const void* row, S* out, int64_t n) {
  const T* in = static_cast<const T*>(row);
  if constexpr (sizeof(ComputeType<T>) == sizeof(S)) {
    each_vector<VecOf<T>, 1>(
        0, n, [&](int64_t i, int, ActiveLanes active) ALWAYS_INLINE { store(out + i, load(in + i, active), active); });
  } else if constexpr (sizeof(T) == sizeof(double)) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<float>(in[i]);
    }
  } else {
    each_vector<F32, 1>(0, n, [&](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
      const F32 values = load(in + i, active);
      for (int lane = 0; lane < active.end; ++lane) {
        out[i + lane] = values[lane];
      }
    });
  }
}

template <typename T, typename S>
void store_row(const S* values, void* row, int64_t n) {
  T* out = static_cast<T*>(row);
  if constexpr (sizeof(ComputeType<T>) == sizeof(S)) {
    each_vector<VecOf<T>, 1>(0, n, [&](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
      store(out + i, load(values + i, active), active);
    });
  } else if constexpr (sizeof(T) == sizeof(S) * 2 || sizeof(T) == sizeof(float)) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<T>(values[i]);
    }
  } else {
    each_vector<F32, 1>(0, n, [&](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
      F32 narrow = {};
      for (int lane = 0; lane < active.end; ++lane) {
        narrow[lane] = static_cast<float>(values[i + lane]);
      }
      store(out + i, narrow, active);
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
void add_rows(const void* x, const void* residual, const ComputeType<T>* x_gate, void* h, int64_t n) {
  const auto add = [=, x = static_cast<const T*>(x), residual = static_cast<const T*>(residual),
                    h = static_cast<T*>(h)](auto adds, auto multiplies) ALWAYS_INLINE {
    each_vector<VecOf<T>, 2>(0, n, [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
      VecOf<T> sum = load(x + i, active);
      if (multiplies) {
        sum *= load(x_gate + i, active);
      }
      if (adds) {
        sum += load(residual + i, active);
      }
      store(h + i, sum, active);
    });
  };
  if (!x_gate) {
    add(std::true_type(), std::false_type());
  } else {
    residual ? add(std::true_type(), std::true_type()) : add(std::false_type(), std::true_type());
  }
}

// For rows whose sums overflow float though their squares may not; rows with inf or NaN come here too. The mean is that
// of the differences from the first element, so it is exact where all elements are equal.
template <typename T>
__attribute__((noinline)) Moments moments_in_double(const T* x, int64_t n, bool centred) {
  ComputeType<T> tile[64];
  Moments result = {0, 0};
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
    (pass == 0 ? result.mean : result.m2) = pass == 0 ? origin + sum : sum;
  }
  return result;
}

template <typename S>
INLINE S reciprocal_root(double mean_square, double eps) {
  return static_cast<S>(1 / std::sqrt(mean_square + eps));
}

// 1/√(mean(x²) + eps).
template <typename T>
INLINE ComputeType<T> reciprocal_rms(const T* x, int64_t n, double eps) {
  double sum = square_sum(x, n);
  if (!std::isfinite(sum)) {
    sum = moments_in_double(x, n, false).m2;
  }
  return reciprocal_root<ComputeType<T>>(sum / n, eps);
}

// y = x · rstd · w with rstd = 1/√(mean(x²) + eps).
template <typename T>
Statistics<ComputeType<T>> rms_norm_forward(const ForwardRow<ComputeType<T>>& row) {
  using S = ComputeType<T>;
  const auto r = row;  // a copy: the compiler must assume that the stores below may change `row`
  const T* x = static_cast<const T*>(r.x);
  T* y = static_cast<T*>(r.y);
  const S rstd = reciprocal_rms(x, r.n, r.eps);
  const auto finish = [&](auto rounds) ALWAYS_INLINE {
    each_vector<VecOf<T>, 2>(0, r.n, [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
      prefetch(x + i, r.x_ahead);
      prefetch(y + i, r.y_ahead);
      const auto x_hat = load(x + i, active) * rstd;
      store(y + i, (rounds ? round_to(x_hat, r.cast) : x_hat) * load(r.weight + i, active), active);
    });
  };
  r.cast == dtype_of<S> ? finish(std::false_type()) : finish(std::true_type());
  return {0, rstd};
}

// Adds to a row of column sums, or writes its first values.
template <typename V, typename S>
INLINE void add_to_column(S* column, V value, bool first, ActiveLanes active) {
  store(column, first ? value : load(column, active) + zero_inactive(value, active), active);
}

// What becomes of the gradient of what was normalised: dx. Gate::before_add, with h = residual + x_gate · x:
// dx = x_gate · gradient;  dresidual = gradient. Returns gradient · x, the row's term of dx_gate. `shared` has the
// prefetch distances.
template <typename T, Gate GATE, typename V, typename S>
INLINE V store_gradient(const BackwardRow<S>& shared, const BackwardRow<S>& r, int64_t i, V gradient,
                        ActiveLanes active) {
  T* dx = static_cast<T*>(r.dx) + i;
  prefetch(dx, shared.dx_ahead);  // a store reads its cache line first
  if constexpr (GATE == Gate::before_add) {
    const T* x = static_cast<const T*>(r.gated_x) + i;
    prefetch(x, shared.gated_x_ahead);
    if (r.dresidual) {
      T* dresidual = static_cast<T*>(r.dresidual) + i;
      prefetch(dresidual, shared.dresidual_ahead);
      store(dresidual, gradient, active);
    }
    const V term = gradient * load(x, active);
    store(dx, gradient * load(shared.x_gate + i, active), active);
    return term;
  } else {
    store(dx, gradient, active);
    return V{};
  }
}

// dx = (w·dy − x̂ · c1) · rstd + dh with c1 = mean(x̂ · w·dy);  dweight += dy · x̂;
// dbias += dy. D: the type of dy.
template <typename T, Gate GATE, typename D>
INLINE void rms_norm_gradients(const BackwardRow<ComputeType<T>>& r) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const T* x = static_cast<const T*>(r.x);
  const D* dy = static_cast<const D*>(r.dy);
  const T* dh = static_cast<const T*>(r.dh);
  const S rstd = r.statistics.rstd;
  Sum<V> sum;
  const auto step = [&](int64_t i, int slot, ActiveLanes active) ALWAYS_INLINE {
    sum.chain[slot] +=
        zero_inactive((load(x + i, active) * rstd) * (load(dy + i, active) * load(r.weight + i, active)), active);
  };
  each_summed<V>(r.n, step, sum);
  const S c1_rstd = static_cast<S>(sum.total() / r.n) * rstd;
  each_vector<V, 2>(0, r.n, [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
    const V x_hat = load(x + i, active) * rstd;
    const V grad = load(dy + i, active);
    prefetch(x + i, r.x_ahead);
    prefetch(dy + i, r.dy_ahead);
    V result = grad * load(r.weight + i, active) * rstd - x_hat * c1_rstd;
    if (dh) {
      result += load(dh + i, active);
    }
    const V dx_gate = store_gradient<T, GATE>(r, r, i, result, active);
    if constexpr (GATE == Gate::before_add) {
      add_to_column(r.dx_gate + i, dx_gate, r.first, active);
    }
    if (r.dweight) {
      add_to_column(r.dweight + i, grad * round_to(x_hat, r.cast), r.first, active);
    }
  });
  if (r.dbias) {  // on its own: few have a bias, and the loop above is faster without this
    each_vector<V, 2>(0, r.n, [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
      add_to_column(r.dbias + i, load(dy + i, active), r.first, active);
    });
  }
}

template <typename T, Gate GATE>
void rms_norm_backward(const BackwardRow<ComputeType<T>>& row) {
  const auto r = row;  // a copy, as in rms_norm_forward
  rms_norm_gradients<T, GATE, T>(r);
}

// x̂ = (x − mean) · rstd.
template <typename S>
struct Scaling {
  S mean, rstd;
  S correction;  // what rounding the mean to S took from x̂: with a mean far from zero it exceeds all other errors

  template <typename T>
  static INLINE Scaling of(Moments all, const ForwardRow<S>& row) {
    if (!std::isfinite(all.m2)) {
      all = moments_in_double(static_cast<const T*>(row.x), row.n, true);
    }
    const S mean = static_cast<S>(all.mean), rstd = reciprocal_root<S>(all.m2 / row.n, row.eps);
    return {mean, rstd, static_cast<S>((mean - all.mean) * rstd)};
  }

  template <typename V>
  INLINE V x_hat(V x) const {
    return (x - mean) * rstd + correction;
  }
};

// A row of COUNT whole vectors, loaded once and kept in registers.
template <typename T, int COUNT>
INLINE Statistics<ComputeType<T>> layer_norm_in_registers(const ForwardRow<ComputeType<T>>& r) {
  constexpr int width = lanes<VecOf<T>>;
  const T* x = static_cast<const T*>(r.x);
  T* y = static_cast<T*>(r.y);
  ValuesInRegisters<VecOf<T>, COUNT> values;
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) {
    values.of[i] = load_vec(x + i * width);
  }
  const auto scaling = Scaling<ComputeType<T>>::template of<T>(moments_of(values), r);
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) {
    const int at = i * width;
    store_vec(y + at, scaling.x_hat(values.of[i]) * load_vec(r.weight + at) + load_vec(r.bias + at));
  }
  return {scaling.mean, scaling.rstd};
}

// y = (x − mean) · rstd · w + b with rstd = 1/√(mean((x − mean)²) + eps).
template <typename T>
Statistics<ComputeType<T>> layer_norm_forward(const ForwardRow<ComputeType<T>>& row) {
  const auto r = row;  // a copy, as in rms_norm_forward
  constexpr int64_t width = lanes<VecOf<T>>;
  switch (r.n) {
#if VECTOR_BYTES == 16  // with wider vectors these rows are narrow
    case 2 * width:
      return layer_norm_in_registers<T, 2>(r);
    case 4 * width:
      return layer_norm_in_registers<T, 4>(r);
#endif
    case 8 * width:
      return layer_norm_in_registers<T, 8>(r);
#if VECTOR_BYTES == 64  // AVX-512 has 32 registers
    case 16 * width:
      return layer_norm_in_registers<T, 16>(r);
#endif
  }
  const T* x = static_cast<const T*>(r.x);
  T* y = static_cast<T*>(r.y);
  const auto scaling = Scaling<ComputeType<T>>::template of<T>(moments(x, r.n, r.x_ahead), r);
  each_vector<VecOf<T>, 2>(0, r.n, [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
    prefetch(y + i, r.y_ahead);
    store(y + i, scaling.x_hat(load(x + i, active)) * load(r.weight + i, active) + load(r.bias + i, active), active);
  });
  return {scaling.mean, scaling.rstd};
}

// dx = (w·dy − c2 − x̂ · c1) · rstd + dh with c1 = mean(x̂ · w·dy) and c2 = mean(w·dy);  dweight += dy · x̂;
// dbias += dy.
template <typename T, Gate GATE>
void layer_norm_backward(const BackwardRow<ComputeType<T>>& row) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const auto r = row;  // a copy, as in rms_norm_forward
  const T* x = static_cast<const T*>(r.x);
  const T* dy = static_cast<const T*>(r.dy);
  const T* dh = static_cast<const T*>(r.dh);
  const auto [mean, rstd] = r.statistics;
  // A row of one element has dx = 0, but with fused multiply-adds w·dy − c2 − x̂ · c1 may leave a rounding error.
  const S scale = r.n == 1 ? 0 : rstd;
  Sum<V> sum, x_hat_sum;
  const auto step = [&, mean = mean, rstd = rstd](int64_t i, int slot, ActiveLanes active) ALWAYS_INLINE {
    const V grad = zero_inactive(load(dy + i, active) * load(r.weight + i, active), active);
    sum.chain[slot] += grad;
    x_hat_sum.chain[slot] += zero_inactive((load(x + i, active) - mean) * rstd * grad, active);
  };
  each_summed<V>(r.n, step, sum, x_hat_sum);
  const S c2_rstd = static_cast<S>(sum.total() / r.n) * scale;
  const S c1_rstd = static_cast<S>(x_hat_sum.total() / r.n) * scale;
  each_vector<V, 2>(0, r.n, [=, mean = mean, rstd = rstd](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
    const V x_hat = (load(x + i, active) - mean) * rstd;
    const V grad = load(dy + i, active);
    prefetch(x + i, r.x_ahead);
    prefetch(dy + i, r.dy_ahead);
    V result = grad * load(r.weight + i, active) * scale - (x_hat * c1_rstd + c2_rstd);
    if (dh) {
      result += load(dh + i, active);
    }
    const V dx_gate = store_gradient<T, GATE>(r, r, i, result, active);
    if constexpr (GATE == Gate::before_add) {
      add_to_column(r.dx_gate + i, dx_gate, r.first, active);
    }
    if (r.dweight) {
      add_to_column(r.dweight + i, grad * x_hat, r.first, active);
    }
    if (r.dbias) {
      add_to_column(r.dbias + i, grad, r.first, active);
    }
  });
}
