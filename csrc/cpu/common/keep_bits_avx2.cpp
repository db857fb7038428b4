#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "dtype.h"
#include "keep_bits.h"

// Nothing from another header may be instantiated below: a shared inline function compiled for this target could be
// linked into code that runs on any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define LORASP_ISA avx2
#define LORASP_AVX2
#include "keep_bits_impl.h"

namespace lorasp::avx2 {
const KeepBits kKeepBits = keep_bits;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
