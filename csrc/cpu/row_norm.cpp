// The row norms on the CPU: the loops over rows, checks, and the operators. row_kernels.h has the kernels, which work
// on one row, and narrow_row_kernels.h those that work on several.
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <tuple>

#include "row_norm.h"

#include "column_sums.h"
#include "rotations.h"
#include "tensors.h"
#include "views.h"

namespace fastnorm::cpu {
namespace {

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

at::IntArrayRef normalized_sizes(const at::Tensor& x, int64_t dims) { return x.sizes().slice(x.dim() - dims); }

int64_t count_rows(const at::Tensor& x, int64_t dims) {
  return c10::multiply_integers(x.sizes().slice(0, x.dim() - dims));
}

at::DimVector sizes_per_sample(const at::Tensor& x, int64_t dims, int64_t samples) {
  at::DimVector sizes(normalized_sizes(x, dims));
  sizes.insert(sizes.begin(), samples);
  return sizes;
}

ForwardResult make_results(const ForwardCall& call, at::ScalarType statistics_dtype) {
  ForwardResult result;
  result.y = empty(call.x.sizes(), call.out_dtype);
  if (call.residual_dtype) {
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

// A thread's weight, bias and x_gate, whose rows belong to samples.
template <typename S>
class Parameters {
 public:
  template <typename Call>
  Parameters(const Call& call, int64_t width, bool wants_bias)
      : weight_(call.weight, width, 1, call.zero_centered ? 1 : 0, call.samples) {
    if (wants_bias) {
      bias_.emplace(call.bias, width, 0, 0, call.samples);
    }
    if (call.x_gate.defined()) {
      x_gate_.emplace(call.x_gate, width, 1, 0, call.samples);
    }
  }

  // Points a row's parameters to those of a sample, from a column on.
  template <typename Row>
  void set(Row& row, int64_t sample, int64_t first) {
    const auto values = [=](ColumnValues<S>& of) {
      of.choose(sample);
      return of.get() + first;
    };
    row.weight = values(weight_);
    row.bias = bias_ ? values(*bias_) : nullptr;
    row.x_gate = x_gate_ ? values(*x_gate_) : nullptr;
  }

 private:
  ColumnValues<S> weight_;
  std::optional<ColumnValues<S>> bias_, x_gate_;
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
int64_t rows_to_prepare(int64_t width) { return std::max<int64_t>(1, (1 << 18) / width); }

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
        adds(call.residual_dtype.has_value()),
        gated(call.gate.defined()),
        needs_scratch(gated || call.cos.defined() || x.converts() || residual.converts() || h.converts() ||
                      y.converts()),
        add(kernels<S>(working).add),
        forward(kernels_of<S>(call, working).forward),
        narrow(narrow_kernels_of(kernels_of<S>(call, working), levels.cols() / call.groups)) {
    if (call.norm == Norm::rms && call.bias && !call.gate.defined()) {
      forward = kernels<S>(working).biased_rms_norm;
      narrow = {};
    }
    if (call.cos.defined()) {
      forward = kernels<S>(working).rotated_rms_norm.forward;
      narrow = {};
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

  bool has_one_stride() const { return x.has_one_stride() && gate.has_one_stride(); }

  void look_ahead(int64_t i, ForwardRow<S>& row) const {
    row.x_ahead = x.ahead(i, narrow.rows);
    row.gate_ahead = gate.ahead(i, narrow.rows);
    row.y_ahead = y.ahead(i, narrow.rows);
  }

  static void end_look_ahead(ForwardRow<S>& row) { row.x_ahead = row.gate_ahead = row.y_ahead = 0; }

  // `count` rows from i on.
  void run(int64_t i, int count, ForwardRow<S>* rows, Scratch<S>& scratch) const {
    Statistics<S> statistics[most_rows_at_once];
    for (int r = 0; r < count; ++r) {
      begin(i + r, rows[r], scratch, r);
    }
    if (narrow.forward) {
      narrow.forward(rows, count, statistics);
    } else {
      statistics[0] = forward(rows[0]);
    }
    for (int r = 0; r < count; ++r) {
      finish(i + r, rows[r], statistics[r]);
    }
  }

  void begin(int64_t i, ForwardRow<S>& row, Scratch<S>& scratch, int of) const {
    row.x = x.read(i, scratch.row(0, of));
    if (adds) {
      void* sum = h.write(i, scratch.row(2, of));
      add(row.x, residual.read(i, scratch.row(1, of)), row.x_gate, sum, row.n);
      h.finish(i, sum);
      row.x = h.read(i, scratch.row(0, of));  // the norm sees h as rounded to its dtype
    }
    if (gated) {
      row.gate = gate.read(i, scratch.row(2, of));
    }
    row.y = y.write(i, scratch.row(1, of));
  }

  void finish(int64_t i, const ForwardRow<S>& row, const Statistics<S>& statistics) const {
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
  void (*add)(const void* x, const void* residual, const S* x_gate, void* h, int64_t n);
  Statistics<S> (*forward)(const ForwardRow<S>&);
  NarrowKernels<S> narrow;
};

// Rows have groups · cols columns; weight, bias and x_gate: (samples, cols), or contiguous.
template <typename S>
void forward_in(const ForwardCall& call, const ForwardResult& result, const RowLevels& levels) {
  const int64_t n_rows = levels.rows(), width = levels.cols(), cols = width / call.groups;
  const int64_t sample_rows = n_rows / call.samples;
  const ForwardRows<S> tensors(call, result, levels);
  parallel(n_rows, width, [&](int64_t begin, int64_t end) {
    const int at_once = tensors.narrow.rows;
    Scratch<S> scratch(tensors.needs_scratch, 6, cols, at_once);
    Parameters<S> parameters(call, width, call.norm == Norm::layer || call.bias || call.gate.defined());
    Rotations<S> rotations(call, levels, scratch.row(4), scratch.row(5));
    Step<ForwardRow<S>> step{at_once};
    ForwardRow<S>& row = step.rows[0];
    row.n = cols;
    row.scratch = scratch.row(3);
    row.silu = call.silu;
    row.eps = call.eps;
    row.cast = cast_from<S>(call.cast_dtype);
    const int64_t some_rows = rows_to_prepare(width);
    for (int64_t first = begin; first < end; first += some_rows) {
      const int64_t last = std::min(first + some_rows, end);
      tensors.prepare(first, last);
      for (int64_t group = 0; group < call.groups; ++group) {
        std::optional<ForwardRows<S>> part;
        const ForwardRows<S>& rows = call.groups == 1 ? tensors : part.emplace(tensors.group(group, cols));
        rows.look_ahead(first, row);
        for (int64_t i = first; i < last;) {
          const int64_t sample = i / sample_rows, stop = std::min((sample + 1) * sample_rows, last);
          parameters.set(row, sample, group * cols);
          step.share(stop - i);
          for (int count; i < stop; i += count) {
            count = step.count(stop - i);
            if (!rows.has_one_stride()) {
              rows.look_ahead(i, row);
            }
            if (i + at_once >= end) {  // the next rows are another thread's: no prefetch
              rows.end_look_ahead(row);
            }
            rotations.set(row, i);
            rows.run(i, count, step.rows.data(), scratch);
          }
        }
      }
    }
  });
}

// The tensors of a backward, row by row, or those of one group of their columns.
template <typename S>
struct BackwardRows {
  BackwardRows(const BackwardCall& call, const BackwardResult& result, const RowLevels& levels)
      : BackwardRows(
            call, result, levels,
            working_dtype<S>({&call.dy, &call.dh, &call.h, &call.x, &call.gate, &result.dx, &result.dresidual})) {}

  BackwardRows(const BackwardCall& call, const BackwardResult& result, const RowLevels& levels, Dtype working)
      : dy(call.dy, working, levels),
        dh(call.dh, working, levels),
        h(call.h, working, levels),
        x(call.x, working, levels),
        gate(call.gate, working, levels),
        dx(result.dx, working, levels),
        dresidual(result.dresidual, working, levels),
        dgate(result.dgate, working, levels),
        mean(call.mean.defined() ? call.mean.const_data_ptr<S>() : nullptr),
        rstd(call.rstd.const_data_ptr<S>()),
        groups(call.groups),
        gated(call.gate.defined()),
        x_gated(call.x_gate.defined()),
        needs_scratch(gated || call.cos.defined() || dy.converts() || dh.converts() || h.converts() || x.converts() ||
                      dx.converts() || dresidual.converts()),
        backward(kernels_of<S>(call, working).backward),
        narrow(narrow_kernels_of(kernels_of<S>(call, working), levels.cols() / call.groups)) {
    if (call.cos.defined()) {
      backward = kernels<S>(working).rotated_rms_norm.backward;
      narrow = {};
    }
  }

  BackwardRows group(int64_t index, int64_t cols) const {
    BackwardRows part = *this;
    for (Rows2d<S>* rows : {&part.dy, &part.dh, &part.h, &part.gate, &part.dx, &part.dresidual, &part.dgate}) {
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

  bool has_one_stride() const {
    return dy.has_one_stride() && h.has_one_stride() && x.has_one_stride() && gate.has_one_stride();
  }

  void look_ahead(int64_t i, BackwardRow<S>& row) const {
    row.x_ahead = h.ahead(i, narrow.rows);
    row.dy_ahead = dy.ahead(i, narrow.rows);
    row.gate_ahead = gate.ahead(i, narrow.rows);
    row.gated_x_ahead = x.ahead(i, narrow.rows);
    row.dx_ahead = dx.ahead(i, narrow.rows);
    row.dresidual_ahead = dresidual.ahead(i, narrow.rows);
    row.dgate_ahead = dgate.ahead(i, narrow.rows);
  }

  static void end_look_ahead(BackwardRow<S>& row) {
    row.x_ahead = row.dy_ahead = row.gate_ahead = row.gated_x_ahead = 0;
    row.dx_ahead = row.dresidual_ahead = row.dgate_ahead = 0;
  }

  // `count` rows from i on.
  void run(int64_t i, int count, BackwardRow<S>* rows, Scratch<S>& scratch) const {
    for (int r = 0; r < count; ++r) {
      begin(i + r, rows[r], scratch, r);
    }
    narrow.backward ? narrow.backward(rows, count) : backward(rows[0]);
    for (int r = 0; r < count; ++r) {
      finish(i + r, rows[r]);
    }
  }

  void begin(int64_t i, BackwardRow<S>& row, Scratch<S>& scratch, int of) const {
    row.dy = dy.read(i, scratch.row(0, of));
    row.dh = dh.read(i, scratch.row(1, of));
    row.x = h.read(i, scratch.row(2, of));
    row.statistics = {mean ? mean[i * groups] : 0, rstd[i * groups]};
    row.dx = dx.write(i, scratch.row(3, of));
    if (gated) {
      row.gate = gate.read(i, scratch.row(1, of));
      row.dgate = dgate.write(i, scratch.row(4, of));
    }
    if (x_gated) {
      row.gated_x = x.read(i, scratch.row(4, of));
      row.dresidual = dresidual.write(i, scratch.row(5, of));
    }
  }

  void finish(int64_t i, const BackwardRow<S>& row) const {
    dx.finish(i, row.dx);
    dresidual.finish(i, x_gated ? row.dresidual : row.dx);
    if (gated) {
      dgate.finish(i, row.dgate);
    }
  }

  Rows2d<S> dy, dh, h, x, gate, dx, dresidual, dgate;
  const S* mean;
  const S* rstd;
  int64_t groups;
  bool gated, x_gated, needs_scratch;
  void (*backward)(const BackwardRow<S>&);
  NarrowKernels<S> narrow;
};

BackwardResult make_results(const BackwardCall& call) {
  const auto optional = [](at::IntArrayRef sizes, std::optional<at::ScalarType> type) {
    return type ? empty(sizes, *type) : at::Tensor();
  };
  const auto like = [](const at::Tensor& tensor) {
    return tensor.defined() ? empty(tensor.sizes(), tensor.scalar_type()) : at::Tensor();
  };
  const auto parameter = [&](const std::optional<at::Tensor>& given, std::optional<at::ScalarType> type) {
    if (given && given->defined()) {
      return optional(given->sizes(), type);
    }
    return call.samples == 1 ? optional(normalized_sizes(call.h, call.dims), type)
                             : optional(sizes_per_sample(call.h, call.dims, call.samples), type);
  };
  const bool dx_serves = call.dtypes.residual == call.dtypes.x && !call.x_gate.defined();
  BackwardResult result;
  result.dx = empty(call.h.sizes(), call.dtypes.x);
  result.dresidual = optional(call.h.sizes(), dx_serves ? std::nullopt : call.dtypes.residual);
  result.dgate = like(call.gate);
  result.dx_gate = like(call.x_gate);
  result.dweight = parameter(call.weight, call.dtypes.weight);
  result.dbias = parameter(call.bias, call.dtypes.bias);
  return result;
}

// Rows have groups · cols columns; weight, bias and x_gate: (samples, cols), or contiguous.
template <typename S>
void backward_in(const BackwardCall& call, const BackwardResult& result, const RowLevels& levels) {
  const int64_t n_rows = levels.rows(), width = levels.cols(), cols = width / call.groups;
  const BackwardRows<S> tensors(call, result, levels);
  const Chunks chunks(n_rows, call.samples);
  const ColumnSums<S> dweight(result.dweight, chunks, width), dbias(result.dbias, chunks, width);
  const ColumnSums<S> dx_gate(result.dx_gate, chunks, width);
  const bool sums_in_scratch = dweight.needs_scratch() || dbias.needs_scratch() || dx_gate.needs_scratch();
  parallel(chunks.count, chunks.rows * width, [&](int64_t begin, int64_t end) {
    const int at_once = tensors.narrow.rows;
    Scratch<S> scratch(tensors.needs_scratch, 8, cols, at_once), sums(sums_in_scratch, 3, width);
    Parameters<S> parameters(call, width, gate_of(call) == Gate::after_norm);
    Rotations<S> rotations(call, levels, scratch.row(6), scratch.row(7));
    Step<BackwardRow<S>> step{at_once};
    BackwardRow<S>& row = step.rows[0];
    row.n = cols;
    row.scratch = scratch.row(5);
    row.silu = call.silu;
    row.cast = cast_from<S>(call.cast_dtype);
    const int64_t end_row = chunks.begin(end);
    int64_t prepared = chunks.begin(begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunks.begin(chunk), last = chunks.end(chunk);
      if (last > prepared) {
        const int64_t until = std::min(std::max(last, prepared + rows_to_prepare(width)), end_row);
        tensors.prepare(prepared, until);
        prepared = until;
      }
      for (int64_t group = 0; group < call.groups; ++group) {
        std::optional<BackwardRows<S>> part;
        const BackwardRows<S>& rows = call.groups == 1 ? tensors : part.emplace(tensors.group(group, cols));
        parameters.set(row, chunk / chunks.per_sample, group * cols);
        row.dweight = dweight.chunk(chunk, group * cols, sums.row(0));
        row.dbias = dbias.chunk(chunk, group * cols, sums.row(1));
        row.dx_gate = dx_gate.chunk(chunk, 0, sums.row(2));
        rows.look_ahead(first, row);
        row.first = false;
        step.share(last - first);
        for (int64_t i = first; i < last; i += at_once) {
          if (!rows.has_one_stride()) {
            rows.look_ahead(i, row);
          }
          if (i + at_once >= end_row) {  // the next rows are another thread's
            rows.end_look_ahead(row);
          }
          row.first = i == first;
          rotations.set(row, i);
          rows.run(i, step.count(last - i), step.rows.data(), scratch);
        }
      }
      dweight.finish(chunk, sums.row(0));
      dbias.finish(chunk, sums.row(1));
      dx_gate.finish(chunk, sums.row(2));
    }
  });
  if (chunks.per_sample == 1) {
    return;
  }
  constexpr int64_t strip = ColumnSums<S>::strip;
  const int64_t strips = (width + strip - 1) / strip;
  parallel(call.samples * strips, strip * chunks.per_sample, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / strips, first = i % strips * strip, last = std::min(first + strip, width);
      dweight.add_up(sample, first, last);
      dbias.add_up(sample, first, last);
      dx_gate.add_up(sample, first, last);
    }
  });
}

bool is_double(const at::Tensor& tensor) { return tensor.defined() && tensor.scalar_type() == at::kDouble; }

// Checks what is normalised before the other tensors, whose expected shapes follow from it.
void check_input(const at::Tensor& x, int64_t dims) {
  TORCH_CHECK(dims > 0 && dims <= x.dim() && c10::multiply_integers(normalized_sizes(x, dims)) > 0,
              "fastnorm: expected x with elements in its last ", dims, " dimensions, got ", x.sizes());
  check_tensor(x, "x", x.sizes());
}

// x: what is normalised.
template <typename Call>
void check_rotation(const Call& call, const at::Tensor& x, std::optional<at::ScalarType> residual_dtype) {
  TORCH_CHECK(call.cos.defined() == call.sin.defined(), "fastnorm: expected cos with sin, and only with it");
  if (!call.cos.defined()) {
    return;
  }
  const bool is_plain_rms_norm = call.norm == Norm::rms && gate_of(call) == Gate::none && !residual_dtype && !call.bias;
  TORCH_CHECK(is_plain_rms_norm && call.dims == 1 && call.groups == 1 && call.samples == 1,
              "fastnorm: no kernel for a rotation but of rms_norm's rows, without a gate, residual or bias");
  at::DimVector sizes(x.sizes());
  sizes.back() = call.cos.dim() == 0 ? 0 : call.cos.size(-1);
  TORCH_CHECK(sizes.back() > 0 && sizes.back() % 2 == 0 && sizes.back() <= x.size(-1),
              "fastnorm: expected cos with an even number of columns, at most ", x.size(-1), ", got ",
              call.cos.sizes());
  check_tensor(call.cos, "cos", sizes);
  check_tensor(call.sin, "sin", sizes);
}

// x: what is normalised.
template <typename Call>
void check_features(const Call& call, const at::Tensor& x, std::optional<at::ScalarType> residual_dtype) {
  TORCH_CHECK(call.norm == Norm::rms || !call.cast_dtype, "fastnorm: no kernel for cast_dtype with subtract_mean");
  const int64_t width = c10::multiply_integers(normalized_sizes(x, call.dims)), n_rows = count_rows(x, call.dims);
  TORCH_CHECK(call.groups > 0 && width % call.groups == 0, "fastnorm: expected a number of groups that divides ", width,
              ", got ", call.groups);
  TORCH_CHECK(!call.gate.defined() || !residual_dtype, "fastnorm: no kernel for a gate with a residual");
  TORCH_CHECK(call.samples > 0 && n_rows % call.samples == 0, "fastnorm: expected a number of samples that divides ",
              n_rows, " rows, got ", call.samples);
  TORCH_CHECK(
      (call.samples == 1 && !call.x_gate.defined()) || (call.groups == 1 && !call.gate.defined() && !call.cast_dtype),
      "fastnorm: no kernel for samples or an x_gate with groups, a gate or cast_dtype");
  if (call.gate.defined()) {
    check_tensor(call.gate, "gate", x.sizes());
  }
  const auto check = [&](const at::Tensor& parameter, const char* name) {
    if (!parameter.defined()) {
      return;
    }
    if (call.samples == 1 && parameter.dim() == call.dims) {
      check_tensor(parameter, name, normalized_sizes(x, call.dims));
    } else {
      check_tensor(parameter, name, sizes_per_sample(x, call.dims, call.samples));
    }
  };
  check(call.weight.value_or(at::Tensor()), "weight");
  check(call.bias.value_or(at::Tensor()), "bias");
  check(call.x_gate, "x_gate");
  check_rotation(call, x, residual_dtype);
}

// weight, bias and x_gate as the kernels read them: (samples, cols) with adjacent columns, or contiguous.
template <typename Call>
void view_parameters(Call& call) {
  const auto view = [&](const std::optional<at::Tensor>& parameter) {
    const bool has_rows = call.samples > 1 && parameter && parameter->defined();
    return has_rows ? rows_of_samples(*parameter) : contiguous(parameter);
  };
  call.weight = view(call.weight);
  call.bias = view(call.bias);
  call.x_gate = *view(call.x_gate);
}

}  // namespace

ForwardResult norm_forward(ForwardCall call) {
  check_input(call.x, call.dims);
  if (call.residual.defined()) {
    check_tensor(call.residual, "residual", call.x.sizes());
  }
  TORCH_CHECK((call.residual.defined() || call.x_gate.defined()) == call.residual_dtype.has_value(),
              "fastnorm: expected residual_dtype with a residual or an x_gate, and only with one");
  check_features(call, call.x, call.residual_dtype);
  const bool in_double =
      is_double(call.x) || is_double(call.residual) || is_double(call.gate) || call.residual_dtype == at::kDouble;
  ForwardResult result = make_results(call, in_double ? at::kDouble : at::kFloat);
  const RowLevels levels({&call.x, &call.residual, &call.gate, &call.cos, &call.sin}, call.dims);
  view_parameters(call);
  in_double ? forward_in<double>(call, result, levels) : forward_in<float>(call, result, levels);
  return result;
}

BackwardResult norm_backward(BackwardCall call) {
  check_input(call.h, call.dims);
  check_tensor(call.dy, "dy", call.h.sizes());
  if (call.dh.defined()) {
    TORCH_CHECK(!call.gate.defined(), "fastnorm: no kernel for a gate with a residual");
    check_tensor(call.dh, "dh", call.h.sizes());
  }
  TORCH_CHECK(call.x.defined() == call.x_gate.defined(), "fastnorm: expected x with an x_gate, and only with one");
  if (call.x.defined()) {
    check_tensor(call.x, "x", call.h.sizes());
    TORCH_CHECK(call.x.scalar_type() == call.dtypes.x, "fastnorm: expected x in ", call.dtypes.x, ", got ",
                call.x.scalar_type());
  }
  check_features(call, call.h, call.dtypes.residual);
  const bool in_double =
      is_double(call.h) || is_double(call.gate) || call.dtypes.x == at::kDouble || call.dtypes.residual == at::kDouble;
  const at::ScalarType statistics_dtype = in_double ? at::kDouble : at::kFloat;
  const int64_t count = count_rows(call.h, call.dims) * call.groups;
  check_statistics(call.rstd, "rstd", {count}, statistics_dtype);
  if (call.norm == Norm::layer) {
    check_statistics(call.mean, "mean", {count}, statistics_dtype);
  }
  BackwardResult result = make_results(call);
  const RowLevels levels({&call.dy, &call.dh, &call.h, &call.x, &call.gate, &call.cos, &call.sin}, call.dims);
  view_parameters(call);
  in_double ? backward_in<double>(call, result, levels) : backward_in<float>(call, result, levels);
  return result;
}

namespace {

using at::ScalarType;
using at::Tensor;
using std::optional;

Tensor or_undefined(const optional<Tensor>& tensor) { return tensor.value_or(Tensor()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> row_norm_forward(
    const Tensor& x, const optional<Tensor>& residual, const optional<Tensor>& gate, const optional<Tensor>& x_gate,
    int64_t dims, int64_t groups, int64_t samples, const optional<Tensor>& weight, const optional<Tensor>& bias,
    double eps, bool subtract_mean, bool zero_centered, bool silu, bool norm_before_gate,
    optional<ScalarType> cast_dtype, ScalarType out_dtype, optional<ScalarType> residual_dtype) {
  auto [y, h, mean, rstd] =
      norm_forward({subtract_mean ? Norm::layer : Norm::rms, x, or_undefined(residual), or_undefined(gate),
                    or_undefined(x_gate), dims, groups, samples, weight, bias, eps, zero_centered, silu,
                    norm_before_gate, cast_dtype, out_dtype, residual_dtype});
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_norm_backward(
    const Tensor& dy, const optional<Tensor>& dh, const Tensor& h, const optional<Tensor>& x,
    const optional<Tensor>& gate, const optional<Tensor>& x_gate, int64_t dims, int64_t groups, int64_t samples,
    const optional<Tensor>& weight, const optional<Tensor>& bias, const optional<Tensor>& mean, const Tensor& rstd,
    bool zero_centered, bool silu, bool norm_before_gate, optional<ScalarType> cast_dtype, ScalarType x_dtype,
    optional<ScalarType> residual_dtype, optional<ScalarType> dweight_dtype, optional<ScalarType> dbias_dtype) {
  auto [dx, dresidual, dgate, dx_gate, dweight, dbias] =
      norm_backward({mean ? Norm::layer : Norm::rms,
                     dy,
                     or_undefined(dh),
                     h,
                     or_undefined(x),
                     or_undefined(gate),
                     or_undefined(x_gate),
                     dims,
                     groups,
                     samples,
                     weight,
                     bias,
                     or_undefined(mean),
                     rstd,
                     zero_centered,
                     silu,
                     norm_before_gate,
                     cast_dtype,
                     {x_dtype, residual_dtype, dweight_dtype, dbias_dtype}});
  return {dx, dresidual, dgate, dx_gate, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CPU, m) {
  m.impl("row_norm_forward", &row_norm_forward);
  m.impl("row_norm_backward", &row_norm_backward);
}

}  // namespace fastnorm::cpu
