// The kernels for x86 processors with AVX-512.
#include "kernel_includes.h"

#ifdef X86_SETS

// The kernels use vector types, from whose width the compiler chooses the instructions, and few intrinsics.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,bmi2")
#endif
namespace fastnorm::cpu::avx512 {
#define VECTOR_BYTES 64
#define INSTRUCTION_SET_NAME "avx512"
#include "instruction_set.h"
}  // namespace fastnorm::cpu::avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // X86_SETS
