// The work on one row, free of PyTorch: it is compiled once for each instruction set and chosen when the library loads.
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

// S is what a row computes in: double where an input is double, float otherwise.
template <typename S>
constexpr Dtype dtype_of = sizeof(S) == 8 ? Dtype::f64 : Dtype::f32;

template <typename S>
struct Moments {
  S mean, rstd;
};

// Row pointers hold n elements of the kernel's dtype; weight and bias are never null.
template <typename S>
struct ForwardRow {
  const void* x;
  const S* weight;
  const S* bias;
  void* y;
  int64_t n;
  int64_t x_ahead, y_ahead;  // bytes from this row to the next
  double eps;
  Dtype cast;  // x_hat is rounded to it before the weight multiplies; dtype_of<S> means not at all
};

// dh, dweight and dbias may be null; dweight and dbias are added to, or written by the first row.
template <typename S>
struct BackwardRow {
  const void* dy;
  const void* x;
  const void* dh;
  const S* weight;
  Moments<S> moments;
  void* dx;
  S* dweight;
  S* dbias;
  bool first;
  int64_t n;
  int64_t x_ahead, dy_ahead, dx_ahead;
  Dtype cast;
};

template <typename S>
struct NormKernels {
  Moments<S> (*forward)(const ForwardRow<S>&);
  void (*backward)(const BackwardRow<S>&);
};

// All rows of one call in one dtype. The two dtypes that do not compute in S have null pointers.
template <typename S>
struct RowKernels {
  NormKernels<S> rms_norm, layer_norm;
  void (*add)(const void* x, const void* residual, void* h, int64_t n);
};

template <typename S>
struct Rows {
  RowKernels<S> of[dtype_count];
  void (*load[dtype_count])(const void* row, S* out, int64_t n);
  void (*store[dtype_count])(const S* values, void* row, int64_t n);
  void (*add_to_total)(const S* partial, double* total, int64_t n);
  LayoutKernels<S> channels[dtype_count];  // null for the dtypes that do not compute in S
};

struct InstructionSet {
  const char* name;
  Rows<float> float_rows;
  Rows<double> double_rows;
  RunKernels runs[dtype_count];
  MergeSpreads merge_spreads;
};

// The best set that this processor has, no better than ATEN_CPU_CAPABILITY allows.
const InstructionSet& instruction_set();

template <typename S>
inline const Rows<S>& rows() {
  if constexpr (sizeof(S) == 8) {
    return instruction_set().double_rows;
  } else {
    return instruction_set().float_rows;
  }
}

}  // namespace fastnorm::cpu
