// Between tensors and kernels: checks, outputs, views that convert rows to the kernels' dtype, and the split of work
// among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>

#include "pages.h"
#include "rows.h"
#include "views.h"

namespace fastnorm::cpu {

// Raises for a dtype other than the four.
Dtype dtype_from(at::ScalarType type);

// An uninitialised CPU tensor without gaps.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format = at::MemoryFormat::Contiguous);

// Raises unless the tensor has these sizes and one of the four dtypes, on the CPU.
void check_tensor(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes);

// As check_tensor, if there is a tensor.
void check_parameter(const std::optional<at::Tensor>& tensor, const char* name, at::IntArrayRef sizes);

// As check_tensor, for a shape (cols,), and raises unless its elements are adjacent.
void check_columns(const at::Tensor& tensor, const char* name, int64_t cols);

// As check_tensor, for mean and rstd, and raises unless they have this dtype and adjacent elements in rows.
void check_statistics(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, at::ScalarType type);

template <typename S>
constexpr at::ScalarType scalar_type_of = sizeof(S) == 8 ? at::kDouble : at::kFloat;

// The dtype that a call's kernels read and write: that of its tensors if all have the same, otherwise S, to which rows
// are converted in scratch memory.
template <typename S>
Dtype working_dtype(std::initializer_list<const at::Tensor*> tensors) {
  std::optional<Dtype> shared;
  for (const at::Tensor* tensor : tensors) {
    if (tensor->defined()) {
      const Dtype dtype = dtype_from(tensor->scalar_type());
      if (shared && *shared != dtype) {
        return dtype_of<S>;
      }
      shared = dtype;
    }
  }
  return *shared;
}

// A tensor's rows in the working dtype. An undefined tensor's rows are null. Only those of a contiguous tensor are
// written to.
template <typename S>
class Rows2d {
 public:
  Rows2d(const at::Tensor& tensor, Dtype working, const RowLevels& levels) {
    if (!tensor.defined()) {
      return;
    }
    data_ = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));  // only fresh outputs are written to
    element_size_ = static_cast<int64_t>(tensor.element_size());
    offsets_ = levels.offsets(tensor);
    for (int64_t& step : offsets_.steps) {
      step *= element_size_;
    }
    cols_ = levels.cols();
    dtype_ = dtype_from(tensor.scalar_type());
    converts_ = dtype_ != working;
    is_fresh_ = tensor.is_contiguous() && is_fresh(tensor);  // of expanded rows, the bytes would be counted again
  }

  // The columns [first, first + cols) of these rows.
  Rows2d columns(int64_t first, int64_t cols) const {
    Rows2d part = *this;
    if (data_ != nullptr) {
      part.data_ += first * element_size_;
      part.cols_ = cols;
    }
    return part;
  }

  // The row itself, or a converted copy in scratch where its dtype is not the working dtype.
  const void* read(int64_t i, S* scratch) const {
    if (converts_) {
      kernel_table<S>().load[static_cast<int>(dtype_)](address(i), scratch, cols_);
      return scratch;
    }
    return data_ == nullptr ? nullptr : address(i);
  }

  // Where row i begins in the tensor.
  const void* address(int64_t i) const { return data_ + offsets_(i); }

  bool converts() const { return converts_; }

  // Whether every row is as far from the next: so is what to prefetch.
  bool has_one_stride() const { return offsets_.levels == 1; }

  // The prefetch distance in bytes: from row i to the `count`th after it where rows are read in place, otherwise 0.
  int64_t ahead(int64_t i, int count) const { return converts_ ? 0 : offsets_(i + count) - offsets_(i); }

  // To be called before rows [begin, end) of an output are written.
  void prepare(int64_t begin, int64_t end) const {
    if (is_fresh_) {
      fault_in(data_ + begin * stride(), (end - begin) * stride());
    }
  }

  // Where to write row i; finish(i, result) must follow.
  void* write(int64_t i, S* scratch) const { return converts_ ? static_cast<void*>(scratch) : data_ + i * stride(); }

  // Converts and stores a row that was written to scratch.
  void finish(int64_t i, const void* written) const {
    if (data_ != nullptr && written != data_ + i * stride()) {
      kernel_table<S>().store[static_cast<int>(dtype_)](static_cast<const S*>(written), data_ + i * stride(), cols_);
    }
  }

 private:
  int64_t stride() const { return offsets_.steps[0]; }  // of a contiguous tensor

  char* data_ = nullptr;
  int64_t element_size_ = 0;
  RowOffsets offsets_;  // in bytes
  int64_t cols_ = 0;
  Dtype dtype_ = dtype_of<S>;
  bool converts_ = false;
  bool is_fresh_ = false;
};

// Weight, bias or x_gate in S plus an offset, or `absent` in every column if there is none; with several rows, one of
// them at a time. What is in S without an offset is used in place. Each thread makes its own copy: reading another
// core's takes longer than converting.
template <typename S>
class ColumnValues {
 public:
  ColumnValues() = default;  // get() is null

  // tensor: contiguous, or with several rows (rows, cols).
  ColumnValues(const std::optional<at::Tensor>& tensor, int64_t cols, S absent, S offset, int64_t rows = 1)
      : cols_(cols), offset_(offset) {
    const bool given = tensor.has_value() && tensor->defined();
    if (given) {
      dtype_ = dtype_from(tensor->scalar_type());
      stride_ = rows == 1 ? 0 : tensor->stride(0) * static_cast<int64_t>(tensor->element_size());
      data_ = static_cast<const char*>(tensor->const_data_ptr());
    }
    if (!given || dtype_ != dtype_of<S> || offset != 0) {
      own_.reset(new S[cols]);
    }
    given ? read(data_) : static_cast<void>(std::fill_n(own_.get(), cols, absent));
  }

  // Chooses a row; at first it is row 0.
  void choose(int64_t row) {
    const char* source = data_ + row * stride_;
    if (source != read_) {
      read(source);
    }
  }

  const S* get() const { return own_ ? own_.get() : reinterpret_cast<const S*>(read_); }

 private:
  void read(const char* source) {
    read_ = source;
    const S* values = reinterpret_cast<const S*>(source);
    if (dtype_ != dtype_of<S>) {
      kernel_table<S>().load[static_cast<int>(dtype_)](source, own_.get(), cols_);
      values = own_.get();
    }
    if (offset_ != 0) {
      std::transform(values, values + cols_, own_.get(), [this](S value) { return value + offset_; });
    }
  }

  int64_t cols_ = 0;
  S offset_ = 0;
  Dtype dtype_ = dtype_of<S>;
  int64_t stride_ = 0;
  const char* data_ = nullptr;
  const char* read_ = nullptr;  // the chosen row
  std::unique_ptr<S[]> own_;
};

// No thread is woken for fewer elements.
constexpr int64_t thread_elements = 16384;

// Splits [0, count) among threads. Each item covers `elements`.
template <typename Body>
void parallel(int64_t count, int64_t elements, const Body& body) {
  at::parallel_for(0, count, std::max<int64_t>(1, thread_elements / std::max<int64_t>(1, elements)), body);
}

}  // namespace fastnorm::cpu
