// What the loops over rows of a forward (row_forward.cpp) and of a backward (row_backward.cpp) have in common.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>

#include "row_norm.h"

#include "tensors.h"
#include "views.h"

namespace fastnorm::cpu {

template <typename Call>
Gate gate_of(const Call& call) {
  if (call.x_gate.defined()) {
    return Gate::before_add;
  }
  return !call.gate.defined() ? Gate::none : call.norm_before_gate ? Gate::after_norm : Gate::before_norm;
}

template <typename S>
const RowKernels<S>& kernels(Dtype working) {
  return kernel_table<S>().row_norms[static_cast<int>(working)];
}

template <typename S, typename Call>
const NormKernels<S>& kernels_of(const Call& call, Dtype working) {
  return kernels<S>(working).norms[static_cast<int>(call.norm)][static_cast<int>(gate_of(call))];
}

template <typename S>
Dtype cast_from(std::optional<at::ScalarType> type) {
  return type ? dtype_from(*type) : dtype_of<S>;
}

// The kernels for narrow rows, if rows of so many columns are.
template <typename S>
NarrowKernels<S> narrow_kernels_of(const NormKernels<S>& kernels, int64_t cols) {
  return cols <= kernels.narrow.cols ? kernels.narrow : NarrowKernels<S>{};
}

// A thread's scratch memory for rows converted to S: `count` for each of the rows that are done at once. It is reused,
// so that it stays in the cache.
template <typename S>
class Scratch {
 public:
  Scratch(bool wanted, int count, int64_t cols, int rows_at_once = 1)
      : count_(count), cols_(cols), values_(wanted ? new S[rows_at_once * count * cols] : nullptr) {}
  S* row(int i, int of = 0) { return values_ ? values_.get() + (of * count_ + i) * cols_ : nullptr; }

 private:
  int count_;
  int64_t cols_;
  std::unique_ptr<S[]> values_;
};

// A thread's weight, bias and x_gate, whose rows belong to samples.
template <typename S>
class Parameters {
 public:
  template <typename Call>
  Parameters(const Call& call, int64_t width, bool wants_bias)
      : weight_(call.weight, width, 1, call.zero_centered ? 1 : 0, call.samples) {
    if (wants_bias) {
      bias_ = ColumnValues<S>(call.bias, width, 0, 0, call.samples);
    }
    if (call.x_gate.defined()) {
      x_gate_ = ColumnValues<S>(call.x_gate, width, 1, 0, call.samples);
    }
  }

  // Points a row's parameters to those of a sample, from a column on.
  template <typename Row>
  void set(Row& row, int64_t sample, int64_t first) {
    const auto values = [=](ColumnValues<S>& of) {
      of.choose(sample);
      return of.get() == nullptr ? nullptr : of.get() + first;
    };
    row.weight = values(weight_);
    row.bias = values(bias_);
    row.x_gate = values(x_gate_);
  }

 private:
  ColumnValues<S> weight_, bias_, x_gate_;
};

// The rows that one call of a kernel takes. What they share is set in the first; share copies it for the next steps,
// which take `n_rows` rows in all.
template <typename Row>
struct Step {
  void share(int64_t n_rows) { std::fill_n(rows.begin() + 1, count(n_rows) - 1, rows[0]); }

  // How many of these rows the next step takes.
  int count(int64_t n_rows) const { return static_cast<int>(std::min<int64_t>(at_once, n_rows)); }

  int at_once;
  std::array<Row, most_rows_at_once> rows{};
};

// How many rows of outputs to prepare at once: about a MiB of floats.
inline int64_t rows_to_prepare(int64_t width) { return std::max<int64_t>(1, (1 << 18) / width); }

// The loops. Rows have groups · cols columns; weight, bias and x_gate: (samples, cols), or contiguous.
void run_forward(const ForwardCall& call, const ForwardResult& result, const RowLevels& levels, bool in_double);
void run_backward(const BackwardCall& call, const BackwardResult& result, const RowLevels& levels, bool in_double);

}  // namespace fastnorm::cpu
