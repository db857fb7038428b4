#if defined(__x86_64__)
#include "kernels.h"

#include "../common/target_avx2.h"

#include "../common/simd_avx2.h"

#include "../common/simd_exp.h"
#include "kernels_impl.h"

namespace lorasp::avx2 {
const AttentionKernels kAttention[3] = {make_attention<Single<float>>(), make_attention<Single<bf16>>(),
                                        make_attention<Single<f16>>()};
}
#include "../common/target_end.h"
#endif
