#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "rows.h"

// Nothing from another header may be instantiated below: a shared inline function compiled for this target could be
// linked into code that runs on any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#endif
#define LORASP_ISA avx512_bf16
#define LORASP_AVX512
#define LORASP_AVX512_BF16
#include "../common/simd_avx512.h"

#include "../common/simd_exp.h"

#include "simd_softmax.h"

#include "rows_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
