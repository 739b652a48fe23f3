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

template <typename Call>
Gate gate_of(const Call& call) {
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
    const int64_t count = count_rows(call.x, call.dims) * call.groups;
    result.rstd = empty({count}, statistics_dtype);
    if (call.norm == Norm::layer) {
      result.mean = empty({count}, statistics_dtype);
    }
  }
  return result;
}

// The tensors of a forward, row by row, or those of one group of their columns.
template <typename S>
struct ForwardRows {
  ForwardRows(const ForwardCall& call, const ForwardResult& result, const RowLevels& levels)
      : ForwardRows(call, result, levels,
                    working_dtype<S>({&call.x, &call.residual, &call.gate, &result.h, &result.y})) {}

  ForwardRows(const ForwardCall& call, const ForwardResult& result, const RowLevels& levels, Dtype working)
      : x(call.x, working, levels),
        residual(call.residual, working, levels),
        gate(call.gate, working, levels),
        h(result.h, working, levels),
        y(result.y, working, levels),
        mean(result.mean.defined() ? result.mean.mutable_data_ptr<S>() : nullptr),
        rstd(result.rstd.defined() ? result.rstd.mutable_data_ptr<S>() : nullptr),
        groups(call.groups),
        adds(call.residual.defined()),
        gated(call.gate.defined()),
        needs_scratch(gated || x.converts() || residual.converts() || h.converts() || y.converts()),
        add(kernels<S>(working).add),
        forward(kernels_of<S>(call, working).forward) {
    if (call.norm == Norm::rms && call.bias && !call.gate.defined()) {
      forward = kernels<S>(working).biased_rms_norm;
    }
  }

  ForwardRows group(int64_t index, int64_t cols) const {
    ForwardRows part = *this;
    for (Rows2d<S>* rows : {&part.x, &part.residual, &part.gate, &part.h, &part.y}) {
      *rows = rows->columns(index * cols, cols);
    }
    part.mean = mean ? mean + index : nullptr;
    part.rstd = rstd ? rstd + index : nullptr;
    return part;
  }

  void prepare(int64_t begin, int64_t end) const {
    y.prepare(begin, end);
    h.prepare(begin, end);
  }

  void look_ahead(int64_t i, ForwardRow<S>& row) const {
    row.x_ahead = x.ahead(i);
    row.gate_ahead = gate.ahead(i);
    row.y_ahead = y.ahead(i);
  }

  void run(int64_t i, ForwardRow<S>& row, Scratch<S>& scratch) const {
    row.x = x.read(i, scratch.row(0));
    if (adds) {
      void* sum = h.write(i, scratch.row(2));
      add(row.x, residual.read(i, scratch.row(1)), sum, row.n);
      h.finish(i, sum);
      row.x = h.read(i, scratch.row(0));  // the norm sees h as rounded to its dtype
    }
    if (gated) {
      row.gate = gate.read(i, scratch.row(2));
    }
    row.y = y.write(i, scratch.row(1));
    const Statistics<S> statistics = forward(row);
    y.finish(i, row.y);
    if (rstd) {
      rstd[i * groups] = statistics.rstd;
    }
    if (mean) {
      mean[i * groups] = statistics.mean;
    }
  }

  Rows2d<S> x, residual, gate, h, y;
  S* mean;
  S* rstd;
  int64_t groups;
  bool adds, gated, needs_scratch;
  void (*add)(const void* x, const void* residual, void* h, int64_t n);
  Statistics<S> (*forward)(const ForwardRow<S>&);
};

