#include <cstring>

#include "skinny.h"

#define LORASP_ISA portable
#include "../common/simd_portable.h"

#include "skinny_impl.h"

namespace lorasp::portable {
const Kernels kKernels[3] = {make_kernels<Wide<float>>(), make_kernels<Wide<bf16>>(), make_kernels<Wide<f16>>()};
}
