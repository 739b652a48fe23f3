#include "views.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/movedim.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include "tensors.h"

namespace fastnorm::cpu {

at::Tensor as_rows(const at::Tensor& x, int64_t dims) {
  if (!x.defined() || (x.dim() == 2 && dims == 1 && x.stride(1) == 1)) {
    return x;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t cols = c10::multiply_integers(x.sizes().slice(x.dim() - dims));
  const at::Tensor rows = x.is_contiguous() ? x.view({-1, cols}) : x.reshape({-1, cols});
  return rows.stride(1) == 1 ? rows : rows.clone(at::MemoryFormat::Contiguous);
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
