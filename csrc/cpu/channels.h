// What the kernels of batch_norm and group_norm (channel_kernels.h, channel_reduction_kernels.h) take, and their
// tables. They work on blocks: some rows of a 3-D view. Free of PyTorch. A contiguous image of S positions is seen as
// (N, C, S): in this layout, `planes`, a row belongs to one channel. A channels_last image is seen as (N, S, C): in
// this layout, `pixels`, element i of each row belongs to channel i.
#pragma once

#include <cstdint>

namespace fastnorm::cpu {

enum class Layout { planes, pixels };
enum class Activation { none, relu, silu };
constexpr int layout_count = 2, activation_count = 3;

// A block's rows in the kernel's dtype, `stride` bytes apart; null where the call has no such tensor. Rows of a ReLU's
// mask have one bit an element, lowest bits first, set where the gradient passes. `ahead` is the prefetch distance in
// bytes, to the next block: the processor's own prefetching stops at the end of rows, and does not cover stores.
struct StridedRows {
  char* data = nullptr;
  int64_t stride = 0;
  int64_t ahead = 0;
  bool non_temporal = false;  // written past the caches; its rows then start at whole cache lines
};

// Merges a block into the moments (mean and m2) of `count` elements of each channel, or of each `in_group` channels.
template <typename S>
struct MomentsBlock {
  StridedRows x;
  int64_t rows, n, in_group;
  double count;
  double* mean;
  double* m2;
  S* scratch;  // 3 · n elements, for pixels only
};

// y = activation((x − mean) · scale + shift + residual). A ReLU writes its mask if there is one. In planes a row's
// parameters lie `step` after those of the row before: 0 where all rows belong to one channel.
template <typename S>
struct ForwardBlock {
  StridedRows x, residual, y, mask;
  int64_t rows, n, step;
  const S *mean, *scale, *shift;
};

// dz = dy · activation'(z); SiLU recomputes z = (x − mean) · scale + shift, ReLU reads its mask.
// The kernel `sums`: dz_sum += Σ dz, product_sum += Σ dz · (x − mean), laid out as the parameters are.
// The kernel `backward`: dx = gain · dz + slope · (x − mean) + level, or gain · dz where x is null; dresidual = dz.
template <typename S>
struct BackwardBlock {
  StridedRows dy, mask, x, dx, dresidual;
  int64_t rows, n, step;
  const S *mean, *scale, *shift;
  const S *gain, *slope, *level;
  double *dz_sum, *product_sum;
  S* scratch;  // 2 · n elements, for the sums of pixels only
};

template <typename S>
struct ChannelKernels {
  void (*moments)(const MomentsBlock<S>&);
  void (*forward[activation_count])(const ForwardBlock<S>&);
  void (*sums[activation_count])(const BackwardBlock<S>&);
  void (*backward[activation_count])(const BackwardBlock<S>&);
};

// The kernels of one dtype, by layout.
template <typename S>
struct LayoutKernels {
  ChannelKernels<S> of[layout_count];
};

// The moments of some channels, each of `count` elements: arrays of the means and of m2 = Σ (x − mean)².
struct ChannelMoments {
  double count;
  double *mean, *m2;
};

using MergeMoments = void (*)(const ChannelMoments& into, const ChannelMoments& from, int64_t channels);

}  // namespace fastnorm::cpu
