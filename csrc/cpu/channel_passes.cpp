#include "channel_passes.h"

namespace fastnorm::cpu {

at::Tensor channel_tensor(const double* values, int64_t channels, std::optional<at::ScalarType> type) {
  if (!type) {
    return {};
  }
  at::Tensor tensor = empty({channels}, *type);
  rows<double>().store[static_cast<int>(dtype_from(*type))](values, tensor.mutable_data_ptr(), channels);
  return tensor;
}

}  // namespace fastnorm::cpu
