// The kernels of rms_norm with a rotary embedding behind it: one row, forward and backward. Included by
// instruction_set.h after row_kernels.h.

// The lanes of each pair, (2i, 2i + 1), swapped.
INLINE F32 swap_pairs(F32 v) {
  const U64 pairs = reinterpret_cast<U64>(v);
  return reinterpret_cast<F32>(pairs << 32 | pairs >> 32);
}
INLINE F64 swap_pairs(F64 v) {
  F64 swapped;
  for (int i = 0; i < lanes<F64>; ++i) {
    swapped[i] = v[i ^ 1];
  }
  return swapped;
}

// −v in the even lanes.
template <typename V>
INLINE V negate_even(V v) {
  using Index = std::conditional_t<sizeof(v[0]) == sizeof(double), I64, I32>;
  Index sign;
  for (int i = 0; i < lanes<V>; ++i) {
    sign[i] = i % 2 == 0 ? std::numeric_limits<std::remove_cvref_t<decltype(sign[0])>>::min() : 0;
  }
  return reinterpret_cast<V>(reinterpret_cast<Index>(v) ^ sign);
}

// Calls put(i, vector, active) for a row's vectors after the rotation, or those of its gradient before it (BACK). z(i,
// active) gives them as they are.
template <typename V, bool BACK, typename S, typename Read, typename Put>
INLINE void rotate(const Rotation<S>& rotation, int64_t n, Read z, Put put) {
  const S *cos = rotation.cos, *sin = rotation.sin;
  // The columns that pass come first: a last vector that starts before them writes columns that are rotated below.
  each_vector<V, 2>(rotation.dim, n,
                    [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE { put(i, z(i, active), active); });
  if (rotation.interleaved) {
    each_vector<V, 2>(0, rotation.dim, [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
      const V value = z(i, active), c = load(cos + i, active), s = load(sin + i, active);
      if constexpr (BACK) {
        put(i, value * c - negate_even(swap_pairs(value * s)), active);
      } else {
        put(i, value * c + negate_even(swap_pairs(value)) * s, active);
      }
    });
    return;
  }
  const int64_t half = rotation.dim / 2;
  each_vector<V, 2>(0, half, [=](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
    const V first = z(i, active), second = z(half + i, active);
    const V cos_1 = load(cos + i, active), cos_2 = load(cos + half + i, active);
    const V sin_1 = load(sin + i, active), sin_2 = load(sin + half + i, active);
    if constexpr (BACK) {
      put(i, first * cos_1 + second * sin_2, active);
      put(half + i, second * cos_2 - first * sin_1, active);
    } else {
      put(i, first * cos_1 - second * sin_1, active);
      put(half + i, second * cos_2 + first * sin_2, active);
    }
  });
}

// y = rotated(z) with z = x · rstd · w, as rms_norm_forward computes it.
template <typename T>
Statistics<ComputeType<T>> rotated_rms_norm_forward(const ForwardRow<ComputeType<T>>& row) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const auto r = row;  // a copy, as in rms_norm_forward
  const T* x = static_cast<const T*>(r.x);
  T* y = static_cast<T*>(r.y);
  const S rstd = reciprocal_rms(x, r.n, r.eps);
  const auto put = [=](int64_t i, V value, ActiveLanes active) ALWAYS_INLINE {
    prefetch(y + i, r.y_ahead);
    store(y + i, value, active);
  };
  const auto finish = [&](auto rounds) ALWAYS_INLINE {
    const auto z = [=](int64_t i, ActiveLanes active) ALWAYS_INLINE {
      prefetch(x + i, r.x_ahead);
      const V x_hat = load(x + i, active) * rstd;
      return V((rounds ? round_to(x_hat, r.cast) : x_hat) * load(r.weight + i, active));
    };
    rotate<V, false>(r.rotation, r.n, z, put);
  };
  r.cast == dtype_of<S> ? finish(std::false_type()) : finish(std::true_type());
  return {0, rstd};
}

// rms_norm_backward, where dz, in scratch memory, stands for dy.
template <typename T>
void rotated_rms_norm_backward(const BackwardRow<ComputeType<T>>& row) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  auto r = row;  // a copy, as in rms_norm_forward
  const T* dy = static_cast<const T*>(r.dy);
  const auto read_dy = [=, ahead = r.dy_ahead](int64_t i, ActiveLanes active) ALWAYS_INLINE {
    prefetch(dy + i, ahead);
    return load(dy + i, active);
  };
  const auto put = [scratch = r.scratch](int64_t i, V dz, ActiveLanes active)
                       ALWAYS_INLINE { store(scratch + i, dz, active); };
  rotate<V, true>(r.rotation, r.n, read_dy, put);
  r.dy = r.scratch;
  r.dy_ahead = 0;
  rms_norm_gradients<T, Gate::none, S>(r);
}
