#include "channel_passes.h"

#include <c10/util/Exception.h>

namespace fastnorm::cpu {

at::Tensor channel_tensor(const double* values, int64_t channels, std::optional<at::ScalarType> type) {
  if (!type) {
    return {};
  }
  at::Tensor tensor = empty({channels}, *type);
  rows<double>().store[static_cast<int>(dtype_from(*type))](values, tensor.mutable_data_ptr(), channels);
  return tensor;
}

void check_blocks(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "fastnorm: expected ", name,
              " of shape (samples, channels, size) or (samples, size, channels), not empty, got ", x.sizes());
  check_rows(x, name, x.sizes());
}

std::vector<int64_t> mask_sizes(const at::Tensor& x) { return {x.size(0), x.size(1), (x.size(2) + 7) / 8}; }

void check_mask(const at::Tensor& mask, const at::Tensor& x) {
  const std::vector<int64_t> sizes = mask_sizes(x);
  TORCH_CHECK(mask.device().is_cpu() && mask.scalar_type() == at::kByte && mask.sizes() == sizes &&
                  (mask.size(2) <= 1 || mask.stride(2) == 1),
              "fastnorm: expected mask in uint8 on the CPU, without gaps in its rows, of shape ",
              at::IntArrayRef(sizes), ", got ", mask.scalar_type(), " of shape ", mask.sizes(), " with strides ",
              mask.strides());
}

}  // namespace fastnorm::cpu
