// As target_avx2.h, for AVX-512 with its bf16 products. The namespace is LORASP_ISA's where that is defined before: AMX
// needs no target of its own where its instructions are written out, as in amx_tiles.h.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#endif
#ifndef LORASP_ISA
#define LORASP_ISA avx512_bf16
#endif
#define LORASP_AVX512
#define LORASP_AVX512_BF16
