// The row norms on the CPU: the loops over rows, column sums, checks, and the operators. row_kernels.h has the kernels,
// which work on one row.
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <memory>
#include <tuple>

#include "row_norm.h"

#include "tensors.h"
#include "views.h"

namespace fastnorm::cpu {
namespace {

template <typename S>
const NormKernels<S>& kernels(Norm norm, Dtype working) {
  const RowKernels<S>& all = kernel_table<S>().row_norms[static_cast<int>(working)];
  return norm == Norm::rms ? all.rms_norm : all.layer_norm;
}

template <typename S>
Dtype cast_from(std::optional<at::ScalarType> type) {
  return type ? dtype_from(*type) : dtype_of<S>;
}

// A thread's scratch memory for rows converted to S. It is reused from row to row, so that it stays in the cache.
template <typename S>
class Scratch {
 public:
  Scratch(bool wanted, int count, int64_t cols) : cols_(cols), values_(wanted ? new S[count * cols] : nullptr) {}
  S* row(int i) { return values_ ? values_.get() + i * cols_ : nullptr; }

 private:
  int64_t cols_;
  std::unique_ptr<S[]> values_;
};

at::IntArrayRef normalized_sizes(const at::Tensor& x, int64_t dims) { return x.sizes().slice(x.dim() - dims); }

int64_t count_rows(const at::Tensor& x, int64_t dims) {
  return c10::multiply_integers(x.sizes().slice(0, x.dim() - dims));
}

ForwardResult make_results(const ForwardCall& call, at::ScalarType statistics_dtype) {
  ForwardResult result;
  result.y = empty(call.x.sizes(), call.out_dtype);
  if (call.residual.defined()) {
    result.h = empty(call.x.sizes(), *call.residual_dtype);
  }
  if (call.saves_statistics) {
    const int64_t n_rows = count_rows(call.x, call.dims);
    result.rstd = empty({n_rows}, statistics_dtype);
    if (call.norm == Norm::layer) {
      result.mean = empty({n_rows}, statistics_dtype);
    }
  }
  return result;
}

// x and residual: (rows, cols); weight and bias are contiguous.
template <typename S>
void forward_in(const ForwardCall& call, const ForwardResult& result) {
  const int64_t n_rows = call.x.size(0), cols = call.x.size(1);
  const bool adds = call.residual.defined();
  S* const rstd = result.rstd.defined() ? result.rstd.mutable_data_ptr<S>() : nullptr;
  S* const mean = result.mean.defined() ? result.mean.mutable_data_ptr<S>() : nullptr;
  const Dtype working = working_dtype<S>({&call.x, &call.residual, &result.h, &result.y});
  const Rows2d<S> x(call.x, working), residual(call.residual, working);
  const Rows2d<S> h(as_rows(result.h, call.dims), working), y(as_rows(result.y, call.dims), working);
  const bool converts = x.converts() || residual.converts() || h.converts() || y.converts();
  const auto add = kernel_table<S>().row_norms[static_cast<int>(working)].add;
  const auto forward = kernels<S>(call.norm, working).forward;
  parallel(n_rows, cols, [&](int64_t begin, int64_t end) {
    Scratch<S> scratch(converts, 3, cols);
    const ColumnValues<S> weight(call.weight, cols, 1, call.zero_centered ? 1 : 0), bias(call.bias, cols, 0, 0);
    ForwardRow<S> row{};
    row.weight = weight.get();
    row.bias = bias.get();
    row.n = cols;
    row.eps = call.eps;
    row.cast = cast_from<S>(call.cast_dtype);
    const int64_t some_rows = std::max<int64_t>(1, (1 << 18) / cols);
    int64_t prepared = begin;
    for (int64_t i = begin; i < end; ++i) {
      if (i == prepared) {
        prepared = std::min(i + some_rows, end);
        y.prepare(i, prepared);
        h.prepare(i, prepared);
      }
      const bool has_next = i + 1 < end;  // the rows from `end` on are another thread's: no prefetch
      row.x_ahead = has_next ? x.ahead() : 0;
      row.y_ahead = has_next ? y.ahead() : 0;
      row.x = x.read(i, scratch.row(0));
      if (adds) {
        void* sum = h.write(i, scratch.row(2));
        add(row.x, residual.read(i, scratch.row(1)), sum, cols);
        h.finish(i, sum);
        row.x = h.read(i, scratch.row(0));  // the norm sees h as rounded to its dtype
      }
      row.y = y.write(i, scratch.row(1));
      const Statistics<S> statistics = forward(row);
      y.finish(i, row.y);
      if (rstd) {
        rstd[i] = statistics.rstd;
      }
      if (mean) {
        mean[i] = statistics.mean;
      }
    }
  });
}

// Column sums of dweight or dbias: partial sums in S over each chunk of rows, then their sum in double.
template <typename S>
class ColumnSums {
 public:
  ColumnSums(bool wanted, int64_t chunks, int64_t cols) : chunks_(chunks), cols_(cols) {
    if (wanted) {
      partials_ = empty({chunks, cols}, scalar_type_of<S>);
    }
  }

