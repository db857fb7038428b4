#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "rows.h"

// Nothing from another header may be instantiated below: a shared inline function compiled for this target could be
// linked into code that runs on any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LORASP_ISA avx2
#define LORASP_AVX2
#include "../common/simd_avx2.h"

#include "../common/simd_exp.h"

#include "simd_softmax.h"

#include "rows_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
