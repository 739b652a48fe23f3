// The work on blocks of rows for norms with statistics of channels, free of PyTorch; compiled like the rows.
// In the layout `planes` all elements of a row belong to one channel, in `pixels` each row's element i belongs to
// channel i.
#pragma once

#include <cstdint>

namespace fastnorm::cpu {

enum class Layout { planes, pixels };
enum class Activation { none, relu, silu };
constexpr int layout_count = 2, activation_count = 3;

// Rows in the kernel's dtype, `stride` bytes apart. Null where the call has no such tensor. Rows of a relu's mask have
// one bit an element, lowest bits first, set where the gradient passes. What will be worked on next lies `ahead` bytes
// on; the processor does not foresee that by itself where rows are short, or end, and not what it will overwrite.
struct Strip {
  char* data = nullptr;
  int64_t stride = 0;
  int64_t ahead = 0;
  bool streams = false;  // whether it is written past the caches; its rows then start at whole cache lines
};

// Adds a block to the running mean and the sum of squared differences from it of `count` elements of each channel.
template <typename S>
struct SpreadBlock {
  Strip x;
  int64_t rows, n;
  double count;
  double* mean;
  double* square_sum;
  S* scratch;  // 3 n elements, for pixels
};

// y = activation((x − mean) · scale + shift + residual). A relu without a mask writes none. Of planes, each row's
// parameters lie `step` behind those of the row before: 0 where all rows belong to one channel.
template <typename S>
struct ForwardBlock {
  Strip x, residual, y, mask;
  int64_t rows, n, step;
  const S *mean, *scale, *shift;
};

// dz = dy through the activation, whose z = (x − mean) · scale + shift silu needs.
// Sums: sum += Σ dz, product += Σ dz · (x − mean). Gradient: dx = dz · gain + (x − mean) · slope + level, or dz · gain
// where x is null; dresidual = dz. Sums lie as parameters do.
template <typename S>
struct BackwardBlock {
  Strip dy, mask, x, dx, dresidual;
  int64_t rows, n, step;
  const S *mean, *scale, *shift;
  const S *gain, *slope, *level;
  double *sum, *product;
  S* scratch;  // 2 n elements, for pixels' sums
};

template <typename S>
struct ChannelKernels {
  void (*spread)(const SpreadBlock<S>&);
  void (*forward[activation_count])(const ForwardBlock<S>&);
  void (*sums[activation_count])(const BackwardBlock<S>&);
  void (*backward[activation_count])(const BackwardBlock<S>&);
};

template <typename S>
struct LayoutKernels {
  ChannelKernels<S> of[layout_count];
};

// A number of elements, their mean and the sum of squared differences from it, for each of some channels.
struct Spreads {
  double count;
  double *mean, *square_sum;
};

using MergeSpreads = void (*)(const Spreads& into, const Spreads& from, int64_t channels);

}  // namespace fastnorm::cpu
