// The reductions of batch_norm and group_norm, which work on one block at a time: moments for the forward, sums for the
// backward. At the end the table of all kernels of blocks. Included by instruction_set.h after channel_kernels.h.

// Chan's formula: merges the moments of `added` elements into those of `count`.
struct Merge {
  Merge(double count, double added) : share(added / (count + added)), cross(count * share) {}
  INLINE void operator()(double& mean, double& m2, double added_mean, double added_m2) const {
    const double distance = added_mean - mean;
    mean += distance * share;
    m2 += added_m2 + distance * distance * cross;
  }
  double share, cross;
};

void merge_moments(const ChannelMoments& into, const ChannelMoments& from, int64_t channels) {
  const Merge merge(into.count, from.count);
  double* mean = into.mean;
  double* m2 = into.m2;
  for (int64_t i = 0; i < channels; ++i) {
    merge(mean[i], m2[i], from.mean[i], from.m2[i]);
  }
}

// Merges `added` elements, given Σ (x − centre) and Σ (x − centre)². The centre must be close to their mean, or be the
// mean of at least as many elements before them: what `squares - offset * sum` loses to cancellation is then small
// beside what merging adds to m2.
INLINE void merge_sums(const Merge& merge, double added, double centre, double sum, double squares, double& mean,
                       double& m2) {
  const double offset = sum / added;
  const double about_mean = squares - offset * sum;
  merge(mean, m2, centre + offset, about_mean < 0 ? 0 : about_mean);
}

// For blocks whose sums overflow float though their squares may not; blocks with inf or NaN come here too. As in
// moments_in_double, the mean is exact where all elements are equal.
template <typename T>
__attribute__((noinline)) void merge_in_double(const MomentsBlock<ComputeType<T>>& b, int64_t begin, int64_t end,
                                               double& mean, double& m2) {
  const double added = static_cast<double>(b.rows * (end - begin));
  ComputeType<T> tile[word_size];
  load_row<T>(reinterpret_cast<const T*>(b.x.data) + begin, tile, 1);
  const double origin = tile[0];
  double centre = 0, sum = 0;
  for (int pass = 0; pass < 2; ++pass) {
    sum = 0;
    for (int64_t row = 0; row < b.rows; ++row) {
      const T* x = reinterpret_cast<const T*>(b.x.data + row * b.x.stride);
      for (int64_t first = begin; first < end; first += word_size) {
        const int64_t size = std::min<int64_t>(end - first, word_size);
        load_row<T>(x + first, tile, size);
        for (int64_t i = 0; i < size; ++i) {
          const double value = tile[i] - centre;
          sum += pass == 0 ? value / added - origin / added : value * value;
        }
      }
    }
    centre = pass == 0 ? origin + sum : centre;
  }
  Merge(b.count, added)(mean, m2, centre, sum);
}

// Calls add(row, first, last) for rows [begin, end), at most `size` elements at a time, and flushes the sums after
// about that many: the error of a chain of additions grows with its length.
template <typename V, int64_t size, typename Add, typename... Sums>
INLINE void each_flushed(int64_t begin, int64_t end, int64_t n, Add add, Sums&... sums) {
  constexpr int64_t longest = size / word_size;
  int64_t length = 0;  // of the first chain, the longest: it also takes what does not fill a word
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < n; first += size) {
      const int64_t last = std::min(first + size, n);
      add(row, first, last);
      length += (last - first) / word_size + ((last - first) % word_size + lanes<V> - 1) / lanes<V>;
      if (length >= longest || (row + 1 == end && last == n)) {
        (sums.flush(), ...);
        length = 0;
      }
    }
  }
}

// The same for rows of at most a word: calls add(row) for each, and flushes the sums after about `size` elements.
template <int64_t size, typename V, int K, typename Add, typename... Sums>
INLINE void each_flushed_row(int64_t begin, int64_t end, ShortRow<V, K>, Add add, Sums&... sums) {
  constexpr int in_chain = (K + Sum<V>::chains - 1) / Sum<V>::chains;
  constexpr int64_t rows = std::max<int64_t>(size / word_size / in_chain, 1);
  while (begin < end) {
    for (const int64_t last = std::min(begin + rows, end); begin < last; ++begin) {
      add(begin);
    }
    (sums.flush(), ...);
  }
}

