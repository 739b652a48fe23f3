// What an operator of the Triton backend does on the device, to be done again: triton_kernels/plans.py writes it down.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

namespace fastnorm::plans {

using Sizes = std::vector<int64_t>;

// A parameter of a kernel: a number, or an address in the tensor of a slot. Slots are the call's tensors, then the
// results that are there, then the temporaries.
struct Parameter {
  int64_t slot;  // −1 for a number
  int64_t value;
};

struct Launch {
  int64_t function;
  std::array<unsigned, 3> grid;
  unsigned threads, shared;
  std::vector<Parameter> parameters;
};

// Fills a temporary with a view of a tensor of the call.
struct Copy {
  int64_t to, from, offset;
  Sizes sizes, strides;
};

struct Layout {
  Sizes sizes, strides;
  at::ScalarType dtype;
};

struct Plan {
  std::vector<std::optional<Layout>> results;
  std::vector<Layout> temporaries;
  std::vector<std::variant<Copy, Launch>> steps;
  pybind11::object kernels;  // keeps the functions loaded
};

// Reads what plans.record returns.
std::shared_ptr<const Plan> plan_from(const pybind11::handle& described);

// Thrown by the first launch of a thread that the GPU's driver has no context for; Triton's own launcher makes it one.
struct NoContext {};

// Allocates, copies and launches; returns the results. The launcher is the address of a function with the parameters of
// cuLaunchKernel, or a function of Python. Under the GIL, which is released while the driver launches.
std::vector<at::Tensor> run(const Plan& plan, const std::vector<at::Tensor>& inputs, const pybind11::handle& launcher,
                            void* stream);

// The address of a launcher that does nothing, for measuring the host's time.
void* launch_nothing();

}  // namespace fastnorm::plans
