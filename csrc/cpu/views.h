// How kernels see the tensors of a call: row norms as (rows, cols), batch_norm and group_norm as 3-D blocks. The views
// are made here, below autograd, so that what an operator returns is a view of nothing.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "channels.h"

namespace fastnorm::cpu {

// The last `dims` dimensions as columns, which are adjacent, the others as rows, which may be at any distance; a copy
// only where strides demand one. Undefined stays undefined.
at::Tensor as_rows(const at::Tensor& x, int64_t dims);

// A weight or bias without gaps.
std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& parameter);

// An input (N, C, *) and all tensors of its shape, with results in a memory format.
class ChannelView {
 public:
  // Raises unless x is such an input on the CPU, not empty. batch_norm's samples are pooled: their pixels are one row.
  ChannelView(const at::Tensor& x, at::MemoryFormat format, bool pooled);

  Layout layout() const { return layout_; }
  int64_t channels() const { return shape_[1]; }
  // Of blocks: (N, C, S) for planes, (N, S, C) for pixels, (1, N·S, C) for pooled ones.
  at::IntArrayRef sizes() const { return sizes_; }
  // Of a relu's mask.
  at::IntArrayRef mask_sizes() const { return mask_sizes_; }

  // A tensor's blocks, with adjacent last elements; a copy only where strides demand one. Undefined stays undefined.
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
