// Pairs of vectors, in which the kernels of planes take bfloat16: one has the elements at even places, the other those
// at odd ones. A float's upper half is a bfloat16, so that converting a pair moves no element across lanes, which takes
// three quarters of the instructions. Not so the moments: float32 of the same values has the same. Included by
// instruction_set.h before channel_kernels.h.
struct Pair {
  F32 even, odd;
};
template <>
constexpr int lanes<Pair> = 2 * lanes<F32>;

INLINE Pair operator+(Pair a, Pair b) { return {a.even + b.even, a.odd + b.odd}; }
INLINE Pair operator*(Pair a, Pair b) { return {a.even * b.even, a.odd * b.odd}; }
INLINE Pair operator+(Pair a, F32 b) { return {a.even + b, a.odd + b}; }
INLINE Pair operator-(Pair a, F32 b) { return {a.even - b, a.odd - b}; }
INLINE Pair operator*(Pair a, F32 b) { return {a.even * b, a.odd * b}; }
INLINE Pair& operator+=(Pair& a, Pair b) { return a = a + b; }

INLINE Pair pair_of(U32 v) { return {reinterpret_cast<F32>(v << 16), reinterpret_cast<F32>(v & 0xffff0000)}; }
INLINE U32 to_bf16(Pair v) { return rounded_to_bf16(v.even) >> 16 | (rounded_to_bf16(v.odd) & 0xffff0000); }

INLINE Pair load_pair(const Bf16* p, ActiveLanes active) {
  if (active.end == lanes<Pair>) {
    return pair_of(read<U32>(p));
  }
#if VECTOR_BYTES == 64
  return pair_of(reinterpret_cast<U32>(_mm512_maskz_loadu_epi16((1u << active.end) - 1, p)));
#else
  Bf16 tile[lanes<Pair>] = {};
  __builtin_memcpy(tile, p, active.end * sizeof(Bf16));
  return pair_of(read<U32>(tile));
#endif
}

INLINE void store(Bf16* p, Pair v, ActiveLanes active) {
  const U32 bits = to_bf16(v);
  if (active.end == lanes<Pair>) {
    write(p, bits);
    return;
  }
#if VECTOR_BYTES == 64
  _mm512_mask_storeu_epi16(p, (1u << active.end) - 1, reinterpret_cast<__m512i>(bits));
#else
  __builtin_memcpy(p, &bits, active.end * sizeof(Bf16));
#endif
}

template <bool MAY_BE_NON_TEMPORAL>
INLINE void store_to(const StridedRows& out, Bf16* p, Pair v, ActiveLanes active) {
  if (MAY_BE_NON_TEMPORAL && out.non_temporal && active.end == lanes<Pair>) {
    write_non_temporal(p, reinterpret_cast<F32>(to_bf16(v)));
  } else {
    prefetch(p, out.ahead);
    store(p, v, active);
  }
}

INLINE Pair zero_inactive(Pair v, ActiveLanes active) {
  return {zero_inactive(v.even, {(active.begin + 1) / 2, (active.end + 1) / 2}),
          zero_inactive(v.odd, {active.begin / 2, active.end / 2})};
}

template <>
struct Sum<Pair> {
  static constexpr int chains = 2;
  Pair chain[chains] = {};
  F64 flushed = {};

  INLINE void flush() {
    const Pair all = chain[0] + chain[1];
    flushed += in_double(all.even + all.odd);
    chain[0] = chain[1] = Pair{};
  }

  INLINE double total() const { return HorizontalSum<lanes<F64>>::sum(flushed); }
};

// The vectors in which the kernels that follow take rows.
template <typename T, Layout LAYOUT, Activation ACTIVATION>
using RowVec = std::conditional_t<std::is_same_v<T, Bf16> && LAYOUT == Layout::planes &&
                                      ACTIVATION != Activation::silu && std::endian::native == std::endian::little,
                                  Pair, VecOf<T>>;

template <typename V, typename T>
INLINE V load_row_vec(const T* p, ActiveLanes active) {
  if constexpr (std::is_same_v<V, Pair>) {
    return load_pair(p, active);
  } else {
    return load(p, active);
  }
}
