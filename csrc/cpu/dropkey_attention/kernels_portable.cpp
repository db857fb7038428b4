#include <cstring>

#include "kernels.h"

#define LORASP_ISA portable
#include "../common/simd_portable.h"

#include "../common/simd_exp.h"
#include "kernels_impl.h"

namespace lorasp::portable {
const AttentionKernels kAttention[3] = {make_attention<Single<float>>(), make_attention<Single<bf16>>(),
                                        make_attention<Single<f16>>()};
}
