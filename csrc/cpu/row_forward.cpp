// The forward of the row norms on the CPU: the loop over rows.
#include "row_loops.h"

#include "rotations.h"

namespace fastnorm::cpu {
namespace {

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

}  // namespace

void run_forward(const ForwardCall& call, const ForwardResult& result, const RowLevels& levels, bool in_double) {
  in_double ? forward_in<double>(call, result, levels) : forward_in<float>(call, result, levels);
}

}  // namespace fastnorm::cpu
