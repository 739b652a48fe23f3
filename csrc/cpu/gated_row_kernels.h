// The kernels of row norms with a gate: one row, forward and backward; the forward of rms_norm with a bias. Included by
// instruction_set.h after row_kernels.h.

// act(g): silu(g) = g · σ(g), or σ(g).
template <typename V>
INLINE V activated(V gate, V sigma, bool silu) {
  return silu ? gate * sigma : sigma;
}

// act'(g).
template <typename V>
INLINE V activation_slope(V gate, V sigma, bool silu) {
  return sigma * (silu ? 1 + gate * (1 - sigma) : 1 - sigma);
}

template <Norm NORM, typename X, typename S>
INLINE Scaling<S> scaling_of(const ForwardRow<S>& row) {
  const X* x = static_cast<const X*>(row.x);
  if constexpr (NORM == Norm::layer) {
    return Scaling<S>::template of<X>(moments(x, row.n, row.x_ahead), row);
  } else {
    return {0, reciprocal_rms(x, row.n, row.eps), 0};
  }
}

// Gate::after_norm: y = z · act(g) with z = w · x̂ + b. Gate::before_norm: y = w · û + b, where û comes from
// u = x · act(g), kept in scratch memory. Gate::none: y = z.
template <typename T, Norm NORM, Gate GATE>
Statistics<ComputeType<T>> gated_forward(const ForwardRow<ComputeType<T>>& row) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  auto r = row;  // a copy, as in rms_norm_forward
  const T* gate = static_cast<const T*>(r.gate);
  if constexpr (GATE == Gate::before_norm) {
    each_vector<V, 2>(0, r.n, [=, x = static_cast<const T*>(r.x)](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
      const V g = load(gate + i, active);
      prefetch(x + i, r.x_ahead);
      prefetch(gate + i, r.gate_ahead);
      store(r.scratch + i, load(x + i, active) * activated(g, sigmoid(g), r.silu), active);
    });
    r.x = r.scratch;
    r.x_ahead = 0;
  }
  using X = std::conditional_t<GATE == Gate::before_norm, S, T>;
  const X* x = static_cast<const X*>(r.x);
  T* y = static_cast<T*>(r.y);
  const auto scaling = scaling_of<NORM, X>(r);
  const auto finish = [&](auto rounds) ALWAYS_INLINE {
    each_vector<V, 2>(0, r.n, [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
      prefetch(x + i, r.x_ahead);
      prefetch(y + i, r.y_ahead);
      const V value = load(x + i, active);
      const V x_hat = NORM == Norm::layer ? scaling.x_hat(value) : value * scaling.rstd;
      V z = (rounds ? round_to(x_hat, r.cast) : x_hat) * load(r.weight + i, active) + load(r.bias + i, active);
      if constexpr (GATE == Gate::after_norm) {
        const V g = load(gate + i, active);
        prefetch(gate + i, r.gate_ahead);
        z *= activated(g, sigmoid(g), r.silu);
      }
      store(y + i, z, active);
    });
  };
  NORM == Norm::layer || r.cast == dtype_of<S> ? finish(std::false_type()) : finish(std::true_type());
  return {scaling.mean, scaling.rstd};
}

