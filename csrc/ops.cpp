// The Python module. Loading it registers the kernels of the other files; fastnorm/operators.py has their schemas, with
// which the dispatcher compares the functions' signatures, and Python calls them through torch.ops.fastnorm.
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include "cpu/calls.h"
#include "cpu/rows.h"
#include "cuda/build_info.h"

namespace {

bool is_readable(const at::Tensor& tensor, at::Device device) {
  const auto type = tensor.scalar_type();
  return tensor.layout() == at::kStrided && !tensor.is_nested() && !tensor.is_neg() && !tensor._is_zerotensor() &&
         tensor.device() == device &&
         (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble) &&
         tensor.is_non_overlapping_and_dense();
}

// A loop over a long list is ten times faster here than in Python, where it would take longer than the norms.
bool all_readable(pybind11::handle tensors) {
  const auto fast = pybind11::reinterpret_steal<pybind11::object>(
      PySequence_Fast(tensors.ptr(), "all_readable(): expected a sequence of tensors"));
  if (!fast) {
    throw pybind11::error_already_set();
  }
  PyObject** const items = PySequence_Fast_ITEMS(fast.ptr());
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.ptr()); ++i) {
    if (!THPVariable_CheckExact(items[i]) && !THPVariable_Check(items[i])) {
      throw pybind11::type_error("all_readable(): expected a sequence of tensors");
    }
    if (!is_readable(THPVariable_Unpack(items[i]), THPVariable_Unpack(items[0]).device())) {
      return false;
    }
  }
  return true;
}

constexpr const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

constexpr bool openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

// No build date and no paths: two builds of the same sources are the same file.
pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["flags"] = FASTNORM_CXX_FLAGS;
  info["cxx_standard"] = __cplusplus;
  info["openmp"] = openmp();
  info["instruction_set"] = fastnorm::cpu::instruction_set().name;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = pybind11::none();
  info["cuda_archs"] = pybind11::list();
#ifdef FASTNORM_CUDA
  const auto toolkit = fastnorm::cuda_toolkit();
  info["cuda"] = toolkit.version;
  info["cuda_archs"] = pybind11::cast(toolkit.archs);
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastnorm's compiled kernels (reached through torch.ops.fastnorm) and how they were built.";
  m.def("build_info", &build_info, "What this module was compiled with.");
  m.def("all_readable", &all_readable, "Whether kernels can read all of the tensors as they lie, on one device.");
#ifdef FASTNORM_CUDA
  m.def("cuda_covers", &fastnorm::cuda_covers, "Whether the CUDA kernels run on the device of this index.");
#endif
  if (fastnorm::cpu::add_calls(m.ptr()) != 0) {
    throw pybind11::error_already_set();
  }
}
