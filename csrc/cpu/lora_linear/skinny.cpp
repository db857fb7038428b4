#include "skinny.h"

#include "../common/isa.h"

namespace lorasp {

const Kernels& kernels(DType dtype) {
  const int index = static_cast<int>(dtype);
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return avx2::kKernels[index];
    case Isa::kAvx512:
      return avx512::kKernels[index];
    case Isa::kAvx512Bf16:
      return avx512_bf16::kKernels[index];
#if defined(__linux__)
    case Isa::kAmx:
      return amx::kKernels[index];
#endif
#endif
    default:
      return portable::kKernels[index];
  }
}

}  // namespace lorasp
