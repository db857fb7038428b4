#if defined(__x86_64__)
#include "dtype.h"
#include "keep_bits.h"

#include "target_avx512.h"

#include "keep_bits_impl.h"

namespace lorasp::avx512 {
const KeepBits kKeepBits = keep_bits;
}
#include "target_end.h"
#endif
