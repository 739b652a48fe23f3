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

// Whether this build has machine code, or PTX that the driver can compile, for the device of this index.
bool cuda_covers(int device);

}  // namespace fastnorm
