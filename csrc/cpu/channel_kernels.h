// The elementwise kernels of batch_norm and group_norm, which work on one block at a time: y in the forward, dx in the
// backward, each with its activation. Included by instruction_set.h after run_kernels.h.
template <typename V>
using IndexOf = std::conditional_t<sizeof(V{}[0]) == sizeof(double), I64, I32>;

template <typename V>
INLINE IndexOf<V> lane_bits() {
  IndexOf<V> bits;
  for (int i = 0; i < lanes<V>; ++i) {
    bits[i] = 1 << i;
  }
  return bits;
}

// Bit i is set where lane i is not <= 0, NaN included: there ReLU's gradient passes.
template <typename V>
INLINE uint32_t passing(V z) {
#if VECTOR_BYTES == 64
  if constexpr (lanes<V> == 16) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(z), _mm512_setzero_ps(), _CMP_NLE_UQ);
  } else {
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(z), _mm512_setzero_pd(), _CMP_NLE_UQ);
  }
#elif VECTOR_BYTES == 32
  if constexpr (lanes<V> == 8) {
    return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(z), _mm256_setzero_ps(), _CMP_NLE_UQ));
  } else {
    return _mm256_movemask_pd(_mm256_cmp_pd(reinterpret_cast<__m256d>(z), _mm256_setzero_pd(), _CMP_NLE_UQ));
  }
#else
  const IndexOf<V> blocked = z <= 0 ? lane_bits<V>() : IndexOf<V>{};
  uint32_t bits = ~(~0u << lanes<V>);
  for (int i = 0; i < lanes<V>; ++i) {
    bits -= static_cast<uint32_t>(blocked[i]);
  }
  return bits;
#endif
}

// Zeroes the lanes whose bits are not set.
template <typename V>
INLINE V where(uint32_t bits, V v) {
#if VECTOR_BYTES == 64
  if constexpr (lanes<V> == 16) {
    return reinterpret_cast<V>(_mm512_maskz_mov_ps(bits, reinterpret_cast<__m512>(v)));
  } else {
    return reinterpret_cast<V>(_mm512_maskz_mov_pd(bits, reinterpret_cast<__m512d>(v)));
  }
#else
  const IndexOf<V> all = IndexOf<V>{} + static_cast<decltype(+IndexOf<V>{}[0])>(bits);
  return (all & lane_bits<V>()) != 0 ? v : V{};
#endif
}

// Zeroes the lanes where ReLU's gradient does not pass, and returns the bits of the others.
template <typename V>
INLINE uint32_t rectify(V& z) {
  const uint32_t bits = passing(z);
  z = where(bits, z);
  return bits;
}

// Of pairs, bits are in the order of the elements.
INLINE uint32_t rectify(Pair& z) {
  const uint32_t even = rectify(z.even), odd = rectify(z.odd);
#if VECTOR_BYTES >= 32
  return _pdep_u32(even, 0x55555555) | _pdep_u32(odd, 0xaaaaaaaa);
#else
  const auto spread = [](uint32_t bits) { return (bits & 1) | (bits & 2) << 1 | (bits & 4) << 2 | (bits & 8) << 3; };
  return spread(even) | spread(odd) << 1;
#endif
}

INLINE Pair where(uint32_t bits, Pair v) {
#if VECTOR_BYTES >= 32
  return {where(_pext_u32(bits, 0x55555555), v.even), where(_pext_u32(bits, 0xaaaaaaaa), v.odd)};
#else
  const auto gather = [](uint32_t b) { return (b & 1) | (b >> 1 & 2) | (b >> 2 & 4) | (b >> 3 & 8); };
  return {where(gather(bits), v.even), where(gather(bits >> 1), v.odd)};
#endif
}

// Rows are worked on in words: 64 elements, whose mask is one 64-bit word.
constexpr int word_size = 64;
using FullWord = std::integral_constant<int, word_size>;

// A row of `n` elements, at most a word, in K vectors. With K a constant, what a row costs beside its vectors, a half
// of the time of planes of 7 x 7, is left to the compiler.
template <typename V, int K>
struct ShortRow {
  using Vec = V;
  int n;
};
// Any other row.
template <typename V>
struct LongRow {
  using Vec = V;
};

template <typename Row>
constexpr bool is_long = std::is_same_v<Row, LongRow<typename Row::Vec>>;

// Planes of 7 x 7 are seven vectors of AVX2's. Rows of more would take more code than they gain.
constexpr int max_short_vectors = 8;

