#include "kernels.h"

#include "../common/isa.h"

namespace lorasp {

const AttentionKernels& attention_kernels(DType dtype) {
  const int index = static_cast<int>(dtype);
#if defined(__x86_64__)
  switch (active_isa()) {
#if defined(__linux__)
    case Isa::kAmx:
      return dtype == DType::kBF16 ? amx::kAttention[0] : avx512::kAttention[index];
#endif
    case Isa::kAvx512Bf16:
      return dtype == DType::kBF16 ? avx512_bf16::kAttention[0] : avx512::kAttention[index];
    case Isa::kAvx512:
      return avx512::kAttention[index];
    case Isa::kAvx2:
      return avx2::kAttention[index];
    default:
      break;
  }
#endif
  return portable::kAttention[index];
}

}  // namespace lorasp
