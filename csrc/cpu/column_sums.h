// The row norms' sums over rows, in an order that doesn't depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "rows.h"
#include "tensors.h"

namespace fastnorm::cpu {

// How the rows of a backward are cut into chunks, over each of which columns are summed. It follows from a sample's
// shape alone, and no chunk has rows of two samples.
struct Chunks {
  Chunks(int64_t n_rows, int64_t samples, int64_t cols)
      : sample_rows(n_rows / samples),
        rows(rows_of(sample_rows, cols)),
        per_sample((sample_rows + rows - 1) / rows),
        count(samples * per_sample) {}

  // The first row of a chunk; of `count`, the number of rows.
  int64_t begin(int64_t chunk) const { return chunk / per_sample * sample_rows + chunk % per_sample * rows; }
  int64_t end(int64_t chunk) const { return std::min(begin(chunk) + rows, (chunk / per_sample + 1) * sample_rows); }

  int64_t sample_rows, rows, per_sample, count;

 private:
  static int64_t rows_of(int64_t sample_rows, int64_t cols) {
    constexpr int64_t most = 64;  // float sums of more rows would lose digits
    if (sample_rows <= most && sample_rows * cols <= thread_elements) {
      return std::max<int64_t>(1, sample_rows);  // one thread's, whose sums are the result
    }
    // Fewer rows keep more threads busy, but below 16, writing and reading the partial sums takes longer than that
    // gains. At least two chunks, but of a single row.
    const int64_t least = std::min<int64_t>(16, (sample_rows + 1) / 2);
    return std::clamp<int64_t>(std::max((sample_rows + 7) / 8, least), 1, most);
  }
};

// Column sums of dweight, dbias or dx_gate: partial sums in S over each chunk of rows, then, for each sample, their sum
// in double. The sums over a sample's only chunk are the result.
template <typename S>
class ColumnSums {
 public:
  // total: (samples, cols) elements, or undefined where the sums are not wanted.
  ColumnSums(const at::Tensor& total, const Chunks& chunks, int64_t cols)
      : per_sample_(chunks.per_sample), cols_(cols), store_row_(nullptr) {
    if (!total.defined()) {
      return;
    }
    total_ = static_cast<char*>(total.mutable_data_ptr());
    element_size_ = static_cast<int64_t>(total.element_size());
    const Dtype dtype = dtype_from(total.scalar_type());
    store_ = kernel_table<double>().store[static_cast<int>(dtype)];
    if (per_sample_ != 1) {  // without rows the sums are zeros
      partials_ = empty({chunks.count, cols}, scalar_type_of<S>);
    } else if (dtype != dtype_of<S>) {
      store_row_ = kernel_table<S>().store[static_cast<int>(dtype)];
    }
  }

  bool needs_scratch() const { return store_row_ != nullptr; }

  // Where the sums of a chunk go, from a column on: in the end to scratch memory for a row. Null if they are not
  // wanted.
  S* chunk(int64_t i, int64_t first, S* scratch) const {
    if (total_ == nullptr) {
      return nullptr;
    }
    S* const rows = partials_.defined() ? partials_.template mutable_data_ptr<S>() : reinterpret_cast<S*>(total_);
    return (store_row_ ? scratch : rows + i * cols_) + first;
  }

  // Stores what the scratch memory holds, all columns of a chunk.
  void finish(int64_t i, const S* scratch) const {
    if (store_row_) {
      store_row_(scratch, total_ + i * cols_ * element_size_, cols_);
    }
  }

  // Writes columns [first, last), at most `strip` of them, of a sample's result.
  void add_up(int64_t sample, int64_t first, int64_t last) const {
    if (!partials_.defined()) {
      return;
    }
    const S* partials = partials_.template const_data_ptr<S>() + sample * per_sample_ * cols_;
    double sums[strip] = {};
    for (int64_t i = 0; i < per_sample_; ++i) {
      kernel_table<S>().add_to_total(partials + i * cols_ + first, sums, last - first);
    }
    store_(sums, total_ + (sample * cols_ + first) * element_size_, last - first);
  }

  static constexpr int64_t strip = 512;

 private:
  int64_t per_sample_, cols_;
  char* total_ = nullptr;
  int64_t element_size_ = 0;
  void (*store_)(const double* values, void* row, int64_t n) = nullptr;
  void (*store_row_)(const S* values, void* row, int64_t n);  // set where a chunk's sums are a result of another dtype
  at::Tensor partials_;
};

}  // namespace fastnorm::cpu
