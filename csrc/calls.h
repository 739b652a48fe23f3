// Whole calls of the norms in C++, autograd included: for plain calls, whose time Python would dominate.
#pragma once

#include <Python.h>

namespace fastnorm {

// Each adds functions to the module; they return NotImplemented, without side effects, for a call that is wrong or not
// plain, which Python then makes. Returns -1 with a Python error set on failure.
int add_row_norm_calls(PyObject* module);      // row_norm: all of them with all options
int add_rms_norm_many_call(PyObject* module);  // rms_norm_many
int add_channel_norm_calls(PyObject* module);  // batch_norm, group_norm

}  // namespace fastnorm
