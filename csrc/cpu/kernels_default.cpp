// The kernels for every processor: all have vectors of 16 bytes, as SSE2 or NEON.
#include "kernel_includes.h"

namespace fastnorm::cpu::plain {
#define VECTOR_BYTES 16
#define INSTRUCTION_SET_NAME "default"
#include "instruction_set.h"
}  // namespace fastnorm::cpu::plain
