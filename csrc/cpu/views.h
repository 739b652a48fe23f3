// The views in which kernels see the tensors of a call: row norms as (rows, cols), batch_norm and group_norm as 3-D
// tensors. They are made here, below autograd, so that no result of an operator is a view of another tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "channels.h"

namespace fastnorm::cpu {

// x as (rows, cols): the last `dims` dimensions are the columns, which are adjacent in the result; rows may have any
// stride. Copies only where the strides of x allow no such view. Undefined stays undefined.
at::Tensor as_rows(const at::Tensor& x, int64_t dims);

// A contiguous weight or bias.
std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& parameter);

// The 3-D view of an input (N, C, *) and of all tensors of its shape. A contiguous input of S positions is seen as
// (N, C, S), the layout `planes`; a channels_last one as (N, S, C), the layout `pixels`. Results get a memory format,
// from which the layout follows.
class ChannelView {
 public:
  // Raises unless x is such an input on the CPU, not empty. `across_samples`: statistics span the samples, as in
  // batch_norm, so the pixels of all samples are seen as those of one.
  ChannelView(const at::Tensor& x, at::MemoryFormat format, bool across_samples);

  Layout layout() const { return layout_; }
  int64_t channels() const { return shape_[1]; }
  // The view's sizes: (N, C, S) for planes, (N, S, C) for pixels, (1, N·S, C) for pixels across samples.
  at::IntArrayRef sizes() const { return sizes_; }
  // The sizes of a ReLU's mask: one bit for each element.
  at::IntArrayRef mask_sizes() const { return mask_sizes_; }

  // A tensor in this view, its last dimension adjacent. Copies only where strides demand it. Undefined stays undefined.
  at::Tensor blocks(const at::Tensor& tensor) const;

  // As above, and raises unless the tensor has the input's shape, one of the four dtypes, and lies on the CPU.
  at::Tensor checked_blocks(const at::Tensor& tensor, const char* name) const;

  // An uninitialised result of the input's shape, in the memory format.
  at::Tensor make_result(at::ScalarType type) const;

  // An uninitialised mask; undefined where none is wanted.
  at::Tensor make_mask(bool wanted) const;

  // Raises unless the tensor is a mask of this view.
  void check_mask(const at::Tensor& mask) const;

 private:
  at::DimVector shape_;
  at::MemoryFormat format_;
  Layout layout_;
  std::array<int64_t, 3> sizes_, mask_sizes_;
};

}  // namespace fastnorm::cpu
