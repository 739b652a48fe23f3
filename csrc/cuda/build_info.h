// Which CUDA toolkit and architectures the extension was built for.
#pragma once
#include <string>
#include <vector>

namespace fastnorm {

struct CudaToolkit {
  std::string version;
  std::vector<std::string> archs;
};

// Defined in a file that nvcc compiles: only nvcc knows its version and its list of architectures.
CudaToolkit cuda_toolkit();

// Whether this build has machine code, or PTX that the driver can compile, for the device of this index.
bool cuda_covers(int device);

}  // namespace fastnorm
