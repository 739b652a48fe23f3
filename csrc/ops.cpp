// The Python module fastnorm._C. Loading it registers the operators of the other files, which Python calls through
// torch.ops.fastnorm. Their schemas are in fastnorm/operators.py; the dispatcher compares them with the C++ signatures.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "calls.h"
#include "cpu/pages.h"
#include "cpu/rows.h"
#include "cuda/build_info.h"
#include "lists.h"
#include "plans.h"
#include "statistics.h"

namespace {

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
  m.def("new_pages", &fastnorm::cpu::how_pages_are_made, "How the pages of large new outputs are made here.");
#ifdef FASTNORM_CUDA
  m.def("cuda_covers", &fastnorm::cuda_covers, "Whether the CUDA kernels run on the device of this index.");
#endif
  if (fastnorm::add_row_norm_calls(m.ptr()) != 0 || fastnorm::add_rms_norm_many_call(m.ptr()) != 0 ||
      fastnorm::add_channel_norm_calls(m.ptr()) != 0 || fastnorm::add_list_functions(m.ptr()) != 0 ||
      fastnorm::plans::add_functions(m.ptr()) != 0 || fastnorm::add_statistics_functions(m.ptr()) != 0) {
    throw pybind11::error_already_set();
  }
}
