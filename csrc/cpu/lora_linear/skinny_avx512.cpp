#if defined(__x86_64__)
#include "skinny.h"

#include "../common/target_avx512.h"

#include "../common/simd_avx512.h"

#include "skinny_impl.h"

namespace lorasp::avx512 {
const Kernels kKernels[3] = {make_kernels<Wide<float>>(), make_kernels<Wide<bf16>>(), make_kernels<Wide<f16>>()};
}
#include "../common/target_end.h"
#endif
