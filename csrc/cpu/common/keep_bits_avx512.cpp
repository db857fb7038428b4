#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "dtype.h"
#include "keep_bits.h"

// Nothing from another header may be instantiated below: a shared inline function compiled for this target could be
// linked into code that runs on any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define LORASP_ISA avx512
#define LORASP_AVX512
#include "keep_bits_impl.h"

namespace lorasp::avx512 {
const KeepBits kKeepBits = keep_bits;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
