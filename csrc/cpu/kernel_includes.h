// What the kernels of every instruction set need; included before the compiler may use one, which it could otherwise do
// in functions of the standard library that the linker then takes for all.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define X86_SETS 1
#include <immintrin.h>
#endif
