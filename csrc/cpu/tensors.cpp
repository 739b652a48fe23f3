#include "tensors.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <c10/util/Exception.h>

#include <limits>

namespace fastnorm::cpu {
namespace {

void check_gaps(const at::Tensor& tensor, const char* name) {
  const auto last = tensor.dim() - 1;
  TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, "fastnorm: expected the rows of ", name,
              " without gaps, got strides ", tensor.strides());
}

}  // namespace

Dtype dtype_from(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    case at::kDouble:
      return Dtype::f64;
    default:
      TORCH_CHECK_TYPE(false, "fastnorm: expected float32, bfloat16, float16 or float64, got ", type);
  }
}

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format) {
  at::Tensor tensor = at::detail::empty_cpu(sizes, type, false, format);
  // torch.empty does the same, so that users find reads of memory that was never written.
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    at::isFloatingType(type) ? tensor.fill_(std::numeric_limits<double>::quiet_NaN()) : tensor.fill_(255);
  }
  return tensor;
}

void check_tensor(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.device().is_cpu(), "fastnorm: expected ", name, " on the CPU, got ", tensor.device());
  TORCH_CHECK(tensor.sizes() == sizes, "fastnorm: expected ", name, " of shape ", sizes, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.unsafeGetTensorImpl()->storage_initialized(), "fastnorm: the memory of ", name,
              " is gone: its storage was resized to 0");
  dtype_from(tensor.scalar_type());
}

void check_parameter(const std::optional<at::Tensor>& tensor, const char* name, at::IntArrayRef sizes) {
  if (tensor && tensor->defined()) {
    check_tensor(*tensor, name, sizes);
  }
}

void check_columns(const at::Tensor& tensor, const char* name, int64_t cols) {
  check_tensor(tensor, name, {cols});
  check_gaps(tensor, name);
}

void check_statistics(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, at::ScalarType type) {
  check_tensor(tensor, name, sizes);
  check_gaps(tensor, name);
  TORCH_CHECK(tensor.scalar_type() == type, "fastnorm: expected ", name, " in ", type, ", got ", tensor.scalar_type());
}

}  // namespace fastnorm::cpu