  // The partial sums of a chunk; null where the sum is not wanted.
  S* chunk(int64_t i) const {
    return partials_.defined() ? partials_.template mutable_data_ptr<S>() + i * cols_ : nullptr;
  }

  // Writes columns [first, last), at most `width` of them, of the result. An undefined result is left out.
  void add_up(const at::Tensor& total, int64_t first, int64_t last) const {
    if (!total.defined()) {
      return;
    }
    const S* partials = partials_.template const_data_ptr<S>();
    double sums[width] = {};
    for (int64_t i = 0; i < chunks_; ++i) {
      kernel_table<S>().add_to_total(partials + i * cols_ + first, sums, last - first);
    }
    const auto store = kernel_table<double>().store[static_cast<int>(dtype_from(total.scalar_type()))];
    store(sums, static_cast<char*>(total.mutable_data_ptr()) + first * total.element_size(), last - first);
  }

  static constexpr int64_t width = 512;

 private:
  int64_t chunks_, cols_;
  at::Tensor partials_;
};

// The tensors of a backward, row by row.
template <typename S>
struct BackwardRows {
  BackwardRows(const BackwardCall& call, const BackwardResult& result)
      : BackwardRows(call, result, working_dtype<S>({&call.dy, &call.dh, &call.x, &result.dx, &result.dresidual})) {}

  BackwardRows(const BackwardCall& call, const BackwardResult& result, Dtype working)
      : dy(call.dy, working),
        dh(call.dh, working),
        x(call.x, working),
        dx(as_rows(result.dx, call.dims), working),
        dresidual(as_rows(result.dresidual, call.dims), working),
        mean(call.mean.defined() ? call.mean.const_data_ptr<S>() : nullptr),
        rstd(call.rstd.const_data_ptr<S>()),
        backward(kernels<S>(call.norm, working).backward) {}

  bool converts() const {
    return dy.converts() || dh.converts() || x.converts() || dx.converts() || dresidual.converts();
  }

  void prepare(int64_t begin, int64_t end) const {
    dx.prepare(begin, end);
    dresidual.prepare(begin, end);
  }

  void run(int64_t i, BackwardRow<S>& row, Scratch<S>& scratch) const {
    row.dy = dy.read(i, scratch.row(0));
    row.dh = dh.read(i, scratch.row(1));
    row.x = x.read(i, scratch.row(2));
    row.statistics = {mean ? mean[i] : 0, rstd[i]};
    row.dx = dx.write(i, scratch.row(3));
    backward(row);
    dx.finish(i, row.dx);
    dresidual.finish(i, row.dx);
  }

