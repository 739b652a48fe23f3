// Operators of the Triton backend, called from C++. The first call of a combination runs the launcher in Python, where
// Triton compiles and launches. The second makes a launch plan, by which it and later calls allocate and launch without
// Python's launcher.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <variant>
#include <vector>

namespace fastnorm::plans {

// What an operator takes. An undefined tensor is None, as is a dtype that is not there.
using Argument = std::variant<at::Tensor, bool, int64_t, double, std::optional<at::ScalarType>, at::MemoryFormat>;

// Calls an operator of fastnorm.triton_kernels by its name; a result that is None is undefined. Holds the GIL while it
// runs, but for the launches themselves.
std::vector<at::Tensor> call(const char* name, c10::ArrayRef<Argument> arguments);

// Adds call_operator(name, *arguments), clear_plans(), plan_count() and the address LAUNCH_NOTHING to the module.
// Returns -1 with a Python error set where that fails.
int add_functions(PyObject* module);

}  // namespace fastnorm::plans
