// The operators of norms and clipping on CUDA tensors: checks, outputs, launches.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "../policy_arguments.h"
#include "agc.h"
#include "multi_tensor.h"

namespace fastnorm::cuda {
namespace {

Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return FLOAT32;
    case at::kDouble:
      return FLOAT64;
    case at::kHalf:
      return FLOAT16;
    case at::kBFloat16:
      return BFLOAT16;
    default:
      TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16 tensors, but got ", tensor.scalar_type());
  }
}

void check(const at::Tensor& tensor, const at::Device& device) {
  TORCH_CHECK(tensor.device() == device, "expected all tensors on ", device, ", but got one on ", tensor.device());
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "expected tensors without gaps and overlaps");
}

uint64_t address_of(const at::Tensor& tensor, bool written) {
  return reinterpret_cast<uint64_t>(written ? tensor.mutable_data_ptr() : tensor.const_data_ptr());
}

std::vector<Item> items_of(at::TensorList tensors, bool written) {
  TORCH_CHECK(!tensors.empty(), "expected at least one tensor");
  std::vector<Item> items;
  items.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    check(tensor, tensors[0].device());
    items.push_back({address_of(tensor, written), tensor.numel(), dtype_of(tensor)});
  }
  return items;
}

// Zeros for the kernels' tickets, which they leave as zeros. Calls on one stream run one after the other and share
// them. Replays of a CUDA graph may run beside other calls: a captured call gets its own, which the graph sets to zero.
at::Tensor tickets(int64_t count, const at::Device& device, const c10::cuda::CUDAStream& stream) {
  const auto options = at::device(device).dtype(at::kInt);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return at::zeros({count}, options);
  }
  using Key = std::pair<c10::DeviceIndex, cudaStream_t>;
  static auto* const kept = new std::map<Key, at::Tensor>;  // never destroyed: CUDA may be gone before it would be
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& zeros = (*kept)[{device.index(), stream.stream()}];
  if (!zeros.defined() || zeros.numel() < count) {
    zeros = at::zeros({2 * count}, options);
  }
  return zeros;
}

struct Norms {
  at::Tensor total;
  at::Tensor coefficient;
  at::Tensor nonfinite;
  at::Tensor norms;
};

