#include <cstring>

#include "dtype.h"
#include "keep_bits.h"

#define LORASP_ISA portable
#include "keep_bits_impl.h"

namespace lorasp::portable {
const KeepBits kKeepBits = keep_bits;
}
