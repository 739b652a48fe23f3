// What the kernels of the row norms (row_kernels.h) take, and the tables of all CPU kernels. The kernels are free of
// PyTorch and compiled once for each instruction set; dispatch.cpp chooses one.
#pragma once

#include <cstdint>

#include "channels.h"
#include "runs.h"

namespace fastnorm::cpu {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Dtype { f32, bf16, f16, f64 };
constexpr int dtype_count = 4;

enum class Norm { rms, layer };
constexpr int norm_count = 2;

// Where a gate multiplies: after the norm its y, before the norm its x, or x before a residual is added (the x_gate).
enum class Gate { none, after_norm, before_norm, before_add };
constexpr int gate_count = 4;

// S is the type that kernels compute in: double where an input is double, float otherwise.
template <typename S>
constexpr Dtype dtype_of = sizeof(S) == 8 ? Dtype::f64 : Dtype::f32;

template <typename S>
struct Statistics {
  S mean, rstd;
};

// A rotary embedding of a row's first `dim` columns, an even number: y_j = z_j · cos_j ± z_partner(j) · sin_j. In the
// first half, − and the partner j + dim / 2; in the second, + and j − dim / 2. Interleaved: − and j + 1 in even
// columns, + and j − 1 in odd ones. Other columns pass.
template <typename S>
struct Rotation {
  const S* cos;
  const S* sin;
  int64_t dim;
  bool interleaved;
};

// x, gate and y point to n elements of the kernel's dtype. weight is never null, bias only in an rms_norm with neither
// a bias nor a gate. A gate needs scratch memory for n elements.
template <typename S>
struct ForwardRow {
  const void* x;
  const void* gate;
  const S* weight;
  const S* bias;
  const S* x_gate;  // read by `add` alone
  void* y;
  int64_t n;
  S* scratch;
  int64_t x_ahead, gate_ahead, y_ahead;  // prefetch distance: bytes from this row to the next, or 0
  bool silu;                             // the gate's activation; false is the sigmoid
  double eps;
  // x̂ is rounded to it before the weight multiplies; dtype_of<S> means no rounding.
  Dtype cast;
  Rotation<S> rotation;  // read by `rotated_rms_norm` alone
};

// dh, dresidual, dweight and dbias may be null; there is no dh with a gate. dweight, dbias and dx_gate are sums over
// rows: the first row writes them, the others add. Gate::before_add alone reads gated_x, what the x_gate multiplied,
// and writes dresidual and dx_gate. A rotation, like a gate, needs scratch memory for n elements.
template <typename S>
struct BackwardRow {
  const void* dy;
  const void* x;
  const void* dh;
  const void* gate;
  const S* weight;
  const S* bias;  // read by Gate::after_norm
  const S* x_gate;
  const void* gated_x;
  Statistics<S> statistics;
  void* dx;
  void* dresidual;
  void* dgate;
  S* dweight;
  S* dbias;
  S* dx_gate;
  bool first;
  int64_t n;
  S* scratch;
  int64_t x_ahead, dy_ahead, gate_ahead, gated_x_ahead, dx_ahead, dresidual_ahead, dgate_ahead;
  bool silu;
  Dtype cast;
  Rotation<S> rotation;  // read by `rotated_rms_norm` alone
};

constexpr int most_rows_at_once = 8;

// Kernels that take several rows of at most `cols` columns at once: up to `rows` of them, which differ in nothing but
// what they point to, their statistics and `first`. The prefetch distances are those to the rows of the next step.
// Without such kernels no row is narrow.
template <typename S>
struct NarrowKernels {
  int64_t cols = 0;
  int rows = 1;
  void (*forward)(const ForwardRow<S>* rows, int count, Statistics<S>* statistics) = nullptr;
  void (*backward)(const BackwardRow<S>* rows, int count) = nullptr;
};

template <typename S>
struct NormKernels {
  Statistics<S> (*forward)(const ForwardRow<S>&);
  void (*backward)(const BackwardRow<S>&);
  NarrowKernels<S> narrow = {};
};

// The row kernels of one dtype; null where the dtype is not computed in S.
template <typename S>
struct RowKernels {
  NormKernels<S> norms[norm_count][gate_count];
  Statistics<S> (*biased_rms_norm)(const ForwardRow<S>&);  // the forward with a bias, without a gate
  NormKernels<S> rotated_rms_norm;
  // h = residual + x_gate · x; residual or x_gate may be null.
  void (*add)(const void* x, const void* residual, const S* x_gate, void* h, int64_t n);
};

// The kernels that compute in S, by dtype. `load` and `store` convert a row between a dtype and S.
template <typename S>
struct KernelTable {
  RowKernels<S> row_norms[dtype_count];
  void (*load[dtype_count])(const void* row, S* out, int64_t n);
  void (*store[dtype_count])(const S* values, void* row, int64_t n);
  void (*add_to_total)(const S* partial, double* total, int64_t n);
  LayoutKernels<S> channel_norms[dtype_count];  // null where the dtype is not computed in S
};

struct InstructionSet {
  const char* name;
  KernelTable<float> float_kernels;
  KernelTable<double> double_kernels;
  RunKernels runs[dtype_count];
  MergeMoments merge_moments;
};

// The best instruction set that this processor has and ATEN_CPU_CAPABILITY, PyTorch's own variable, allows.
const InstructionSet& instruction_set();

template <typename S>
inline const KernelTable<S>& kernel_table() {
  if constexpr (sizeof(S) == 8) {
    return instruction_set().double_kernels;
  } else {
    return instruction_set().float_kernels;
  }
}

}  // namespace fastnorm::cpu
