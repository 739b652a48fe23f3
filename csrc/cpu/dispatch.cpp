// Chooses among the kernels of AVX-512, AVX2 and every processor, once, at the first call.
#include <cstdlib>
#include <cstring>

#include "kernel_includes.h"

namespace fastnorm::cpu {

namespace plain {
extern const InstructionSet instruction_set;
}
#ifdef X86_SETS
namespace avx2 {
extern const InstructionSet instruction_set;
}
namespace avx512 {
extern const InstructionSet instruction_set;
}
#endif

namespace {

const InstructionSet& choose() {
#ifdef X86_SETS
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool only_plain = limit != nullptr && std::strcmp(limit, "default") == 0;
  const bool only_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  __builtin_cpu_init();
  // No processor has AVX2 and FMA without F16C and BMI2, which not every compiler can ask for.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && !only_plain && !only_avx2) {
    return avx512::instruction_set;
  }
  if (has_avx2 && !only_plain) {
    return avx2::instruction_set;
  }
#endif
  return plain::instruction_set;
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace fastnorm::cpu
