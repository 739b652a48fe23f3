// The kernels for every processor: sixteen bytes are what all have, as SSE2 or NEON.
#include "kernel_includes.h"

namespace fastnorm::cpu::plain {
#define VECTOR_BYTES 16
#define INSTRUCTION_SET_NAME "default"
#include "instruction_set.h"
}  // namespace fastnorm::cpu::plain
