#include "views.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/movedim.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <bit>
#include <iterator>

#include "tensors.h"

namespace fastnorm::cpu {

namespace {

at::Tensor copied(const at::Tensor& x) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return x.clone(at::MemoryFormat::Contiguous);
}

// Whether the dimensions from `first` on are one run of adjacent elements.
bool is_adjacent(const at::Tensor& x, int64_t first) {
  int64_t run = 1;
  for (int64_t d = x.dim() - 1; d >= first; run *= x.size(d--)) {
    if (x.size(d) != 1 && x.stride(d) != run) {
      return false;
    }
  }
  return true;
}

}  // namespace

Division::Division(int64_t divisor) {
  const int bits = std::bit_width(static_cast<uint64_t>(divisor - 1));  // of the largest remainder
  shift_ = 31 + bits;
  multiplier_ = ((uint64_t{1} << shift_) + divisor - 1) / divisor;
}

RowLevels::Levels RowLevels::levels_of(c10::ArrayRef<at::Tensor*> tensors, int64_t leading) {
  Levels levels;
  const at::IntArrayRef sizes = tensors[0]->sizes();
  for (int64_t d = 0; d < leading; ++d) {
    const auto collapses = [&](const at::Tensor* t) { return t->stride(levels.back().dim) == sizes[d] * t->stride(d); };
    if (sizes[d] == 1) {
      continue;
    }
    if (!levels.empty() && std::all_of(tensors.begin(), tensors.end(), collapses)) {
      levels.back() = {levels.back().size * sizes[d], d};
    } else {
      levels.push_back({sizes[d], d});
    }
  }
  return levels;
}

RowLevels::RowLevels(std::initializer_list<at::Tensor*> tensors, int64_t dims) {
  c10::SmallVector<at::Tensor*, 4> given;
  std::copy_if(tensors.begin(), tensors.end(), std::back_inserter(given), [](auto* t) { return t->defined(); });
  const int64_t leading = given[0]->dim() - dims;
  rows_ = c10::multiply_integers(given[0]->sizes().slice(0, leading));
  cols_ = c10::multiply_integers(given[0]->sizes().slice(leading));
  if (rows_ == 0) {
    return;
  }
  for (at::Tensor* tensor : given) {
    if (!is_adjacent(*tensor, leading)) {
      *tensor = copied(*tensor);
    }
  }
  levels_ = levels_of(given, leading);
  if (levels_.size() > 3 || (levels_.size() > 1 && rows_ > INT32_MAX)) {
    for (at::Tensor* tensor : given) {
      if (levels_of(tensor, leading).size() > 1) {
        *tensor = copied(*tensor);
      }
    }
    levels_ = levels_of(given, leading);
  }
  for (size_t i = 1; i < levels_.size(); ++i) {
    divisions_[i - 1] = Division(levels_[levels_.size() - i].size);
  }
}

RowOffsets RowLevels::offsets(const at::Tensor& tensor) const {
  RowOffsets offsets{std::max<int>(1, static_cast<int>(levels_.size())), {cols_, 0, 0}, divisions_};
  int64_t inner = 0;  // how far one row of the level lies from where its inner level's end
  for (int level = 0; level < static_cast<int>(levels_.size()); ++level) {
    const auto& [size, dim] = levels_[levels_.size() - 1 - level];
    offsets.steps[level] = tensor.stride(dim) - inner;
    inner = size * tensor.stride(dim);
  }
  while (offsets.levels > 1 && offsets.steps[offsets.levels - 1] == 0) {
    --offsets.levels;  // of a contiguous tensor beside others: no division
  }
  return offsets;
}

at::Tensor rows_of_samples(const at::Tensor& parameter) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor rows = parameter.dim() == 2 ? parameter : parameter.flatten(1);
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : copied(rows);
}

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& parameter) {
  if (!parameter || !parameter->defined() || parameter->is_contiguous()) {
    return parameter;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return parameter->contiguous();
}

ChannelView::ChannelView(const at::Tensor& x, at::MemoryFormat format, bool across_samples)
    : shape_(x.sizes()), format_(format) {
  TORCH_CHECK(x.dim() >= 2 && x.numel() > 0, "fastnorm: expected x of shape (N, C, *), not empty, got ", x.sizes());
  check_tensor(x, "x", x.sizes());
  const int64_t samples = x.size(0), size = c10::multiply_integers(x.sizes().slice(2));
  // With one position both layouts are possible; pixels have longer rows then: the channels.
  layout_ = size == 1 || (format != at::MemoryFormat::Contiguous && channels() > 1) ? Layout::pixels : Layout::planes;
  if (layout_ == Layout::planes) {
    sizes_ = {samples, channels(), size};
  } else {
    sizes_ = {across_samples ? 1 : samples, across_samples ? samples * size : size, channels()};
  }
  mask_sizes_ = {sizes_[0], sizes_[1], (sizes_[2] + 7) / 8};
}

at::Tensor ChannelView::blocks(const at::Tensor& tensor) const {
  if (!tensor.defined()) {
    return tensor;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor view = (layout_ == Layout::pixels ? tensor.movedim(1, -1) : tensor).reshape(sizes_);
  return view.stride(2) == 1 ? view : view.clone(at::MemoryFormat::Contiguous);
}

at::Tensor ChannelView::checked_blocks(const at::Tensor& tensor, const char* name) const {
  if (tensor.defined()) {
    check_tensor(tensor, name, shape_);
  }
  return blocks(tensor);
}

at::Tensor ChannelView::make_result(at::ScalarType type) const { return empty(shape_, type, format_); }

at::Tensor ChannelView::make_mask(bool wanted) const { return wanted ? empty(mask_sizes_, at::kByte) : at::Tensor(); }

void ChannelView::check_mask(const at::Tensor& mask) const {
  TORCH_CHECK(mask.unsafeGetTensorImpl()->storage_initialized(), "fastnorm: the memory of mask is gone");
  TORCH_CHECK(mask.device().is_cpu() && mask.scalar_type() == at::kByte && mask.sizes() == mask_sizes() &&
                  (mask.size(2) <= 1 || mask.stride(2) == 1),
              "fastnorm: expected mask in uint8 on the CPU, without gaps in its rows, of shape ", mask_sizes(),
              ", got ", mask.scalar_type(), " of shape ", mask.sizes(), " with strides ", mask.strides());
}

}  // namespace fastnorm::cpu
