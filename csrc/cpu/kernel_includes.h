// The headers that the kernels need. kernels_*.cpp include them before they enable an instruction set: otherwise inline
// functions of the standard library would be compiled for it, and the linker might pick those for the whole library.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>

#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define X86_SETS 1
#include <immintrin.h>
#endif