template <typename V, int K = 1, typename Body>
INLINE void with_short_row(int n, Body body) {
  if constexpr (K < max_short_vectors && K * lanes<V> < word_size) {
    if (n > K * lanes<V>) {
      return with_short_row<V, K + 1>(n, body);
    }
  }
  body(ShortRow<V, K>{n});
}

// Calls body(row) with a block's rows of `n` elements, to be taken in vectors V. SiLU computes too much to gain from
// short rows of their own.
template <typename V, Layout LAYOUT, Activation ACTIVATION, typename Body>
INLINE void with_row(int64_t n, Body body) {
  if constexpr (LAYOUT == Layout::planes && ACTIVATION != Activation::silu) {
    if (n <= std::min(word_size, max_short_vectors * lanes<V>)) {
      return with_short_row<V>(static_cast<int>(n), body);
    }
  }
  body(LongRow<V>());
}

// Calls body(first, count) for the words of a row's elements [first, end). In hot loops full words have a body of their
// own, with count = FullWord, a constant; elsewhere the extra code does not pay.
template <bool hot, typename V, typename Body>
INLINE void each_word(LongRow<V>, int64_t first, int64_t end, Body body) {
  if constexpr (hot) {
    for (; first + word_size <= end; first += word_size) {
      body(first, FullWord());
    }
  }
  for (; first < end; first += word_size) {
    body(first, static_cast<int>(std::min<int64_t>(end - first, word_size)));
  }
}

template <bool, typename V, int K, typename Body>
INLINE void each_word(ShortRow<V, K> row, int64_t, int64_t, Body body) {
  body(int64_t{0}, row);
}

// Calls step(offset, slot, active) for the vectors of a word, with `slot` as in each_vector.
template <typename V, typename Step>
INLINE void each_of_word(FullWord, Step step) {
  constexpr int width = lanes<V>, slots = Sum<V>::chains;
  for (int offset = 0; offset < word_size; offset += slots * width) {
#pragma GCC unroll 4
    for (int slot = 0; slot < slots; ++slot) {
      step(offset + slot * width, slot, ActiveLanes{0, width});
    }
  }
}

template <typename V, typename Step>
INLINE void each_of_word(int count, Step step) {
  constexpr int width = lanes<V>;
  for (int offset = 0; offset < count; offset += width) {
    step(offset, 0, ActiveLanes{0, count - offset < width ? count - offset : width});
  }
}

// As in each_vector, the last vector starts before the last full one ends.
template <typename V, int K, typename Step>
INLINE void each_of_word(ShortRow<V, K> row, Step step) {
  constexpr int width = lanes<V>, last = (K - 1) % Sum<V>::chains;
#pragma GCC unroll 8
  for (int k = 0; k + 1 < K; ++k) {
    step(k * width, k % Sum<V>::chains, ActiveLanes{0, width});
  }
  if constexpr (K == 1) {
    step(0, 0, ActiveLanes{0, row.n});
  } else {
    step(row.n - width, last, ActiveLanes{K * width - row.n, width});
  }
}

// How many elements a word has.
INLINE int elements(int count) { return count; }
template <typename V, int K>
INLINE int elements(ShortRow<V, K> row) {
  return row.n;
}

// Four bytes and more are read and written as two numbers, which overlap where they are fewer than eight.
template <typename Count>
INLINE uint64_t read_word(const char* row, int64_t first, Count count) {
  const char* p = row + first / 8;
  const int bytes = (elements(count) + 7) / 8;
  if (bytes >= 4 && std::endian::native == std::endian::little) {
    return read<uint32_t>(p) | static_cast<uint64_t>(read<uint32_t>(p + bytes - 4)) << 8 * (bytes - 4);
  }
  uint64_t word = 0;
  for (int byte = 0; byte < bytes; ++byte) {
    word |= static_cast<uint64_t>(static_cast<uint8_t>(p[byte])) << 8 * byte;
  }
  return word;
}

template <typename Count>
INLINE void write_word(char* row, int64_t first, Count count, uint64_t word) {
  char* p = row + first / 8;
  const int bytes = (elements(count) + 7) / 8;
  word &= ~uint64_t{0} >> (word_size - elements(count));
  if (bytes >= 4 && std::endian::native == std::endian::little) {
    write(p, static_cast<uint32_t>(word));
    write(p + bytes - 4, static_cast<uint32_t>(word >> 8 * (bytes - 4)));
    return;
  }
  for (int byte = 0; byte < bytes; ++byte) {
    p[byte] = static_cast<char>(word >> 8 * byte);
  }
}