  Rows2d<S> dy, dh, x, dx, dresidual;
  const S* mean;
  const S* rstd;
  void (*backward)(const BackwardRow<S>&);
};

BackwardResult make_results(const BackwardCall& call) {
  const auto optional = [](at::IntArrayRef sizes, std::optional<at::ScalarType> type) {
    return type ? empty(sizes, *type) : at::Tensor();
  };
  const at::IntArrayRef sizes = call.x.sizes(), normalized = normalized_sizes(call.x, call.dims);
  const bool is_alike = call.residual_dtype == call.x_dtype;
  return {empty(sizes, call.x_dtype), optional(sizes, is_alike ? std::nullopt : call.residual_dtype),
          optional(normalized, call.dweight_dtype), optional(normalized, call.dbias_dtype)};
}

// dy, dh and x: (rows, cols); the weight is contiguous.
template <typename S>
void backward_in(const BackwardCall& call, const BackwardResult& result) {
  const int64_t n_rows = call.x.size(0), cols = call.x.size(1);
  const BackwardRows<S> tensors(call, result);
  // At most 64 rows a chunk, so that float sums keep their digits. Fewer rows keep more threads busy, but below 16,
  // writing and reading the partial sums takes longer than that gains. At least two chunks.
  const int64_t chunk_rows = std::min<int64_t>(64, std::max((n_rows + 7) / 8, std::min<int64_t>(16, (n_rows + 1) / 2)));
  const int64_t chunks = (n_rows + chunk_rows - 1) / chunk_rows;
  const ColumnSums<S> dweight(call.dweight_dtype.has_value(), chunks, cols);
  const ColumnSums<S> dbias(call.dbias_dtype.has_value(), chunks, cols);
  parallel(chunks, chunk_rows * cols, [&](int64_t begin, int64_t end) {
    Scratch<S> scratch(tensors.converts(), 4, cols);
    const ColumnValues<S> weight(call.weight, cols, 1, call.zero_centered ? 1 : 0);
    BackwardRow<S> row{};
    row.weight = weight.get();
    row.n = cols;
    row.cast = cast_from<S>(call.cast_dtype);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * chunk_rows, last = std::min(first + chunk_rows, n_rows);
      tensors.prepare(first, last);
      row.dweight = dweight.chunk(chunk);
      row.dbias = dbias.chunk(chunk);
      for (int64_t i = first; i < last; ++i) {
        const bool has_next = i + 1 < std::min(end * chunk_rows, n_rows);
        row.x_ahead = has_next ? tensors.x.ahead() : 0;
        row.dy_ahead = has_next ? tensors.dy.ahead() : 0;
        row.dx_ahead = has_next ? tensors.dx.ahead() : 0;
        row.first = i == first;
        tensors.run(i, row, scratch);
      }
    }
  });
  constexpr int64_t width = ColumnSums<S>::width;
  parallel((cols + width - 1) / width, width * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * width; first < std::min(end * width, cols); first += width) {
      dweight.add_up(result.dweight, first, std::min(first + width, cols));
      dbias.add_up(result.dbias, first, std::min(first + width, cols));
    }
  });
}

bool is_double(const at::Tensor& tensor) { return tensor.defined() && tensor.scalar_type() == at::kDouble; }

// Checks x before the other tensors, whose expected shapes follow from it.
void check_input(const at::Tensor& x, int64_t dims) {
  TORCH_CHECK(dims > 0 && dims <= x.dim() && c10::multiply_integers(normalized_sizes(x, dims)) > 0,
              "fastnorm: expected x with elements in its last ", dims, " dimensions, got ", x.sizes());
  check_tensor(x, "x", x.sizes());
}

void check_features(Norm norm, bool has_bias, std::optional<at::ScalarType> cast_dtype) {
  TORCH_CHECK(norm == Norm::layer || !has_bias, "fastnorm: no kernel for a bias without subtract_mean");
  TORCH_CHECK(norm == Norm::rms || !cast_dtype, "fastnorm: no kernel for cast_dtype with subtract_mean");
}

}  // namespace

