#if defined(__x86_64__)
#include "kernels.h"

#include "../common/target_avx512.h"

#include "../common/simd_avx512.h"

#include "../common/simd_exp.h"
#include "../common/transpose16.h"
#include "kernels_impl.h"

namespace lorasp::avx512 {
const AttentionKernels kAttention[3] = {make_attention<Single<float>>(), make_attention<Single<bf16>>(),
                                        make_attention<Single<f16>>()};
}
#include "../common/target_end.h"
#endif
