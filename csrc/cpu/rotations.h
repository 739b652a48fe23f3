// The rotary embeddings behind rms_norm: cos and sin of each row as the kernels read them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "rows.h"
#include "tensors.h"
#include "views.h"

namespace fastnorm::cpu {

// Rows of cos or sin in S. A row is converted once for successive rows of x that share it, as all heads do.
template <typename S>
class Factors {
 public:
  Factors(const at::Tensor& tensor, const RowLevels& levels, S* scratch)
      : rows_(Rows2d<S>(tensor, dtype_of<S>, levels).columns(0, tensor.size(-1))), scratch_(scratch) {}

  const S* row(int64_t i) {
    const void* const source = rows_.address(i);
    if (source != read_) {
      read_ = source;
      values_ = static_cast<const S*>(rows_.read(i, scratch_));
    }
    return values_;
  }

 private:
  Rows2d<S> rows_;
  S* scratch_;
  const void* read_ = nullptr;  // the row that `values_` are
  const S* values_ = nullptr;
};

// A thread's rotation. Does nothing without one.
template <typename S>
class Rotations {
 public:
  // cos_scratch, sin_scratch: memory for a row of each.
  template <typename Call>
  Rotations(const Call& call, const RowLevels& levels, S* cos_scratch, S* sin_scratch) {
    if (call.cos.defined()) {
      cos_.emplace(call.cos, levels, cos_scratch);
      sin_.emplace(call.sin, levels, sin_scratch);
      dim_ = call.cos.size(-1);
      interleaved_ = call.interleaved;
    }
  }

  template <typename Row>
  void set(Row& row, int64_t i) {
    if (cos_) {
      row.rotation = {cos_->row(i), sin_->row(i), dim_, interleaved_};
    }
  }

 private:
  std::optional<Factors<S>> cos_, sin_;
  int64_t dim_ = 0;
  bool interleaved_ = false;
};

}  // namespace fastnorm::cpu
