// Operator schemas, and the Python module with the build information. Importing the module loads the library, which
// registers the schemas here and the kernels of the other files; Python calls them through torch.ops.fastnorm.
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>

#include "cpu/calls.h"
#include "cpu/rows.h"
#include "cuda/build_info.h"

namespace {

// A loop over a long list is ten times faster here than in Python, where it would take longer than the norms.
bool all_readable(at::TensorList tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& tensor) {
    const auto type = tensor.scalar_type();
    return tensor.layout() == at::kStrided && !tensor.is_nested() && !tensor.is_neg() && !tensor._is_zerotensor() &&
           tensor.device() == tensors[0].device() &&
           (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble) &&
           tensor.is_non_overlapping_and_dense();
  });
}

}  // namespace

// Outputs that may be absent (dresidual, dweight, dbias) are undefined tensors, which Python receives as None.
TORCH_LIBRARY(fastnorm, m) {
  m.def(
      "rms_norm_forward(Tensor x, int dims, Tensor? weight, float eps, bool zero_centered, ScalarType? cast_dtype, "
      "ScalarType out_dtype) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, int dims, Tensor? weight, Tensor rstd, bool zero_centered, ScalarType? "
      "cast_dtype, ScalarType? dweight_dtype) -> (Tensor dx, Tensor dweight)");
  m.def(
      "add_rms_norm_forward(Tensor x, Tensor residual, int dims, Tensor? weight, float eps, bool zero_centered, "
      "ScalarType? cast_dtype, ScalarType out_dtype, ScalarType residual_dtype) -> (Tensor y, Tensor h, Tensor rstd)");
  m.def(
      "add_rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, int dims, Tensor? weight, Tensor rstd, bool "
      "zero_centered, ScalarType? cast_dtype, ScalarType x_dtype, ScalarType residual_dtype, ScalarType? "
      "dweight_dtype) -> (Tensor dx, Tensor dresidual, Tensor dweight)");
  m.def(
      "layer_norm_forward(Tensor x, int dims, Tensor? weight, Tensor? bias, float eps, bool zero_centered, "
      "ScalarType out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, int dims, Tensor? weight, Tensor mean, Tensor rstd, bool "
      "zero_centered, ScalarType? dweight_dtype, ScalarType? dbias_dtype) -> (Tensor dx, Tensor dweight, Tensor "
      "dbias)");
  m.def(
      "add_layer_norm_forward(Tensor x, Tensor residual, int dims, Tensor? weight, Tensor? bias, float eps, bool "
      "zero_centered, ScalarType out_dtype, ScalarType residual_dtype) -> (Tensor y, Tensor h, Tensor mean, Tensor "
      "rstd)");
  m.def(
      "add_layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, int dims, Tensor? weight, Tensor mean, Tensor rstd, "
      "bool zero_centered, ScalarType x_dtype, ScalarType residual_dtype, ScalarType? dweight_dtype, ScalarType? "
      "dbias_dtype) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def(
      "batch_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor? factor, float momentum, float eps, MemoryFormat memory_format, bool relu, "
      "ScalarType out_dtype) -> (Tensor y, Tensor mask, Tensor mean, Tensor rstd)");
  m.def(
      "batch_norm_backward(Tensor dy, Tensor? mask, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool "
      "training, MemoryFormat memory_format, ScalarType? dresidual_dtype, ScalarType? dweight_dtype, ScalarType? "
      "dbias_dtype) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def(
      "batch_norm_evaluation(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor "
      "running_var, float eps, MemoryFormat memory_format, bool relu, bool wants_mask, ScalarType out_dtype) -> "
      "(Tensor y, Tensor mask)");
  m.def("batch_norm_statistics(Tensor x, MemoryFormat memory_format) -> Tensor");
  m.def(
      "batch_norm_normalize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
      "MemoryFormat memory_format, bool relu, ScalarType out_dtype) -> (Tensor y, Tensor mask)");
  m.def(
      "batch_norm_backward_sums(Tensor dy, Tensor? mask, Tensor x, Tensor mean, Tensor rstd, MemoryFormat "
      "memory_format) -> Tensor");
  m.def(
      "batch_norm_backward_apply(Tensor dy, Tensor? mask, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor "
      "means, MemoryFormat memory_format, ScalarType? dresidual_dtype) -> (Tensor dx, Tensor dresidual)");
  m.def(
      "group_norm_forward(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, MemoryFormat memory_format, "
      "bool silu, ScalarType out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_backward(Tensor dy, Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
      "MemoryFormat memory_format, bool silu, ScalarType? dweight_dtype, ScalarType? dbias_dtype) -> (Tensor dx, "
      "Tensor dweight, Tensor dbias)");
  m.def(
      "multi_tensor_norm(Tensor[] tensors, float norm_type, float max_norm) "
      "-> (Tensor total_norm, Tensor coefficient, Tensor nonfinite, Tensor norms)");
  m.def("multi_tensor_scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()");
  m.def("multi_tensor_clamp_(Tensor(a!)[] tensors, float bound) -> ()");
  m.def(
      "multi_tensor_agc_(Tensor(a!)[] grads, Tensor[] params, int[] units, float clip_factor, float eps, "
      "float norm_type) -> ()");
  m.def("all_readable(Tensor[] tensors) -> bool", &all_readable);
}

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
#ifdef FASTNORM_CUDA
  m.def("cuda_covers", &fastnorm::cuda_covers, "Whether the CUDA kernels run on the device of this index.");
#endif
  if (fastnorm::cpu::add_calls(m.ptr()) != 0) {
    throw pybind11::error_already_set();
  }
}