// A parameter of the channels, such as the mean, for the elements of a row. In planes every lane has the same number,
// that at `offset`; in pixels each lane has its channel's.
template <typename T, Layout LAYOUT>
struct Parameter {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  INLINE Parameter(const S* p, int64_t offset) : values(p), value(V{}) {
    if (LAYOUT == Layout::planes && p != nullptr) {
      value += p[offset];
    }
  }
  INLINE V at(int64_t i, ActiveLanes active) const {
    if constexpr (LAYOUT == Layout::planes) {
      return value;
    } else {
      return load(values + i, active);
    }
  }
  const S* values;
  V value;
};

// How many rows are worked on side by side. For pixels several: they share the loads of the parameters, and memory is
// read from several places at once. SiLU computes too much to gain from it, and SSE2 and NEON have registers for two.
template <Layout LAYOUT, Activation ACTIVATION>
constexpr int rows_at_once = LAYOUT == Layout::planes || ACTIVATION == Activation::silu ? 1
                             : VECTOR_BYTES == 16                                       ? 2
                                                                                        : 4;

// Calls body(row, count) for rows [row, end): first with count = at_once, as a constant, then with 1.
template <int at_once, typename Body>
INLINE void each_rows(int64_t row, int64_t end, Body body) {
  for (; row + at_once <= end; row += at_once) {
    body(row, std::integral_constant<int, at_once>());
  }
  if constexpr (at_once > 1) {
    for (; row < end; ++row) {
      body(row, std::integral_constant<int, 1>());
    }
  }
}

// COUNT rows of a block, from `row` on.
template <typename T, int COUNT>
struct RowPointers {
  INLINE RowPointers(const StridedRows& rows, int64_t row) {
    for (int r = 0; r < COUNT; ++r) {
      at[r] = reinterpret_cast<T*>(rows.data + (row + r) * rows.stride);
    }
  }
  INLINE T* operator[](int r) const { return at[r]; }
  T* at[COUNT];
};

// PLAIN blocks have no residual and no non-temporal stores. Most calls are plain, and a variant for them alone leaves
// them more registers for addresses.
template <typename T, Layout LAYOUT, Activation ACTIVATION, bool PLAIN, typename Row>
INLINE void forward_rows(const ForwardBlock<ComputeType<T>> b, Row whole) {
  using V = typename Row::Vec;
  each_rows<rows_at_once<LAYOUT, ACTIVATION>>(0, b.rows, [&](int64_t row, auto count) ALWAYS_INLINE {
    constexpr int R = decltype(count)::value;
    const int64_t at = row * b.step;
    const Parameter<T, LAYOUT> means(b.mean, at), scales(b.scale, at), shifts(b.shift, at);
    const RowPointers<T, R> x(b.x, row), residual(b.residual, row), y(b.y, row);
    const RowPointers<char, R> mask(b.mask, row);
    each_word<R == rows_at_once<LAYOUT, ACTIVATION>>(whole, 0, b.n, [&](int64_t first, auto size) ALWAYS_INLINE {
      uint64_t words[R] = {};
      each_of_word<V>(size, [&](int offset, int, ActiveLanes active) ALWAYS_INLINE {
        const int64_t i = first + offset;
        const auto mean = means.at(i, active), scale = scales.at(i, active), shift = shifts.at(i, active);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          prefetch(x[r] + i, b.x.ahead);
          V z = (load_row_vec<V>(x[r] + i, active) - mean) * scale + shift;
          if (!PLAIN && b.residual.data != nullptr) {
            prefetch(residual[r] + i, b.residual.ahead);
            z += load_row_vec<V>(residual[r] + i, active);
          }
          if constexpr (ACTIVATION == Activation::relu) {
            words[r] |= static_cast<uint64_t>(rectify(z)) << offset;
          } else if constexpr (ACTIVATION == Activation::silu) {
            z *= sigmoid(z);
          }
          store_to<!PLAIN>(b.y, y[r] + i, z, active);
        }
      });
      if (ACTIVATION == Activation::relu && b.mask.data != nullptr) {
        for (int r = 0; r < R; ++r) {
          write_word(mask[r], first, size, words[r]);
        }
      }
    });
  });
}

template <typename T, Layout LAYOUT, Activation ACTIVATION>
void forward_block(const ForwardBlock<ComputeType<T>>& block) {
  // by value: the compiler must assume that stores change what a reference refers to
  with_row<RowVec<T, LAYOUT, ACTIVATION>, LAYOUT, ACTIVATION>(block.n, [&](auto row) ALWAYS_INLINE {
    if (block.residual.data == nullptr && !block.y.non_temporal) {
      forward_rows<T, LAYOUT, ACTIVATION, true>(block, row);
    } else {
      forward_rows<T, LAYOUT, ACTIVATION, false>(block, row);
    }
  });
}

