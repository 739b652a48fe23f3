// The whole of a call in C++, autograd included, for calls so plain that nothing needs to be asked in Python.
#pragma once

#include <Python.h>

namespace fastnorm {

// Each adds functions to the module that return NotImplemented, without a side effect, for a call that is wrong or not
// plain. Returns -1 with a Python error set where that fails.
int add_row_norm_calls(PyObject* module);      // row_norm: the four of them, with all options
int add_channel_norm_calls(PyObject* module);  // batch_norm, group_norm

}  // namespace fastnorm
