#include "build_info.h"

namespace fastnorm {

CudaToolkit cuda_toolkit() {
  CudaToolkit toolkit;
  toolkit.version = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
  for (const int arch : {__CUDA_ARCH_LIST__}) toolkit.archs.push_back("sm_" + std::to_string(arch / 10));
  return toolkit;
}

}  // namespace fastnorm
