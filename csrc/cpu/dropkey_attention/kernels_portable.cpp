#include <cstring>

#include "dropkey_attention.h"

#define LORASP_ISA portable
#include "simd_portable.h"

#include "simd_exp.h"
#include "dropkey_attention_engines.h"
#include "dropkey_attention_impl.h"

namespace lorasp::portable {
const AttentionKernels kAttention[3] = {make_attention<Single<float>>(), make_attention<Single<bf16>>(),
                                        make_attention<Single<f16>>()};
}
