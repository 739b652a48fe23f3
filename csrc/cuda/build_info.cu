#include "build_info.h"

#include <cuda_runtime_api.h>

namespace fastnorm {
namespace {

__global__ void probe() {}

}  // namespace

CudaToolkit cuda_toolkit() {
  CudaToolkit toolkit;
  toolkit.version = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
  for (const int arch : {__CUDA_ARCH_LIST__}) toolkit.archs.push_back("sm_" + std::to_string(arch / 10));
  return toolkit;
}

bool cuda_covers(int device) {
  int current = 0;
  cudaGetDevice(&current);
  cudaSetDevice(device);
  cudaFuncAttributes attributes;
  const bool covered = cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
  cudaGetLastError();  // clears the error, or the next check would report it
  cudaSetDevice(current);
  return covered;
}

}  // namespace fastnorm
