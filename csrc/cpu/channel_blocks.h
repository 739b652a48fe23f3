// The blocks of 3-D tensors, converted to the kernels' dtype where needed, and the scratch memory of a call of
// batch_norm or group_norm.
#pragma once

#include <atomic>
#include <memory>

#include "channel_plan.h"

namespace fastnorm::cpu {

// A 3-D tensor's blocks in the working dtype; those of an undefined tensor are null.
// An output of 16 MiB and more is written with non-temporal stores: they don't read what they overwrite, which saves a
// sixth of the time, and the next reader loses nothing, as the beginning of so large an output leaves the caches
// anyway. Fresh pages are written with normal stores: the system has just cleared them, so they are in a cache.
//
// A smaller tensor that a loop uses again lies in the L3 cache. The processor's own prefetching is then faster than
// ours; only planes gain from ours, where SiLU or elements of 16 bits leave time for it.
template <typename S>
class Blocks3d {
 public:
  Blocks3d(const at::Tensor& tensor, Dtype working, const ChannelPlan& plan, Activation activation) {
    if (!tensor.defined()) {
      return;
    }
    data_ = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));  // only fresh outputs are written to
    size_ = static_cast<int64_t>(tensor.element_size());
    strides_[0] = tensor.stride(0) * size_;
    strides_[1] = tensor.stride(1) * size_;
    dtype_ = dtype_from(tensor.scalar_type());
    converts_ = dtype_ != working;
    is_fresh_ = is_fresh(tensor);
    const bool is_aligned = (reinterpret_cast<uintptr_t>(data_) | strides_[0] | strides_[1]) % 64 == 0;
    const bool is_large = tensor.nbytes() >= size_t{16} << 20;
    non_temporal_ = is_large && is_aligned && !is_fresh_ && !converts_;
    const bool takes_long = activation == Activation::silu || size_ == 2;
    prefetches_ = is_large || is_fresh_ || (plan.layout() == Layout::planes && takes_long);
  }

  bool defined() const { return data_ != nullptr; }
  bool converts() const { return converts_; }

  // The block itself, or a converted copy in scratch where its dtype is not the working dtype.
  StridedRows read(const Block& block, S* scratch) const {
    const StridedRows here = view(block, block.next_input);
    if (!converts_) {
      return here;
    }
    for (int64_t row = 0; row < block.rows; ++row) {
      kernel_table<S>().load[static_cast<int>(dtype_)](here.data + row * here.stride, scratch + row * block.n, block.n);
    }
    return scratch_view(block, scratch);
  }

  // Where to write a block; finish(block, result) must follow.
  StridedRows write(const Block& block, S* scratch) const {
    return converts_ ? scratch_view(block, scratch) : view(block, block.next);
  }

  void finish(const Block& block, const StridedRows& written) const {
    if (!converts_) {
      return;
    }
    const StridedRows here = view(block, block.next);
    for (int64_t row = 0; row < block.rows; ++row) {
      const S* values = reinterpret_cast<const S*>(written.data + row * written.stride);
      kernel_table<S>().store[static_cast<int>(dtype_)](values, here.data + row * here.stride, block.n);
    }
  }

  // To be called when a chunk of an output has been written: makes its non-temporal stores visible to other threads.
  void publish() const {
    if (non_temporal_) {
      std::atomic_thread_fence(std::memory_order_seq_cst);
    }
  }

  // To be called before a chunk of an output is written: makes its pages if the memory is fresh.
  void prepare(const Region& chunk) const {
    if (!is_fresh_) {
      return;
    }
    char* here = start(chunk);
    const int64_t bytes = chunk.n * size_, stride = strides_[chunk.axis];
    if (stride == bytes) {
      fault_in(here, chunk.rows * bytes);
      return;
    }
    for (int64_t row = 0; row < chunk.rows; ++row) {
      fault_in(here + row * stride, bytes);
    }
  }

 private:
  char* start(const Region& region) const {
    return data_ + region.first * strides_[0] + region.second * strides_[1] + region.col * size_;
  }

  StridedRows view(const Block& block, const Region& next) const {
    if (data_ == nullptr) {
      return {};
    }
    char* here = start(block);
    return {here, strides_[block.axis], prefetches_ ? start(next) - here : 0, non_temporal_};
  }

  StridedRows scratch_view(const Block& block, S* scratch) const {
    return {reinterpret_cast<char*>(scratch), block.n * static_cast<int64_t>(sizeof(S))};
  }

  char* data_ = nullptr;
  int64_t size_ = 0;
  int64_t strides_[2] = {};
  Dtype dtype_ = dtype_of<S>;
  bool converts_ = false;
  bool is_fresh_ = false;
  bool non_temporal_ = false;
  bool prefetches_ = false;
};

// A ReLU's mask of shape (.., ceil(n / 8)), one bit an element, by block.
class MaskBlocks {
 public:
  explicit MaskBlocks(const at::Tensor& mask) {
    if (mask.defined()) {
      data_ = static_cast<char*>(const_cast<void*>(mask.const_data_ptr()));  // only fresh masks are written to
      strides_[0] = mask.stride(0);
      strides_[1] = mask.stride(1);
    }
  }

  StridedRows view(const Block& block) const {
    if (data_ == nullptr) {
      return {};
    }
    return {data_ + block.first * strides_[0] + block.second * strides_[1] + block.col / 8, strides_[block.axis]};
  }

 private:
  char* data_ = nullptr;
  int64_t strides_[2] = {};
};

// A thread's scratch memory: blocks converted to S, and the sums of a block of pixels.
template <typename S>
class BlockScratch {
 public:
  BlockScratch(const ChannelPlan& plan, int tensors, int sums)
      : block_(tensors > 0 ? plan.block_elements() : 0),
        sums_(plan.layout() == Layout::pixels ? sums * plan.channels() : 0) {
    if (const int64_t size = tensors * block_ + sums_; size > 0) {
      values_.reset(new S[size]);
    }
  }
  S* block(int i) const { return values_.get() + sums_ + i * block_; }
  S* sums() const { return values_.get(); }

 private:
  int64_t block_, sums_;
  std::unique_ptr<S[]> values_;
};

// COUNT arrays with a number for each channel.
template <typename S, int COUNT>
class ChannelArrays {
 public:
  explicit ChannelArrays(int64_t size) : size_(size), values_(new S[COUNT * size]) {}
  S* operator[](int i) const { return values_.get() + i * size_; }

 private:
  int64_t size_;
  std::unique_ptr<S[]> values_;
};

}  // namespace fastnorm::cpu