// Calls step(x, slot, active) for all vectors of a block of planes, and flushes the sums after about 1024 elements.
template <typename T, typename Step, typename... Sums>
INLINE void each_of_plane(const MomentsBlock<ComputeType<T>>& b, Step step, Sums&... sums) {
  using V = VecOf<T>;
  constexpr int64_t size = 1024;
  const auto at = [&](int64_t row) ALWAYS_INLINE { return reinterpret_cast<const T*>(b.x.data + row * b.x.stride); };
  with_row<V, Layout::planes, Activation::none>(b.n, [&](auto whole) ALWAYS_INLINE {
    if constexpr (is_long<decltype(whole)>) {
      const auto add = [&](int64_t row, int64_t first, int64_t last) ALWAYS_INLINE {
        const T* x = at(row);
        each_vector<V, Sum<V>::chains>(
            first, last, [&](int64_t i, int slot, ActiveLanes active) ALWAYS_INLINE { step(x + i, slot, active); });
      };
      each_flushed<V, size>(0, b.rows, b.n, add, sums...);
    } else {
      const auto add = [&](int64_t row) ALWAYS_INLINE {
        const T* x = at(row);
        each_of_word<V>(whole, [&](int i, int slot, ActiveLanes active) ALWAYS_INLINE { step(x + i, slot, active); });
      };
      each_flushed_row<size>(0, b.rows, whole, add, sums...);
    }
  });
}

// Σ (x − centre) and Σ (x − centre)² of a block of planes.
template <typename T>
struct PlaneSums {
  INLINE PlaneSums(const MomentsBlock<ComputeType<T>>& b, ComputeType<T> centre) {
    using V = VecOf<T>;
    Sum<V> sums, products;
    const auto step = [&](const T* x, int slot, ActiveLanes active) ALWAYS_INLINE {
      prefetch(x, b.x.ahead);
      const V distance = zero_inactive(load(x, active) - centre, active);
      sums.chain[slot] += distance;
      products.chain[slot] += distance * distance;
    };
    each_of_plane<T>(b, step, sums, products);
    sum = sums.total();
    squares = products.total();
  }
  double sum, squares;
};

// Merges a block of planes into its channel's moments, in one pass about a centre that is close to the mean: the mean
// of the elements before, or else that of the block's first few. If the mean turns out further from this centre than
// the elements are from the mean, which loses digits, a second pass takes the mean itself as the centre.
template <typename T>
void moments_of_planes(const MomentsBlock<ComputeType<T>>& block) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  auto b = block;
  if (b.x.stride == b.n * static_cast<int64_t>(sizeof(T))) {  // adjacent rows count as one
    b.n *= b.rows;
    b.rows = 1;
  }
  const T* first = reinterpret_cast<const T*>(b.x.data);
  const double added = static_cast<double>(b.rows * b.n);
  S centre = static_cast<S>(*b.mean);
  if (b.count == 0) {
    V few;
    if (b.n >= lanes<V>) {
      few = load_vec(first);
    } else {
      few = V{} + load_first(first, 1)[0];
    }
    centre = static_cast<S>(HorizontalSum<lanes<F64>>::sum(in_double(few)) / lanes<V>);
  }
  PlaneSums<T> sums(b, centre);
  if (b.count == 0 && sums.sum * sums.sum > added * sums.squares / 2) {
    centre += static_cast<S>(sums.sum / added);
    sums = PlaneSums<T>(b, centre);
  }
  if (std::isfinite(sums.squares)) {
    merge_sums(Merge(b.count, added), added, centre, sums.sum, sums.squares, *b.mean, *b.m2);
  } else {
    merge_in_double<T>(b, 0, b.n, *b.mean, *b.m2);
  }
}

