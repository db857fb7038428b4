#if defined(__x86_64__)
#include "skinny.h"

#include "../common/target_avx512_bf16.h"

#include "../common/simd_avx512.h"

#include "skinny_impl.h"
#include "dot_bf16.h"

namespace lorasp::avx512_bf16 {
const Kernels kKernels[3] = {make_kernels<Wide<float>>(), make_kernels<Paired>(), make_kernels<Wide<f16>>()};
}
#include "../common/target_end.h"
#endif
