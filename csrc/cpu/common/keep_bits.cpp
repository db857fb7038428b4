#include "keep_bits.h"

#include "isa.h"

namespace lorasp {

KeepBits keep_bits_kernel() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx512) return avx512::kKeepBits;
  if (active_isa() == Isa::kAvx2) return avx2::kKeepBits;
#endif
  return portable::kKeepBits;
}

}  // namespace lorasp
