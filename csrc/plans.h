// The table of launch plans, through which C++ calls operators of the Triton backend. For each combination of arguments
// the first call runs the launcher in Python, where Triton compiles. The second records a launch plan, which it and
// later calls run.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <variant>
#include <vector>

namespace fastnorm::plans {

// An argument of an operator. An undefined tensor, alone or in a list, and an absent dtype stand for None.
using Argument = std::variant<at::Tensor, bool, int64_t, double, std::optional<at::ScalarType>, at::MemoryFormat,
                              std::vector<at::Tensor>, std::vector<bool>>;

// Calls an operator of fastnorm.triton_kernels by its name. A result that is None is undefined; a list of results is
// their vector. Takes the GIL, and releases it during launches.
std::vector<at::Tensor> call(const char* name, c10::ArrayRef<Argument> arguments);

// Adds call_operator(name, *arguments), clear_plans(), plan_count() and the address LAUNCH_NOTHING to the module.
// Returns -1 with a Python error set on failure.
int add_functions(PyObject* module);

}  // namespace fastnorm::plans
