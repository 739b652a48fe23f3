// What the kernels of norms and clipping (run_kernels.h) compute, and their table. A run is a number of elements that
// lie one after the other in memory. Free of PyTorch.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace fastnorm::cpu {

// What a p-norm reduces |x| by, for p = 1, 2, any other, inf, -inf, 0.
enum class Reduction { sum, squares, powers, largest, smallest, nonzeros };
constexpr int reduction_count = 6;

struct RunKernels {
  // In double. NaN gives NaN, but `nonzeros` counts it as 1. Only `powers` uses p, and the divisor of every |x|.
  double (*reduce[reduction_count])(const void* x, int64_t n, double p, double divisor);
  void (*scale)(void* x, int64_t n, double coefficient);
  void (*clamp)(void* x, int64_t n, double bound);
};

// A p-norm: reduce each run, fold the results of several runs, take the root.
struct PNorm {
  explicit PNorm(double p) : p(p), reduction(reduction_of(p)) {}

  double p;
  Reduction reduction;

  // The norm that gives the element with the largest power |x|^p: inf, or -inf for negative p.
  PNorm extreme() const { return PNorm(std::copysign(std::numeric_limits<double>::infinity(), p)); }

  // The folded value without elements.
  double start() const { return reduction == Reduction::smallest ? std::numeric_limits<double>::infinity() : 0.0; }

  double fold(double a, double b) const {
    if (reduction == Reduction::largest) {
      return a > b || a != a ? a : b;
    }
    if (reduction == Reduction::smallest) {
      return a < b || a != a ? a : b;
    }
    return a + b;
  }

  double root(double folded) const {
    if (reduction == Reduction::squares) {
      return std::sqrt(folded);
    }
    return reduction == Reduction::powers ? std::pow(folded, 1 / p) : folded;
  }

  // Whether powers may have overflowed or underflowed in double although the norm itself is in range.
  bool is_doubtful(double folded) const {
    const bool has_powers = reduction == Reduction::powers || reduction == Reduction::squares;
    return has_powers && !(folded > 1e-280 && folded < 1e300);
  }

 private:
  static Reduction reduction_of(double p) {
    if (std::isinf(p)) {
      return p > 0 ? Reduction::largest : Reduction::smallest;
    }
    return p == 2 ? Reduction::squares : p == 1 ? Reduction::sum : p == 0 ? Reduction::nonzeros : Reduction::powers;
  }
};

}  // namespace fastnorm::cpu
