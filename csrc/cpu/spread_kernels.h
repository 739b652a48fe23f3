// Statistics of blocks, and the table of the kernels of blocks. Included by instruction_set.h after channel_kernels.h.

// Chan's formula for what lies at `offset` from the mean of `count` elements.
struct Merge {
  Merge(double count, double added) : share(added / (count + added)), cross(count * share) {}
  INLINE void operator()(double& mean, double& square_sum, double added_mean, double added_square_sum) const {
    const double distance = added_mean - mean;
    mean += distance * share;
    square_sum += added_square_sum + distance * distance * cross;
  }
  double share, cross;
};

void merge_spreads(const Spreads& into, const Spreads& from, int64_t channels) {
  const Merge merge(into.count, from.count);
  double* mean = into.mean;
  double* square_sum = into.square_sum;
  for (int64_t i = 0; i < channels; ++i) {
    merge(mean[i], square_sum[i], from.mean[i], from.square_sum[i]);
  }
}

// Adds `added` elements with Σ (x − centre) and Σ (x − centre)². The centre must be close to their mean, or be the mean
// of as many elements before them: what the difference of the squares loses is then small beside what merging adds.
INLINE void merge_sums(const Merge& merge, double added, double centre, double sum, double squares, double& mean,
                       double& square_sum) {
  const double offset = sum / added;
  const double about_mean = squares - offset * sum;
  merge(mean, square_sum, centre + offset, about_mean < 0 ? 0 : about_mean);
}

// For blocks whose float sums overflow though their squares may not; blocks with inf or NaN come here too. As in a row,
// the mean is exact where all elements are alike.
template <typename T>
__attribute__((noinline)) void merge_in_double(const SpreadBlock<ComputeType<T>>& b, int64_t begin, int64_t end,
                                               double& mean, double& square_sum) {
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
  Merge(b.count, added)(mean, square_sum, centre, sum);
}

// Calls add(row, first, last) for parts of rows [begin, end) of at most `size` elements, and flushes the sums about as
// often: the error of a chain of additions grows with its length.
template <typename V, int64_t size, typename Add, typename... Sums>
INLINE void each_flushed(int64_t begin, int64_t end, int64_t n, Add add, Sums&... sums) {
  constexpr int64_t longest = size / word_size;
  int64_t length = 0;  // of the first chain, which takes all that does not fill a word
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

// Calls step(x, i, slot, part) for all vectors of a block, and flushes the sums every so often.
template <typename T, typename Step, typename... Sums>
INLINE void each_of_plane(const SpreadBlock<ComputeType<T>>& b, Step step, Sums&... sums) {
  const auto add = [&](int64_t row, int64_t first, int64_t last) ALWAYS_INLINE {
    const T* x = reinterpret_cast<const T*>(b.x.data + row * b.x.stride);
    each_vector<VecOf<T>, Sum<VecOf<T>>::chains>(
        first, last, [&](int64_t i, int slot, Part part) ALWAYS_INLINE { step(x + i, slot, part); });
  };
  each_flushed<VecOf<T>, 1024>(0, b.rows, b.n, add, sums...);
}

// Σ (x − centre) and Σ (x − centre)² of a block.
template <typename T>
struct PlaneSums {
  INLINE PlaneSums(const SpreadBlock<ComputeType<T>>& b, ComputeType<T> centre) {
    using V = VecOf<T>;
    Sum<V> sums, products;
    const auto step = [&](const T* x, int slot, Part part) ALWAYS_INLINE {
      prefetch(x, b.x.ahead);
      const V distance = keep(load(x, part) - centre, part);
      sums.chain[slot] += distance;
      products.chain[slot] += distance * distance;
    };
    each_of_plane<T>(b, step, sums, products);
    sum = sums.total();
    squares = products.total();
  }
  double sum, squares;
};

// About a centre that is near enough to the mean: that of the elements before, or else of the block's first few. Where
// it turns out to be further off than elements are, which loses digits, all is done again about the mean.
template <typename T>
void spread_of_planes(const SpreadBlock<ComputeType<T>>& block) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  auto b = block;
  if (b.x.stride == b.n * static_cast<int64_t>(sizeof(T))) {  // its rows are one
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
    centre = static_cast<S>(Doubles<lanes<F64>>::sum(in_double(few)) / lanes<V>);
  }
  PlaneSums<T> sums(b, centre);
  if (b.count == 0 && sums.sum * sums.sum > added * sums.squares / 2) {
    centre += static_cast<S>(sums.sum / added);
    sums = PlaneSums<T>(b, centre);
  }
  if (std::isfinite(sums.squares)) {
    merge_sums(Merge(b.count, added), added, centre, sums.sum, sums.squares, *b.mean, *b.square_sum);
  } else {
    merge_in_double<T>(b, 0, b.n, *b.mean, *b.square_sum);
  }
}

// sum += Σ (x − centre) and squares += Σ (x − centre)².
template <typename T>
INLINE void add_pixels(const SpreadBlock<ComputeType<T>>& b, const ComputeType<T>* centre, ComputeType<T>* sum,
                       ComputeType<T>* squares) {
  using V = VecOf<T>;
  constexpr int at_once = rows_at_once<Layout::pixels, Activation::none>;
  each_rows<at_once>(0, b.rows, [&](int64_t row, auto count) ALWAYS_INLINE {
    constexpr int R = decltype(count)::value;
    const RowPointers<T, R> x(b.x, row);
    each_word<R == at_once>(0, b.n, [&](int64_t first, auto size) ALWAYS_INLINE {
      each_of_word<V>(size, [&](int offset, int, Part part) ALWAYS_INLINE {
        const int64_t i = first + offset;
        const V middle = load(centre + i, part);
        V distance_sum = {}, square_sum = {};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          prefetch(x[r] + i, b.x.ahead);
          const V distance = load(x[r] + i, part) - middle;
          distance_sum += distance;
          square_sum += distance * distance;
        }
        store(sum + i, load(sum + i, part) + distance_sum, part);
        store(squares + i, load(squares + i, part) + square_sum, part);
      });
    });
  });
}