ForwardResult norm_forward(ForwardCall call) {
  check_input(call.x, call.dims);
  if (call.residual.defined()) {
    check_tensor(call.residual, "residual", call.x.sizes());
  }
  TORCH_CHECK(call.residual.defined() == call.residual_dtype.has_value(),
              "fastnorm: expected residual_dtype with a residual, and only with one");
  check_features(call.norm, call.bias.has_value(), call.cast_dtype);
  check_parameter(call.weight, "weight", normalized_sizes(call.x, call.dims));
  check_parameter(call.bias, "bias", normalized_sizes(call.x, call.dims));
  const bool in_double = is_double(call.x) || is_double(call.residual) || call.residual_dtype == at::kDouble;
  ForwardResult result = make_results(call, in_double ? at::kDouble : at::kFloat);
  call.x = as_rows(call.x, call.dims);
  call.residual = as_rows(call.residual, call.dims);
  call.weight = contiguous(call.weight);
  call.bias = contiguous(call.bias);
  in_double ? forward_in<double>(call, result) : forward_in<float>(call, result);
  return result;
}

BackwardResult norm_backward(BackwardCall call) {
  check_input(call.x, call.dims);
  check_tensor(call.dy, "dy", call.x.sizes());
  if (call.dh.defined()) {
    check_tensor(call.dh, "dh", call.x.sizes());
  }
  check_features(call.norm, call.dbias_dtype.has_value(), call.cast_dtype);
  check_parameter(call.weight, "weight", normalized_sizes(call.x, call.dims));
  const bool in_double = is_double(call.x) || call.x_dtype == at::kDouble || call.residual_dtype == at::kDouble;
  const at::ScalarType statistics_dtype = in_double ? at::kDouble : at::kFloat;
  check_statistics(call.rstd, "rstd", {count_rows(call.x, call.dims)}, statistics_dtype);
  if (call.norm == Norm::layer) {
    check_statistics(call.mean, "mean", {count_rows(call.x, call.dims)}, statistics_dtype);
  }
  BackwardResult result = make_results(call);
  call.dy = as_rows(call.dy, call.dims);
  call.dh = as_rows(call.dh, call.dims);
  call.x = as_rows(call.x, call.dims);
  call.weight = contiguous(call.weight);
  in_double ? backward_in<double>(call, result) : backward_in<float>(call, result);
  return result;
}

namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four row_norm_forward(const Tensor& x, const optional<Tensor>& residual, int64_t dims, const optional<Tensor>& weight,
                      const optional<Tensor>& bias, double eps, bool subtract_mean, bool zero_centered,
                      optional<ScalarType> cast_dtype, ScalarType out_dtype, optional<ScalarType> residual_dtype) {
  auto [y, h, mean, rstd] = norm_forward({subtract_mean ? Norm::layer : Norm::rms, x, dims, residual.value_or(Tensor()),
                                          weight, bias, eps, zero_centered, cast_dtype, out_dtype, residual_dtype});
  return {y, h, mean, rstd};
}

Four row_norm_backward(const Tensor& dy, const optional<Tensor>& dh, const Tensor& h, int64_t dims,
                       const optional<Tensor>& weight, const optional<Tensor>& mean, const Tensor& rstd,
                       bool zero_centered, optional<ScalarType> cast_dtype, ScalarType x_dtype,
                       optional<ScalarType> residual_dtype, optional<ScalarType> dweight_dtype,
                       optional<ScalarType> dbias_dtype) {
  auto [dx, dresidual, dweight, dbias] = norm_backward(
      {mean ? Norm::layer : Norm::rms, dy, dh.value_or(Tensor()), h, dims, weight, mean.value_or(Tensor()), rstd,
       zero_centered, cast_dtype, x_dtype, residual_dtype, dweight_dtype, dbias_dtype});
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("row_norm_forward", &row_norm_forward);
  m.impl("row_norm_backward", &row_norm_backward);
}

}  // namespace fastnorm::cpu
