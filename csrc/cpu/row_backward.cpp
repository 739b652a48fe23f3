// The backward of the row norms on the CPU: the loops over rows, and over columns for the sums.
#include "row_loops.h"

#include "column_sums.h"
#include "rotations.h"

namespace fastnorm::cpu {
namespace {

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

template <typename S>
void backward_in(const BackwardCall& call, const BackwardResult& result, const RowLevels& levels) {
  const int64_t n_rows = levels.rows(), width = levels.cols(), cols = width / call.groups;
  const BackwardRows<S> tensors(call, result, levels);
  const Chunks chunks(n_rows, call.samples, width);
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

}  // namespace

void run_backward(const BackwardCall& call, const BackwardResult& result, const RowLevels& levels, bool in_double) {
  in_double ? backward_in<double>(call, result, levels) : backward_in<float>(call, result, levels);
}

}  // namespace fastnorm::cpu
