// The whole of a call in C++, autograd included, for calls so plain that nothing needs to be asked in Python.
#pragma once

#include <Python.h>

namespace fastnorm::cpu {

// Adds layer_norm, rms_norm, add_layer_norm and add_rms_norm to the module, with the signatures of
// fastnorm.functional as far as they are positional. Each returns NotImplemented, without a side effect, for a call
// that is wrong or not plain. Returns -1 with a Python error set where that fails.
int add_calls(PyObject* module);

}  // namespace fastnorm::cpu