// The means of a block's first rows: a power of two of them, so that those of equal numbers are exact.
template <typename T>
INLINE void first_means(const SpreadBlock<ComputeType<T>>& b, ComputeType<T>* means) {
  using V = VecOf<T>;
  const int rows = b.rows >= 4 ? 4 : b.rows >= 2 ? 2 : 1;
  each_vector<V, 1>(0, b.n, [&](int64_t i, int, Part part) ALWAYS_INLINE {
    V sum = {};
    for (int row = 0; row < rows; ++row) {
      sum += load(reinterpret_cast<const T*>(b.x.data + row * b.x.stride) + i, part);
    }
    store(means + i, sum * (ComputeType<T>{1} / rows), part);
  });
}

// As spread_of_planes.
template <typename T>
void spread_of_pixels(const SpreadBlock<ComputeType<T>>& block) {
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
      merge_sums(merge, added, centre[i], sum[i], squares[i], b.mean[i], b.square_sum[i]);
    }
    return;
  }
  for (int64_t i = 0; i < b.n; ++i) {
    if (std::isfinite(squares[i])) {
      merge_sums(merge, added, centre[i], sum[i], squares[i], b.mean[i], b.square_sum[i]);
    } else {
      merge_in_double<T>(b, i, i + 1, b.mean[i], b.square_sum[i]);
    }
  }
}

template <typename T, Layout LAYOUT, Activation ACTIVATION>
void sums_of_block(const BackwardBlock<ComputeType<T>>& block) {
  using S = ComputeType<T>;
  using V = VecOf<T>;
  const auto b = block;
  if constexpr (LAYOUT == Layout::planes) {
    constexpr int64_t size = 256;  // where signs differ, longer chains are far less exact than products are
    const auto add_rows = [&](int64_t begin, int64_t end, Sum<V>& sum, Sum<V>& product) ALWAYS_INLINE {
      const auto add = [&](int64_t, int slot, Part, const V(&dz)[1], const V(&distance)[1]) ALWAYS_INLINE {
        sum.chain[slot] += dz[0];
        product.chain[slot] += dz[0] * distance[0];
      };
      const auto add_row = [&](int64_t row, int64_t first, int64_t last) ALWAYS_INLINE {
        each_gradient<T, LAYOUT, ACTIVATION, true, 1>(b, row, first, last, add);
      };
      each_flushed<V, size>(begin, end, b.n, add_row, sum, product);
    };
    if (b.step == 0) {
      Sum<V> sum, product;
      add_rows(0, b.rows, sum, product);
      *b.sum += sum.total();
      *b.product += product.total();
      return;
    }
    constexpr int at_once = lanes<F64>;
    for (int64_t begin = 0; begin < b.rows; begin += at_once) {
      const int count = static_cast<int>(std::min<int64_t>(b.rows - begin, at_once));
      F64 sums[at_once], products[at_once];
      for (int r = 0; r < at_once; ++r) {
        Sum<V> sum, product;
        add_rows(begin + r, begin + r + (r < count), sum, product);
        sums[r] = sum.flushed;
        products[r] = product.flushed;
      }
      const Part part{count, 0};
      store(b.sum + begin, load(b.sum + begin, part) + totals(sums), part);
      store(b.product + begin, load(b.product + begin, part) + totals(products), part);
    }
  } else {
    // Added up in double every few rows, as above.
    constexpr int64_t some_rows = 16;
    S* sum = b.scratch;
    S* product = b.scratch + b.n;
    for (int64_t first = 0; first < b.rows; first += some_rows) {
      std::fill_n(sum, 2 * b.n, S{0});
      const int64_t last = std::min(first + some_rows, b.rows);
      each_rows<rows_at_once<LAYOUT, ACTIVATION>>(first, last, [&](int64_t row, auto count) ALWAYS_INLINE {
        constexpr int R = decltype(count)::value;
        const auto step = [&](int64_t i, int, Part part, const V(&dz)[R], const V(&distance)[R]) ALWAYS_INLINE {
          V dz_sum = dz[0], product_sum = dz[0] * distance[0];
          for (int r = 1; r < R; ++r) {
            dz_sum += dz[r];
            product_sum += dz[r] * distance[r];
          }
          store(sum + i, load(sum + i, part) + dz_sum, part);
          store(product + i, load(product + i, part) + product_sum, part);
        };
        each_gradient<T, LAYOUT, ACTIVATION, true, R>(b, row, 0, b.n, step);
      });
      add_to_total(sum, b.sum, b.n);
      add_to_total(product, b.product, b.n);
    }
  }
}

template <typename T, Layout LAYOUT>
constexpr ChannelKernels<ComputeType<T>> kernels_of_layout = {
    LAYOUT == Layout::planes ? spread_of_planes<T> : spread_of_pixels<T>,
    {forward_block<T, LAYOUT, Activation::none>, forward_block<T, LAYOUT, Activation::relu>,
     forward_block<T, LAYOUT, Activation::silu>},
    {sums_of_block<T, LAYOUT, Activation::none>, sums_of_block<T, LAYOUT, Activation::relu>,
     sums_of_block<T, LAYOUT, Activation::silu>},
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