// For each channel of a block of pixels, sum += Σ (x − centre) and squares += Σ (x − centre)².
template <typename T>
INLINE void add_pixels(const MomentsBlock<ComputeType<T>>& b, const ComputeType<T>* centre, ComputeType<T>* sum,
                       ComputeType<T>* squares) {
  using V = VecOf<T>;
  constexpr int at_once = rows_at_once<Layout::pixels, Activation::none>;
  each_rows<at_once>(0, b.rows, [&](int64_t row, auto count) ALWAYS_INLINE {
    constexpr int R = decltype(count)::value;
    const RowPointers<T, R> x(b.x, row);
    each_word<R == at_once>(LongRow<V>(), 0, b.n, [&](int64_t first, auto size) ALWAYS_INLINE {
      each_of_word<V>(size, [&](int offset, int, ActiveLanes active) ALWAYS_INLINE {
        const int64_t i = first + offset;
        const V middle = load(centre + i, active);
        V distance_sum = {}, squares_sum = {};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          prefetch(x[r] + i, b.x.ahead);
          const V distance = load(x[r] + i, active) - middle;
          distance_sum += distance;
          squares_sum += distance * distance;
        }
        store(sum + i, load(sum + i, active) + distance_sum, active);
        store(squares + i, load(squares + i, active) + squares_sum, active);
      });
    });
  });
}

// Each channel's mean over a block's first rows. Their number is a power of two: the mean of equal numbers is exact.
template <typename T>
INLINE void first_means(const MomentsBlock<ComputeType<T>>& b, ComputeType<T>* means) {
  using V = VecOf<T>;
  const int rows = b.rows >= 4 ? 4 : b.rows >= 2 ? 2 : 1;
  each_vector<V, 1>(0, b.n, [&](int64_t i, int, ActiveLanes active) ALWAYS_INLINE {
    V sum = {};
    for (int row = 0; row < rows; ++row) {
      sum += load(reinterpret_cast<const T*>(b.x.data + row * b.x.stride) + i, active);
    }
    store(means + i, sum * (ComputeType<T>{1} / rows), active);
  });
}

// Merges a block of pixels into the moments of its channels, as moments_of_planes does, each about a centre of its own.
template <typename T>
void moments_of_channels(const MomentsBlock<ComputeType<T>>& block) {
  using S = ComputeType<T>;
  const auto b = block;
  const double added = static_cast<double>(b.rows);
  S* centre = b.scratch;
  S* sum = b.scratch + b.n;
  S* squares = b.scratch + 2 * b.n;
  if (b.count == 0) {
    first_means<T>(b, centre);
  } else {
    for (int64_t i = 0; i < b.n; ++i) {
      centre[i] = static_cast<S>(b.mean[i]);
    }
  }
  std::fill_n(sum, 2 * b.n, S{0});
  add_pixels<T>(b, centre, sum, squares);
  if (b.count == 0) {
    int is_off = 0;
    for (int64_t i = 0; i < b.n; ++i) {
      is_off |= sum[i] * sum[i] > 4 * static_cast<S>(b.rows) * squares[i] / 5;
    }
    if (is_off) {
      for (int64_t i = 0; i < b.n; ++i) {
        centre[i] += sum[i] / static_cast<S>(b.rows);
      }
      std::fill_n(sum, 2 * b.n, S{0});
      add_pixels<T>(b, centre, sum, squares);
    }
  }
  int overflown = 0;
  for (int64_t i = 0; i < b.n; ++i) {
    overflown |= !(squares[i] - squares[i] == 0);
  }
  const Merge merge(b.count, added);
  if (!overflown) {
    for (int64_t i = 0; i < b.n; ++i) {
      merge_sums(merge, added, centre[i], sum[i], squares[i], b.mean[i], b.m2[i]);
    }
    return;
  }
  for (int64_t i = 0; i < b.n; ++i) {
    if (std::isfinite(squares[i])) {
      merge_sums(merge, added, centre[i], sum[i], squares[i], b.mean[i], b.m2[i]);
    } else {
      merge_in_double<T>(b, i, i + 1, b.mean[i], b.m2[i]);
    }
  }
}

