// The kernels of layer_norm and rms_norm for narrow rows, several at a time, forward and backward. Included by
// instruction_set.h after row_kernels.h.
//
// A narrow row takes as long as its chain of operations: horizontal sum, division, square root, second pass. Here the
// chains of several rows run side by side, and statistics are computed in vectors with a lane for each row.
//
// Vectors of 16 bytes have two lanes, which gains nothing: there, no row is narrow.
constexpr int narrow_rows = lanes<F64>;
static_assert(narrow_rows <= most_rows_at_once);

#if VECTOR_BYTES > 16

// Rows of more bytes gain nothing: they have enough vectors to overlap their own chains, or wait for memory.
template <typename T>
constexpr int64_t narrow_cols = 8 * VECTOR_BYTES / sizeof(T) - 1;

// Calls step(r, i, active, sums) for the vectors of row r, which are to be added to sums. Of the results, lane r is the
// sum over row r, and lanes from `count` on are zero.
template <typename T, int SUMS, typename Step>
INLINE void sum_rows(int64_t n, int count, F64 (&results)[SUMS], Step step) {
  using V = VecOf<T>;
  F64 sums[SUMS][narrow_rows];
  for (int r = 0; r < count; ++r) {
    V of_row[SUMS] = {};
    each_vector<V, 1>(0, n, [&](int64_t i, int, ActiveLanes active) ALWAYS_INLINE { step(r, i, active, of_row); });
    for (int k = 0; k < SUMS; ++k) {
      sums[k][r] = in_double(of_row[k]);
    }
  }
  if (count == 1) {  // rows of a sample of their own: horizontal_sums adds in the same order
    for (int k = 0; k < SUMS; ++k) {
      results[k] = F64{HorizontalSum<lanes<F64>>::sum(sums[k][0])};
    }
    return;
  }
  for (int r = count; r < narrow_rows; ++r) {
    for (int k = 0; k < SUMS; ++k) {
      sums[k][r] = F64{};
    }
  }
  for (int k = 0; k < SUMS; ++k) {
    results[k] = horizontal_sums(sums[k]);
  }
}

// x of `count` rows, for moments_of.
template <typename T>
struct NarrowRows {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  using Centres = S[narrow_rows];
  const ForwardRow<S>* rows;
  int count;
  int64_t n;

  INLINE const T* x(int r) const { return static_cast<const T*>(rows[r].x); }

  template <typename Term>
  INLINE F64 sum_of(Term term) const {
    F64 result[1];
    sum_rows<T>(n, count, result, [&](int r, int64_t i, ActiveLanes active, V(&sum)[1]) ALWAYS_INLINE {
      sum[0] += zero_inactive(term(r, load(x(r) + i, active)), active);
    });
    return result[0];
  }

  INLINE F64 sum() const {
    return sum_of([&](int, V value) ALWAYS_INLINE { return value; });
  }
  INLINE F64 sum_from(const Centres& centres) const {
    return sum_of([&](int r, V value) ALWAYS_INLINE { return V(value - centres[r]); });
  }
  INLINE F64 square_sum_from(const Centres& centres) const {
    return sum_of([&](int r, V value) ALWAYS_INLINE { return V((value - centres[r]) * (value - centres[r])); });
  }
  INLINE F64 square_sum() const {
    return sum_of([&](int, V value) ALWAYS_INLINE { return V(value * value); });
  }
};

// The moments of layer_norm; of rms_norm, about zero.
template <Norm NORM, typename T>
INLINE MomentsIn<F64> moments_of_rows(const NarrowRows<T>& narrow) {
  MomentsIn<F64> all{};
  if constexpr (NORM == Norm::layer) {
    all = moments_of(narrow);
  } else {
    all.m2 = narrow.square_sum();
  }
  const I64 overflows = all.m2 - all.m2 != 0;
  if (any(overflows)) {
    for (int r = 0; r < narrow.count; ++r) {
      if (overflows[r]) {
        const Moments exact = moments_in_double(narrow.x(r), narrow.n, NORM == Norm::layer);
        all.mean[r] = exact.mean;
        all.m2[r] = exact.m2;
      }
    }
  }
  return all;
}

