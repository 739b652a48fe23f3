// The kernels for x86 processors with AVX2.
#include "kernel_includes.h"

#ifdef X86_SETS

// The kernels use vector types, from whose width the compiler chooses the instructions, and few intrinsics.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
namespace fastnorm::cpu::avx2 {
#define VECTOR_BYTES 32
#define INSTRUCTION_SET_NAME "avx2"
#include "instruction_set.h"
}  // namespace fastnorm::cpu::avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // X86_SETS