// Without a policy, its state is null.
Norms norms_of(const std::vector<Item>& items, double p, double max_norm, const policy::Policy& policy,
               at::ScalarType type, const at::Device& device) {
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  const auto options = at::device(device).dtype(type);
  const auto count = static_cast<int64_t>(items.size());
  const bool is_per_tensor = policy.state != nullptr && policy.rule == policy::ADAGC;
  Norms result{at::empty({}, options), is_per_tensor ? at::empty({count}, options) : at::empty({}, options),
               at::empty({}, options.dtype(at::kFloat)), at::empty({count}, options)};
  const at::Tensor workspace = at::empty({norm_workspace(items)}, options.dtype(at::kDouble));
  const at::Tensor zeros = tickets(count + 1, device, stream);
  NormRequest request{};
  request.p = p;
  request.max_norm = max_norm;
  request.policy = policy;
  request.workspace = workspace.mutable_data_ptr<double>();
  request.tickets = reinterpret_cast<uint32_t*>(zeros.mutable_data_ptr<int>());
  request.norms = result.norms.mutable_data_ptr();
  request.total = result.total.mutable_data_ptr();
  request.coefficient = result.coefficient.mutable_data_ptr();
  request.nonfinite = result.nonfinite.mutable_data_ptr<float>();
  request.kind = kind_of(p);
  request.wide = type == at::kDouble;
  launch_norm(items, request, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Results results_of(at::TensorList tensors, double p, double max_norm, const policy::Policy& policy) {
  const std::vector<Item> items = items_of(tensors, false);
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  bool wide = false;
  for (const Item& item : items) {
    wide |= item.dtype == FLOAT64;
  }
  Norms result = norms_of(items, p, max_norm, policy, wide ? at::kDouble : at::kFloat, tensors[0].device());
  return {result.total, result.coefficient, result.nonfinite, result.norms};
}

Results multi_tensor_norm(at::TensorList tensors, double norm_type, double max_norm) {
  return results_of(tensors, norm_type, max_norm, {});
}

Results multi_tensor_policy(at::TensorList tensors, double norm_type, const at::Tensor& state, int64_t rule,
                            at::ArrayRef<double> constants) {
  TORCH_CHECK(!tensors.empty(), "expected at least one tensor");
  check(state, tensors[0].device());
  return results_of(tensors, norm_type, 0, policy::policy_of(state, rule, constants, tensors.size()));
}

void change(Change kind, at::TensorList tensors, ChangeRequest request) {
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  for (const std::vector<Item>& part : disjoint(items_of(tensors, true))) {
    launch_change(kind, part, request, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    request.first += static_cast<uint32_t>(part.size());
  }
}

void multi_tensor_scale_(at::TensorList tensors, const at::Tensor& coefficient) {
  TORCH_CHECK(!tensors.empty(), "expected at least one tensor");
  check(coefficient, tensors[0].device());
  const Dtype dtype = dtype_of(coefficient);
  const bool is_per_tensor = coefficient.dim() == 1 && coefficient.size(0) == static_cast<int64_t>(tensors.size());
  TORCH_CHECK((coefficient.numel() == 1 || is_per_tensor) && (dtype == FLOAT32 || dtype == FLOAT64),
              "expected one float32 or float64 number for a coefficient, or one for each tensor");
  ChangeRequest request{};
  request.coefficient = coefficient.const_data_ptr();
  request.per_tensor = is_per_tensor;
  request.wide = dtype == FLOAT64;
  change(SCALE, tensors, request);
}

void multi_tensor_clamp_(at::TensorList tensors, double bound) {
  TORCH_CHECK(!tensors.empty(), "expected at least one tensor");
  ChangeRequest request{};
  request.bound = bound;
  change(CLAMP, tensors, request);
}

// Clips long units as tensors of their own, by the kernels of norms and changes.
void clip_long_units(const std::vector<Gradient>& gradients, const AgcRequest& agc, const at::Device& device) {
  std::vector<Item> items = unit_items(gradients);
  const Norms norms = norms_of(items, agc.p, 1.0, {}, at::kDouble, device);
  items.resize(items.size() / 2);
  ChangeRequest request{};
  request.norms = norms.norms.const_data_ptr<double>();
  request.clip_factor = agc.clip_factor;
  request.eps = agc.eps;
  launch_change(CLIP_UNITS, items, request, c10::cuda::getCurrentCUDAStream(device.index()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void multi_tensor_agc_(at::TensorList grads, at::TensorList params, at::IntArrayRef units, double clip_factor,
                       double eps, double norm_type) {
  TORCH_CHECK(grads.size() == params.size() && grads.size() == units.size(),
              "expected as many parameters and numbers of units as gradients");
  const std::vector<Item> items = items_of(grads, true), parameters = items_of(params, false);
  const at::Device device = grads[0].device();
  std::vector<Gradient> gradients;
  for (size_t i = 0; i < items.size(); ++i) {
    check(params[i], device);
    TORCH_CHECK(items[i].size == parameters[i].size, "expected gradients with the sizes of their parameters");
    TORCH_CHECK(units[i] > 0 && items[i].size % units[i] == 0, "expected units of one size, but got ", units[i],
                " units of ", items[i].size, " elements");
    gradients.push_back({items[i], parameters[i].address, parameters[i].dtype, units[i]});
  }
  const c10::cuda::CUDAGuard guard(device);
  const AgcRequest request{norm_type, clip_factor, eps, kind_of(norm_type)};
  for (std::vector<Gradient>& part : disjoint(gradients)) {
    const auto first_long =
        std::stable_partition(part.begin(), part.end(), [](const Gradient& gradient) { return !gradient.is_long(); });
    const std::vector<Gradient> shared(first_long, part.end());
    part.erase(first_long, part.end());
    launch_agc(part, request, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (!shared.empty()) {
      clip_long_units(shared, request, device);
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnorm, CUDA, m) {
  m.impl("multi_tensor_norm", multi_tensor_norm);
  m.impl("multi_tensor_policy", multi_tensor_policy);
  m.impl("multi_tensor_scale_", multi_tensor_scale_);
  m.impl("multi_tensor_clamp_", multi_tensor_clamp_);
  m.impl("multi_tensor_agc_", multi_tensor_agc_);
}

}  // namespace fastnorm::cuda
