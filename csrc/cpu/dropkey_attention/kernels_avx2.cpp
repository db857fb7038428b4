#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

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
#include "kernels_impl.h"

namespace lorasp::avx2 {
const AttentionKernels kAttention[3] = {make_attention<Single<float>>(), make_attention<Single<bf16>>(),
                                        make_attention<Single<f16>>()};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
