// What follows the include of this header, up to target_end.h, is compiled for AVX2 (with FMA and F16C, as isa.cpp asks
// of the CPU), whatever the rest of the program is compiled for.
//
// Headers from elsewhere belong before it: a shared inline function compiled for this target could be linked into code
// that runs on any CPU.
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LORASP_ISA avx2
#define LORASP_AVX2