// Calls step(i, slot, active, dz, x − mean) for all vectors of R rows' elements [begin, end). If HAS_X is false, x may
// be null, and x − mean is then zero.
template <typename T, Layout LAYOUT, Activation ACTIVATION, bool HAS_X, int R, typename Row, typename Step>
INLINE void each_gradient(const BackwardBlock<ComputeType<T>>& b, Row whole, int64_t row, int64_t begin, int64_t end,
                          Step step) {
  using V = typename Row::Vec;
  const int64_t at = row * b.step;
  const Parameter<T, LAYOUT> means(b.mean, at), scales(b.scale, at), shifts(b.shift, at);
  const RowPointers<T, R> dy(b.dy, row), x(b.x, row);
  const RowPointers<char, R> mask(b.mask, row);
  each_word<R == rows_at_once<LAYOUT, ACTIVATION>>(whole, begin, end, [&](int64_t first, auto size) ALWAYS_INLINE {
    uint64_t words[R] = {};
    if constexpr (ACTIVATION == Activation::relu) {
      for (int r = 0; r < R; ++r) {
        words[r] = read_word(mask[r], first, size);
      }
    }
    each_of_word<V>(size, [&](int offset, int slot, ActiveLanes active) ALWAYS_INLINE {
      const int64_t i = first + offset;
      V dz[R], distance[R] = {};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        prefetch(dy[r] + i, b.dy.ahead);
        dz[r] = load_row_vec<V>(dy[r] + i, active);
        if (HAS_X || b.x.data != nullptr) {
          prefetch(x[r] + i, b.x.ahead);
          distance[r] = load_row_vec<V>(x[r] + i, active) - means.at(i, active);
        }
        if constexpr (ACTIVATION == Activation::relu) {
          dz[r] = where(static_cast<uint32_t>(words[r] >> offset), dz[r]);
        } else if constexpr (ACTIVATION == Activation::silu) {
          const V z = distance[r] * scales.at(i, active) + shifts.at(i, active);
          const V gate = sigmoid(z);
          dz[r] *= gate * (1 + z * (1 - gate));
        }
      }
      step(i, slot, active, dz, distance);
    });
  });
}

// PLAIN blocks have an x, no dresidual and no non-temporal stores.
template <typename T, Layout LAYOUT, Activation ACTIVATION, bool PLAIN, typename Row>
INLINE void backward_rows(const BackwardBlock<ComputeType<T>> b, Row whole) {
  using V = typename Row::Vec;
  each_rows<rows_at_once<LAYOUT, ACTIVATION>>(0, b.rows, [&](int64_t row, auto count) ALWAYS_INLINE {
    constexpr int R = decltype(count)::value;
    const int64_t at = row * b.step;
    const Parameter<T, LAYOUT> gains(b.gain, at), slopes(b.slope, at), levels(b.level, at);
    const RowPointers<T, R> dx(b.dx, row), dresidual(b.dresidual, row);
    const auto step = [&](int64_t i, int, ActiveLanes active, const V(&dz)[R], const V(&distance)[R]) ALWAYS_INLINE {
      const auto gain = gains.at(i, active);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V gradient = dz[r] * gain;
        if (PLAIN || b.x.data != nullptr) {
          gradient += distance[r] * slopes.at(i, active) + levels.at(i, active);
        }
        store_to<!PLAIN>(b.dx, dx[r] + i, gradient, active);
        if (!PLAIN && b.dresidual.data != nullptr) {
          store_to<true>(b.dresidual, dresidual[r] + i, dz[r], active);
        }
      }
    };
    each_gradient<T, LAYOUT, ACTIVATION, PLAIN, R>(b, whole, row, 0, b.n, step);
  });
}

template <typename T, Layout LAYOUT, Activation ACTIVATION>
void backward_block(const BackwardBlock<ComputeType<T>>& block) {
  with_row<RowVec<T, LAYOUT, ACTIVATION>, LAYOUT, ACTIVATION>(block.n, [&](auto row) ALWAYS_INLINE {
    if (block.x.data != nullptr && block.dresidual.data == nullptr && !block.dx.non_temporal) {
      backward_rows<T, LAYOUT, ACTIVATION, true>(block, row);
    } else {
      backward_rows<T, LAYOUT, ACTIVATION, false>(block, row);
    }
  });
}
