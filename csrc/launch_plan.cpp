#include "launch_plan.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/SymIntArrayRef.h>

#include <string>
#include <utility>

namespace fastnorm::plans {
namespace {

namespace py = pybind11;
using at::Tensor;

// cuLaunchKernel and hipModuleLaunchKernel.
using DriverLaunch = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                             unsigned shared, void* stream, void** parameters, void** extra);

constexpr int invalid_context = 201;  // CUDA_ERROR_INVALID_CONTEXT, hipErrorInvalidContext

int do_nothing(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
  return 0;
}

Layout layout_from(const py::handle& described) {
  const auto parts = py::cast<py::tuple>(described);
  return {py::cast<Sizes>(parts[0]), py::cast<Sizes>(parts[1]), py::cast<at::ScalarType>(parts[2])};
}

// at::empty_strided, past the dispatch that finds the device's kernel.
Tensor empty(const Layout& layout, at::Device device) {
  const auto key = device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  return at::_ops::empty_strided::redispatch(c10::DispatchKeySet(key), c10::fromIntArrayRefSlow(layout.sizes),
                                             c10::fromIntArrayRefSlow(layout.strides), layout.dtype, at::kStrided,
                                             device, /*pin_memory=*/false);
}

void launch_by_driver(DriverLaunch launcher, const Launch& launch, void* stream, const std::vector<int64_t>& values) {
  // Triton may append two parameters to a kernel's own, for scratch memory that a plan's kernels don't use
  std::vector<void*> pointers;
  pointers.reserve(values.size() + 2);
  for (const int64_t& value : values) {
    pointers.push_back(const_cast<int64_t*>(&value));
  }
  static int64_t none = 0;
  pointers.insert(pointers.end(), 2, &none);
  const int status = launcher(reinterpret_cast<void*>(launch.function), launch.grid[0], launch.grid[1], launch.grid[2],
                              launch.threads, 1, 1, launch.shared, stream, pointers.data(), nullptr);
  if (status == invalid_context) {
    throw NoContext();
  }
  TORCH_CHECK(status == 0, "fastnorm: the GPU's driver refused to launch a kernel, error ", status,
              "; an earlier kernel may have failed: look for the first error with CUDA_LAUNCH_BLOCKING=1");
}

void launch_by_python(const py::handle& launcher, const Launch& launch, const std::vector<int64_t>& values,
                      const std::vector<Tensor>& slots) {
  py::list tensors;
  for (const Tensor& tensor : slots) {
    tensors.append(tensor);
  }
  launcher(launch.function, py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]), values, tensors);
}

}  // namespace

std::shared_ptr<const Plan> plan_from(const py::handle& described) {
  auto plan = std::make_shared<Plan>();
  plan->returns_list = py::cast<bool>(described.attr("returns_list"));
  for (const auto& result : described.attr("results")) {
    plan->results.push_back(result.is_none() ? std::nullopt : std::optional(layout_from(result)));
  }
  for (const auto& temporary : described.attr("temporaries")) {
    plan->temporaries.push_back(layout_from(temporary));
  }
  for (const auto& step : described.attr("steps")) {
    const auto parts = py::cast<py::tuple>(step);
    if (py::cast<std::string>(parts[0]) == "copy") {
      plan->steps.emplace_back(Copy{py::cast<int64_t>(parts[1]), py::cast<int64_t>(parts[2]),
                                    py::cast<int64_t>(parts[3]), py::cast<Sizes>(parts[4]), py::cast<Sizes>(parts[5])});
      continue;
    }
    Launch launch{py::cast<int64_t>(parts[1]),
                  py::cast<std::array<unsigned, 3>>(parts[2]),
                  py::cast<unsigned>(parts[3]),
                  py::cast<unsigned>(parts[4]),
                  {}};
    for (const auto& parameter : parts[5]) {
      const auto [slot, value] = py::cast<std::pair<int64_t, int64_t>>(parameter);
      launch.parameters.push_back({slot, value});
    }
    plan->steps.emplace_back(std::move(launch));
  }
  plan->kernels = described.attr("launches");
  return plan;
}

std::vector<Tensor> run(const Plan& plan, std::vector<Tensor> slots, const py::handle& launcher, void* stream) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Device device = slots[0].device();
  std::vector<Tensor> results;
  slots.reserve(slots.size() + plan.results.size() + plan.temporaries.size());
  const auto allocate = [&](const Layout& layout) { return slots.emplace_back(empty(layout, device)); };
  for (const auto& result : plan.results) {
    results.push_back(result ? allocate(*result) : Tensor());
  }
  for (const Layout& temporary : plan.temporaries) {
    allocate(temporary);
  }
  const auto driver =
      PyLong_Check(launcher.ptr()) ? reinterpret_cast<DriverLaunch>(PyLong_AsSize_t(launcher.ptr())) : nullptr;
  std::vector<int64_t> values;
  for (const auto& step : plan.steps) {
    if (const auto* copy = std::get_if<Copy>(&step)) {
      const Tensor& from = slots[copy->from];
      slots[copy->to].copy_(from.as_strided(copy->sizes, copy->strides, from.storage_offset() + copy->offset));
      continue;
    }
    const auto& launch = std::get<Launch>(step);
    values.clear();
    for (const Parameter& parameter : launch.parameters) {
      const int64_t base =
          parameter.slot < 0 ? 0 : static_cast<int64_t>(reinterpret_cast<uintptr_t>(slots[parameter.slot].data_ptr()));
      values.push_back(base + parameter.value);
    }
    if (driver != nullptr) {
      const py::gil_scoped_release no_gil;  // the driver waits while its queue is full
      launch_by_driver(driver, launch, stream, values);
    } else {
      launch_by_python(launcher, launch, values, slots);
    }
  }
  return results;
}

void* launch_nothing() { return reinterpret_cast<void*>(&do_nothing); }

}  // namespace fastnorm::plans
