// What Python asks of lists of tensors.
#pragma once

#include <Python.h>

namespace fastnorm {

// Adds all_readable and list_key to the module. Returns -1 with a Python error set where that fails.
int add_list_functions(PyObject* module);

}  // namespace fastnorm
