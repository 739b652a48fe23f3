#pragma once
#include <string>
#include <vector>

namespace fastnorm {

struct CudaToolkit {
  std::string version;
  std::vector<std::string> archs;
};

// Asked in a file that nvcc compiles, because only nvcc knows its version and the architectures it was given.
CudaToolkit cuda_toolkit();

}  // namespace fastnorm