// The same for groups of channels. The channels of a group have one centre, so that their sums are simply added.
template <typename T>
void moments_of_groups(const MomentsBlock<ComputeType<T>>& block) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const auto b = block;
  const double added = static_cast<double>(b.rows * b.in_group);
  S* centre = b.scratch;
  S* sum = b.scratch + b.n;
  S* squares = b.scratch + 2 * b.n;
  const auto each_group = [&](auto body) ALWAYS_INLINE {
    for (int64_t group = 0; group < b.n / b.in_group; ++group) {
      body(group, group * b.in_group);
    }
  };
  const auto measure = [&] {
    std::fill_n(sum, 2 * b.n, S{0});
    add_pixels<T>(b, centre, sum, squares);
  };
  const auto total = [&](const S* values) ALWAYS_INLINE {
    if (b.in_group < lanes<V>) {  // most instruction sets would write a part of a vector to memory, and wait to read it
      return std::accumulate(values, values + b.in_group, 0.0);
    }
    Sum<V> all;
    each_summed<V>(
        b.in_group,
        [&](int64_t i, int slot, ActiveLanes active)
            ALWAYS_INLINE { all.chain[slot] += zero_inactive(load(values + i, active), active); },
        all);
    return all.total();
  };
  if (b.count == 0) {
    first_means<T>(b, centre);
  }
  each_group([&](int64_t group, int64_t begin) {
    S middle = static_cast<S>(b.mean[group]);
    if (b.count == 0) {  // the mean of two of these means, or of four, exact as they are
      const S* few = centre + begin;
      middle = (few[0] + few[1]) / 2;
      middle = b.in_group < 4 ? middle : (middle + (few[2] + few[3]) / 2) / 2;
    }
    std::fill_n(centre + begin, b.in_group, middle);
  });
  measure();
  if (b.count == 0) {
    bool is_off = false;
    each_group([&](int64_t, int64_t begin) {
      const double offset = total(sum + begin);
      if (offset * offset > added * total(squares + begin) / 2) {
        std::fill_n(centre + begin, b.in_group, static_cast<S>(centre[begin] + offset / added));
        is_off = true;
      }
    });
    if (is_off) {
      measure();
    }
  }
  const Merge merge(b.count, added);
  each_group([&](int64_t group, int64_t begin) {
    const double all_squares = total(squares + begin);
    if (std::isfinite(all_squares)) {
      merge_sums(merge, added, centre[begin], total(sum + begin), all_squares, b.mean[group], b.m2[group]);
    } else {
      merge_in_double<T>(b, begin, begin + b.in_group, b.mean[group], b.m2[group]);
    }
  });
}

template <typename T>
void moments_of_pixels(const MomentsBlock<ComputeType<T>>& block) {
  block.in_group == 1 ? moments_of_channels<T>(block) : moments_of_groups<T>(block);
}

// Adds Σ dz and Σ dz · (x − mean) of a block of planes: to one channel's sums, or, with a step, to each row's own.
template <typename T, Activation ACTIVATION>
void sums_of_planes(const BackwardBlock<ComputeType<T>>& block) {
  using V = RowVec<T, Layout::planes, ACTIVATION>;
  const auto b = block;
  constexpr int64_t size = 256;  // terms of mixed sign: longer chains lose far more digits than the products do
  const auto add_rows = [&](auto whole, int64_t begin, int64_t end, F64& dz_sum, F64& product_sum) ALWAYS_INLINE {
    Sum<V> sum, product;
    const auto add = [&](int64_t, int slot, ActiveLanes active, const V(&dz)[1], const V(&distance)[1]) ALWAYS_INLINE {
      const V terms = zero_inactive(dz[0], ActiveLanes{active.begin, lanes<V>});  // those after active.end are zero
      sum.chain[slot] += terms;
      product.chain[slot] += terms * distance[0];
    };
    const auto add_part = [&](int64_t row, int64_t first, int64_t last) ALWAYS_INLINE {
      each_gradient<T, Layout::planes, ACTIVATION, true, 1>(b, whole, row, first, last, add);
    };
    if constexpr (is_long<decltype(whole)>) {
      each_flushed<V, size>(begin, end, b.n, add_part, sum, product);
    } else {
      const auto add_row = [&](int64_t row) ALWAYS_INLINE { add_part(row, 0, b.n); };
      each_flushed_row<size>(begin, end, whole, add_row, sum, product);
    }
    dz_sum = sum.flushed;
    product_sum = product.flushed;
  };
  if (b.step == 0) {
    F64 sum, product;
    with_row<V, Layout::planes, ACTIVATION>(
        b.n, [&](auto whole) ALWAYS_INLINE { add_rows(whole, 0, b.rows, sum, product); });
    *b.dz_sum += HorizontalSum<lanes<F64>>::sum(sum);
    *b.product_sum += HorizontalSum<lanes<F64>>::sum(product);
    return;
  }
  constexpr int at_once = lanes<F64>;
  for (int64_t begin = 0; begin < b.rows; begin += at_once) {
    const int count = static_cast<int>(std::min<int64_t>(b.rows - begin, at_once));
    F64 sums[at_once], products[at_once];
    for (int r = 0; r < at_once; ++r) {
      add_rows(LongRow<V>(), begin + r, begin + r + (r < count), sums[r], products[r]);
    }
    const ActiveLanes active{0, count};
    store(b.dz_sum + begin, load(b.dz_sum + begin, active) + horizontal_sums(sums), active);
    store(b.product_sum + begin, load(b.product_sum + begin, active) + horizontal_sums(products), active);
  }
}