// As layer_norm_forward and rms_norm_forward. The results of a row depend neither on the others nor on their number.
template <typename T, Norm NORM>
void narrow_forward(const ForwardRow<ComputeType<T>>* rows, int count, Statistics<ComputeType<T>>* statistics) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const int64_t n = rows->n;
  const S *weight = rows->weight, *bias = rows->bias;
  const int64_t x_ahead = rows->x_ahead, y_ahead = rows->y_ahead;
  const Dtype cast = rows->cast;
  const MomentsIn<F64> all = moments_of_rows<NORM>(NarrowRows<T>{rows, count, n});
  const Rounded<S, F64> mean(all.mean);
  const Rounded<S, F64> rstd(1 / square_root(all.m2 / static_cast<double>(n) + rows->eps));
  const Rounded<S, F64> correction((mean.in_double() - all.mean) * rstd.in_double());
  const auto finish = [&](auto rounds) ALWAYS_INLINE {
    for (int r = 0; r < count; ++r) {
      const Scaling<S> scaling = {mean.value[r], rstd.value[r], correction.value[r]};
      statistics[r] = {scaling.mean, scaling.rstd};
      const T* x = static_cast<const T*>(rows[r].x);
      T* y = static_cast<T*>(rows[r].y);
      each_vector<V, 1>(0, n, [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
        const V value = load(x + i, active);
        prefetch(x + i, x_ahead);
        prefetch(y + i, y_ahead);
        if constexpr (NORM == Norm::layer) {
          store(y + i, scaling.x_hat(value) * load(weight + i, active) + load(bias + i, active), active);
        } else {
          const V x_hat = value * scaling.rstd;
          store(y + i, (rounds ? round_to(x_hat, cast) : x_hat) * load(weight + i, active), active);
        }
      });
    }
  };
  NORM == Norm::layer || cast == dtype_of<S> ? finish(std::false_type()) : finish(std::true_type());
}

// As layer_norm_backward and rms_norm_backward. dweight, dbias and dx_gate are summed over these rows first.
template <typename T, Norm NORM, Gate GATE>
void narrow_backward(const BackwardRow<ComputeType<T>>* rows, int count) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const BackwardRow<S> shared = *rows;  // a copy, as in rms_norm_forward
  const int64_t n = shared.n;
  const auto x_hat_of = [rows](int r, int64_t i, ActiveLanes active) ALWAYS_INLINE {
    const V value = load(static_cast<const T*>(rows[r].x) + i, active);
    const auto [mean, rstd] = rows[r].statistics;
    return V((NORM == Norm::layer ? value - mean : value) * rstd);
  };
  const auto grad_of = [rows](int r, int64_t i, ActiveLanes active)
                           ALWAYS_INLINE { return load(static_cast<const T*>(rows[r].dy) + i, active); };
  F64 sums[2];
  sum_rows<T>(n, count, sums, [&](int r, int64_t i, ActiveLanes active, V(&sum)[2]) ALWAYS_INLINE {
    const V grad = zero_inactive(grad_of(r, i, active) * load(shared.weight + i, active), active);
    sum[0] += grad;
    sum[1] += zero_inactive(x_hat_of(r, i, active) * grad, active);
  });
  const Rounded<S, F64> c2(sums[0] / static_cast<double>(n)), c1(sums[1] / static_cast<double>(n));
  S scale[narrow_rows], c1_rstd[narrow_rows], c2_rstd[narrow_rows];
  for (int r = 0; r < count; ++r) {
    // As in layer_norm_backward: a row of one element has dx = 0.
    scale[r] = NORM == Norm::layer && n == 1 ? 0 : rows[r].statistics.rstd;
    c1_rstd[r] = c1.value[r] * scale[r];
    c2_rstd[r] = c2.value[r] * scale[r];
  }
  each_vector<V, 1>(0, n, [&](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
    const V weight = load(shared.weight + i, active);
    V dweight = {}, dbias = {}, dx_gate = {};
    for (int r = 0; r < count; ++r) {
      const V x_hat = x_hat_of(r, i, active), grad = grad_of(r, i, active);
      prefetch(static_cast<const T*>(rows[r].x) + i, shared.x_ahead);
      prefetch(static_cast<const T*>(rows[r].dy) + i, shared.dy_ahead);
      const V along = NORM == Norm::layer ? x_hat * c1_rstd[r] + c2_rstd[r] : x_hat * c1_rstd[r];
      V result = grad * weight * scale[r] - along;
      if (shared.dh) {
        result += load(static_cast<const T*>(rows[r].dh) + i, active);
      }
      dx_gate += store_gradient<T, GATE>(shared, rows[r], i, result, active);
      dweight += grad * (NORM == Norm::layer ? x_hat : round_to(x_hat, shared.cast));
      dbias += grad;
    }
    if (shared.dweight) {
      add_to_column(shared.dweight + i, dweight, shared.first, active);
    }
    if (shared.dbias) {
      add_to_column(shared.dbias + i, dbias, shared.first, active);
    }
    if constexpr (GATE == Gate::before_add) {
      add_to_column(shared.dx_gate + i, dx_gate, shared.first, active);
    }
  });
}

template <typename T, Norm NORM, Gate GATE>
constexpr NarrowKernels<ComputeType<T>> narrow_kernels = {narrow_cols<T>, narrow_rows, narrow_forward<T, NORM>,
                                                          narrow_backward<T, NORM, GATE>};
#else
template <typename T, Norm NORM, Gate GATE>
constexpr NarrowKernels<ComputeType<T>> narrow_kernels = {};
#endif
