// Compiles the row kernels for each instruction set and chooses one when the library loads.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86_SETS 1
#include <immintrin.h>
#endif

namespace fastnorm::cpu {

// Sixteen bytes are what every target has: SSE2, NEON.
namespace plain {
#define VECTOR_BYTES 16
#define INSTRUCTION_SET_NAME "default"
#include "instruction_set.h"
#undef VECTOR_BYTES
#undef INSTRUCTION_SET_NAME
}  // namespace plain

#ifdef X86_SETS

// Functions defined from here on may use AVX2; intrinsics apart, the compiler takes it from the vectors' width.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
namespace avx2 {
#define VECTOR_BYTES 32
#define INSTRUCTION_SET_NAME "avx2"
#include "instruction_set.h"
#undef VECTOR_BYTES
#undef INSTRUCTION_SET_NAME
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi2"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,bmi2")
#endif
namespace avx512 {
#define VECTOR_BYTES 64
#define INSTRUCTION_SET_NAME "avx512"
#include "instruction_set.h"
#undef VECTOR_BYTES
#undef INSTRUCTION_SET_NAME
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // X86_SETS

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