// Rows have groups · cols columns; weight and bias are contiguous.
template <typename S>
void forward_in(const ForwardCall& call, const ForwardResult& result, const RowLevels& levels) {
  const int64_t n_rows = levels.rows(), width = levels.cols(), cols = width / call.groups;
  const ForwardRows<S> tensors(call, result, levels);
  parallel(n_rows, width, [&](int64_t begin, int64_t end) {
    Scratch<S> scratch(tensors.needs_scratch, 4, cols);
    const ColumnValues<S> weight(call.weight, width, 1, call.zero_centered ? 1 : 0);
    std::optional<ColumnValues<S>> bias;
    if (call.norm == Norm::layer || call.bias || call.gate.defined()) {
      bias.emplace(call.bias, width, 0, 0);
    }
    ForwardRow<S> row{};
    row.n = cols;
    row.scratch = scratch.row(3);
    row.silu = call.silu;
    row.eps = call.eps;
    row.cast = cast_from<S>(call.cast_dtype);
    const int64_t some_rows = std::max<int64_t>(1, (1 << 18) / width);
    for (int64_t first = begin; first < end; first += some_rows) {
      const int64_t last = std::min(first + some_rows, end);
      tensors.prepare(first, last);
      for (int64_t group = 0; group < call.groups; ++group) {
        std::optional<ForwardRows<S>> part;
        const ForwardRows<S>& rows = call.groups == 1 ? tensors : part.emplace(tensors.group(group, cols));
        row.weight = weight.get() + group * cols;
        row.bias = bias ? bias->get() + group * cols : nullptr;
        rows.look_ahead(first, row);
        for (int64_t i = first; i < last; ++i) {
          if (!levels.is_plain()) {
            rows.look_ahead(i, row);
          }
          if (i + 1 == end) {  // the next row is another thread's: no prefetch
            row.x_ahead = row.gate_ahead = row.y_ahead = 0;
          }
          rows.run(i, row, scratch);
        }
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

  // The partial sums of a chunk, from a column on; null where the sum is not wanted.
  S* chunk(int64_t i, int64_t first) const {
    return partials_.defined() ? partials_.template mutable_data_ptr<S>() + i * cols_ + first : nullptr;
  }

  // Writes columns [first, last), at most `strip` of them, of the result. An undefined result is left out.
  void add_up(const at::Tensor& total, int64_t first, int64_t last) const {
    if (!total.defined()) {
      return;
    }
    const S* partials = partials_.template const_data_ptr<S>();
    double sums[strip] = {};
    for (int64_t i = 0; i < chunks_; ++i) {
      kernel_table<S>().add_to_total(partials + i * cols_ + first, sums, last - first);
    }
    const auto store = kernel_table<double>().store[static_cast<int>(dtype_from(total.scalar_type()))];
    store(sums, static_cast<char*>(total.mutable_data_ptr()) + first * total.element_size(), last - first);
  }

  static constexpr int64_t strip = 512;

 private:
  int64_t chunks_, cols_;
  at::Tensor partials_;
};

// The tensors of a backward, row by row, or those of one group of their columns.
template <typename S>
struct BackwardRows {
  BackwardRows(const BackwardCall& call, const BackwardResult& result, const RowLevels& levels)
      : BackwardRows(call, result, levels,
                     working_dtype<S>({&call.dy, &call.dh, &call.x, &call.gate, &result.dx, &result.dresidual})) {}

  BackwardRows(const BackwardCall& call, const BackwardResult& result, const RowLevels& levels, Dtype working)
      : dy(call.dy, working, levels),
        dh(call.dh, working, levels),
        x(call.x, working, levels),
        gate(call.gate, working, levels),
        dx(result.dx, working, levels),
        dresidual(result.dresidual, working, levels),
        dgate(result.dgate, working, levels),
        mean(call.mean.defined() ? call.mean.const_data_ptr<S>() : nullptr),
        rstd(call.rstd.const_data_ptr<S>()),
        groups(call.groups),
        gated(call.gate.defined()),
        needs_scratch(gated || dy.converts() || dh.converts() || x.converts() || dx.converts() || dresidual.converts()),
        backward(kernels_of<S>(call, working).backward) {}

  BackwardRows group(int64_t index, int64_t cols) const {
    BackwardRows part = *this;
    for (Rows2d<S>* rows : {&part.dy, &part.dh, &part.x, &part.gate, &part.dx, &part.dresidual, &part.dgate}) {
      *rows = rows->columns(index * cols, cols);
    }
    part.mean = mean ? mean + index : nullptr;
    part.rstd = rstd + index;
    return part;
  }

  void prepare(int64_t begin, int64_t end) const {
    dx.prepare(begin, end);
    dresidual.prepare(begin, end);
    dgate.prepare(begin, end);
  }

  void look_ahead(int64_t i, BackwardRow<S>& row) const {
    row.x_ahead = x.ahead(i);
    row.dy_ahead = dy.ahead(i);
    row.gate_ahead = gate.ahead(i);
    row.dx_ahead = dx.ahead(i);
    row.dgate_ahead = dgate.ahead(i);
  }

  void run(int64_t i, BackwardRow<S>& row, Scratch<S>& scratch) const {
    row.dy = dy.read(i, scratch.row(0));
    row.dh = dh.read(i, scratch.row(1));
    row.x = x.read(i, scratch.row(2));
    row.statistics = {mean ? mean[i * groups] : 0, rstd[i * groups]};
    row.dx = dx.write(i, scratch.row(3));
    if (gated) {
      row.gate = gate.read(i, scratch.row(1));
      row.dgate = dgate.write(i, scratch.row(4));
    }
    backward(row);
    dx.finish(i, row.dx);
    dresidual.finish(i, row.dx);
    if (gated) {
      dgate.finish(i, row.dgate);
    }
  }

  Rows2d<S> dy, dh, x, gate, dx, dresidual, dgate;
  const S* mean;
  const S* rstd;
  int64_t groups;
  bool gated, needs_scratch;
  void (*backward)(const BackwardRow<S>&);
};

BackwardResult make_results(const BackwardCall& call) {
  const auto optional = [](at::IntArrayRef sizes, std::optional<at::ScalarType> type) {
    return type ? empty(sizes, *type) : at::Tensor();
  };
  const at::IntArrayRef sizes = call.x.sizes(), normalized = normalized_sizes(call.x, call.dims);
  const bool is_alike = call.residual_dtype == call.x_dtype;
  return {empty(sizes, call.x_dtype), optional(sizes, is_alike ? std::nullopt : call.residual_dtype),
          call.gate.defined() ? empty(sizes, call.gate.scalar_type()) : at::Tensor(),
          optional(normalized, call.dweight_dtype), optional(normalized, call.dbias_dtype)};
}

// Rows have groups · cols columns; weight and bias are contiguous.
template <typename S>
void backward_in(const BackwardCall& call, const BackwardResult& result, const RowLevels& levels) {
  const int64_t n_rows = levels.rows(), width = levels.cols(), cols = width / call.groups;
  const BackwardRows<S> tensors(call, result, levels);
  // At most 64 rows a chunk, so that float sums keep their digits. Fewer rows keep more threads busy, but below 16,
  // writing and reading the partial sums takes longer than that gains. At least two chunks.
  const int64_t chunk_rows = std::min<int64_t>(64, std::max((n_rows + 7) / 8, std::min<int64_t>(16, (n_rows + 1) / 2)));
  const int64_t chunks = (n_rows + chunk_rows - 1) / chunk_rows;
  const ColumnSums<S> dweight(call.dweight_dtype.has_value(), chunks, width);
  const ColumnSums<S> dbias(call.dbias_dtype.has_value(), chunks, width);
  parallel(chunks, chunk_rows * width, [&](int64_t begin, int64_t end) {
    Scratch<S> scratch(tensors.needs_scratch, 6, cols);
    const ColumnValues<S> weight(call.weight, width, 1, call.zero_centered ? 1 : 0);
    std::optional<ColumnValues<S>> bias;
    if (gate_of(call) == Gate::after_norm) {
      bias.emplace(call.bias, width, 0, 0);
    }
    BackwardRow<S> row{};
    row.n = cols;
    row.scratch = scratch.row(5);
    row.silu = call.silu;
    row.cast = cast_from<S>(call.cast_dtype);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * chunk_rows, last = std::min(first + chunk_rows, n_rows);
      tensors.prepare(first, last);
      for (int64_t group = 0; group < call.groups; ++group) {
        std::optional<BackwardRows<S>> part;
        const BackwardRows<S>& rows = call.groups == 1 ? tensors : part.emplace(tensors.group(group, cols));
        row.weight = weight.get() + group * cols;
        row.bias = bias ? bias->get() + group * cols : nullptr;
        row.dweight = dweight.chunk(chunk, group * cols);
        row.dbias = dbias.chunk(chunk, group * cols);
        rows.look_ahead(first, row);
        for (int64_t i = first; i < last; ++i) {
          if (!levels.is_plain()) {
            rows.look_ahead(i, row);
          }
          if (i + 1 == std::min(end * chunk_rows, n_rows)) {  // the next row is another thread's: no prefetch
            row.x_ahead = row.dy_ahead = row.gate_ahead = row.dx_ahead = row.dgate_ahead = 0;
          }
          row.first = i == first;
          rows.run(i, row, scratch);
        }
      }
    }
  });
  constexpr int64_t strip = ColumnSums<S>::strip;
  parallel((width + strip - 1) / strip, strip * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * strip; first < std::min(end * strip, width); first += strip) {
      dweight.add_up(result.dweight, first, std::min(first + strip, width));
      dbias.add_up(result.dbias, first, std::min(first + strip, width));
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

template <typename Call>
void check_features(const Call& call) {
  TORCH_CHECK(call.norm == Norm::rms || !call.cast_dtype, "fastnorm: no kernel for cast_dtype with subtract_mean");
  const int64_t width = c10::multiply_integers(normalized_sizes(call.x, call.dims));
  TORCH_CHECK(call.groups > 0 && width % call.groups == 0, "fastnorm: expected a number of groups that divides ", width,
              ", got ", call.groups);
  TORCH_CHECK(!call.gate.defined() || !call.residual_dtype, "fastnorm: no kernel for a gate with a residual");
  if (call.gate.defined()) {
    check_tensor(call.gate, "gate", call.x.sizes());
  }
}

}  // namespace

ForwardResult norm_forward(ForwardCall call) {
  check_input(call.x, call.dims);
  if (call.residual.defined()) {
    check_tensor(call.residual, "residual", call.x.sizes());
  }
  TORCH_CHECK(call.residual.defined() == call.residual_dtype.has_value(),
              "fastnorm: expected residual_dtype with a residual, and only with one");
  check_features(call);
  check_parameter(call.weight, "weight", normalized_sizes(call.x, call.dims));
  check_parameter(call.bias, "bias", normalized_sizes(call.x, call.dims));
  const bool in_double =
      is_double(call.x) || is_double(call.residual) || is_double(call.gate) || call.residual_dtype == at::kDouble;
  ForwardResult result = make_results(call, in_double ? at::kDouble : at::kFloat);
  const RowLevels levels({&call.x, &call.residual, &call.gate}, call.dims);
  call.weight = contiguous(call.weight);
  call.bias = contiguous(call.bias);
  in_double ? forward_in<double>(call, result, levels) : forward_in<float>(call, result, levels);
  return result;
}

BackwardResult norm_backward(BackwardCall call) {
  check_input(call.x, call.dims);
  check_tensor(call.dy, "dy", call.x.sizes());
  if (call.dh.defined()) {
    TORCH_CHECK(!call.gate.defined(), "fastnorm: no kernel for a gate with a residual");
    check_tensor(call.dh, "dh", call.x.sizes());
  }
  check_features(call);
  check_parameter(call.weight, "weight", normalized_sizes(call.x, call.dims));
  check_parameter(call.bias, "bias", normalized_sizes(call.x, call.dims));
  const bool in_double =
      is_double(call.x) || is_double(call.gate) || call.x_dtype == at::kDouble || call.residual_dtype == at::kDouble;
  const at::ScalarType statistics_dtype = in_double ? at::kDouble : at::kFloat;
  const int64_t count = count_rows(call.x, call.dims) * call.groups;
  check_statistics(call.rstd, "rstd", {count}, statistics_dtype);
  if (call.norm == Norm::layer) {
    check_statistics(call.mean, "mean", {count}, statistics_dtype);
  }
  BackwardResult result = make_results(call);
  const RowLevels levels({&call.dy, &call.dh, &call.x, &call.gate}, call.dims);
  call.weight = contiguous(call.weight);
  call.bias = contiguous(call.bias);
  in_double ? backward_in<double>(call, result, levels) : backward_in<float>(call, result, levels);
  return result;
}

namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;

std::tuple<Tensor, Tensor, Tensor, Tensor> row_norm_forward(const Tensor& x, const optional<Tensor>& residual,
                                                            const optional<Tensor>& gate, int64_t dims, int64_t groups,
                                                            const optional<Tensor>& weight,
                                                            const optional<Tensor>& bias, double eps,
                                                            bool subtract_mean, bool zero_centered, bool silu,
                                                            bool norm_before_gate, optional<ScalarType> cast_dtype,
                                                            ScalarType out_dtype, optional<ScalarType> residual_dtype) {
  auto [y, h, mean, rstd] = norm_forward({subtract_mean ? Norm::layer : Norm::rms, x, residual.value_or(Tensor()),
                                          gate.value_or(Tensor()), dims, groups, weight, bias, eps, zero_centered, silu,
                                          norm_before_gate, cast_dtype, out_dtype, residual_dtype});
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_norm_backward(
    const Tensor& dy, const optional<Tensor>& dh, const Tensor& h, const optional<Tensor>& gate, int64_t dims,
    int64_t groups, const optional<Tensor>& weight, const optional<Tensor>& bias, const optional<Tensor>& mean,
    const Tensor& rstd, bool zero_centered, bool silu, bool norm_before_gate, optional<ScalarType> cast_dtype,
    ScalarType x_dtype, optional<ScalarType> residual_dtype, optional<ScalarType> dweight_dtype,
    optional<ScalarType> dbias_dtype) {
  auto [dx, dresidual, dgate, dweight, dbias] =
      norm_backward({mean ? Norm::layer : Norm::rms, dy, dh.value_or(Tensor()), h, gate.value_or(Tensor()), dims,
                     groups, weight, bias, mean.value_or(Tensor()), rstd, zero_centered, silu, norm_before_gate,
                     cast_dtype, x_dtype, residual_dtype, dweight_dtype, dbias_dtype});
  return {dx, dresidual, dgate, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("row_norm_forward", &row_norm_forward);
  m.impl("row_norm_backward", &row_norm_backward);
}

}  // namespace fastnorm::cpu
