// A launch plan: the allocations, copies and kernel launches of an operator of the Triton backend for one combination
// of arguments. triton_kernels/plans.py records it, `run` repeats it without Triton's launcher.
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
// defined results, then the temporaries.
struct Parameter {
  int64_t slot;   // −1 for a number
  int64_t value;  // the number, or the offset in bytes
};

struct Launch {
  int64_t function;
  std::array<unsigned, 3> grid;
  unsigned threads, shared;
  std::vector<Parameter> parameters;
};

// Copies a strided view of a tensor of the call to a temporary.
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
  bool returns_list;  // whether the launcher returns them as a list
  std::vector<Layout> temporaries;
  std::vector<std::variant<Copy, Launch>> steps;
  pybind11::object kernels;  // keeps the functions loaded
};

// Reads what plans.record returns.
std::shared_ptr<const Plan> plan_from(const pybind11::handle& described);

// Thrown by the first launch of a thread that has no GPU context yet. Triton's own launcher creates one.
struct NoContext {};

// Allocates, copies and launches; returns the results. The slots are the call's tensors, one at least. The launcher is
// the address of a function with the parameters of cuLaunchKernel, or a Python function. Needs the GIL, and releases it
// while the driver launches.
std::vector<at::Tensor> run(const Plan& plan, std::vector<at::Tensor> slots, const pybind11::handle& launcher,
                            void* stream);

// The address of a launcher that does nothing, for measuring the host's time.
void* launch_nothing();

}  // namespace fastnorm::plans