// The norm's gradients are those of rms_norm_backward and layer_norm_backward. With s = act(g):
// Gate::after_norm: dz = dy · s stands for dy;  dg = dy · z · act'(g).
// Gate::before_norm: u = x · s stands for x;  dx = du · s;  dg = du · x · act'(g).
// The scratch memory keeps dz or σ(g) between the two passes.
template <typename T, Norm NORM, Gate GATE>
void gated_backward(const BackwardRow<ComputeType<T>>& row) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const auto r = row;  // a copy, as in rms_norm_forward
  const T* x = static_cast<const T*>(r.x);
  const T* dy = static_cast<const T*>(r.dy);
  const T* gate = static_cast<const T*>(r.gate);
  T* dx = static_cast<T*>(r.dx);
  T* dgate = static_cast<T*>(r.dgate);
  const auto [mean, rstd] = r.statistics;
  const S scale = NORM == Norm::layer && r.n == 1 ? 0 : rstd;  // as in layer_norm_backward
  const auto x_hat_of = [mean = mean, rstd = rstd](V value)
                            ALWAYS_INLINE { return (NORM == Norm::layer ? value - mean : value) * rstd; };
  Sum<V> sum, x_hat_sum;
  const auto step = [&](int64_t i, int slot, ActiveLanes active) ALWAYS_INLINE {
    V value = load(x + i, active), grad = load(dy + i, active);
    const V g = load(gate + i, active), sigma = sigmoid(g);
    if constexpr (GATE == Gate::before_norm) {
      store(r.scratch + i, sigma, active);
      value *= activated(g, sigma, r.silu);
    }
    const V x_hat = x_hat_of(value), weight = load(r.weight + i, active);
    if constexpr (GATE == Gate::after_norm) {
      const V z = round_to(x_hat, r.cast) * weight + load(r.bias + i, active);
      prefetch(dgate + i, r.dgate_ahead);
      store(dgate + i, grad * z * activation_slope(g, sigma, r.silu), active);
      grad *= activated(g, sigma, r.silu);
      store(r.scratch + i, grad, active);
    }
    const V weighted = zero_inactive(grad * weight, active);
    sum.chain[slot] += weighted;
    x_hat_sum.chain[slot] += zero_inactive(x_hat * weighted, active);
  };
  each_summed<V>(r.n, step, sum, x_hat_sum);
  const S c2_rstd = NORM == Norm::layer ? static_cast<S>(sum.total() / r.n) * scale : 0;
  const S c1_rstd = static_cast<S>(x_hat_sum.total() / r.n) * scale;
  each_vector<V, 2>(0, r.n, [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
    V value = load(x + i, active), s{}, slope{};
    prefetch(x + i, r.x_ahead);
    prefetch(dy + i, r.dy_ahead);
    prefetch(gate + i, r.gate_ahead);
    prefetch(dx + i, r.dx_ahead);
    if constexpr (GATE == Gate::before_norm) {
      const V g = load(gate + i, active), sigma = load(r.scratch + i, active);
      s = activated(g, sigma, r.silu);
      slope = value * activation_slope(g, sigma, r.silu);
      value *= s;
    }
    const V grad = GATE == Gate::after_norm ? load(r.scratch + i, active) : load(dy + i, active);
    const V x_hat = x_hat_of(value);
    const V along = NORM == Norm::layer ? x_hat * c1_rstd + c2_rstd : x_hat * c1_rstd;
    V result = grad * load(r.weight + i, active) * scale - along;
    if constexpr (GATE == Gate::before_norm) {
      prefetch(dgate + i, r.dgate_ahead);
      store(dgate + i, result * slope, active);
      result *= s;
    }
    store(dx + i, result, active);
    if (r.dweight) {
      add_to_column(r.dweight + i, grad * round_to(x_hat, r.cast), r.first, active);
    }
    if (r.dbias) {
      add_to_column(r.dbias + i, grad, r.first, active);
    }
  });
}

template <typename T, Norm NORM, Gate GATE>
constexpr NormKernels<ComputeType<T>> gated_kernels = {gated_forward<T, NORM, GATE>, gated_backward<T, NORM, GATE>};

template <typename T, Norm NORM, Gate GATE>
constexpr NormKernels<ComputeType<T>> plain_kernels = {
    NORM == Norm::layer ? layer_norm_forward<T> : rms_norm_forward<T>,
    NORM == Norm::layer ? layer_norm_backward<T, GATE> : rms_norm_backward<T, GATE>, narrow_kernels<T, NORM, GATE>};

template <typename T>
constexpr RowKernels<ComputeType<T>> kernels_of = {
    {{plain_kernels<T, Norm::rms, Gate::none>, gated_kernels<T, Norm::rms, Gate::after_norm>,
      gated_kernels<T, Norm::rms, Gate::before_norm>, plain_kernels<T, Norm::rms, Gate::before_add>},
     {plain_kernels<T, Norm::layer, Gate::none>, gated_kernels<T, Norm::layer, Gate::after_norm>,
      gated_kernels<T, Norm::layer, Gate::before_norm>, plain_kernels<T, Norm::layer, Gate::before_add>}},
    gated_forward<T, Norm::rms, Gate::none>,
    {rotated_rms_norm_forward<T>, rotated_rms_norm_backward<T>},
    add_rows<T>};
