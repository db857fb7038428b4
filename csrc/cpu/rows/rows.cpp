#include "rows.h"

#include "../common/isa.h"

namespace lorasp {

const RowKernels& row_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return avx2::kRowKernels;
    case Isa::kAvx512:
      return avx512::kRowKernels;
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
      return avx512_bf16::kRowKernels;
#endif
    default:
      return portable::kRowKernels;
  }
}

}  // namespace lorasp
