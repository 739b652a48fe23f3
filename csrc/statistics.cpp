#include "statistics.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <utility>

namespace fastnorm {
namespace {

struct Statistics {
  int64_t size;
  at::Tensor mean, rstd;
  double eps;
};

thread_local bool is_listening = false;
thread_local std::optional<Statistics> told;

PyObject* listen(PyObject*, PyObject*) {
  told.reset();
  is_listening = true;
  Py_RETURN_NONE;
}

PyObject* heard(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  is_listening = false;
  const auto found = std::exchange(told, std::nullopt);
  if (!found) {
    Py_RETURN_NONE;
  }
  PyObject* const mean = found->mean.defined() ? THPVariable_Wrap(found->mean) : Py_NewRef(Py_None);
  return Py_BuildValue("LNNd", static_cast<long long>(found->size), mean, THPVariable_Wrap(found->rstd), found->eps);
  END_HANDLE_TH_ERRORS
}

}  // namespace

void tell_statistics(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd, double eps) {
  if (is_listening) {
    told = {x.numel(), mean, rstd, eps};
  }
}

int add_statistics_functions(PyObject* module) {
  static PyMethodDef methods[] = {
      {"listen", &listen, METH_NOARGS, "listen(): from now on this thread's norms tell their statistics"},
      {"heard", &heard, METH_NOARGS,
       "heard(): (elements of x, mean or None, rstd, eps) of the last norm since listen(), or None; ends listening"},
      {nullptr, nullptr, 0, nullptr}};
  return PyModule_AddFunctions(module, methods);
}

}  // namespace fastnorm