// Adds Σ dz and Σ dz · (x − mean) of each channel of a block of pixels.
template <typename T, Activation ACTIVATION>
void sums_of_pixels(const BackwardBlock<ComputeType<T>>& block) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const auto b = block;
  constexpr int64_t some_rows = 16;  // are added in S, and these sums in double: few, for the reason above
  S* sum = b.scratch;
  S* product = b.scratch + b.n;
  for (int64_t first = 0; first < b.rows; first += some_rows) {
    std::fill_n(sum, 2 * b.n, S{0});
    const int64_t last = std::min(first + some_rows, b.rows);
    each_rows<rows_at_once<Layout::pixels, ACTIVATION>>(first, last, [&](int64_t row, auto count) ALWAYS_INLINE {
      constexpr int R = decltype(count)::value;
      const auto step = [&](int64_t i, int, ActiveLanes active, const V(&dz)[R], const V(&distance)[R]) ALWAYS_INLINE {
        V dz_sum = dz[0], product_sum = dz[0] * distance[0];
        for (int r = 1; r < R; ++r) {
          dz_sum += dz[r];
          product_sum += dz[r] * distance[r];
        }
        store(sum + i, load(sum + i, active) + dz_sum, active);
        store(product + i, load(product + i, active) + product_sum, active);
      };
      each_gradient<T, Layout::pixels, ACTIVATION, true, R>(b, LongRow<V>(), row, 0, b.n, step);
    });
    add_to_total(sum, b.dz_sum, b.n);
    add_to_total(product, b.product_sum, b.n);
  }
}

template <typename T, Layout LAYOUT, Activation ACTIVATION>
constexpr auto sums_of = LAYOUT == Layout::planes ? sums_of_planes<T, ACTIVATION> : sums_of_pixels<T, ACTIVATION>;

template <typename T, Layout LAYOUT>
constexpr ChannelKernels<ComputeType<T>> kernels_of_layout = {
    LAYOUT == Layout::planes ? moments_of_planes<T> : moments_of_pixels<T>,
    {forward_block<T, LAYOUT, Activation::none>, forward_block<T, LAYOUT, Activation::relu>,
     forward_block<T, LAYOUT, Activation::silu>},
    {sums_of<T, LAYOUT, Activation::none>, sums_of<T, LAYOUT, Activation::relu>, sums_of<T, LAYOUT, Activation::silu>},
    {backward_block<T, LAYOUT, Activation::none>, backward_block<T, LAYOUT, Activation::relu>,
     backward_block<T, LAYOUT, Activation::silu>}};

template <typename T, typename S>
constexpr LayoutKernels<S> layout_kernels_of() {
  if constexpr (sizeof(ComputeType<T>) == sizeof(S)) {
    return {{kernels_of_layout<T, Layout::planes>, kernels_of_layout<T, Layout::pixels>}};
  } else {
    return {};
  }
}
