#if defined(__x86_64__)
#include "skinny.h"

#include "../common/target_avx2.h"

#include "../common/simd_avx2.h"

#include "skinny_impl.h"

namespace lorasp::avx2 {
const Kernels kKernels[3] = {make_kernels<Wide<float>>(), make_kernels<Wide<bf16>>(), make_kernels<Wide<f16>>()};
}
#include "../common/target_end.h"
#endif
