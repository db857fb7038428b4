// Rows of keep bits (../../philox.h) by the instruction set in use: the same bits from each.
#pragma once
#include <cstdint>

#include "../../philox.h"

namespace lorasp {

// Bits of elements start ... start + count - 1; bits past count in the last word are unspecified.
using KeepBits = void (*)(const KeepMask& mask, int64_t start, int64_t count, uint32_t* out);

KeepBits keep_bits_kernel();

namespace portable {
extern const KeepBits kKeepBits;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KeepBits kKeepBits;
}
namespace avx512 {
extern const KeepBits kKeepBits;
}
#endif

}  // namespace lorasp
