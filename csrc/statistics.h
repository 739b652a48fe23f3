// The statistics of a norm's input, which its forward computes for its backward, for a listener on the same thread. The
// node is not where to read them: a checkpoint's hooks would compute the forward again to unpack what it saved.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

namespace fastnorm {

// mean (undefined for RMSNorm) and rstd: one number for each of equal parts of x. Does nothing unless listened to.
void tell_statistics(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd, double eps);

// Adds listen and heard. Returns -1 with a Python error set on failure.
int add_statistics_functions(PyObject* module);

}  // namespace fastnorm
