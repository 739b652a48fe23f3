// Checks and keys of lists of tensors, for the clipping functions in Python.
#pragma once

#include <Python.h>

namespace fastnorm {

// Adds are_plain, all_readable, gradients, shape_key and list_key to the module. Returns -1 with a Python error set on
// failure.
int add_list_functions(PyObject* module);

}  // namespace fastnorm
