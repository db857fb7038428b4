// bf16 only: the other dtypes use the AVX-512 kernels.
#if defined(__x86_64__)
#include "kernels.h"

#include "../common/target_avx512_bf16.h"

#include "../common/simd_avx512.h"

#include "../common/simd_exp.h"
#include "../common/transpose16.h"
#include "kernels_impl.h"

namespace lorasp::avx512_bf16 {
const AttentionKernels kAttention[1] = {make_attention<PairedDots>()};
}
#include "../common/target_end.h"
#endif
