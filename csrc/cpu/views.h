// The views in which kernels see the tensors of a call: row norms as rows at their own strides, batch_norm and
// group_norm as 3-D tensors. They are made here, below autograd, so that no result of an operator is a view of another
// tensor.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "channels.h"

namespace fastnorm::cpu {

// Divides 0 ≤ i < 2³¹ by a divisor from 2 to 2³¹ − 1: exactly, by a product and a shift (Granlund & Montgomery 1994).
class Division {
 public:
  Division() = default;
  explicit Division(int64_t divisor);

  int64_t operator()(int64_t i) const { return static_cast<int64_t>(static_cast<uint64_t>(i) * multiplier_ >> shift_); }

 private:
  uint64_t multiplier_ = 0;
  int shift_ = 0;
};

// Where the rows of a tensor begin, in elements. With one level of rows they are steps[0] apart.
struct RowOffsets {
  int64_t operator()(int64_t i) const {
    int64_t offset = i * steps[0];
    for (int level = 1; level < levels; ++level) {
      i = divisions[level - 1](i);
      offset += i * steps[level];
    }
    return offset;
  }

  int levels = 1;
  std::array<int64_t, 3> steps{};
  std::array<Division, 2> divisions;
};

// The rows of tensors of one shape, which are read in place: the last `dims` dimensions are the columns. The leading
// dimensions are collapsed into as few levels as the strides of all tensors allow, up to three, as of (B, S, H, D).
// Tensors after the first may have other columns, as cos and sin have.
class RowLevels {
 public:
  // Replaces tensors by contiguous copies where their columns are not adjacent, or where there would be more levels.
  // Undefined tensors stay so; there must be a defined one, with columns.
  RowLevels(std::initializer_list<at::Tensor*> tensors, int64_t dims);

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  // Of a tensor of the shape: of those above, or a contiguous one.
  RowOffsets offsets(const at::Tensor& tensor) const;

 private:
  struct Level {
    int64_t size, dim;  // the innermost of the dimensions that were collapsed
  };
  using Levels = c10::SmallVector<Level, 4>;

  static Levels levels_of(c10::ArrayRef<at::Tensor*> tensors, int64_t leading);

  int64_t rows_, cols_;
  Levels levels_;  // from the outermost on
  std::array<Division, 2> divisions_;
};

// A parameter (samples, *shape) as (samples, cols), with adjacent columns; copied only where its strides demand it.
at::Tensor rows_of_samples(const at::Tensor& parameter);

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
